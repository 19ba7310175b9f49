"""How many singular values of attention hold a share of their sum, against the length; and by chance, rows shuffled."""

from pathlib import Path

import numpy as np

from ordnung.scripts.common.figures import COLOURS, OTHER, legend_below, new_figure
from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.experiments.verdicts import interval


def needed(results: dict) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Lengths, and of the first checkpoint the mean of all heads by passage and length: its own, and shuffled."""
    rows = results["models"][0]["lengths"]
    means = (
        np.array([[np.mean(passage) for passage in row[name]] for row in rows]).T for name in ("needed", "shuffled")
    )
    return [row["n"] for row in rows], *means


def exponents(lengths: list[int], ranks: np.ndarray) -> list[float]:
    """The slope of log rank on log length, of each passage."""
    return [float(np.polyfit(np.log(lengths), np.log(passage), 1)[0]) for passage in ranks]


def markdown(results: dict) -> str:
    """Mean rank of all heads by length, of the least and of the most compressible layer, and of chance."""
    lengths, own, shuffled = needed(results)
    model, share = results["models"][0], results["settings"]["share"]
    body = []
    for i, row in enumerate(model["lengths"]):
        layers = np.array(row["needed"]).mean((0, 2))
        body.append([f"{row['n']:,}", *(interval(list(ranks[:, i])).text(1) for ranks in (own, shuffled))])
        body[-1] += [f"{layers.min():.1f} to {layers.max():.1f}", f"{own[:, i].mean() / row['n']:.2f}"]
    header = ["tokens", "rank", "rows shuffled", "layers, least to most", "rank / tokens"]
    slopes = (interval(exponents(lengths, ranks)).text(2) for ranks in (own, shuffled))
    return (
        f"{described(results['machine'])} {model['model']}: singular values that hold {share:.0%} of their sum, mean "
        f"of all heads with the 95 % t-interval over passages of text.\n\n{markdown_table(header, body)}\n\n"
        f"Exponent of the length: {next(slopes)}; with each row's weights shuffled {next(slopes)}."
    )


def plot(results: dict, image: Path):
    """Both against the length, log-log, beside a rank that does not grow and one that grows as the length does."""
    lengths, own, shuffled = needed(results)
    figure, panel = new_figure(figsize=(6, 5))
    for ranks, label, colour, line in (
        (own, "attention of the encoder", COLOURS["softmax_lm"], "-"),
        (shuffled, "its weights, each row shuffled", OTHER, "--"),
    ):
        found = [interval(list(ranks[:, i])) for i in range(len(lengths))]
        bars = [each.high - each.mean if each.n > 1 else 0 for each in found]
        panel.errorbar(lengths, [each.mean for each in found], bars, fmt=line, marker="o", markersize=4, capsize=3,
                       color=colour, label=label)  # fmt: skip
    first = own[:, 0].mean()
    for slope, label, line in ((1, "as the length", "-"), (0, "a rank that stays", ":")):
        ends = [first, first * (lengths[-1] / lengths[0]) ** slope]
        look = {"color": "#DDDDDD" if slope else "grey", "linewidth": 7 if slope else 1, "zorder": 0}  # it lies under
        panel.plot([lengths[0], lengths[-1]], ends, line, label=label, **look)
    share = results["settings"]["share"]
    panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"singular values with {share:.0%} of their sum")
    panel.set_xticks(lengths, [f"{n:,}" for n in lengths])
    panel.xaxis.minorticks_off()
    panel.grid(alpha=0.3)
    legend_below(figure, [panel], columns=2)
    figure.savefig(image, dpi=120)
