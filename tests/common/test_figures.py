"""One colour a family, and curves that differ within it."""

from ordnung.modeling.registration import FAMILIES, REGISTERED
from ordnung.scripts.benchmarks.mixer import PARTS
from ordnung.scripts.benchmarks.variants import VARIANTS, with_static_forms
from ordnung.scripts.common.figures import COLOURS, family_of, of_variants, styles


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
