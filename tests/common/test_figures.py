"""One colour a family, and curves that differ within it."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from ordnung.modeling.registration import FAMILIES, REGISTERED
from ordnung.scripts.benchmarks.mixer import PARTS
from ordnung.scripts.benchmarks.variants import VARIANTS, with_static_forms
from ordnung.scripts.common import figures
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import COLOURS, OTHER, family_of, of_variants, shades, styles
from ordnung.scripts.linearizing import report as linearizing_report
from ordnung.scripts.reports.card_tables import FIGURES
from ordnung.scripts.reports.results import RESULTS, load

FIRST = {family.partition("_")[0]: family for family in COLOURS}  # a word that names of a family begin with
CURVES = sorted(name for name in FIGURES if not name.endswith(("_recall", "_spectrum", "_patterns")))  # others are maps


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a figure of the cards, and gives it back unrendered."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))

    def draw(name: str | None = None, by=None) -> Figure:
        try:
            (by or FIGURES[name])(tmp_path / "figure.png")
        except ScriptError as error:
            pytest.skip(f"not run yet: {error}")
        return saved.pop()

    return draw


def curves(panel) -> dict:
    """The lines with names of a panel."""
    handles, labels = panel.get_legend_handles_labels()
    return {
        label: handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle, label in zip(handles, labels)
    }


def look(line) -> tuple:
    """What is seen of a line in a legend: colour, dashes, marker, and whether that is filled."""
    filled = str(line.get_markerfacecolor()) != "none"
    return to_rgb(line.get_color()), line.get_linestyle(), line.get_marker(), filled


def is_shade(colour: tuple, own: tuple) -> bool:
    """Whether a colour is another one, mixed with white."""
    part = (1 - np.array(colour)) / (1 - np.array(own))
    return bool(np.allclose(part, part[0], atol=0.01) and 0.3 < part[0] < 1.01)


def test_every_family_has_a_colour_of_its_own():
    assert set(FAMILIES) <= set(COLOURS) and len(set(COLOURS.values())) == len(COLOURS)


def test_competitors_of_the_benchmark_have_their_family_s_colour():
    outside = set(REGISTERED) - set(FAMILIES)  # the plugin's, where its tests ran before: those are drawn in one grey
    for name in {*with_static_forms(list(VARIANTS)), *PARTS} - outside:
        assert family_of(name) in COLOURS, name
    assert family_of("softmax_encoder_eager") == family_of("source_model_sdpa") == "softmax_lm"
    assert family_of("source_mixer_conv") == family_of("convolution") == "conv_lm"


def test_members_of_a_family_differ_in_line_and_marker():
    settings = {"variants": {name: {"model_type": "conv_lm"} for name in "abc"} | {"d": {"model_type": "softmax_lm"}}}
    drawn = styles(of_variants(settings))
    assert {drawn[name]["color"] for name in "abc"} == {drawn["a_equal_compute"]["color"]} == {COLOURS["conv_lm"]}
    assert len({(drawn[name]["linestyle"], drawn[name]["marker"]) for name in "abc"}) == 3
    assert drawn["d"]["color"] == COLOURS["softmax_lm"]


def test_softmax_attention_of_a_control_is_drawn_as_the_control():
    control = {"model_type": "control_attention_lm"}
    found = of_variants({"variants": {"a": control, "b": {**control, "weights": "elu"}}})
    drawn = styles(found)
    assert drawn["a"]["color"] == COLOURS["softmax_lm"] and drawn["b"]["color"] == OTHER


def test_variants_of_published_results_can_be_told_apart():
    compared = 0
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text())
        settings = results.get("settings", {})
        if isinstance(settings, dict) and isinstance(settings.get("variants"), dict):
            typed = {name: v for name, v in settings["variants"].items() if isinstance(v, dict) and "model_type" in v}
            drawn = styles(of_variants({"variants": typed}))
            looks = [(drawn[name]["color"], drawn[name]["linestyle"], drawn[name]["marker"]) for name in typed]
            assert len(set(looks)) == len(looks), path.name
            compared += 1
    assert compared > 5


def test_curves_of_unknown_families_differ_too():
    one, other = styles({"a": "retention_lm", "b": "control_attention_lm"}).values()
    assert one["color"] == other["color"] == OTHER and one["marker"] != other["marker"]


@pytest.mark.parametrize("name", CURVES)
def test_curves_of_a_figure_are_told_apart_and_have_the_colour_of_their_family(drawn, name):
    for panel in drawn(name).axes:
        looks = {label: look(line) for label, line in curves(panel).items()}
        assert len(set(looks.values())) == len(looks)
        for label, (colour, *_) in looks.items():
            family = FIRST.get(re.split("[_, ]", label)[0])
            if family is not None:
                assert is_shade(colour, to_rgb(COLOURS[family])), label
        if looks and panel.spines.bottom.get_visible() and panel.spines.top.get_visible():  # of a break one part has it
            assert panel.get_ylabel() and panel.get_xlabel(), panel.get_title()


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_does_not_hide_one_that_it_equals(drawn, name):
    for panel in drawn(name).axes:
        lines = [line for label, line in curves(panel).items() if len(line.get_xdata()) > 2]
        for below, above in combinations(sorted(lines, key=lambda line: line.get_zorder()), 2):
            shared = [np.isin(line.get_xdata(), other.get_xdata()) for line, other in ((below, above), (above, below))]
            ours, theirs = (np.asarray(line.get_ydata(), float)[at] for line, at in zip((below, above), shared))
            if len(ours) > 2 and len(ours) == len(below.get_xdata()) and np.allclose(ours, theirs, rtol=0.04):
                assert above.get_linewidth() < below.get_linewidth(), (below.get_label(), above.get_label())


@pytest.mark.parametrize("name", ["linearized_decoder", "quadratic_kernel_lm_rank", "linformer_lm_lowrank"])
def test_legends_stand_beside_the_curves(drawn, name):
    figure = drawn(name)
    FigureCanvasAgg(figure).draw()
    for panel in figure.axes:
        if panel.get_legend() is not None:
            frame, legend = panel.get_window_extent(), panel.get_legend().get_window_extent()
            assert not frame.overlaps(legend), panel.get_title()


def test_attention_that_copies_its_cache_says_so_and_parts_have_a_legend_of_their_own(drawn):
    figure = drawn("conv_lm_benchmark")
    panels = {panel.get_title().partition("\n")[0]: panel for panel in figure.axes}
    decoded = curves(panels["Decode, one token"])
    assert set(decoded) == {"conv_lm", "softmax_lm, growing cache", "gpt2_sdpa, growing cache"}
    (models,) = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert len(models) < 12 and set(curves(panels["Parts"])) <= set(PARTS) and not set(models) & set(PARTS)
    assert any(len(bar.lines[2]) for bar in panels["Forward"].containers)  # quartiles


def test_the_null_of_shuffled_rows_is_grey_and_dashed(drawn):
    (panel,) = drawn("linformer_lm_lowrank").axes
    own, shuffled = (curves(panel)[name] for name in ("attention of the encoder", "its weights, each row shuffled"))
    assert (own.get_color(), own.get_linestyle()) == (COLOURS["softmax_lm"], "-")
    assert (shuffled.get_color(), shuffled.get_linestyle()) == (OTHER, "--")


def test_slopes_are_named_in_every_panel(drawn):
    for panel in drawn("growth").axes:
        assert {text.get_text() for text in panel.texts} == {"N", "N^2", "N^3"}


@pytest.mark.parametrize("name, level", [("recall_capacity", "chance"), ("compare_protocol", "trigram")])
def test_chance_and_n_grams_are_lines(drawn, name, level):
    results, figure = load(name), drawn(name)
    height = results["chance"] if level == "chance" else np.log(results["ngrams"]["trigram"]["mean"])
    panels = [panel for panel in figure.axes if "above" not in panel.get_ylabel()]
    crossed = [
        any(np.allclose(line.get_ydata(), height) and panel.get_ylim()[0] < height < panel.get_ylim()[1]
            for line in panel.get_lines())
        for panel in panels
    ]  # fmt: skip
    assert sum(crossed) == (1 if level == "chance" else 2)  # by position, and by FLOPs


@pytest.mark.parametrize("name", ["linearized_smollm2_sparse", "linearized_minilm_conv"])
def test_the_floor_is_drawn_beside_what_it_is_the_floor_of(drawn, name):
    results = load(name)
    figure = drawn(by=lambda image: linearizing_report.draw(results, image))
    floors = [line for panel in figure.axes for label, line in curves(panel).items() if "floor" in label]
    assert any(np.allclose(line.get_ydata(), results["floor"]["loss"]) for line in floors)
    for y in (y for line in floors for y in line.get_ydata()):
        assert any(panel.get_ylim()[0] < y < panel.get_ylim()[1] for panel in figure.axes)


def test_the_axis_breaks_between_a_few_values_and_many():
    assert figures.gap_in([3, 1, 2, 9]) == 3 and figures.gap_in([3, -5, 2, 1]) == 1
    assert figures.gap_in([1, 2, 8, 9]) is None  # as many on both sides
    assert figures.gap_in([1, 2, 3, 4, 5]) is None and figures.gap_in([2]) is None and figures.gap_in([2, 2]) is None
    figure = figures.empty_figure()
    for values, more, edges in (([1, 2, 3, 9], [5], (3, 5)), ([-5, 1, 2, 3], [0], (0, 1))):
        upper, lower = figures.broken_panel(figure, figure.add_gridspec(1, 1)[0], values, more)
        assert edges[0] < lower.get_ylim()[1] < upper.get_ylim()[0] < edges[1]
        assert lower.get_ylim()[0] < min(values) and max(values) < upper.get_ylim()[1]
        heights = [panel.get_position().height for panel in (upper, lower)]
        assert (heights[0] < heights[1]) == (edges == (3, 5))
    (whole,) = figures.broken_panel(figure, figure.add_gridspec(1, 1)[0], [1, 2])
    assert whole.spines.top.get_visible()


def test_losses_of_bytes_say_so():
    assert figures.loss_unit({"pretrain": {"train_tokenizer_vocab_size": 260}}) == "nats per token, about a byte"
    assert figures.loss_unit({"pretrain": {"train_tokenizer_vocab_size": 2048}}) == "nats per token"
    assert figures.loss_unit({"pretrain": {}}) == "nats per token"


def test_shades_end_with_the_colour_itself():
    light, own = shades("conv_lm", 2)
    assert own == pytest.approx(to_rgb(COLOURS["conv_lm"])) and all(a > b for a, b in zip(light, own))
    assert shades("conv_lm", 1) == [own]
