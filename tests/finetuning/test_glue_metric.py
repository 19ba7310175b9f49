"""The metrics of GLUE against their definitions, and through `evaluate`."""

import evaluate
import numpy as np
import pytest
from scipy import stats

from ordnung.scripts.finetuning import glue_metric
from ordnung.scripts.finetuning.glue_metric import Glue


def test_scores_equal_their_definitions():
    random = np.random.default_rng(0)
    for _ in range(5):
        a, b = random.integers(2, size=(2, 200))
        (tn, fp), (fn, tp) = [[int(((b == i) & (a == j)).sum()) for j in (0, 1)] for i in (0, 1)]
        scores = Glue("mrpc", keep_in_memory=True).compute(predictions=a, references=b)
        assert scores == {"accuracy": (tp + tn) / 200, "f1": pytest.approx(2 * tp / (2 * tp + fp + fn))}
        expected = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
        scores = Glue("cola", keep_in_memory=True).compute(predictions=a, references=b)
        assert scores == {"matthews_correlation": pytest.approx(expected)}
        x, y = random.normal(size=200).round(1), random.integers(6, size=200)  # with ties
        scores = Glue("stsb", keep_in_memory=True).compute(predictions=x, references=y)
        assert scores["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
        assert scores["spearmanr"] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_constant_prediction_scores_zero():
    assert glue_metric.matthews_correlation(np.ones(4), np.array([0, 1, 1, 0])) == 0
    assert glue_metric.pearson(np.full(4, 0.1), np.arange(4)) == 0
    assert glue_metric.f1(np.zeros(3), np.zeros(3)) == 0


def test_evaluate_loads_it(tmp_path):
    metric = evaluate.load(glue_metric.__file__, "rte", cache_dir=tmp_path)
    assert metric.compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5}


def test_bad_input():
    with pytest.raises(ValueError, match="unknown task 'ax'.*cola"):
        Glue("ax")
    with pytest.raises(ValueError, match="nothing to score"):
        Glue("rte", keep_in_memory=True).compute(predictions=[], references=[])
