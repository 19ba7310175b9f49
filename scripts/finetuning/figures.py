"""Figures of a fine-tuning run: its loss and scores by step, and which classes were taken for which."""

from pathlib import Path
from typing import Any

import numpy as np

from ordnung.scripts.common.figures import new_figure
from ordnung.scripts.common.files import read_json_lines
from ordnung.scripts.finetuning.scores import describe

# A larger matrix is not written into its cells.
MOST_NUMBERS = 20


def write_details(folder: Path, data, logits: dict[str, np.ndarray], title: str) -> dict[str, Any]:
    """What stands beside a run's scores, by split (see `scores.describe`); draws confusion matrices.

    Args:
        data: `TaskData`.
        title: of the pictures, the split apart.
    """
    details = {}
    for split, examples in data.scored.items():
        details[split] = describe(data.task, logits[split], examples, data.train)
        if "confusion" in details[split]:
            image = folder / f"confusion_{split}.png"
            draw_confusion(details[split]["confusion"], data.task.labels, image, f"{title}, {split}")
    return details


def draw_confusion(matrix: list[list[int]], labels: tuple[str, ...], image: Path, title: str):
    """Draw counts of true classes (rows) taken for predicted ones (columns), coloured by share of the true class."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.5 + 0.45 * min(len(labels), 40)
    figure, axes = new_figure(figsize=(size + 1, size))
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if len(labels) <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
    names = [label if len(label) <= 20 else label[:19] + "…" for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), names, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="share of the true class")
    figure.savefig(image, dpi=120)


def plot_curves(folder: Path, title: str):
    """Draw curves.png from a run's metrics.jsonl: training and held-out loss, and the held-out scores below."""
    lines = read_json_lines(folder / "metrics.jsonl")
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    scored = [line for line in lines if "eval_loss" in line]
    figure, panels = new_figure(1 + bool(scored), 1, figsize=(7, 3.2 * (1 + bool(scored))), sharex=True, squeeze=False)
    losses = panels[0][0]
    losses.plot(*zip(*train), color="C0", alpha=0.6, label="training")
    if scored:
        steps = [line["step"] for line in scored]
        losses.plot(steps, [line["eval_loss"] for line in scored], "o-", color="C3", markersize=3, label="held out")
        for name in [
            name for name in scored[0] if name.startswith("eval_") and name not in ("eval_loss", "eval_seconds")
        ]:
            values = [line[name] for line in scored]
            panels[1][0].plot(steps, values, "o-", markersize=3, label=name.removeprefix("eval_").replace("_", " "))
        panels[1][0].set(ylabel="score, held out")
    losses.set(ylabel="loss", title=title)
    panels[-1][0].set(xlabel="step")
    for (panel,) in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=120)
