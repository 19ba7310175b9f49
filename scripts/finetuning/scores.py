"""How well a model does: the scores of each problem type through scikit-learn, with what they are worth beside them.

Every score is a function of arrays with a row for each example, so that the same function serves the bootstrap.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import logit
from torch.nn import functional as F

from ordnung.scripts.common.tables import interval
from ordnung.scripts.finetuning.data import Examples
from ordnung.scripts.finetuning.glue_metric import Glue, pearson, spearmanr
from ordnung.scripts.finetuning.structured import answer_scores, best_answers, count_entities, tags_of
from ordnung.scripts.finetuning.tasks import THRESHOLD, Task

# Models are compared by these, where there is one of them, or else by the mean of all scores that are no errors.
MAIN = ("macro_f1", "entity_f1", "answer_f1")
ERRORS = ("loss", "mean_absolute_error")
# Among these a threshold is chosen.
THRESHOLDS = np.arange(1, 20) / 20
RESAMPLES = 1000
# Problem types whose scores are made of sums over rows.
OF_SUMS = ("token_classification", "question_answering")


def mean_score(scores: dict[str, float]) -> float:
    """One number for a split: the main score, or the mean of its scores, as GLUE averages them."""
    main = [scores[name] for name in MAIN if name in scores]
    return float(np.mean(main or [value for name, value in scores.items() if name not in ERRORS]))


def score(task: Task, logits: np.ndarray, examples: Examples) -> dict[str, float]:
    """The loss and the scores of predictions.

    Args:
        logits: as `inference.predict` gives them.
    """
    scores = {"loss": loss(task, logits, examples)}
    if task.problem_type in OF_SUMS:
        return scores | measure(task.problem_type, outcome(task, logits, examples)[0])
    if task.splits is None:
        predicted = logits[:, 0] if task.regression else logits.argmax(-1)
        kind = np.float32 if task.regression else np.int64
        metric = Glue(task.name, keep_in_memory=True)
        return scores | metric.compute(predictions=predicted, references=examples.labels.astype(kind))
    return scores | measure(task.problem_type, *outcome(task, logits, examples))


def loss(task: Task, logits: np.ndarray, examples: Examples) -> float:
    """The model's loss over all labelled examples, without class weights."""
    values = torch.from_numpy(logits)
    if task.problem_type == "regression":
        return float(F.mse_loss(values[:, 0], torch.from_numpy(examples.labels.astype(np.float32))))
    if task.problem_type == "multi_label_classification":
        return float(F.binary_cross_entropy_with_logits(values, torch.from_numpy(examples.labels.astype(np.float32))))
    if task.problem_type == "question_answering":
        whole = np.logaddexp.reduceat(logits.astype(np.float64), examples.starts[:-1])  # (windows, 2)
        at = examples.starts[:-1, None] + examples.labels.astype(np.int64)
        return float((whole - np.take_along_axis(logits, at, axis=0)).mean())
    labels = examples.labels if examples.word_labels is None else examples.word_labels
    return float(F.cross_entropy(values, torch.from_numpy(labels.astype(np.int64))))  # -100 is left out


def answer_loss(outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of answers' starts and ends among real tokens; models of transformers' own count padding too."""
    padding, ends = batch["attention_mask"] == 0, ("start", "end")
    scores = [outputs[f"{end}_logits"].masked_fill(padding, torch.finfo(torch.float32).min) for end in ends]
    return sum(F.cross_entropy(each.float(), batch[f"{end}_positions"]) for each, end in zip(scores, ends)) / 2


def outcome(task: Task, logits: np.ndarray, examples: Examples) -> tuple[np.ndarray, ...]:
    """What `measure` takes: arrays with a row for each example, predictions first."""
    if task.problem_type == "regression":
        return logits[:, 0].astype(np.float64), examples.labels.astype(np.float64)
    if task.problem_type == "multi_label_classification":
        threshold = best_threshold(logits, examples) if task.threshold is None else task.threshold
        return logits >= logit(threshold), examples.labels > 0.5
    if task.problem_type == "token_classification":
        truths = [examples.gold[row] for row in examples.rows]
        return count_entities(task.labels, truths, tags_of(logits, examples, list(map(len, truths))))
    if task.problem_type == "question_answering":
        answers = best_answers(logits, examples, examples.contexts, task.unanswerable)
        asked = np.unique(examples.rows)
        golds = [[answer["text"] for answer in examples.gold[row]] for row in asked]
        return (np.array([answer_scores(answers[row][0], gold) for row, gold in zip(asked, golds)]),)
    return logits.argmax(-1), examples.labels


def best_threshold(logits: np.ndarray, examples: Examples) -> float:
    """The threshold of several labels with the highest macro F1; of equally good ones the nearest to 0.5."""
    labels = examples.labels > 0.5

    def goodness(threshold: float) -> tuple[float, float]:
        scores = measure("multi_label_classification", logits >= logit(threshold), labels)
        return scores["macro_f1"], -abs(threshold - THRESHOLD)

    return float(max(THRESHOLDS, key=goodness))


def measure(problem_type: str, predicted: np.ndarray, labels: np.ndarray | None = None) -> dict[str, float]:
    """The scores of a problem type.

    Of tags, `predicted` are the counts of `structured.count_entities`, and of answers their exact matches and F1, by
    row: such scores are made of sums over rows. Classes are those that occur among labels or predictions, as
    scikit-learn takes them.
    """
    from sklearn import metrics

    if problem_type in OF_SUMS:
        sums = resampled(problem_type, [predicted], np.ones((1, len(predicted))))
        scores = {name: values[0] for name, values in sums.items()}
    elif problem_type == "regression":
        scores = {"pearson": pearson(predicted, labels), "spearmanr": spearmanr(predicted, labels)}
        scores["mean_absolute_error"] = metrics.mean_absolute_error(labels, predicted)
    elif problem_type == "multi_label_classification":
        kinds = ("macro", "micro")
        f1s = (metrics.f1_score(labels, predicted, average=kind, zero_division=0) for kind in kinds)
        scores = dict(zip(("macro_f1", "micro_f1"), f1s)) | {"accuracy": metrics.accuracy_score(labels, predicted)}
    else:
        averaged = metrics.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
        scores = {"accuracy": metrics.accuracy_score(labels, predicted), "macro_f1": averaged[2]}
        scores |= {"macro_precision": averaged[0], "macro_recall": averaged[1]}
    return {name: float(value) for name, value in scores.items()}


def describe(task: Task, logits: np.ndarray, examples: Examples, train: Examples) -> dict[str, Any]:
    """What stands beside the scores: of each class, of a guess that looks at no text, and the scores' uncertainty.

    Returns:
        `intervals`: 95 % of the bootstrap, by score; `baseline`: the scores of the training rows' most frequent class,
        labels or mean; `per_class` and, of classes, `confusion`: rows of true classes, columns of predicted ones.
    """
    from sklearn import metrics

    arrays = outcome(task, logits, examples)
    if task.problem_type in OF_SUMS:
        made = {"intervals": bootstrap(task.problem_type, arrays[:1])}
        return made | (_describe_tags if len(arrays) > 1 else _describe_answers)(arrays, examples)
    made = {"intervals": bootstrap(task.problem_type, arrays)}
    predicted, labels = arrays
    if task.problem_type == "regression":
        guesses, named = [train.labels.mean()], "the training rows' mean"
    elif task.problem_type == "multi_label_classification":  # all of them have the best F1 of labels without a text
        guesses, named = [train.labels.mean(0) > 0.5, np.True_], "always the frequent labels, or all: the better"
    else:
        guesses = [np.bincount(train.labels).argmax()]
        named = f"always {task.labels[guesses[0]]}"
    constants = (np.broadcast_to(guess, labels.shape) for guess in guesses)
    measured = [measure(task.problem_type, constant, labels) for constant in constants]
    made["baseline"] = {"what": named, **{name: max(each[name] for each in measured) for name in measured[0]}}
    if task.problem_type == "regression":
        return made
    numbers = range(len(task.labels))
    columns = metrics.precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    names = ("precision", "recall", "f1", "examples")
    made["per_class"] = {
        label: dict(zip(names, (*map(float, row[:3]), int(row[3])))) for label, row in zip(task.labels, zip(*columns))
    }
    if task.problem_type == "multi_label_classification":
        made["threshold"] = task.threshold
    else:
        made["confusion"] = metrics.confusion_matrix(labels, predicted, labels=numbers).tolist()
    return made


def _describe_tags(arrays: tuple, examples: Examples) -> dict[str, Any]:
    counts, by_type = arrays
    tags = (examples.gold[row] for row in examples.rows)
    nothing = np.array([[0, 0, true, some.count(0), words] for (*_, true, _, words), some in zip(counts, tags)])
    per_class = {}
    for kind, count in sorted(by_type.items()):
        found, predicted, true = (count[name] for name in ("found", "predicted", "true"))
        precision, recall = found / max(predicted, 1), found / max(true, 1)
        f1 = 2 * found / max(predicted + true, 1)
        per_class[kind] = {"precision": precision, "recall": recall, "f1": f1, "examples": true}
    return {"baseline": {"what": "always O", **measure("token_classification", nothing)}, "per_class": per_class}


def _describe_answers(arrays: tuple, examples: Examples) -> dict[str, Any]:
    nothing = np.array([answer_scores("", [each["text"] for each in gold]) for gold in examples.gold])
    return {"baseline": {"what": "never an answer", **measure("question_answering", nothing)}}


def bootstrap(problem_type: str, arrays: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """95 % interval of each score: the examples drawn again and again, as many as there are, with replacement."""
    random, count = np.random.default_rng(0), len(arrays[0])
    resamples = min(RESAMPLES, max(100, RESAMPLES * 2000 // count))  # of many examples the interval is narrow
    times = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    scores = resampled(problem_type, arrays, times)
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in scores.items()}


def resampled(problem_type: str, arrays: Sequence[np.ndarray], times: np.ndarray) -> dict[str, np.ndarray]:
    """What `measure` says of many samples of the same examples, at once where it is made of counts.

    Args:
        times: (samples, n) how often each has each example.
    Returns:
        (samples,) by score.
    """
    if problem_type == "regression":
        each = [measure(problem_type, *(np.repeat(array, row) for array in arrays)) for row in times]
        return {name: np.array([scores[name] for scores in each]) for name in each[0]}
    if problem_type == "question_answering":
        return dict(zip(("exact_match", "answer_f1"), (times @ arrays[0] / times.sum(1, keepdims=True)).T))
    if problem_type == "token_classification":
        found, predicted, true, right, words = (times @ arrays[0]).T.astype(np.float64)
        return {
            "entity_precision": found / np.maximum(predicted, 1),
            "entity_recall": found / np.maximum(true, 1),
            "entity_f1": 2 * found / np.maximum(predicted + true, 1),
            "accuracy": right / np.maximum(words, 1),
        }
    predicted, labels = arrays
    correct = predicted == labels
    if problem_type == "multi_label_classification":
        hits, guesses, truths = predicted & labels, predicted, labels
        correct = correct.all(1)
    else:
        classes = np.union1d(predicted, labels)
        guesses, truths = predicted[:, None] == classes, labels[:, None] == classes
        hits = guesses & truths
    hit, guessed, true = (times @ array.astype(np.float64) for array in (hits, guesses, truths))  # (samples, labels)
    # a label that a sample lacks is none of its classes; of several labels, each counts
    there = (guessed + true > 0) | (problem_type == "multi_label_classification")

    def mean(part, whole):
        return (np.divide(part, whole, out=np.zeros_like(part), where=whole > 0) * there).sum(1) / there.sum(1)

    scores = {"accuracy": times @ correct / times.sum(1), "macro_f1": mean(2 * hit, guessed + true)}
    if problem_type == "multi_label_classification":
        return scores | {"micro_f1": 2 * hit.sum(1) / np.maximum(guessed.sum(1) + true.sum(1), 1)}
    return scores | {"macro_precision": mean(hit, guessed), "macro_recall": mean(hit, true)}


def seed_interval(values: Sequence[float]) -> list[float]:
    """95 % interval of the mean over seeds, by Student's t."""
    found = interval(values)
    return [found.low, found.high]


def class_weights(task: Task, train: Examples) -> np.ndarray | None:
    """Weights that give each class the same share of the loss; of several labels, what a present label weighs.

    Returns:
        (labels,), for classes with mean 1 over the training rows; None of a regression or an answer.
    """
    if task.problem_type == "multi_label_classification":
        present = train.labels.sum(0)
        return (len(train) - present) / np.maximum(present, 1)
    if task.problem_type in ("single_label_classification", "token_classification"):
        labels = train.labels if train.word_labels is None else train.word_labels[train.word_labels >= 0]
        counts = np.bincount(labels, minlength=len(task.labels))
        return len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return None


def weighted_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch with `weights` (labels,) from `class_weights`; labels of -100 are left out."""
    if labels.dtype.is_floating_point:
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
    logits, labels = logits.flatten(0, -2), labels.flatten()
    # divided by the labels, not by their weights: batches of few rare labels must not count as much as others
    losses = F.cross_entropy(logits, labels, weight=weights, reduction="sum")
    return losses / (labels >= 0).sum().clamp(min=1)
