"""Models of several widths side by side: what they recall against the size of their state, and loss against FLOPs.

Variants are named KIND_WIDTH.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ordnung.scripts.common.figures import legend_below, loss_unit, nested, new_figure, of_variants, reaching, styles
from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import Interval, interval, markdown_table
from ordnung.scripts.experiments.verdicts import changes

CAPACITY, SIZES = "recall_capacity", "compare_sizes"


def by_kind(results: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """What was found of each kind, by width, from the narrowest on."""
    kinds: dict[str, dict[int, dict[str, Any]]] = {}
    for name, found in results["variants"].items():
        kind, _, width = name.rpartition("_")
        kinds.setdefault(kind, {})[int(width)] = found
    return {kind: dict(sorted(found.items())) for kind, found in kinds.items()}


def right(found: dict[str, Any]) -> Interval:
    """The share of the most pairs that is recalled, over seeds."""
    return interval(found["accuracy"][-1]["values"])


def capacity_markdown(results: dict[str, Any]) -> str:
    settings = results["settings"]
    header = ["model", "width", "parameters", "state, bytes", f"right of {settings['num_pairs'][-1]} pairs"]
    body = [
        [kind, str(width), f"{one['parameters']:,}", f"{one['state_bytes']:,}", right(one).text(3)]
        for kind, found in by_kind(results).items()
        for width, one in found.items()
    ]
    about = f"{described(results['machine'])} {settings['max_steps']} steps of {settings['batch_size']} sequences of "
    about += f"{settings['sequence_length']} tokens; chance {results['chance']:.3f}."
    return f"{about}\n\n{markdown_table(header, body)}"


def total_flops(found: dict[str, Any]) -> float:
    """Of training, a step taken to cost three forward passes."""
    return 3 * found["forward_flops_per_token"] * found["tokens"]


def slope(found: dict[int, dict[str, Any]]) -> Interval:
    """The exponent of training FLOPs in the held-out loss, fitted to the widths seed by seed."""
    flops = np.log([total_flops(one) for one in found.values()])
    losses = np.log([one["eval_loss"]["values"] for one in found.values()])  # (widths, seeds)
    return interval([float(np.polyfit(flops, losses[:, seed], 1)[0]) for seed in range(losses.shape[1])])


def sizes_markdown(results: dict[str, Any]) -> str:
    kinds, trigram = by_kind(results), results["ngrams"]["trigram"]["mean"]
    widths = list(next(iter(kinds.values())))
    first = next(iter(kinds))
    header = ["model", *(f"width {width}" for width in widths), "exponent of FLOPs"]
    header += [f"perplexity against {first}, width {width}" for width in (widths[0], widths[-1])]
    body = []
    for kind, found in kinds.items():
        losses = [interval(one["eval_loss"]["values"]).text(3) for one in found.values()]
        against = []
        for width in (widths[0], widths[-1]):
            pair = (each[width]["eval_perplexity"]["values"] for each in (found, kinds[first]))
            against.append("-" if kind == first else changes(*pair).text(1, 100, " %"))
        body.append([kind, *losses, slope(found).text(3), *against])
    steps = results["settings"]["pretrain"]["max_steps"]
    about = f"{described(results['machine'])} Held-out loss in nats, {steps:,} steps; counted, a trigram has "
    about += f"{np.log(trigram):.3f}."
    return f"{about}\n\n{markdown_table(header, body)}"


def _plot(results: dict[str, Any], image: Path, place, value, level: float, what: str, **labels):
    """A line a kind through its widths, with 95 % t-intervals over seeds, and the line that all must pass.

    Args:
        level: of that line; `what` it is.
    """
    figure, panel = new_figure(figsize=(7, 4.5))
    models, kinds = of_variants(results["settings"]), by_kind(results)
    drawn = nested(styles({kind: models[f"{kind}_{min(found)}"] for kind, found in kinds.items()}))
    for kind, found in kinds.items():
        values = [value(one) for one in found.values()]
        means, *ends = zip(*((one.mean, one.low, one.high) for one in values))
        several = values[0].n > 1
        panel.errorbar(
            [place(one) for one in found.values()],
            means,
            reaching(means, *ends) if several else None,
            label=kind,
            capsize=3,
            elinewidth=1.2,
            **drawn[kind],
        )
    panel.axhline(level, color="red", linestyle=":", label=what)
    panel.set(xscale="log", **labels)
    panel.grid(alpha=0.3)
    legend_below(figure, [panel])
    figure.savefig(image, dpi=120)


def capacity_plot(results: dict[str, Any], image: Path):
    _plot(
        results,
        image,
        lambda one: one["state_bytes"],
        right,
        results["chance"],
        f"at random ({results['chance']:.3f})",
        xlabel="generation state at the end of a sequence (bytes)",
        ylabel=f"share right of {results['settings']['num_pairs'][-1]} pairs",
        ylim=(-0.03, 1.05),
    )


def sizes_plot(results: dict[str, Any], image: Path):
    _plot(
        results,
        image,
        total_flops,
        lambda one: interval(one["eval_loss"]["values"]),
        math.log(results["ngrams"]["trigram"]["mean"]),
        "trigram, counted",
        xlabel="training FLOPs",
        ylabel=f"held-out loss ({loss_unit(results['settings'])})",
    )
