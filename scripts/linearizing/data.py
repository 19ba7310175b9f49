"""The text of a linearization: rows of tokens to train and to measure on."""

import dataclasses
import math

import datasets
import numpy as np
import torch

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.rows import load_rows
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.pretraining import data as pretraining
from ordnung.scripts.pretraining import perplexity
from ordnung.scripts.pretraining.blocks import BatchMaker, PlacedBlocks, ShuffledBlocks


def real_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, N), True for tokens that are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0


def documents_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, N), the number of each token's document in the batch; -1 at padding."""
    real = real_tokens(batch)
    begins = torch.zeros_like(real)
    begins[:, 0] = True
    if "position_ids" in batch:
        begins |= batch["position_ids"] == 0
    number = (begins & real).flatten().long().cumsum(0).view_as(begins) - 1
    return number.masked_fill(~real, -1)


def mean_states(states: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """(documents, D), each document's mean state; `documents` (B, N) as `documents_of` numbers them."""
    real = documents.flatten() >= 0
    number = documents.flatten()[real]
    sums = states.new_zeros(int(number.max()) + 1, states.shape[-1]).float()
    sums = sums.index_add(0, number, states.flatten(0, 1)[real].float())
    return sums / number.bincount()[:, None]


# What is said of a text without documents: which one, and where more is given.
TRAINED = "the training data", "give more by --train_file"
HELD_OUT = "the held-out text", "give more by --validation_file or --validation_fraction"


def encoder_blocks(documents, tokenizer, block_size: int, several: bool, told: tuple[str, str]) -> PlacedBlocks:
    """Blocks of an encoder's documents: each with its special tokens, cut off at `block_size`.

    Args:
        told: `TRAINED` or `HELD_OUT`.
    Raises:
        ScriptError: no text.
    """
    arrays, sizes = pretraining.placed(pretraining.encode(documents, tokenizer, block_size))
    if not len(sizes):
        raise ScriptError(f"{told[0]} holds {len(documents):,} documents, none of two tokens or more: {told[1]}")
    return PlacedBlocks(arrays, sizes, block_size, True, several)


def load_blocks(
    options: LinearizeOptions, tokenizer, encoder: bool, several: bool
) -> tuple[ShuffledBlocks, np.ndarray, np.ndarray]:
    """The training blocks, and the held-out ones (n, eval_block_size) with their lengths (n,).

    Args:
        several: a block may hold several documents, where they are kept apart.
    Raises:
        ScriptError: as `pretraining.data`; a text of less than a block.
    """
    train, held_out = pretraining.load_documents(options)
    if held_out is None:
        raise ScriptError("there is no held-out text: give --validation_file or --validation_fraction")
    if not encoder:
        blocks = pretraining.training_blocks(options, train, tokenizer, several)
        measured = dataclasses.replace(options, block_size=options.eval_block_size)
        rest = pretraining.held_out_blocks(measured, held_out, tokenizer, several)
        return blocks, rest.blocks, rest.lengths
    placed = encoder_blocks(train, tokenizer, options.block_size, several, TRAINED)
    rest = encoder_blocks(held_out, tokenizer, options.eval_block_size, several, HELD_OUT)
    # at random, as best fit puts the longest documents first
    some = np.random.default_rng(options.seed).permutation(len(rest))[: options.max_eval_blocks]
    return ShuffledBlocks(placed, placed.lengths, options.seed), rest[some], rest.lengths[some]


class Text:
    """What is trained on and measured on.

    Args:
        encoder, several: as `load_blocks` takes them.
        device: where batches go.
    """

    def __init__(self, options: LinearizeOptions, tokenizer, encoder: bool, several: bool, device: torch.device):
        self.tokenizer, self.device, self.options = tokenizer, device, options
        self.separate = options.respect_document_boundaries or encoder
        # the texts of encoders stay whole, or are masked; labels of a causal model are its tokens
        share = options.mlm_probability if encoder else 0
        objective = "masked" if share else "causal"
        self.make_batch = BatchMaker(objective, tokenizer, self.separate, share, options.seed)
        self.blocks, rows, lengths = load_blocks(options, tokenizer, encoder, several and self.separate)
        size = options.per_device_eval_batch_size
        self.held_out = [self.batch(rows[i : i + size], lengths[i : i + size], i) for i in range(0, len(rows), size)]
        self.held_out_tokens = np.concatenate([row[:length] for row, length in zip(rows, lengths)])
        self.held_out_tokens = np.where(self.held_out_tokens < 0, ~self.held_out_tokens, self.held_out_tokens)

    def rows(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The training blocks from number `position` on, their lengths, and that number."""
        self.blocks.load_state_dict({"position": position})
        return *self.blocks.take(count), position

    def first_rows(self, tokens: int) -> list[dict[str, torch.Tensor]]:
        """Batches of the first training blocks, of so many tokens; the same on every process."""
        size, count = self.options.per_device_eval_batch_size, math.ceil(tokens / self.options.block_size)
        return [self.batch(*self.rows(start, min(size, count - start))) for start in range(0, count, size)]

    def batch(self, rows: np.ndarray, lengths: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        if self.separate:
            rows = rows[:, : max(int(lengths.max()), 2)]
        return {name: tensor.to(self.device) for name, tensor in self.make_batch(rows, lengths, first).items()}


def load_long_text(options: LinearizeOptions, tokenizer) -> np.ndarray:
    """The first `long_tokens` tokens of the long text, or all.

    Raises:
        ScriptError: as `corpus.load_files`.
    """
    documents = corpus.load_files(options.long_file, "long_file", options.text_columns, streaming=False)
    return perplexity.encode(documents, tokenizer, options.long_tokens)[0]


PAIR_COLUMNS = ("sentence1", "sentence2", "label")


def load_pairs(path: str) -> datasets.Dataset:
    """Pairs of texts: columns `PAIR_COLUMNS`.

    Raises:
        ScriptError: as `load_rows`, or other columns.
    """
    pairs = load_rows([path], "similarity_file")
    missing = set(PAIR_COLUMNS) - set(pairs.column_names)
    if missing:
        raise ScriptError(f"--similarity_file {path} has no column {min(missing)!r}, only {pairs.column_names}")
    return pairs
