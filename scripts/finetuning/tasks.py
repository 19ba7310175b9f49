"""What is fine-tuned on: the tasks that are known by name, GLUE's nine and IMDB, and what a user's own data make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ordnung.scripts.common.errors import ScriptError, closest

if TYPE_CHECKING:
    import datasets

# Problem type -> ending of the class name of the models for it.
HEADS = {
    "single_label_classification": "ForSequenceClassification",
    "multi_label_classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
# Probability from which on a label of a multi-label text is predicted, unless another is asked for.
THRESHOLD = 0.5


@dataclass(frozen=True)
class Task:
    """A task: its columns, its labels, and where its data and its results go.

    Args:
        name: also the name of its scores in `glue_metric.SCORES`.
        dataset: data set of the Hub, and `config_name` its configuration.
        columns: the text column, or the two of a pair.
        labels: names of the labels 0, 1, ...; empty for a regression.
        evaluation: the splits that are scored.
        tests: splits without labels, and the file name under which the GLUE server takes their predictions.
        submits_names: the server wants label names, not numbers.
        held_out: share of the training rows on which checkpoints are compared, where the scored splits are a test set.
        problem_type: a key of `HEADS`.
        splits: a user's own data, read and checked: columns, "label" and "idx", as `own.read_task` gives them.
        split_off: its validation split was split off the training rows.
        value: what a regression predicts.
        unanswerable: some training questions have no answer.
        threshold: probability from which on one of several labels is predicted; None: the best of those scored.
    """

    name: str
    dataset: str
    config_name: str | None
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    evaluation: tuple[str, ...] = ("validation",)
    tests: dict[str, str] = field(default_factory=dict)
    submits_names: bool = False
    held_out: float = 0.0
    problem_type: str = "single_label_classification"
    splits: dict[str, datasets.Dataset] | None = None
    split_off: bool = False
    value: str = "similarity"
    unanswerable: bool = False
    threshold: float | None = THRESHOLD

    @property
    def regression(self) -> bool:
        return self.problem_type == "regression"

    @property
    def head(self) -> str:
        return HEADS[self.problem_type]

    @property
    def folder(self) -> str:
        """Where its runs lie in the output folder, which a user's own data have to themselves."""
        return "" if self.splits else self.name


def _glue(name: str, columns: str, labels: str, file: str, **kwargs) -> Task:
    tests = {"test": f"{file}.tsv"}
    return Task(name, "nyu-mll/glue", name, tuple(columns.split()), tuple(labels.split()), **{"tests": tests, **kwargs})


_PAIR = "sentence1 sentence2"
GLUE = {
    task.name: task
    for task in (
        _glue("cola", "sentence", "unacceptable acceptable", "CoLA"),
        _glue("sst2", "sentence", "negative positive", "SST-2"),
        _glue("mrpc", _PAIR, "not_equivalent equivalent", "MRPC"),
        _glue("stsb", _PAIR, "", "STS-B", problem_type="regression"),
        _glue("qqp", "question1 question2", "not_duplicate duplicate", "QQP"),
        _glue(
            "mnli",
            "premise hypothesis",
            "entailment neutral contradiction",
            "MNLI",
            evaluation=("validation_matched", "validation_mismatched"),
            tests={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
            submits_names=True,
        ),
        _glue("qnli", "question sentence", "entailment not_entailment", "QNLI", submits_names=True),
        _glue("rte", _PAIR, "entailment not_entailment", "RTE", submits_names=True),
        _glue("wnli", _PAIR, "not_entailment entailment", "WNLI"),
    )
}
IMDB = Task("imdb", "stanfordnlp/imdb", None, ("text",), ("neg", "pos"), evaluation=("test",), held_out=0.1)
TASKS = {**GLUE, "imdb": IMDB}


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once; "all" names GLUE's.

    Raises:
        ScriptError: no name, or an unknown one.
    """
    chosen = dict.fromkeys(name for given in names for name in (GLUE if given == "all" else [given]))
    known = f"{', '.join(TASKS)}, or all for GLUE's"
    for name in chosen:
        if name not in TASKS:
            raise ScriptError(f"unknown --task_name {name!r}{closest(name, TASKS)}; the tasks are {known}")
    if not chosen:
        raise ScriptError(f"give --task_name: one or more of {known}")
    return [TASKS[name] for name in chosen]
