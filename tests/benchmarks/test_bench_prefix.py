"""bench_prefix.py from end to end, and that it measures nothing that is wrong."""

import json

import pytest

from ordnung.scripts import bench_prefix
from ordnung.scripts.benchmarks import prefix
from ordnung.scripts.common.errors import ScriptError

TINY = ["--layers", "2", "3", "--lengths", "8", "16", "--count_lengths", "16", "32", "--decode_lengths", "12", "14"]
TINY += ["--decode_steps", "2", "--repeats", "1", "--hidden_size", "16", "--num_attention_heads", "2"]


def test_program_writes_what_its_tables_need(tmp_path, capsys):
    bench_prefix.main([*TINY, "--output", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())
    assert prefix.markdown(results) in capsys.readouterr().out
    assert [(row["layers"], row["length"]) for row in results["training"]] == [(2, 8), (2, 16), (3, 8), (3, 16)]
    for row in results["training"]:
        costs = row["competitors"]
        assert costs["causal"]["flops"] < costs["stride"]["flops"] < costs["cubic"]["flops"]
        assert costs["recomputed"]["saved_bytes"] < costs["cubic"]["saved_bytes"]
        assert all(len(cost["all_seconds"]) == 1 for cost in costs.values())
    assert [decoding["length"] for decoding in results["decoding"]] == [12, 14]
    assert results["machine"]["threads"] == results["settings"]["threads"] == 1


def test_exponents():
    assert prefix.growth({"128": 5.0, "256": 40.0}) == "3.00"
    assert prefix.growth({64: 1.0, 1024: 256.0}) == "2.00"
    assert prefix.growth({64: 1.0}) == "-"


def test_wrong_outputs_are_not_timed(tmp_path, monkeypatch):
    right = prefix.predict
    monkeypatch.setattr(prefix, "predict", lambda model, tokens: right(model, tokens).roll(1, 1))
    with pytest.raises(ScriptError, match="cubic differs from naive by .* with 2 layers and 8 tokens"):
        bench_prefix.main([*TINY, "--output", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()
