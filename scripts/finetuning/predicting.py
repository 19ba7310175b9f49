"""Predictions for the rows of files: streamed in pieces, in batches of like lengths, resumed after a stop."""

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.special import expit, softmax
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.common.machine import how_to_go_on
from ordnung.scripts.common.models import best_run, check_folder
from ordnung.scripts.common.rows import load_rows
from ordnung.scripts.finetuning.data import Examples, load_fast_tokenizer
from ordnung.scripts.finetuning.inference import Runner
from ordnung.scripts.finetuning.labels import is_missing
from ordnung.scripts.finetuning.model import auto_class
from ordnung.scripts.finetuning.own import choose_texts
from ordnung.scripts.finetuning.structured import WORDS, best_answers, cells, encoder_of, tags_of
from ordnung.scripts.finetuning.tasks import THRESHOLD
from ordnung.scripts.hub.sharing import PEFT_HEADS
from ordnung.scripts.training.signals import StopSignals

logger = logging.getLogger("ordnung.predict")

# Rows are read, sorted by length, predicted and written in pieces of so many batches.
BATCHES_PER_PIECE = 32


LABELLERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def find_head(name: str, **code) -> tuple[PreTrainedConfig, str | None]:
    """The config of a checkpoint or of what an adapter adapts, and the head: an ending of the class's name, or None.

    Raises:
        OSError, ValueError: there is none.
    """
    adapter = Path(name) / "adapter_config.json"
    kind = read_json(adapter) if adapter.is_file() else {}
    config = AutoConfig.from_pretrained(kind.get("base_model_name_or_path") or name, **code)
    classes = config.architectures or [""]
    endings = (head for head in LABELLERS if classes[0].endswith(head))
    return config, PEFT_HEADS.get(kind.get("task_type")) or next(endings, None)


def load(name: str, trust_remote_code: bool = False, **kwargs) -> tuple[torch.nn.Module, str]:
    """A model that was fine-tuned to label, and its head.

    Args:
        kwargs: further ones of `from_pretrained`.
    Raises:
        ScriptError: there is no such checkpoint, or none that labels.
    """
    check_folder(name)
    code = {"trust_remote_code": trust_remote_code}
    try:
        config, head = find_head(name, **code)
        if head not in LABELLERS:
            raise ScriptError(f"{name} is a {(config.architectures or [config.model_type])[0]}: fine-tune it first")
        model, report = auto_class(head).from_pretrained(name, output_loading_info=True, **code, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ScriptError(f"no fine-tuned model can be loaded from {name}: {' '.join(str(error).split())}") from error
    if report["missing_keys"] and (Path(name) / "config.json").is_file():  # an adapter's base has no classifier
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ScriptError(f"{name} lacks weights, which would be random: {missing}; fine-tune it first")
    return model, head


class Writer:
    """Rows in a file that gets its name when it is whole; until then it can be gone on with.

    Args:
        made_of: what the rows depend on; a part that was made of something else is begun again.
    """

    def __init__(self, path: str, made_of: dict[str, Any]):
        self.path, self.made_of = Path(path), json.loads(json.dumps(made_of))
        self.part = self.path.with_name(f".{self.path.name}.part")
        self.state_file = self.part.with_suffix(".json")
        self.columns, self.rows, size = None, 0, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.part.exists() and self.state_file.exists():
            state = read_json(self.state_file)
            if state["made_of"] == self.made_of:
                self.columns, self.rows, size = state["columns"], state["rows"], state["bytes"]
                logger.info(f"{self.path}: going on after row {self.rows:,}")
            else:
                logger.warning(f"{self.path}: begun again, as model, file or options are not what they were")
        with open(self.part, "ab") as file:
            file.truncate(size)

    def write(self, rows: list[dict[str, Any]]):
        text = io.StringIO(newline="")
        if self.path.suffix == ".jsonl":
            text.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        else:
            delimiter = "\t" if self.path.suffix == ".tsv" else ","
            first, self.columns = self.columns is None, self.columns or list(rows[0])
            table = csv.DictWriter(text, self.columns, delimiter=delimiter, extrasaction="ignore", lineterminator="\n")
            if first:
                table.writeheader()
            table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        with open(self.part, "ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self.rows += len(rows)
        state = {"rows": self.rows, "bytes": size, "columns": self.columns, "made_of": self.made_of}
        write_json(self.state_file, state)

    def close(self):
        self.part.replace(self.path)
        self.state_file.unlink(missing_ok=True)


def _cell(value: Any) -> Any:
    """A value in a table: labels of a list are separated as fine-tuning reads them, what is nested is JSON."""
    if isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
        return ";".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def answers(logits: np.ndarray, config: PreTrainedConfig, top_k: int, threshold: float | None) -> Iterator[dict]:
    """What is predicted for each row of (n, labels) scores, by column."""
    several = config.problem_type == "multi_label_classification"
    if config.num_labels == 1 and not several:
        yield from ({"predicted_value": float(value)} for (value,) in logits)
        return
    shares = expit(logits) if several else softmax(logits.astype(np.float64), axis=1)
    names = [str(config.id2label.get(number, number)) for number in range(shares.shape[1])]
    order = np.argsort(-shares, axis=1, kind="stable")
    of_training = getattr(config, "label_threshold", THRESHOLD) if several else 0.0
    least = of_training if threshold is None else threshold
    for row, ranked in zip(shares, order):
        if several:
            chosen = [number for number in ranked if row[number] >= least][: top_k if top_k > 1 else None]
            yield {
                "predicted_labels": [names[number] for number in chosen],
                "predicted_probabilities": [round(float(row[number]), 6) for number in chosen],
            }
        else:
            made = {}
            for place, number in enumerate(ranked[:top_k], 1):
                ending = "" if place == 1 else f"_{place}"
                made[f"predicted_label{ending}"] = names[number] if row[number] >= least else None
                made[f"predicted_probability{ending}"] = round(float(row[number]), 6)
            yield made


class Predictor:
    """Columns of predictions for rows."""

    def __init__(
        self, options, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, head: str, columns: tuple[str, ...]
    ):
        self.options, self.columns, self.head, self.config = options, columns, head, model.config
        limit = tokenizer.model_max_length
        length = options.max_length or (limit if limit < limits.NO_LENGTH else limits.model_length(model, tokenizer))
        limits.check_length(model, length, "max_length")
        self.encoder = encoder_of(head)(tokenizer, columns, length, options.truncation)
        self.runner = Runner(model, tokenizer, options)
        self.cut = self.empty = 0
        # whatever the first rows are: a table's columns stay what they are there
        fixed = {"ForTokenClassification": "predicted_tags", "ForQuestionAnswering": "predicted_answer"}
        if head in fixed:
            self.names = [fixed[head]]
        else:
            scores = np.zeros((1, self.config.num_labels))
            self.names = list(next(answers(scores, self.config, options.top_k, options.threshold)))

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with their predictions; without one where there is no text."""
        full = [
            number
            for number, row in enumerate(rows)
            if not any(is_missing(row.get(name)) or row[name] == [] for name in self.columns)
        ]
        self.empty += len(rows) - len(full)
        made: list[dict] = [{} for _ in rows]
        if full:
            read = cells if self.head == "ForTokenClassification" else lambda value, _: str(value)
            texts = {name: [read(rows[number][name], name) for number in full] for name in self.columns}
            examples = Examples.of_lists(self.encoder(texts))
            self.cut += examples.cut
            for number, answer in zip(full, self._answers(examples, texts)):
                made[number] = answer
        return [{**row, **(answer or dict.fromkeys(self.names))} for row, answer in zip(rows, made)]

    def _answers(self, examples: Examples, texts: dict[str, list]) -> Iterator[dict[str, Any]]:
        logits = self.runner(examples)
        if self.head == "ForTokenClassification":
            tags = tags_of(logits, examples, list(map(len, texts[self.columns[0]])))
            yield from ({"predicted_tags": " ".join(str(self.config.id2label[tag]) for tag in some)} for some in tags)
        elif self.head == "ForQuestionAnswering":
            found = best_answers(logits, examples, texts[self.columns[1]], self.options.version_2_with_negative)
            yield from ({"predicted_answer": text} for text, _ in found)
        else:
            yield from answers(logits, self.config, self.options.top_k, self.options.threshold)


def columns_of(head: str, names: list[str], options) -> tuple[str, ...]:
    """The columns that a head reads, as named or guessed.

    Raises:
        ScriptError: as `choose_texts`.
    """
    known = {"ForTokenClassification": WORDS, "ForQuestionAnswering": ("question", "context")}.get(head, ())
    found = [name for name in known if name in names]
    if head == "ForTokenClassification":
        found = found[:1]
    return choose_texts(names, options.file[0], options.text_column or found)


def pieces(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    rows = iter(rows)
    while piece := list(islice(rows, size)):
        yield piece


def label(rows: datasets.IterableDataset, predictor: Predictor, writer: Writer, stop: Callable[[], Any] = bool):
    """Predict and write the rows that were not written yet, until `stop` says so after a piece."""
    size = predictor.options.per_device_eval_batch_size * BATCHES_PER_PIECE
    with tqdm(initial=writer.rows, unit="row", desc="predicting") as bar:
        for piece in pieces(rows.skip(writer.rows) if writer.rows else rows, size):
            writer.write(predictor(piece))
            bar.update(len(piece))
            if stop():
                return


def run(options) -> int:
    """Predict by predict.py's options; returns the exit status: 0, or 128 + the number of the signal that stopped it.

    Raises:
        ScriptError: model, file and options do not fit.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ordnung").setLevel(logging.INFO)
    if Path(options.output).exists() and not options.overwrite:
        raise ScriptError(f"--output {options.output} is there already: --overwrite replaces it, or name another")
    rows = load_rows(options.file, "file", streaming=True)
    options.model_name_or_path = best_run(options.model_name_or_path)
    model, head = load(options.model_name_or_path, options.trust_remote_code, dtype=getattr(torch, options.dtype))
    tokenizer = load_fast_tokenizer(options)
    names = rows.column_names or list(next(iter(rows)))
    taken = [name for name in names if name.startswith("predicted_")]
    if taken:
        raise ScriptError(f"--file {options.file[0]} has a column {taken[0]!r}, which predictions go to: rename it")
    predictor = Predictor(options, model, tokenizer, head, columns_of(head, names, options))
    logger.info(f"{options.model_name_or_path}; text: {' and '.join(predictor.columns)}")
    files = {name: [os.path.getsize(name), os.stat(name).st_mtime_ns] for name in options.file if Path(name).is_file()}
    weights = [
        [path.name, path.stat().st_mtime_ns] for path in sorted(Path(options.model_name_or_path).glob("*.safetensors"))
    ]
    writer = Writer(options.output, {**asdict(options), "overwrite": None, "files": files, "weights": weights})
    with StopSignals(False) as signals:
        label(rows, predictor, writer, lambda: signals.received)
        if signals.received:
            logger.warning(f"told to stop after row {writer.rows:,}; {how_to_go_on(False)}")
            return 128 + signals.received
    if not writer.rows:
        raise ScriptError(f"--file {', '.join(options.file)}: there is no row")
    writer.close()
    notes = [f"{predictor.cut:,} texts cut to {predictor.encoder.max_length} tokens"] if predictor.cut else []
    notes += [f"{predictor.empty:,} rows without text, and so without prediction"] if predictor.empty else []
    print(f"{options.output}: {writer.rows:,} rows" + "".join(f"; {note}" for note in notes))
    return 0
