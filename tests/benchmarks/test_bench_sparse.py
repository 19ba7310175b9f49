"""bench_sparse.py on tiny sizes: what it compares is equal, its tables, and wrong results."""

import json

import pytest
import torch

from ordnung.scripts import bench_sparse
from ordnung.scripts.benchmarks import sparse
from ordnung.scripts.common.errors import ScriptError


def test_program_from_end_to_end(device, tmp_path, capsys):
    path = tmp_path / "bench.json"
    sizes = {"lengths": "100 200", "backward_lengths": "90", "encoder_lengths": "64", "decode_lengths": "50 70"}
    argv = [word for name, value in sizes.items() for word in (f"--{name}", *value.split())]
    argv += ["--window", "32", "--num_attention_heads", "2", "--decode_steps", "2", "--rounds", "2", "--flex", "False"]
    assert bench_sparse.main([*argv, "--device", device, "--output", str(path)]) == 0
    results, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert sparse.markdown(results) in printed and "Its peak memory, forward and backward" in printed
    assert [row["length"] for row in results["attention"]] == [100, 200, 90]
    for row in (*results["attention"], *results["encoders"], *results["decoding"]):
        assert all(each["seconds"] > 0 and len(each["all_seconds"]) == 2 for each in row["competitors"].values())
    states = [row["competitors"] for row in results["decoding"]]
    assert states[0]["local"]["state_bytes"] == states[1]["local"]["state_bytes"]
    assert states[0]["full attention, dynamic"]["state_bytes"] < states[1]["full attention, dynamic"]["state_bytes"]


def test_what_is_wrong_is_not_timed(monkeypatch):
    options = bench_sparse.SparseBenchOptions(window=16, num_attention_heads=2, rounds=1, encoder_lengths=[32])
    right = sparse.LongformerModel.forward

    def wrong(self, *args, **kwargs):
        output = right(self, *args, **kwargs)
        return (output[0] + 0.01,)

    monkeypatch.setattr(sparse.LongformerModel, "forward", wrong)
    with pytest.raises(ScriptError, match="SparseAttentionLM differs by .*nothing is timed"):
        sparse.measure_encoders(options, 32, backward=False)
    with pytest.raises(ScriptError, match="x differs"):
        sparse.check("x", torch.tensor([1.0, torch.nan]), torch.ones(2))


def test_where_flex_attention_cannot_run_its_row_says_why():
    options = bench_sparse.SparseBenchOptions(window=16, num_attention_heads=2, rounds=1)

    def broken(query, key, value):
        raise RuntimeError("no C++ compiler. Install one.\nand more")

    results = {"settings": vars(options), "encoders": [], "prefill": [], "decoding": []}
    results["attention"] = [sparse.measure_attention(options, 40, False, broken)]
    assert results["attention"][0]["competitors"][sparse.FLEX] == {"reason": "no C++ compiler"}
    assert "| no C++ compiler" in sparse.markdown(results)
    inputs = [torch.randn(1, 20, 2, 64, requires_grad=True) for _ in range(3)]
    assert "does not support backward on CPU" in sparse.flex_reason(sparse.compiled_flex(16, "cpu"), inputs, True)


def test_exponent_is_that_of_the_last_two_lengths():
    rows = [{"length": n, "competitors": {"a": {"seconds": n**2.0}}} for n in (1, 10, 20)]
    assert sparse.growth(rows, "a") == "2.00" and sparse.growth(rows, "b") == "-"


def test_claims_say_what_was_reached():
    def row(length, backward, **faster):
        return {"length": length, "backward": backward, "competitors": {k: {"faster": v} for k, v in faster.items()}}

    results = {
        "attention": [row(4096, False, local=3.7, all=2.2), row(4096, True, local=9.0)],
        "decoding": [{"length": 32768, "competitors": {"local": {"faster": 5.5}, "local + global": {"faster": 4.9}}}],
    }
    peaks = {"SDPA": {"peak_bytes": 1000}, "local": {"peak_bytes": 990}}
    peaks["local"]["faster"] = peaks["SDPA"]["faster"] = 9.6
    results["attention"].append({"length": 16384, "backward": False, "competitors": peaks})
    lines = {line.split("|")[1].strip(): line.split("|")[3:5] for line in sparse.claims(results).splitlines()}
    verdicts = {what: [cell.strip() for cell in cells] for what, cells in lines.items()}
    assert verdicts["local, forward, 4,096 tokens"] == ["3.70×", "no"]
    assert verdicts["all, forward, 4,096 tokens"] == ["2.20×", "yes"]
    assert verdicts["local, forward and backward, 4,096 tokens"] == ["9.00×", "yes"]
    assert verdicts["local, peak memory, forward, 16,384 tokens"] == ["0.990", "yes"]
    assert verdicts["local, forward, 8,192 tokens"] == ["-", "not run"]
    assert verdicts["local, one more token of a layer, 32,768 tokens"] == ["5.50×", "yes"]
    assert verdicts["local + global, one more token of a layer, 32,768 tokens"] == ["4.90×", "no"]
