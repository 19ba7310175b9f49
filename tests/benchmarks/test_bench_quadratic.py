"""bench_quadratic.py from end to end, and that it measures nothing that is wrong."""

import json

import pytest

from ordnung.scripts import bench_quadratic
from ordnung.scripts.benchmarks import quadratic
from ordnung.scripts.common.errors import ScriptError

TINY = ["--head_sizes", "2", "4", "--lengths", "8", "40", "--decode_lengths", "9", "20", "--decode_steps", "2"]
TINY += ["--repeats", "2", "--heads", "2", "--chunk_size", "16", "--model_lengths", "12", "5"]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.draws
def test_program_writes_what_its_tables_need(gate, device, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert bench_quadratic.main([*TINY, f"--decay_gate={gate}", "--device", device, "--output", str(out)]) == 0
    results = json.loads(out.read_text())
    assert quadratic.markdown(results) in capsys.readouterr().out
    assert [(row["head_size"], row["length"]) for row in results["lengths"]] == [(2, 8), (2, 40), (4, 8), (4, 40)]
    for row in results["lengths"]:
        assert all(row[task][name]["n"] == 2 for task in quadratic.TASKS for name in ("squared", "softmax"))
    assert [(row["head_size"], row["length"]) for row in results["decoding"]] == [(2, 9), (2, 20), (4, 9), (4, 20)]
    assert results["state_tokens"] == {"2": 6 * 3 / 4, "4": 15 * 5 / 8}
    assert [row["length"] for row in results["models"]] == [5, 12]
    sizes = [[row["bytes"][name] for row in results["models"]] for name in quadratic.CACHES]
    assert sizes[0][0] == sizes[0][1] and sizes[1][0] < sizes[1][1] and sizes[2][0] < sizes[2][1]
    assert (tmp_path / "out.png").stat().st_size > 10_000


def rows(*ratios):
    return [
        {"head_size": 8, "length": n, "forward": {"softmax": {"median": ratio}, "squared": {"median": 1.0}}}
        for n, ratio in zip((100, 200, 400), ratios)
    ]


def test_crossover_lies_between_lengths():
    assert quadratic.crossover(rows(0.5, 2.0, 4.0), 8, "forward") == pytest.approx(100 * 2**0.5)
    assert quadratic.crossover(rows(2.0, 0.5, 2.0), 8, "forward") == pytest.approx(200 * 2**0.5)
    assert quadratic.crossover(rows(1.5, 2.0, 4.0), 8, "forward") == 100
    assert quadratic.crossover(rows(0.1, 0.5, 0.9), 8, "forward") is None


def test_wrong_outputs_are_not_timed(tmp_path, monkeypatch):
    right = quadratic.squared
    monkeypatch.setattr(quadratic, "squared", lambda *args, **more: right(*args, **more).roll(1, 1))
    with pytest.raises(ScriptError, match="differs from its formula by .* at head size 2"):
        bench_quadratic.main([*TINY, "--output", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


def test_claims_say_what_was_reached():
    def row(d, length, ratio):
        return {
            "head_size": d,
            "length": length,
            "forward": {"softmax": {"median": ratio}, "squared": {"median": 1.0}},
        }

    models = [
        {"length": n, **{name: {"median": time} for name in quadratic.CACHES}} for n, time in ((9, 1.2), (5, 1.0))
    ]
    results = {"lengths": [row(16, 4096, 2.4), row(64, 16384, 1.5)], "models": models}
    lines = {line.split("|")[1].strip(): line.split("|")[3:5] for line in quadratic.claims(results).splitlines()}
    verdicts = {what: [cell.strip() for cell in cells] for what, cells in lines.items()}
    assert verdicts["d = 16, 4,096 tokens"] == ["2.40×", "yes"]
    assert verdicts["d = 64, 16,384 tokens"] == ["1.50×", "no"]
    assert verdicts["d = 32, 4,096 tokens"] == ["-", "not run"]
    assert verdicts["a step after 9 tokens against one after 5: QuadraticKernelLM"] == ["1.20×", "no"]
