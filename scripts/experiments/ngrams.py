"""What counting words gives: the perplexity of interpolated Kneser-Ney n-grams on the tokens that models train on.

Kneser and Ney 1995, interpolated as in Chen and Goodman 1998 (TR-10-98), with one discount an order. nltk.lm has the
same model and takes milliseconds a token; the tests hold this one against it.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.tables import summarise
from ordnung.scripts.experiments.compare_data import check_pretrain, prepare_data
from ordnung.scripts.pretraining.data import held_out_blocks, training_blocks
from ordnung.scripts.pretraining.options import PretrainOptions

NAMES = {2: "bigram", 3: "trigram", 5: "5-gram"}  # by how many tokens one has


class _Order:
    """The n-grams of one order: `keys` (rising) are numbers to base V, `counts` what each counts for."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocab_size: int, discount: float | None):
        self.keys, self.counts, self.vocab_size = keys, counts, vocab_size
        self.contexts, inverse = np.unique(keys // vocab_size, return_inverse=True)
        self.totals, self.types = np.bincount(inverse, counts), np.bincount(inverse)
        if discount is None:  # Ney's estimate; a half where nothing occurs once, so that nothing is held impossible
            once, twice = (int((counts == times).sum()) for times in (1, 2))
            discount = once / (once + 2 * twice) if once else 0.5
        self.discount = discount

    def interpolate(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of the last token of each key; `lower` are those from a context that is one token shorter."""
        context, counts = self._find(self.contexts, keys // self.vocab_size), np.append(self.counts, 0)
        own = counts[self._find(self.keys, keys)]
        known = context < len(self.contexts)
        totals, types = np.append(self.totals, 1)[context], np.append(self.types, 0)[context]
        mixed = (np.maximum(own - self.discount, 0) + self.discount * types * lower) / totals
        return np.where(known, mixed, lower)

    @staticmethod
    def _find(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Where each number stands in a rising table; the length of the table where it does not."""
        places = np.searchsorted(table, wanted)
        return np.where(np.append(table, -1)[places] == wanted, places, len(table))


class KneserNey:
    """Interpolated Kneser-Ney n-grams.

    The highest order counts how often an n-gram occurs, the lower ones how many different tokens stand before it; below
    single tokens all are equally likely.

    Args:
        blocks: (n, N) token ids; no n-gram spans two blocks.
        discounts: one an order, from single tokens on; by default estimated from the counts.
    """

    def __init__(self, blocks: np.ndarray, vocab_size: int, order: int = 3, discounts: list[float] | None = None):
        self.vocab_size, self.orders = vocab_size, []
        for n in range(1, order + 1):
            if n == order:
                keys, counts = np.unique(self._keys(blocks, n), return_counts=True)
            else:
                longer = np.unique(self._keys(blocks, n + 1))
                keys, counts = np.unique(longer % vocab_size**n, return_counts=True)
            self.orders.append(_Order(keys, counts, vocab_size, discounts[n - 1] if discounts else None))

    def _keys(self, blocks: np.ndarray, n: int) -> np.ndarray:
        """(blocks, N - n + 1): each n-gram as a number to base V."""
        width = blocks.shape[1] - n + 1
        keys = np.zeros((len(blocks), width), dtype=np.int64)
        for i in range(n):
            keys = keys * self.vocab_size + blocks[:, i : i + width]
        return keys

    def losses(self, blocks: np.ndarray) -> np.ndarray:
        """(n, N - 1) nats: entry i is the loss of token i + 1 of a block, from what the block holds before it."""
        chances = self.orders[0].interpolate(self._keys(blocks, 1), np.full(blocks.shape, 1 / self.vocab_size))[:, 1:]
        for n, order in enumerate(self.orders[1:], start=2):
            chances[:, n - 2 :] = order.interpolate(self._keys(blocks, n), chances[:, n - 2 :])
        return -np.log(chances)


def ngram_lines(shared: PretrainOptions, data: dict[str, str], seeds: list[int]) -> dict[str, Any]:
    """Perplexity on the held-out blocks after counting what a run of pretrain.py trains on.

    A block that a run sees in several epochs counts once.

    Args:
        data: the options that `prepare_data` gives.
    Returns:
        by name of the n-gram, the perplexity with each seed's blocks, summed up; `training_tokens`, those counted. No
        n-grams so long that a vocabulary has more of them than a 64-bit number tells.
    """
    tokenizer = AutoTokenizer.from_pretrained(data["tokenizer_name"])
    train, held_out = (
        corpus.load_files([data[name]], name, "text", streaming=False) for name in ("train_file", "validation_file")
    )
    blocks = held_out_blocks(shared, held_out, tokenizer).blocks
    names = {order: name for order, name in NAMES.items() if len(tokenizer) ** order < 2**63}
    values, tokens = {name: [] for name in names.values()}, []
    for seed in seeds:
        source = training_blocks(replace(shared, seed=seed), train, tokenizer)
        rows = shared.step_rows(processes=1)
        wanted = rows * (shared.max_steps or int(np.ceil(shared.num_train_epochs * len(source) / rows)))
        seen = np.unique(source.take(min(wanted, len(source)))[0], axis=0)
        tokens.append(seen.size)
        for order, name in names.items():
            losses = KneserNey(seen, len(tokenizer), order).losses(blocks)
            values[name].append(float(np.exp(losses.mean())))
    return {"training_tokens": tokens, **{name: summarise(numbers) for name, numbers in values.items()}}


def run(options) -> int:
    """Compute the lines of a results file of compare.py or transfer.py and write them; returns the exit status."""
    results = read_json(Path(options.results))
    if not results["settings"].get("pretrain"):
        raise ScriptError(f"--results {options.results} holds models that were not pretrained there: name another file")
    pretrain = {**results["settings"]["pretrain"], **(options.pretrain or {})}
    with TemporaryDirectory() as folder:
        shared = check_pretrain(pretrain)
        data = prepare_data(Path(folder), shared)
        lines = ngram_lines(shared, data, options.seeds or results["seeds"])
    value = {"machine": machine_info(), "settings": {"results": Path(options.results).name, "pretrain": pretrain}}
    write_json(options.output_file, {**value, "seeds": options.seeds or results["seeds"], "ngrams": lines})
    print(", ".join(f"{name} {lines[name]['mean']:.1f}" for name in NAMES.values() if name in lines))
    return 0
