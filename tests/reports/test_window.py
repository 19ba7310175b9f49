"""What an encoder with a window loses, paired by seed."""

import pytest

from ordnung.scripts.common.tables import summarise
from ordnung.scripts.reports import window


def run(accuracies, seconds):
    machine = {"cpu": "any", "gpu": []} | dict.fromkeys(("threads", "torch", "transformers", "ordnung", "date"), "1")
    scores = {"metrics": {"validation": {"accuracy": summarise(accuracies)}}, "seconds": summarise(seconds)}
    cut = {"validation": {"rows": 1000, "cut": 7, "to": 1024}}
    return {"machine": machine, "seeds": [0, 1, 2], "tasks": {"train": scores | {"training_rows": 9, "truncated": cut}}}


@pytest.mark.parametrize(
    "lost, verdict", [(0.001, "holds"), (0.05, "does not hold"), (0.012, "not decided")], ids=["equal", "less", "near"]
)
def test_a_difference_is_judged_by_pairs_of_seeds(lost, verdict):
    whole = [0.8, 0.9, 0.85]
    shown = window.markdown(
        run([x - y for x, y in zip(whole, (lost, 1.1 * lost, 0.7 * lost))], [50, 60, 70]), run(whole, [100, 120, 140])
    )
    assert f'"A window loses nothing, within 1 point": {verdict}.' in shown
    assert "-50.0 % (-50.0 to -50.0, n = 3) of time" in shown and "1,000 reviews to measure on, 7 of them" in shown
