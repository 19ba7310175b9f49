"""What all figures share: one colour a family, everywhere, and legends beside the curves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Of people who cannot tell red from green too: Okabe and Ito's, and dark grey for attention, which is held against.
COLOURS = {
    "softmax_lm": "#333333",
    "conv_lm": "#0072B2",
    "linformer_lm": "#D55E00",
    "cubic_prefix_lm": "#009E73",
    "quadratic_kernel_lm": "#CC79A7",
    "sparse_attention_lm": "#E69F00",
    "gpt2": "#999999",
    "lfm2": "#56B4E9",
    "mamba": "#8C564B",
    "mistral": "#7F3C8D",
}
OTHER = "#BBBBBB"
LINES, MARKERS = ("-", "--", ":", "-."), "osv^DxP"


def family_of(name: str) -> str:
    """The family of a competitor of benchmark.py, by the word that its name begins with; of a part, by what it is."""
    first, last = name.partition("_")[0], name.rpartition("_")[2]
    if last in ("sdpa", "eager") and first == "source":
        return "softmax_lm"
    if first in ("source", "convolution", "block"):
        first = "conv"
    return next((family for family in COLOURS if family.partition("_")[0] == first), name)


def styles(families: Mapping[str, str]) -> dict[str, dict]:
    """Colour, line and marker of curves by name: the colour of the family, the rest tells its members apart.

    Families begin with different markers, so that curves of two that coincide show both.

    Args:
        families: the family of each name, from `COLOURS` or another.
    """
    seen: dict[str, int] = {}
    chosen = {}
    for name, family in families.items():
        colour = COLOURS.get(family, OTHER)
        i = seen[colour] = seen.get(colour, -1) + 1
        first = list(COLOURS).index(family) if family in COLOURS else len(COLOURS)
        marker, line = MARKERS[(first + i) % len(MARKERS)], LINES[i % len(LINES)]
        chosen[name] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}
    return chosen


def nest(i: int, count: int) -> dict[str, Any]:
    """Look of the i-th of curves that may coincide: narrower, and its open marker smaller, than all before it."""
    part = i / max(1, count - 1)
    return {"linewidth": 3.5 - 2.3 * part, "markersize": 9 - 5 * part, "markerfacecolor": "none"}


def nested(drawn: Mapping[str, dict]) -> dict[str, dict]:
    """Styles of curves that may coincide, by `nest`, each with a line of its own."""
    return {
        name: {
            **style,
            **nest(i, len(drawn)),
            "linestyle": LINES[i % len(LINES)],
            "markeredgewidth": 1.2,
            "zorder": 2 + i / 100,
        }
        for i, (name, style) in enumerate(drawn.items())
    }


def shades(family: str, count: int) -> list[tuple[float, float, float]]:
    """So many shades of a family's colour, the first the lightest and the last the colour itself."""
    from matplotlib.colors import to_rgb

    parts = [1.0] if count == 1 else [0.4 + 0.6 * i / (count - 1) for i in range(count)]
    return [tuple(1 - part * (1 - value) for value in to_rgb(COLOURS[family])) for part in parts]


def of_variants(settings: dict) -> dict[str, str]:
    """The family of each variant of an experiment, from the settings in its results; of those trained longer too.

    The controls of experiments are softmax attention where their weights are.
    """
    families = {}
    for name, variant in settings["variants"].items():
        control = variant["model_type"] == "control_attention_lm" and variant.get("weights", "softmax") == "softmax"
        families[name] = "softmax_lm" if control else variant["model_type"]
    return families | {f"{name}_equal_compute": family for name, family in families.items()}


def empty_figure(figsize: tuple[float, float] | None = None):
    """A figure without panels that is drawn for a file, without pyplot's state and screens."""
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def new_figure(rows: int = 1, columns: int = 1, figsize: tuple[float, float] | None = None, **arguments) -> tuple:
    """An `empty_figure` with panels.

    Args:
        arguments: as `matplotlib.figure.Figure.subplots` takes them.

    Returns:
        the figure, and what that gives: a panel, or an array of them.
    """
    figure = empty_figure(figsize)
    return figure, figure.subplots(rows, columns, **arguments)


def gap_in(values: Iterable[float], least: float = 1 / 3, crowd: float = 2.5) -> int | None:
    """How many of the lowest values lie below the widest room between two.

    None where that is less than `least` of their range, or where neither side has `crowd` times as many as the other.
    """
    ordered = sorted(values)
    steps = [high - low for low, high in zip(ordered, ordered[1:])]
    if not steps or max(steps) <= least * (ordered[-1] - ordered[0]):
        return None
    below = 1 + steps.index(max(steps))
    few, many = sorted((below, len(ordered) - below))
    return below if many >= crowd * few else None


def broken_panel(figure, place, values: Sequence[float], more: Sequence[float] = ()) -> list:
    """A panel whose y axis leaves a gap out where a few values are far from the others and would press them together.

    Most of the height is for the many, so the scales of the parts differ.

    Args:
        place: a part of a grid, of the figure.
        values: of the curves; they tell where the gap is.
        more: what has to be seen too.

    Returns:
        what is to be drawn in, all in each: the part above the gap if there is one, and the part below.
    """
    below = gap_in(values)
    if below is None:
        return [figure.add_subplot(place)]
    few_above, ordered = below > len(values) / 2, sorted([*values, *more])
    least, most, edge = ordered[0], ordered[-1], sorted(values)[below - 1 : below + 1]
    # lines in the gap go to the few
    low = edge[0] if few_above else max(value for value in ordered if value < edge[1])
    high = min(value for value in ordered if value > edge[0]) if few_above else edge[1]
    parts = place.subgridspec(2, 1, height_ratios=(1, 3) if few_above else (3, 1), hspace=0.04)
    lower = figure.add_subplot(parts[1])
    upper = figure.add_subplot(parts[0], sharex=lower)
    room = 0.4 * (high - low)
    below, above = (min(0.1 * size, room) or room for size in (low - least, most - high))
    lower.set_ylim(least - below, low + below)
    upper.set_ylim(high - above, most + above)
    upper.spines.bottom.set_visible(False)
    lower.spines.top.set_visible(False)
    upper.tick_params(which="both", bottom=False, labelbottom=False)
    cut = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 9, "linestyle": "none", "color": "black", "clip_on": False}
    upper.plot([0, 1], [0, 0], transform=upper.transAxes, **cut)
    lower.plot([0, 1], [1, 1], transform=lower.transAxes, **cut)
    return [upper, lower]


def loss_unit(settings: Mapping[str, Any]) -> str:
    """Of losses of an experiment: what is a token, where its vocabulary is hardly more than the 256 bytes."""
    size = settings["pretrain"].get("train_tokenizer_vocab_size")
    return "nats per token" + (", about a byte" if size and size < 272 else "")


def reaching(middles: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """The error bars of `errorbar` that reach from each low to each high."""
    return [[m - low for m, low in zip(middles, lows)], [high - m for m, high in zip(middles, highs)]]


def draw_slopes(panel, ends: tuple[float, float], start: float, top: float):
    """Lines of growth as N, N² and N³ into a log-log panel, to compare with, as far as its top.

    Args:
        ends: the shortest and the longest N.
        start: where the lines begin, at the shortest.
    """
    panel.margins(x=0.1)  # room for the powers, right of the curves
    for slope in (1, 2, 3):
        last = min(ends[1], ends[0] * (top / start) ** (1 / slope))
        height = start * (last / ends[0]) ** slope
        panel.plot([ends[0], last], [start, height], color="#DDDDDD", linewidth=1, zorder=0)
        power = f"N^{slope}" if slope > 1 else "N"
        panel.annotate(power, (last, height), (3, 0), textcoords="offset points", color="grey", fontsize=8, va="center")


def legend_below(figure, panels: Sequence, columns: int = 4):
    """One legend of all curves of the panels, below them."""
    labels = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns, fontsize=8)
