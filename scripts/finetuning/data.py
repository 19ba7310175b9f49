"""Data for fine-tuning: splits read and checked, texts tokenized and cut to length, padded batches."""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from tokenizers import Encoding, processors
from transformers import PreTrainedTokenizerBase

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.tasks import Task

# Fewer rows than this are tokenized faster by one process.
ROWS_PER_WORKER = 20_000


def load_splits(task: Task, options: FinetuneOptions) -> dict[str, datasets.Dataset]:
    """The splits of a task with the columns that it needs, checked: train, those that are scored, test splits if any.

    Raises:
        ScriptError: data that cannot be read, no such split or column, an empty split, a label out of range, no text.
    """
    needed = ("train", *task.evaluation)
    if task.splits:
        return _sample(dict(task.splits), task, options)
    if options.dataset_path:
        source, found = _load_folder(Path(options.dataset_path), task)
    else:
        source = options.dataset_name or task.dataset
        config = task.config_name
        try:
            # a data set of the user's own may hold one task alone, and then has no configuration of its name
            if options.dataset_name and config not in datasets.get_dataset_config_names(source):
                config = None
            found = datasets.load_dataset(source, config)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ScriptError(
                f"{source} cannot be loaded for {task.name}: {reason}; name a local folder by --dataset_path"
            ) from error
    missing = [split for split in needed if split not in found]
    if missing:
        raise ScriptError(f"{source} has no split {missing[0]!r}, only {', '.join(found) or 'none'}")
    splits = {split: found[split] for split in (*needed, *task.tests) if split in found}
    for split, data in splits.items():
        labelled = split in needed
        _check(data, f"{source} ({split})", task, labelled)
        used = [*task.columns, "idx", *(["label"] if labelled else [])]
        splits[split] = data.select_columns([name for name in used if name in data.column_names])
    return _sample(splits, task, options)


def _sample(splits: dict[str, datasets.Dataset], task: Task, options: FinetuneOptions) -> dict[str, datasets.Dataset]:
    """The splits with so many rows to train on and to score as are wanted."""
    wanted = {"train": options.max_train_samples, **dict.fromkeys(task.evaluation, options.max_eval_samples)}
    for split, count in wanted.items():
        if count is not None:
            # at random, as IMDB's rows come sorted by label; the same whatever the seed of a run
            order = np.random.default_rng(0).permutation(len(splits[split]))
            splits[split] = splits[split].select(np.sort(order[:count]))
    return splits


def _load_folder(folder: Path, task: Task) -> tuple[str, dict[str, datasets.Dataset]]:
    """The files of a task in `folder`, or in the folder in it that has the task's name."""
    folder = folder / task.name if (folder / task.name).is_dir() else folder
    if not folder.is_dir():
        raise ScriptError(f"--dataset_path {folder}: there is no such folder")
    found = {}
    for split in ("train", *task.evaluation, *task.tests):
        files = [folder / f"{split}{ending}" for ending in corpus.READERS if (folder / f"{split}{ending}").exists()]
        if len(files) > 1:
            raise ScriptError(f"{files[0]} and {files[1].name}: which of the two? Leave one")
        for path in files:
            reader, settings = corpus.READERS[path.suffix]
            try:
                # by a name of its own: files of a folder need not have the same columns, as unlabelled tests have not
                found[split] = datasets.load_dataset(reader, data_files={split: str(path)}, split=split, **settings)
            except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                if "corresponds to no data" in str(error):
                    raise ScriptError(f"{folder} ({split}) is empty") from error
                raise ScriptError(f"{path} cannot be read: {error.__cause__ or error}") from error
    return str(folder), found


def _check(data: datasets.Dataset, source: str, task: Task, labelled: bool):
    needed = [*task.columns, "label"] if labelled else task.columns
    missing = [name for name in needed if name not in data.column_names]
    if missing:
        raise ScriptError(
            f"{source} has no column {missing[0]!r}, only {', '.join(data.column_names)}; {task.name} needs "
            f"{', '.join(needed)}"
        )
    if len(data) == 0:
        raise ScriptError(f"{source} is empty")
    for column in task.columns:
        row = next((row for row, text in enumerate(data[column]) if not isinstance(text, str)), None)
        if row is not None:
            raise ScriptError(f"{source}, row {row}: {column} is {data[row][column]!r}, not a text")
    if not labelled:
        return
    names = getattr(data.features["label"], "names", None)
    if names is not None and task.labels and tuple(names) != task.labels:
        raise ScriptError(f"{source} has the labels {', '.join(names)}; {task.name} has {', '.join(task.labels)}")
    labels = data["label"][:]
    # an entry that is no number makes text of a .csv file's whole column: it is looked at first
    odd = (
        row for row, label in enumerate(labels) if isinstance(label, str) and not label.replace(".", "", 1).isdigit()
    )
    for row in (next(odd, 0), *range(len(labels))):
        label = labels[row]
        number = isinstance(label, (int, float)) and math.isfinite(label)
        if task.regression and not (number and 0 <= label <= 5):
            raise ScriptError(f"{source}, row {row}: label {label!r} is no similarity from 0 to 5")
        if not task.regression and not (number and label in range(len(task.labels))):
            meaning = ", ".join(f"{i} {name}" for i, name in enumerate(task.labels))
            cure = "; -1 marks rows without a label" if label == -1 else ""
            raise ScriptError(f"{source}, row {row}: label {label!r} is none of {meaning}{cure}")


def load_fast_tokenizer(options) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, if it can cut and pad.

    Raises:
        ScriptError: no tokenizer, none of the fast kind, no token to pad with.
    """
    name = options.tokenizer_name or options.model_name_or_path
    tokenizer = corpus.load_tokenizer(name, options.trust_remote_code)
    if not tokenizer.is_fast:
        raise ScriptError(f"the tokenizer {name} is not one of the tokenizers library, which cutting texts needs")
    if options.pad_token is not None:
        if options.pad_token not in tokenizer.get_vocab():
            raise ScriptError(f"--pad_token {options.pad_token} is no token of {name}: name one of its vocabulary")
        tokenizer.pad_token = options.pad_token
    if tokenizer.pad_token_id is None:
        end = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
        raise ScriptError(
            f"the tokenizer {name} has no pad token, which batches need: name one of its tokens by --pad_token"
            + (f" '{end}'" if end else "")
        )
    return tokenizer


def prepare_tokenizer(options: FinetuneOptions) -> PreTrainedTokenizerBase:
    """The tokenizer, fit for classification: it pads, and it closes and separates texts.

    A tokenizer that adds no special token at all, as those of causal models do, would join the texts of a pair without
    a trace. It gets a template with its end-of-text token around and between the texts, which it is saved with.

    Raises:
        ScriptError: as `load_fast_tokenizer`.
    """
    tokenizer = load_fast_tokenizer(options)
    if tokenizer.num_special_tokens_to_add(pair=True) == 0:
        end = tokenizer.convert_ids_to_tokens(corpus.end_of_document(tokenizer))
        template = processors.TemplateProcessing(
            single=f"{end} $A {end}",
            pair=f"{end} $A {end} $B:1 {end}:1",
            special_tokens=[(end, corpus.end_of_document(tokenizer))],
        )
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def kept_positions(segments: np.ndarray, max_length: int, truncation: str) -> np.ndarray:
    """Which tokens of an example that is too long stay.

    The longer text of a pair gives first. `head_tail` keeps a quarter from the head and the rest from the tail, as the
    best of Sun et al. 2019 (arXiv 1905.05583, section 5.3.1) does.

    Args:
        segments: (tokens,) 0 and 1 for the tokens of the first and second text, -1 for special tokens, which all stay.
    Returns:
        indices, in order.
    """
    special = np.flatnonzero(segments < 0)
    texts = [np.flatnonzero(segments == segment) for segment in (0, 1)]
    room = max(max_length - len(special), 0)
    shorter = min(len(texts[0]), len(texts[1]), room // 2)
    sizes = [room - shorter, shorter] if len(texts[0]) >= len(texts[1]) else [shorter, room - shorter]
    kept = [special]
    for text, size in zip(texts, sizes):
        size = min(size, len(text))
        head = {"head": size, "tail": 0, "head_tail": size // 4}[truncation]
        kept += [text[:head], text[len(text) - (size - head) :]]
    return np.sort(np.concatenate(kept))


@dataclass
class Encoder:
    """Tokenizes a batch of rows and cuts each to `max_length` tokens; `datasets.Dataset.map` calls it."""

    tokenizer: PreTrainedTokenizerBase
    columns: tuple[str, ...]
    max_length: int
    truncation: str

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        return self.cut(self.tokenizer(*(list(rows[column]) for column in self.columns), verbose=False).encodings)[0]

    def cut(self, encodings: list[Encoding]) -> tuple[dict[str, list], list[np.ndarray | None]]:
        """The rows, and of each the positions that are kept, or None for all."""
        ids, types, cut, places = [], [], [], []
        for encoding in encodings:
            tokens, kinds, kept = encoding.ids, encoding.type_ids, None
            cut.append(len(tokens) > self.max_length)
            if cut[-1]:
                segments = np.array([-1 if segment is None else segment for segment in encoding.sequence_ids])
                kept = kept_positions(segments, self.max_length, self.truncation)
                tokens, kinds = np.array(tokens)[kept], np.array(kinds)[kept]
            places.append(kept)
            ids.append(np.asarray(tokens, dtype=np.int32))
            types.append(np.asarray(kinds, dtype=np.int8))
        return {"input_ids": ids, "token_type_ids": types, "cut": cut}, places


def encode(
    data: datasets.Dataset, encoder: Encoder, workers: int | None, gold: bool = False, windows: bool = False
) -> "Examples":
    """Tokenize a split, in parallel where it is large; `datasets` keeps the outcome for the next run.

    Args:
        gold: labels are scored as they were before they were tokenized.
        windows: the encoder makes several examples of a row.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or min(cores, len(data) // ROWS_PER_WORKER)
    encoded = data.map(
        encoder,
        batched=True,
        num_proc=workers if workers > 1 else None,
        remove_columns=data.column_names if windows else list(encoder.columns),
        desc="tokenizing",
    )
    examples = Examples.of(encoded)
    if gold:
        examples.gold, examples.rows = data["label"][:], np.arange(len(examples))
    if windows:
        numbers = {number: row for row, number in enumerate(data["idx"])}
        examples.contexts = data[encoder.columns[1]][:]
        examples.rows = np.array([numbers[number] for number in examples.numbers.tolist()])
    return examples


FLAT = ("word_labels", "places")  # columns with a list a row, of which one array is made


def _labels(column: pa.ChunkedArray) -> np.ndarray:
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    return np.array(column.to_pylist(), dtype=np.float32) if lists else column.to_numpy()


@dataclass
class Examples:
    """Tokenized rows in memory.

    Args:
        ids, types: token ids and token type ids of all rows, one after the other.
        starts: (n + 1,) where each row begins.
        labels: (n,) label numbers or similarities, or (n, labels) 0 and 1; None for a test split.
        numbers: (n,) the rows' own numbers, which predictions are submitted under.
        cut: how many rows were longer than the model takes.
        word_labels: of each token the label of the word that it begins, or -100; None where rows are labelled.
        places: by token, where in the row's text it lies: see the encoders of `structured`.
        gold, contexts: labels and contexts of the rows before they were tokenized, and `rows` (n,) the one of each.
    """

    ids: np.ndarray
    types: np.ndarray
    starts: np.ndarray
    labels: np.ndarray | None
    numbers: np.ndarray
    cut: int
    word_labels: np.ndarray | None = None
    places: np.ndarray | None = None
    rows: np.ndarray | None = None
    gold: list | None = None
    contexts: list[str] | None = None

    @classmethod
    def of(cls, encoded: datasets.Dataset) -> "Examples":
        table = encoded.with_format("arrow")[:]
        rows = table["input_ids"].combine_chunks()
        types = table["token_type_ids"].combine_chunks()
        flat = {name: table[name].combine_chunks().flatten().to_numpy() for name in FLAT if name in table.column_names}
        if "word_labels" in flat:
            table = table.drop_columns("label")
        return cls(
            ids=rows.flatten().to_numpy(),
            types=types.flatten().to_numpy(),
            starts=np.concatenate([[0], np.cumsum(rows.value_lengths().to_numpy())]),
            labels=_labels(table["label"]) if "label" in table.column_names else None,
            numbers=table["idx"].to_numpy() if "idx" in table.column_names else np.arange(len(rows)),
            cut=int(np.sum(table["cut"].to_numpy())),
            **flat,
        )

    @classmethod
    def of_lists(cls, encoded: dict[str, list]) -> "Examples":
        """Of what an `Encoder` gives for rows without labels."""
        ids = encoded["input_ids"]
        return cls(
            ids=np.concatenate(ids),
            types=np.concatenate(encoded["token_type_ids"]),
            starts=np.concatenate([[0], np.cumsum([len(row) for row in ids])]),
            labels=None,
            numbers=np.arange(len(ids)),
            cut=sum(encoded["cut"]),
            places=np.concatenate(encoded["places"]) if "places" in encoded else None,
            rows=np.array(encoded["idx"]) if "idx" in encoded else None,
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def label_counts(self) -> np.ndarray:
        """(n,) how many labels each row has in a mean loss: one, or one for each word."""
        if self.word_labels is None:
            return np.ones(len(self), dtype=np.int64)
        return np.add.reduceat((self.word_labels >= 0).astype(np.int64), self.starts[:-1])

    def digest(self) -> str:
        """Of all that is learned from them or told of them."""
        digest = hashlib.sha256()
        for array in (self.ids, self.types, self.starts, self.labels, self.numbers, self.word_labels):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def subset(self, rows: np.ndarray) -> "Examples":
        """Some of the rows; `cut` still counts all."""
        places = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        flat = np.concatenate(places)
        starts = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        part = Examples(self.ids[flat], self.types[flat], starts, None, self.numbers[rows], self.cut)
        part.labels = None if self.labels is None else self.labels[rows]
        part.word_labels = None if self.word_labels is None else self.word_labels[flat]
        if self.places is not None:
            part.places = self.places.reshape(len(self.ids), -1)[flat].ravel()
        part.rows, part.gold, part.contexts = None if self.rows is None else self.rows[rows], self.gold, self.contexts
        return part


@dataclass
class Batches:
    """Pads rows to the longest of them and makes them tensors."""

    tokenizer: PreTrainedTokenizerBase
    numeric: bool  # labels are quantities, or 0 and 1 for each label
    names: set[str]  # what the model's forward takes
    multiple: int = 1  # lengths are rounded up to it

    def __call__(self, examples: Examples, rows: np.ndarray, packed: bool = False) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, token_type_ids if model and tokenizer have them, all (rows, longest); labels.

        Args:
            packed: all rows side by side in one, (1, tokens), with `position_ids` that start again in place of a mask.
        """
        if packed:
            return self._packed(examples, rows)
        lengths = examples.lengths[rows]
        longest = -(-int(lengths.max()) // self.multiple) * self.multiple
        places = np.arange(longest) - (longest - lengths[:, None]) * (self.tokenizer.padding_side == "left")
        real = (places >= 0) & (places < lengths[:, None])
        flat = (examples.starts[rows][:, None] + places)[real]
        ids = np.full(real.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        ids[real] = examples.ids[flat]
        batch = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
        # GPT-2's forward takes types and its tokenizer gives none: the saved model would be used without them
        if "token_type_ids" in self.names and "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = np.full(real.shape, self.tokenizer.pad_token_type_id, dtype=np.int64)
            batch["token_type_ids"][real] = examples.types[flat]
        if examples.word_labels is not None:
            batch["labels"] = np.full(real.shape, -100, dtype=np.int64)
            batch["labels"][real] = examples.word_labels[flat]
        elif examples.places is not None and examples.labels is not None:  # first and last token of an answer
            before = (longest - lengths) * (self.tokenizer.padding_side == "left")
            ends = examples.labels[rows].astype(np.int64) + before[:, None]
            batch |= {"start_positions": ends[:, 0], "end_positions": ends[:, 1]}
        elif examples.labels is not None:
            batch["labels"] = examples.labels[rows].astype(np.float32 if self.numeric else np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _packed(self, examples: Examples, rows: np.ndarray) -> dict[str, torch.Tensor]:
        places = [np.arange(examples.starts[row], examples.starts[row + 1]) for row in rows]
        flat, positions = np.concatenate(places), np.concatenate([np.arange(len(place)) for place in places])
        batch = {"input_ids": examples.ids[flat][None].astype(np.int64), "position_ids": positions[None]}
        if "token_type_ids" in self.names and "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = examples.types[flat][None].astype(np.int64)
        if examples.word_labels is not None:
            batch["labels"] = examples.word_labels[flat][None].astype(np.int64)
        else:
            batch["labels"] = examples.labels[rows].astype(np.float32 if self.numeric else np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}
