"""GLUE's metrics as an `evaluate` module that needs no network.

    Glue("mrpc").compute(predictions=[1, 0], references=[1, 1])
    evaluate.load("scripts/finetuning/glue_metric.py", "mrpc")     # the same, as evaluate loads modules

The scores of each task are those that the GLUE server reports (Wang et al. 2019, section 3), named as in evaluate's
own "glue" module, which has to be downloaded.
"""

import datasets
import evaluate
import numpy as np


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Share of equal entries."""
    return float((predictions == references).mean())


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Harmonic mean of precision and recall of label 1; 0 where label 1 neither occurs nor is predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(references == 1, predictions == 1, zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews' correlation for any number of labels (Gorodkin 2004); 0 for a constant prediction."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's correlation; 0 where a side is constant, which leaves it undefined."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def spearmanr(predictions: np.ndarray, references: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks, where equal values share their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(predictions), rankdata(references))


# by task; IMDB is scored as SST-2
SCORES = {
    "cola": (matthews_correlation,),
    "sst2": (accuracy,),
    "mrpc": (accuracy, f1),
    "stsb": (pearson, spearmanr),
    "qqp": (accuracy, f1),
    "mnli": (accuracy,),
    "qnli": (accuracy,),
    "rte": (accuracy,),
    "wnli": (accuracy,),
    "imdb": (accuracy,),
}


class Glue(evaluate.Metric):
    """Scores of one task: `Glue(task)`, with the task's name as evaluate's `config_name`.

    Raises:
        ValueError: unknown task; nothing to score.
    """

    def _info(self):
        if self.config_name not in SCORES:
            raise ValueError(f"unknown task {self.config_name!r}; there are {', '.join(SCORES)}")
        kind = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The scores of a GLUE task.",
            citation="Wang et al. GLUE: A Multi-Task Benchmark and Analysis Platform for NLU. ICLR 2019.",
            inputs_description="predictions, references: label numbers; for stsb, similarities from 0 to 5.",
            features=datasets.Features({"predictions": kind, "references": kind}),
            format="numpy",
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        if not len(references):
            raise ValueError("there is nothing to score: predictions and references are empty")
        return {score.__name__: score(predictions, references) for score in SCORES[self.config_name]}
