"""What all figures share: one colour a family, everywhere, and legends beside the curves."""

from collections.abc import Mapping, Sequence

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
LINES, MARKERS = ("-", "--", ":", "-."), "osv^Dx"


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

    Args:
        families: the family of each name, from `COLOURS` or another.
    """
    seen: dict[str, int] = {}
    chosen = {}
    for name, family in families.items():
        i = seen[family] = seen.get(family, -1) + 1
        marker, line = MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]
        chosen[name] = {"color": COLOURS.get(family, OTHER), "linestyle": line, "marker": marker, "markersize": 4}
    return chosen


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


def new_figure(rows: int = 1, columns: int = 1, figsize: tuple[float, float] | None = None, **arguments) -> tuple:
    """A figure of panels that is drawn for a file, without pyplot's state and screens.

    Args:
        arguments: as `matplotlib.figure.Figure.subplots` takes them.

    Returns:
        the figure, and what that gives: a panel, or an array of them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **arguments)


def draw_slopes(panel, ends: tuple[float, float], start: float, top: float):
    """Lines of growth as N, N² and N³ into a log-log panel, to compare with, as far as its top.

    Args:
        ends: the shortest and the longest N.
        start: where the lines begin, at the shortest.
    """
    for slope in (1, 2, 3):
        last = min(ends[1], ends[0] * (top / start) ** (1 / slope))
        height = start * (last / ends[0]) ** slope
        panel.plot([ends[0], last], [start, height], color="#DDDDDD", linewidth=1, zorder=0)
        power = f"N^{slope}" if slope > 1 else "N"
        panel.annotate(power, (last, height), color="grey", fontsize=8, ha="right", va="bottom")


def legend_below(figure, panels: Sequence, columns: int = 4):
    """One legend of all curves of the panels, below them."""
    labels = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns, fontsize=8)
