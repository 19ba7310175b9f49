"""scripts/growth.py: exponents of known powers, and of the families."""

import json

import pytest
from scipy.stats import linregress

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import growth as program
from ordnung.scripts.benchmarks.growth import cheaper_from, crossover, exponents, plot
from ordnung.scripts.common.errors import ScriptError


def test_exponents_of_powers():
    found = exponents([1, 2, 4, 8], [3 * n**2 for n in (1, 2, 4, 8)])
    assert found["all"] == pytest.approx(2) and found["last"] == pytest.approx(2)
    found = exponents([1, 2, 4], [1, 1, 8])
    assert found["last"] == pytest.approx(3) and found["all"] == pytest.approx(1.5)
    line = linregress([0, 1, 2], [0, 0, 3])  # three points, one degree of freedom
    assert found["high"] - found["all"] == pytest.approx(12.7062 * line.stderr, rel=1e-5)
    assert exponents([1, 2, 4, 8], [1, 2, 4, 8])["low"] == pytest.approx(1)  # a power of the length leaves no doubt
    assert exponents([1, 2, 4], [7, 7, 7]) == {"all": 0, "low": 0, "high": 0, "last": 0}  # nor does a constant


def test_crossovers_lie_between_lengths():
    assert crossover([100, 200, 400], [0.5, 2.0, 4.0]) == pytest.approx(100 * 2**0.5)
    assert crossover([100, 200], [2.0, 2.0]) == 100 and crossover([100, 200], [2.0, 0.5]) is None
    families = {
        "softmax_lm": {"train": {"values": [1, 4]}, "decode": {"values": [1, 2]}},
        "conv_lm": {"train": {"values": [2, 2]}, "decode": {"values": [3, 3]}},
    }
    results = {"lengths": [64, 256], "families": families}
    assert [cheaper_from(results, "conv_lm", task) for task in ("train", "decode")] == ["128", "not up to the longest"]


@pytest.mark.draws
def test_families_grow_as_they_say(tmp_path, capsys):
    output = tmp_path / "growth.json"
    assert program.main(["--shortest", "128", "--longest", "2048", "--output_file", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["lengths"] == [128, 256, 512, 1024, 2048] and set(results["families"]) == set(FAMILIES)
    last = {name: {task: of[task]["exponent"]["last"] for task in of} for name, of in results["families"].items()}
    assert [last["conv_lm"][task] for task in ("decode", "state")] == pytest.approx([0, 0], abs=1e-9)
    assert last["conv_lm"]["train"] == pytest.approx(1, abs=0.01)
    assert 1 < last["softmax_lm"]["train"] < 2 < last["cubic_prefix_lm"]["train"] < 3
    assert last["softmax_lm"]["state"] == pytest.approx(1) and last["cubic_prefix_lm"]["decode"] > 1
    assert "| cubic_prefix_lm" in capsys.readouterr().out
    plot(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_lengths_must_double():
    with pytest.raises(ScriptError, match=r"--longest \(100\) must be at least twice --shortest \(64\)"):
        program.main(["--shortest", "64", "--longest", "100", "--output_file", "any"])
