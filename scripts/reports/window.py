"""What an encoder loses, and how long it takes, when its tokens see a window and a global token in place of the row."""

from typing import Any

from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.experiments.verdicts import changes, equal, estimate, interval, seeds_described

MARGIN = 0.01  # of all rows: a difference of less is none


def markdown(window: dict[str, Any], whole: dict[str, Any]) -> str:
    """Accuracy and training time of two runs of `finetune` on one data set, and both paired by seed."""
    found = {"window and a global token": window, "whole row": whole}
    task = next(iter(window["tasks"]))
    results = {name: run["tasks"][task] for name, run in found.items()}
    scores = {name: result["metrics"]["validation"]["accuracy"] for name, result in results.items()}
    body = [
        [
            name,
            estimate(scores[name], 1, 100),
            estimate(results[name]["seconds"], 0),
            f"{results[name]['training_rows']:,}",
        ]
        for name in found
    ]
    own, other = (summary["values"] for summary in scores.values())
    lost = interval([a - b for a, b in zip(own, other)])
    own, other = (result["seconds"]["values"] for result in results.values())
    time = changes(own, other)
    cut = results["whole row"]["truncated"]["validation"]
    return "\n\n".join(
        [
            f"{seeds_described(window['seeds'])}. {cut['rows']:,} reviews to measure on, {cut['cut']:,} of them cut to "
            f"{cut['to']:,} tokens. {described(window['machine'])}",
            markdown_table(["a token sees", "accuracy, %", "training, s", "training rows"], body),
            f"Paired by seed: {lost.text(1, 100)} points of accuracy, {time.text(1, 100, ' %')} of time. "
            f'"A window loses nothing, within {100 * MARGIN:.0f} point": {equal(lost, MARGIN)}.',
        ]
    )
