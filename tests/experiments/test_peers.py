"""The program that compares conversions with transformers' own classes, and the table that it wrote."""

import json
from pathlib import Path

import pytest

import ordnung
from ordnung.scripts import peers as program
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.experiments import peers


def check(results):
    for peer in results["peers"]:
        for what, difference in peer["differences"].items():
            assert difference is True or (difference is not False and difference <= 1e-10), (peer["name"], what)


def test_every_architecture_equals_its_peer(tmp_path, capsys):
    assert program.main(["--seed", "3", "--output_file", str(tmp_path / "peers.json")]) == 0
    results = json.loads((tmp_path / "peers.json").read_text())
    check(results)
    assert [peer["name"] for peer in results["peers"]] == [*peers.ENCODERS, *peers.DECODERS]
    assert results["machine"]["commit"] is not None or not (Path(ordnung.__file__).parent / ".git").exists()
    assert "| qwen3" in capsys.readouterr().out


def test_a_wrong_weight_shows(monkeypatch):
    """What a conversion leaves out is in the table."""
    right = peers.convert

    def wrong(source, *arguments, **more):
        model, report = right(source, *arguments, **more)
        next(model.parameters()).data.add_(1e-3)
        return model, report

    monkeypatch.setattr(peers, "convert", wrong)
    differences = peers.compare_random("llama")
    assert differences["logits, unpadded"] > 1e-6


def test_committed_table_has_real_checkpoints_too():
    results = json.loads((Path(ordnung.__file__).parent / "model_cards/results/peers.json").read_text())
    check(results)
    names = [peer["name"] for peer in results["peers"]]
    assert {"SmolLM2-135M-Instruct (llama)", "all-MiniLM-L6-v2 (bert)"} <= set(names)
    assert set(peers.ENCODERS) | set(peers.DECODERS) <= set(names)


def test_a_folder_that_is_not_there_is_refused_in_words(tmp_path):
    with pytest.raises(ScriptError, match="--sources .*none is no folder"):
        program.main(["--sources", str(tmp_path / "none")])
