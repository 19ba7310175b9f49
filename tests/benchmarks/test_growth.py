"""scripts/growth.py: exponents of known powers, and of the families."""

import json

import pytest

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import growth as program
from ordnung.scripts.benchmarks.growth import exponents, plot
from ordnung.scripts.common.errors import ScriptError


def test_exponents_of_powers():
    found = exponents([1, 2, 4, 8], [3 * n**2 for n in (1, 2, 4, 8)])
    assert found["all"] == pytest.approx(2) and found["last"] == pytest.approx(2)
    found = exponents([1, 2, 4], [1, 1, 8])
    assert found["last"] == pytest.approx(3) and found["all"] == pytest.approx(1.5)


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
