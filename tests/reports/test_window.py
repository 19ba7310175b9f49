"""What an encoder with a window loses, paired by seed, and the time it saves."""

import pytest

from ordnung.scripts.common.tables import summarise
from ordnung.scripts.reports import window


def run(accuracies):
    machine = {"cpu": "any", "gpu": []} | dict.fromkeys(("threads", "torch", "transformers", "ordnung", "date"), "1")
    cut = {"validation": {"rows": 1000, "cut": 7, "to": 1024}}
    result = {"metrics": {"validation": {"accuracy": summarise(accuracies)}}, "training_rows": 9, "truncated": cut}
    return {"machine": machine, "seeds": list(range(len(accuracies))), "tasks": {"train": result}}


@pytest.mark.parametrize(
    "lost, verdict", [(0.001, "holds"), (0.05, "does not hold"), (0.012, "not decided")], ids=["equal", "less", "near"]
)
def test_a_difference_is_judged_by_pairs_of_seeds(lost, verdict):
    whole = [0.8, 0.9, 0.85]
    own = [score - part * lost for score, part in zip(whole, (1, 1.1, 0.7))]
    shown = window.markdown(run(own), run(whole), {"recipes": {"whole": {"each": [2.0, 1.6, 4.0]}}})
    assert f'"A window loses nothing, within 1 point": {verdict}.' in shown
    assert "0.50 (0.25 to 0.62, n = 3)" in shown and "1,000 to measure on, 7 of them" in shown


def test_one_seed_decides_nothing():
    shown = window.markdown(run([0.8]), run([0.9]), {"recipes": {"whole": {"each": [2.0]}}})
    assert ": not decided." in shown and "n = 1" in shown
