"""What an encoder loses, and the time it saves, when a token sees a window and a global token in place of the row."""

from typing import Any

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import estimate, markdown_table, paragraphs, ranged, seeds_described
from ordnung.scripts.experiments.verdicts import at_least, difference

MARGIN = 0.01  # of all rows: a difference of less is none


def markdown(window: dict[str, Any], whole: dict[str, Any], timed: dict[str, Any]) -> str:
    """Accuracy of two runs of `finetune` on one data set, paired by seed, and the time of a token, beside in rounds.

    Args:
        timed: results of `bench-finetune`, of the model with the window and, beside it, the other.
    """
    task = next(iter(window["tasks"]))
    results = [run["tasks"][task] for run in (window, whole)]
    scores = [result["metrics"]["validation"]["accuracy"] for result in results]
    (beside,) = timed["recipes"].values()
    each = [1 / ratio for ratio in beside["each"]]
    time = [ranged(each, 2, f", n = {len(each)}"), "1"]
    names = ["window and a global token", "whole row"]
    body = [[name, estimate(score, 1, 100), ratio] for name, score, ratio in zip(names, scores, time)]
    if window["seeds"] != whole["seeds"]:
        raise ScriptError(f"seeds {window['seeds']} and {whole['seeds']} cannot be paired: run both with the same")
    lost = difference(*(score["values"] for score in scores))
    cut, rows = results[0]["truncated"]["validation"], results[0]["training_rows"]
    return paragraphs(
        f"{seeds_described(window['seeds'])}; {rows:,} reviews to train on, {cut['rows']:,} to "
        f"measure on, {cut['cut']:,} of them cut to {cut['to']:,} tokens. {described(window['machine'])}",
        markdown_table(["a token sees", "accuracy, %", "time of a training token"], body),
        f"Paired by seed: {lost.text(1, 100)} points of accuracy. "
        f'"A window loses nothing, within {100 * MARGIN:.0f} point": {at_least(lost, -MARGIN)}.',
    )
