"""Blocks of tokens: packing documents, an endless seeded order that can be resumed exactly, and batches."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError

IGNORED = -100


def pack(
    documents: Sequence[np.ndarray],
    block_size: int,
    separate: bool,
    carried: np.ndarray | None = None,
    several: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrange tokenized documents in blocks.

    Args:
        documents: token ids of each document.
        separate: let no token see another document: each is cut into blocks, and the rest of its last block is left
            empty; a rest of a single token, which has nothing to predict, is dropped. Otherwise documents follow one
            another.
        carried: tokens left over from the documents before.
        several: with `separate`, put several rests into a block, each where it leaves the least empty (best fit, the
            longest first). The first token of each but the first in its block is stored as its complement (~token).
    Returns:
        blocks (n, block_size) int32, filled up with 0; lengths (n,) int32, the tokens in each block; the tokens left
        over at the end, which did not fill a block (none if separate).
    """
    nothing = np.zeros(0, dtype=np.int32)
    if not separate:
        tokens = np.concatenate([nothing if carried is None else carried, *documents])
        count = len(tokens) // block_size
        lengths = np.full(count, block_size, dtype=np.int32)
        return tokens[: count * block_size].reshape(count, block_size), lengths, tokens[count * block_size :]
    blocks = PlacedBlocks(documents, np.array([len(doc) for doc in documents]), block_size, True, several)
    return blocks[np.arange(len(blocks))], blocks.lengths, nothing


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Bins of `size` that hold things of `lengths`, by their numbers: the longest first, each where it fits best."""
    bins, free, spaces = [], {}, []  # free: space left -> bins that have it; spaces: those that occur, rising
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, lengths[number])
        if at < len(spaces):
            space = spaces[at]
            chosen = free[space].pop()
            if not free[space]:
                del spaces[at], free[space]
        else:
            space, chosen = size, len(bins)
            bins.append([])
        bins[chosen].append(number)
        space -= lengths[number]
        if space and space not in free:
            insort(spaces, space)
            free[space] = []
        if space:
            free[space].append(chosen)
    return bins


class PlacedBlocks:
    """Blocks as `pack` describes them, read where the tokens lie: `blocks[rows]` is (rows, block_size).

    Args:
        arrays: the tokens of all documents, one after the other, in any number of arrays, as those of a mapped file.
        sizes: (documents,) the tokens in each.
    """

    def __init__(
        self, arrays: Sequence[np.ndarray], sizes: np.ndarray, block_size: int, separate: bool, several: bool = False
    ):
        self.arrays, self.block_size = arrays, block_size
        self.array_ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self.tokens = int(sizes.sum())
        if separate:
            counts = -(-sizes // block_size) - (sizes % block_size == 1)  # a rest of a single token is no part
            ends = np.repeat(np.cumsum(sizes), counts)
            places = np.arange(len(ends)) - np.repeat(np.cumsum(counts) - counts, counts)
            self.starts = ends - np.repeat(sizes, counts) + places * block_size
            sizes = np.minimum(ends - self.starts, block_size)
        else:
            self.starts = np.arange(self.tokens // block_size) * block_size
            sizes = np.full(len(self.starts), block_size)
        # block i holds the parts from first[i] to first[i + 1] of those in the order of the blocks
        rows = best_fit(sizes.tolist(), block_size) if several else []
        self.first = np.cumsum([0, *map(len, rows)]) if several else np.arange(len(sizes) + 1)
        order = np.array([part for row in rows for part in row], dtype=int) if several else slice(None)
        self.starts, self.sizes = self.starts[order], sizes[order]
        self.lengths = np.diff(np.cumsum([0, *self.sizes])[self.first]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        blocks = np.zeros((len(rows), self.block_size), dtype=np.int32)
        for block, row in zip(blocks, rows):
            end = 0
            for part in range(self.first[row], self.first[row + 1]):
                begin, end = end, end + self.sizes[part]
                self._read(self.starts[part], block[begin:end])
                if begin:
                    block[begin] = ~block[begin]
        return blocks

    def _read(self, start: int, out: np.ndarray):
        """Fill `out` with the tokens from `start` on."""
        array, done = int(np.searchsorted(self.array_ends, start, side="right")), 0
        while done < len(out):
            begin = start + done - (self.array_ends[array] - len(self.arrays[array]))
            piece = self.arrays[array][begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            array, done = array + 1, done + len(piece)


class ShuffledBlocks:
    """Blocks in a new random order each epoch. The order depends on the seed and the epoch alone."""

    def __init__(self, blocks: np.ndarray | PlacedBlocks, lengths: np.ndarray, seed: int):
        self.blocks, self.lengths, self.seed = blocks, lengths, seed
        self.position = 0  # blocks taken so far, over all epochs

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def epoch(self) -> float:
        return self.position / len(self.blocks)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` blocks (count, block_size) and their lengths (count,)."""
        rows = []
        while count:
            epoch, start = divmod(self.position, len(self.blocks))
            order = self._order(epoch)[start : start + count]
            rows.append(order)
            self.position += len(order)
            count -= len(order)
        rows = np.concatenate(rows)
        return self.blocks[rows], self.lengths[rows]

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached_epoch", None) != epoch:
            self._cached_epoch = epoch
            self._cached_order = np.random.default_rng((self.seed, epoch)).permutation(len(self.blocks))
        return self._cached_order

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict):
        self.position = state["position"]


class StreamedBlocks:
    """Blocks of a stream of documents, read in groups; the blocks of a group are shuffled among themselves.

    Each process reads the whole stream and uses its own blocks of each step, so that the order of blocks does not
    depend on the number of processes. The stream starts again at its end. The state holds where the group began and
    how many of its blocks were taken: resuming reads and tokenizes one group again and goes on with the very next
    block.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        separate: bool,
        seed: int,
        several: bool = False,
    ):
        self.stream, self.tokenizer = stream, tokenizer
        self.block_size, self.separate, self.several, self.seed = block_size, separate, several, seed
        self.position = 0  # blocks taken so far
        self.passes = 0  # times the stream was read to its end
        self._documents: Iterator[str] | None = None
        self._pass_begun = self._end_pass = False
        self._pass_blocks = 0
        self._group = 0
        self._group_start: dict | None = None
        self._carried = np.zeros(0, dtype=np.int32)
        self._blocks, self._lengths = np.zeros((0, block_size), dtype=np.int32), np.zeros(0, dtype=np.int32)
        self._taken = 0

    @property
    def epoch(self) -> float:
        return float(self.passes)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` blocks (count, block_size) and their lengths (count,)."""
        blocks, lengths = [], []
        while count:
            if self._taken == len(self._blocks):
                self._read_group()
            part = slice(self._taken, self._taken + count)
            blocks.append(self._blocks[part])
            lengths.append(self._lengths[part])
            self._taken += len(lengths[-1])
            self.position += len(lengths[-1])
            count -= len(lengths[-1])
        return np.concatenate(blocks), np.concatenate(lengths)

    def _read_group(self):
        self._group_start = {
            "stream": self.stream.state_dict() if self._pass_begun else None,
            "carried": self._carried.tolist(),
            "group": self._group,
            "passes": self.passes,
            "pass_blocks": self._pass_blocks,
        }
        if self._documents is None:
            self.stream.set_epoch(self.passes)
            self._documents = corpus.texts(self.stream)
        texts, characters = [], 0
        for text in self._documents:
            self._pass_begun = True
            texts.append(text)
            characters += len(texts[-1])
            if characters >= corpus.GROUP_CHARACTERS:
                break
        else:
            self._end_pass = True
        documents = [ids for ids, _ in corpus.tokenize(texts, self.tokenizer)]
        blocks, lengths, self._carried = pack(documents, self.block_size, self.separate, self._carried, self.several)
        order = np.random.default_rng((self.seed, self._group)).permutation(len(blocks))
        self._blocks, self._lengths, self._taken = blocks[order], lengths[order], 0
        self._group += 1
        self._pass_blocks += len(blocks)
        if self._end_pass:
            if self._pass_blocks == 0:
                raise ScriptError(f"the whole stream holds less text than one block of {self.block_size} tokens")
            self.passes += 1
            self._documents, self._pass_begun, self._end_pass, self._pass_blocks = None, False, False, 0

    def state_dict(self) -> dict:
        return {"position": self.position, "taken": self._taken, "group_start": self._group_start}

    def load_state_dict(self, state: dict):
        start = state["group_start"]
        self._carried = np.array(start["carried"], dtype=np.int32)
        self._group, self.passes, self._pass_blocks = start["group"], start["passes"], start["pass_blocks"]
        if start["stream"] is not None:
            self.stream.set_epoch(self.passes)
            self.stream.load_state_dict(start["stream"])
            self._documents, self._pass_begun = corpus.texts(self.stream), True
        self._read_group()
        self._taken, self.position = state["taken"], state["position"]


@dataclass
class BatchMaker:
    """Turns blocks into model inputs for one objective.

    Masking draws from a generator of each block's own, seeded by its place in the sequence of blocks: it is the same
    whatever the number of processes and the batch size, and after a resume.
    """

    objective: str
    tokenizer: PreTrainedTokenizerBase
    separate: bool
    mlm_probability: float
    seed: int

    def __post_init__(self):
        self._special = np.array(self.tokenizer.all_special_ids)
        if self.objective == "masked" and self.tokenizer.mask_token_id is None:
            raise ScriptError(
                f"the tokenizer {self.tokenizer.name_or_path} has no mask token; the masked objective needs one"
            )

    def __call__(self, blocks: np.ndarray, lengths: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        """Model inputs of blocks (b, block_size) with lengths (b,), the first of which has number `first`.

        Returns:
            input_ids and labels (b, block_size); attention_mask (b, block_size) where blocks can be padded; and
            position_ids (b, block_size), which start again with each document, where blocks hold several.
        """
        inputs = blocks.astype(np.int64)
        begins = inputs < 0
        inputs[begins] = ~inputs[begins]
        padding = np.arange(blocks.shape[1]) >= lengths[:, None]
        if self.tokenizer.pad_token_id is not None:
            inputs[padding] = self.tokenizer.pad_token_id
        labels = np.where(padding, IGNORED, inputs)
        if self.objective == "masked":
            for row in range(len(blocks)):
                self._mask(inputs[row], labels[row], lengths[row], np.random.default_rng((self.seed, first + row)))
        elif begins.any():
            labels[begins] = IGNORED  # nothing in its own document predicts it
        batch = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        if self.separate:
            batch["attention_mask"] = torch.from_numpy((~padding).astype(np.int64))
        if begins.any():
            places = np.arange(blocks.shape[1])
            starts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
            batch["position_ids"] = torch.from_numpy(places - starts)
        return batch

    def _mask(self, inputs: np.ndarray, labels: np.ndarray, length: int, random: np.random.Generator):
        """BERT's recipe: of the chosen tokens 80 % become the mask token, 10 % a random token, 10 % stay."""
        candidates = np.flatnonzero(~np.isin(inputs[:length], self._special))
        chosen = candidates[random.random(len(candidates)) < self.mlm_probability]
        if len(chosen) == 0:  # a block without a target has no loss
            chosen = random.choice(candidates if len(candidates) else np.arange(length), 1)
        keep = np.ones(len(labels), dtype=bool)
        keep[chosen] = False
        labels[keep] = IGNORED
        kind = random.random(len(chosen))
        inputs[chosen[kind < 0.8]] = self.tokenizer.mask_token_id
        replaced = chosen[(kind >= 0.8) & (kind < 0.9)]
        inputs[replaced] = random.integers(len(self.tokenizer), size=len(replaced))

    def targets(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of tokens that the loss of a batch is a mean over."""
        labels = batch["labels"][:, 1:] if self.objective == "causal" else batch["labels"]
        return int((labels != IGNORED).sum())
