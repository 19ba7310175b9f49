"""One colour a family, and curves that differ within it."""

import json

import pytest
from matplotlib.colors import to_rgb

from ordnung.modeling.registration import FAMILIES, REGISTERED
from ordnung.scripts.benchmarks.mixer import PARTS
from ordnung.scripts.benchmarks.variants import VARIANTS, with_static_forms
from ordnung.scripts.common.figures import COLOURS, OTHER, family_of, of_variants, shades, styles
from ordnung.scripts.reports.results import RESULTS


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


def test_shades_end_with_the_colour_itself():
    light, own = shades("conv_lm", 2)
    assert own == pytest.approx(to_rgb(COLOURS["conv_lm"])) and all(a > b for a, b in zip(light, own))
    assert shades("conv_lm", 1) == [own]
