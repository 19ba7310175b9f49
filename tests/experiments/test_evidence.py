"""compare.py: its measures against their definitions, and the program from end to end; the recipes that are shipped."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_variants import VARIANTS, write_config
from transformers import AutoModelForCausalLM

from ordnung.scripts import compare as compare_program
from ordnung.scripts import recall as recall_program
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.common.tables import estimate, seeds_described, summarise
from ordnung.scripts.experiments import compare, starts, sweep
from ordnung.scripts.experiments.options import CompareOptions, RecallOptions, TransferOptions
from ordnung.scripts.experiments.scores import SCORES
from ordnung.scripts.experiments.variants import variant_configs
from ordnung.scripts.pretraining import run as pretraining
from ordnung.scripts.reports import widths
from ordnung.scripts.reports.results import RESULTS
from ordnung.scripts.training.loop import NotFiniteError
from ordnung.scripts.training.runs import claim_output_dir

WORDS = "whale ship sea captain the a of and sailed harpoon white wind storm night day mast".split()


class TestCompareProgram:
    @pytest.fixture
    def argv(self, tmp_path, monkeypatch):
        """A comparison on many documents, so that held-out text is chosen by chance."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        AcceleratorState._reset_state(reset_partial_state=True)
        random = np.random.default_rng(0)
        texts = [" ".join(random.choice(WORDS, size=60)) for _ in range(40)]
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
        return write_config(
            tmp_path / "compare.yaml",
            baseline="softmax",
            pretrain={
                "train_file": str(tmp_path / "text.jsonl"),
                "text_column": "body",
                "validation_fraction": 0.1,
                "train_tokenizer_vocab_size": 300,
                "block_size": 24,
                "per_device_train_batch_size": 4,
                "max_steps": 3,
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "lr_scheduler_type": "cosine_with_min_lr",
                "use_cpu": True,
            },
        )

    @pytest.mark.draws
    def test_from_end_to_end_and_again(self, argv, tmp_path, monkeypatch, capsys):
        assert compare_program.main(argv) == 0
        folder = tmp_path / "out"
        results = json.loads((folder / "results.json").read_text())
        assert (folder / "positions.png").stat().st_size > 0
        assert (folder / "results.md").read_text().strip() in capsys.readouterr().out
        assert results["seeds"] == [0, 1] and results["machine"]["threads"] == torch.get_num_threads()
        for name, result in results["variants"].items():
            runs = [json.loads((folder / "runs" / f"{name}-seed{i}" / "results.json").read_text()) for i in (0, 1)]
            assert result["eval_loss"]["values"] == [run["evaluation"]["eval_loss"] for run in runs]
            assert [run["seed"] for run in runs] == [0, 1]
            buckets = result["loss_by_position"]
            assert [(bucket["first"], bucket["last"]) for bucket in buckets] == [(1, 15), (16, 23)]
            for seed in (0, 1):  # every position has as many tokens as any other
                mean = sum(b["values"][seed] * (b["last"] - b["first"] + 1) for b in buckets) / 23
                assert mean == pytest.approx(result["eval_loss"]["values"][seed], abs=1e-5)
        conv, softmax = results["variants"].values()
        assert softmax["perplexity_change"]["values"] == [0, 0]
        ratios = np.divide(conv["eval_perplexity"]["values"], softmax["eval_perplexity"]["values"])
        np.testing.assert_allclose(conv["perplexity_change"]["values"], ratios - 1)

        # one run is lost, and a seed is added
        (folder / "runs" / "conv-seed1" / "results.json").unlink()
        ran, run = [], pretraining.run
        monkeypatch.setattr(pretraining, "run", lambda options: ran.append(options) or run(options))
        assert compare_program.main([*argv, "--seeds", "0", "1", "2"]) == 0
        folders = [options.output_dir.rsplit("/", 1)[1] for options in ran]
        assert folders == ["conv-seed1", "conv-seed2", "softmax-seed2"]
        again = json.loads((folder / "results.json").read_text())["variants"]
        assert again["conv"]["eval_loss"]["values"][:2] == pytest.approx(conv["eval_loss"]["values"])

        with pytest.raises(ScriptError, match='"max_steps": 3.*, not .*"max_steps": 4'):
            compare_program.main([*argv, "--pretrain", "max_steps=4"])

    def test_equal_compute(self, argv, tmp_path):
        variants = {"cubic": {"model_type": "cubic_prefix_lm"}, "softmax": {"model_type": "softmax_lm"}}
        argv += ["--variants", json.dumps(variants), "--seeds", "0", "--pretrain", "eval_steps=1,max_steps=2"]
        argv += ["--equal_compute", "softmax"]
        assert compare_program.main(argv) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())["variants"]
        cubic, longer = results["cubic"], results["softmax_equal_compute"]
        assert results["softmax"]["steps"] == cubic["steps"] == 2 < longer["steps"]
        costs = [result["tokens"] * result["forward_flops_per_token"] for result in (cubic, longer)]
        assert costs[1] == pytest.approx(costs[0], rel=0.5 / longer["steps"])
        assert len(longer["curve"]) >= len(cubic["curve"]) == 3
        assert longer["curve"][-1] == {"step": longer["steps"], "eval_loss": longer["eval_loss"]}
        table = (tmp_path / "out" / "results.md").read_text()
        assert "| softmax_equal_compute |" in table and f"| {longer['steps']} " in table

        # a dearer variant makes equal compute longer
        deeper = {"deeper": {"model_type": "cubic_prefix_lm", "num_hidden_layers": 3}}
        with pytest.raises(ScriptError, match=f"softmax_equal_compute-seed0 was trained for {longer['steps']} steps"):
            compare_program.main([*argv, "--variants", json.dumps(deeper)])
        assert not (tmp_path / "out" / "runs" / "deeper-seed0").exists()

    def test_some_of_the_variants_now_and_the_others_later(self, argv, tmp_path):
        argv += ["--seeds", "0"]
        assert compare_program.main([*argv, "--only", "softmax"]) == 0
        assert {folder.name for folder in (tmp_path / "out" / "runs").iterdir()} == {"softmax-seed0"}
        table = (tmp_path / "out" / "results.md").read_text()
        assert "| softmax" in table and "| conv" not in table
        assert compare_program.main(argv) == 0
        assert set(json.loads((tmp_path / "out" / "results.json").read_text())["variants"]) == {"conv", "softmax"}

    def test_what_an_earlier_comparison_has_trained_is_taken_over(self, argv, tmp_path, monkeypatch, capsys):
        argv += ["--sweep", "learning_rate=[1e-3,1e-2],max_steps=2"]
        assert compare_program.main([*argv, "--only", "softmax", "--output_dir", str(tmp_path / "first")]) == 0
        path = tmp_path / "first" / "results.json"
        first = json.loads(path.read_text())
        ran, run = [], pretraining.run
        monkeypatch.setattr(pretraining, "run", lambda options: ran.append(options) or run(options))
        (tmp_path / "text.jsonl").rename(tmp_path / "moved.jsonl")
        argv += ["--pretrain", f"train_file={tmp_path / 'moved.jsonl'}"]
        twice = ["--earlier", str(path), "--equal_compute", "conv", "--equal_compute_with", "softmax"]
        assert compare_program.main([*argv, *twice]) == 0
        assert {Path(options.output_dir).name.split("-")[0] for options in ran[2:]} == {"conv", "conv_equal_compute"}
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["variants"]["softmax"] == first["variants"]["softmax"] and len(results["variants"]["conv"]) > 9
        assert results["sweep"]["softmax"] == first["sweep"]["softmax"] and len(results["sweep"]["conv"]) == 2
        assert results["earlier"] == [{"machine": first["machine"], "variants": ["softmax"]}]

        # what was tried otherwise is tried again, and what was chosen by it trained again
        less = json.loads(path.read_text())
        del less["sweep"]["softmax"][0]
        (tmp_path / "less.json").write_text(json.dumps(less))
        count = len(ran)
        again = [*argv, "--earlier", str(tmp_path / "less.json"), "--output_dir", str(tmp_path / "less")]
        assert compare_program.main([*again, "--only", "softmax"]) == 0 and len(ran) == count + 4
        assert "Trained earlier: softmax." in capsys.readouterr().out

        # a file that has taken over is itself taken over, and says who has trained what
        del ran[:]
        path = tmp_path / "out" / "results.json"
        again = [*argv, "--earlier", str(path), "--output_dir", str(tmp_path / "again")]
        assert compare_program.main(again) == 0 and not ran
        third = json.loads((tmp_path / "again" / "results.json").read_text())
        assert [origin["variants"] for origin in third["earlier"]] == [["softmax"], ["conv"]]
        assert [origin["machine"] for origin in third["earlier"]] == [first["machine"], results["machine"]]

        for wrong, message in (
            (["--pretrain", "max_steps=4"], 'was made with pretrain .*"max_steps": 3.*, not .*"max_steps": 4'),
            (["--seeds", "0"], r"was made with seeds \[0, 1\], not \[0\]: leave it out"),
            (["--variants", "softmax={model_type: softmax_lm}"], "was made with variant softmax "),
            (["--earlier", str(tmp_path / "no.json")], "no.json cannot be read .*name a results.json"),
            (["--earlier", str(tmp_path / "out" / "settings.json")], "is no results.json of this program with ngrams"),
        ):
            with pytest.raises(ScriptError, match=message):
                compare_program.main([*again, *wrong, "--output_dir", str(tmp_path / "wrong")])
        lines = (tmp_path / "moved.jsonl").read_text().split("\n")
        (tmp_path / "moved.jsonl").write_text("\n".join(lines[:20]))
        with pytest.raises(
            ScriptError, match="was made with another text: a bigram that has counted it has perplexity"
        ):
            compare_program.main([*again, "--output_dir", str(tmp_path / "wrong")])
        assert not ran

    def test_a_dear_variant_at_the_flops_of_another(self, argv, tmp_path):
        variants = {"cubic": {"model_type": "cubic_prefix_lm"}, "softmax": {"model_type": "softmax_lm"}}
        argv += ["--variants", json.dumps(variants), "--seeds", "0", "--pretrain", "max_steps=12"]
        argv += ["--sweep", "learning_rate=[1e-3,1e-2],max_steps=8", "--equal_compute", "cubic"]
        argv += ["--equal_compute_with", "softmax", "--equal_compute_only", "cubic"]
        assert compare_program.main(argv) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        found, sizes = results["variants"], {one["options"]["max_steps"] for one in results["sweep"]["cubic"]}
        assert {"softmax", "cubic_equal_compute"} < set(found) and "cubic" not in found
        softmax, cubic = found["softmax"], found["cubic_equal_compute"]
        assert softmax["steps"] == 12 > cubic["steps"] >= 1
        costs = [one["tokens"] * one["forward_flops_per_token"] for one in (softmax, cubic)]
        assert costs[1] == pytest.approx(costs[0], rel=0.5 / cubic["steps"])
        ratio = softmax["forward_flops_per_token"] / cubic["forward_flops_per_token"]
        assert sizes == {round(8 * ratio)} != {8}

    def test_each_variant_trains_with_its_best_of_a_sweep(self, argv, tmp_path, monkeypatch, capsys):
        argv += ["--seeds", "0", "--sweep", "learning_rate=[1e-5,3e-2,1e-2],max_steps=2,warmup_steps=1"]
        ran, run = [], pretraining.run
        monkeypatch.setattr(pretraining, "run", lambda options: ran.append(options) or run(options))
        assert compare_program.main(argv) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [options.max_steps for options in ran] == [2] * 6 + [3] * 2 and len(results["sweep"]["conv"]) == 3
        for name, taken in zip(VARIANTS, ran[6:]):
            losses = {one["options"]["learning_rate"]: one["eval_loss"] for one in results["sweep"][name]}
            assert taken.learning_rate == min(losses, key=losses.get) != 1e-5 and taken.warmup_steps != 1
        # what variants are compared on has no part in it
        assert all(options.validation_file is None and options.train_file == ran[0].train_file for options in ran[:6])
        assert (
            all(options.validation_file for options in ran[6:]) and "- conv: learning_rate" in capsys.readouterr().out
        )

        def diverges(options):
            raise NotFiniteError("loss nan")

        monkeypatch.setattr(pretraining, "run", diverges)
        assert compare_program.main(argv) == 0  # all is kept
        with pytest.raises(ScriptError, match="holds runs with sweep .*, not {}"):
            compare_program.main(argv[: argv.index("--sweep")])
        settings = json.loads((tmp_path / "out" / "settings.json").read_text())
        assert settings.pop("sweep")  # as earlier versions left a folder without a sweep
        (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
        with pytest.raises(ScriptError, match="holds runs with sweep {}, not .*learning_rate"):
            compare_program.main(argv)
        for run in (diverges, None):  # what diverged is not tried again
            monkeypatch.setattr(pretraining, "run", run)
            with pytest.raises(ScriptError, match="no loss of the sweep stayed finite"):
                compare_program.main([*argv, "--output_dir", str(tmp_path / "other")])

    def test_models_that_count_no_flops_and_runs_of_epochs_have_their_rows(self, tmp_path):
        results = json.loads((RESULTS / "compare_protocol.json").read_text())
        del results["settings"]["pretrain"]["max_steps"]
        results["variants"]["linformer"]["forward_flops_per_token"] = None
        (row,) = (
            line for line in compare.markdown(results).splitlines() if line.startswith("| linformer ") and "116" in line
        )
        assert row.split("|")[-3].strip() == "-" and "| 1,500 |" in row
        compare.plot(results, tmp_path / "course.png")
        assert (tmp_path / "course.png").stat().st_size

    def test_a_model_of_transformers_own_stands_beside_ours(self, argv, tmp_path):
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
        variants = {"gpt2": {"model_type": "gpt2", **shape}, "conv": {"model_type": "conv_lm"}}
        argv += ["--seeds", "0", "--variants", json.dumps(variants), "--baseline", "gpt2"]
        with pytest.raises(ScriptError, match="variant gpt2 is a gpt2, which counts no FLOPs: .*--equal_compute_with"):
            compare_program.main([*argv, "--equal_compute", "conv"])
        assert compare_program.main([*argv, "--equal_compute", "conv", "--equal_compute_with", "softmax"]) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["variants"]["gpt2"]["forward_flops_per_token"] is None
        (row,) = (
            x
            for x in (tmp_path / "out" / "results.md").read_text().splitlines()
            if x.startswith("| gpt2") and "all" in x
        )
        assert row.split("|")[-3].strip() == "-"

    def test_a_stopped_run_stops_the_comparison(self, argv, tmp_path, monkeypatch):
        ran = []
        monkeypatch.setattr(pretraining, "run", lambda options: ran.append(options) or 143)
        assert compare_program.main(argv) == 143
        assert len(ran) == 1 and not (tmp_path / "out" / "results.json").exists()

    @pytest.mark.parametrize(
        "wrong, message",
        [
            (["--pretrain", "seed=3"], "seed: the comparison sets it"),
            (["--pretrain", "objective=masked"], "leave objective"),
            (["--pretrain", "respect_document_boundaries=True"], "leave objective"),
            (["--pretrain", "max_step=3"], "did you mean 'max_steps'"),
            (["--pretrain", "validation_fraction=0"], "held-out text"),
            (
                ["--pretrain", "validation_fraction=0,validation_file=any.txt", "--sweep", "learning_rate=[0.1,0.2]"],
                "validation_fraction must be above 0, not 0: --sweep chooses on",
            ),
            (["--sweep", "learning_rate=0.1"], "--sweep has no list of values"),
            (["--sweep", "max_steps=[2,3]"], r"--sweep max_steps=\[2, 3\]: what is compared trains for as long as"),
            (
                ["--only", "conv", "--baseline", "conv", "--equal_compute", "conv"],
                "--only conv changes which variant is the dearest: name one of them by --equal_compute_with",
            ),
            (["--sweep", "learning_rat=[0.1,0.2]"], "did you mean 'learning_rate'"),
            (["--baseline", "conv_lm"], "--baseline conv_lm must be one of the variants conv, softmax"),
            (["--equal_compute", "conv_lm"], "--equal_compute conv_lm must be one of the variants conv, softmax"),
            (["--only", "no"], "--only no must be one of the variants conv, softmax"),
            (["--only", "conv", "--baseline", "softmax"], "--baseline softmax must be one of the variants conv$"),
            (["--equal_compute_with", "no"], "--equal_compute_with no must be one of the variants conv, softmax"),
            (["--equal_compute_only", "conv"], "--equal_compute_only conv must be one of equal_compute"),
            (
                ["--equal_compute", "conv", "--equal_compute_only", "conv"],
                "--equal_compute_with None must be a variant",
            ),
            (["--variants", "broken={model_type: conv_lm, kernel_size: 0}"], "variant broken: .*must be at least 1"),
            (["--variants", "broken=3"], "variant broken must be a mapping"),
            (["--variants", "a/b={model_type: conv_lm}"], "'a/b' names a folder"),
        ],
    )
    def test_bad_options(self, argv, wrong, message):
        with pytest.raises(ScriptError, match=message):
            compare_program.main([*argv, *wrong])

    def test_a_mistake_found_in_the_data_can_be_mended(self, argv, monkeypatch):
        monkeypatch.setattr(pretraining, "run", lambda options: 143)
        with pytest.raises(ScriptError, match="at least 258, not 5"):
            compare_program.main([*argv, "--pretrain", "train_tokenizer_vocab_size=5"])
        assert compare_program.main(argv) == 143


def test_n_grams_are_of_one_number_of_steps():
    def variant(steps, perplexity):
        return {"steps": steps, "eval_perplexity": {"mean": perplexity}}

    variants = {"a": variant(5, 9), "b": variant(5, 11), "a_equal_compute": variant(1234, 8)}
    results = {"settings": {"pretrain": {"max_steps": 5}}, "variants": variants, "ngrams": {"trigram": {"mean": 10}}}
    (told,) = compare.beside_counting(results)
    assert "the tokens of 5 steps. Below its trigram (10.0): a; of other lengths: a_equal_compute (1,234 st" in told


@pytest.mark.parametrize(
    "block_size, buckets",
    [(8, [(1, 7)]), (16, [(1, 15)]), (17, [(1, 15), (16, 16)]), (100, [(1, 15), (16, 31), (32, 63), (64, 99)])],
)
def test_position_buckets(block_size, buckets):
    assert compare.position_buckets(block_size) == buckets


def test_position_losses_of_a_model_that_knows_the_first_half():
    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, tokens, use_cache):
            """The next token is certain for the first five, then all 8 are as likely."""
            logits = 100.0 * torch.nn.functional.one_hot(tokens.roll(-1, 1), 8)
            logits[:, 5:] = 0
            return SimpleNamespace(logits=logits)

    losses = compare.position_losses(Model(), np.random.default_rng(0).integers(8, size=(7, 10), dtype=np.int32), 3)
    np.testing.assert_allclose(losses, [0] * 5 + [np.log(8)] * 4, atol=1e-6)


def test_summaries():
    assert summarise([1.0, 3.0]) == {"mean": 2.0, "standard_deviation": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert estimate(summarise([1.0, 3.0]), 2) == "2.00 ± 12.71"
    assert estimate(summarise([0.5]), 1, scale=100) == "50.0 (n = 1)"
    assert seeds_described([3]) == "seed 3 alone (n = 1)" and "n = 2 seeds (0, 1)" in seeds_described([0, 1])


def test_a_folder_of_other_things_is_not_claimed(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ScriptError, match="something else"):
        claim_output_dir(tmp_path, {}, {})


def shipped(name, options_type):
    path = Path(recall_program.__file__).parent / "configs" / f"{name}.yaml"
    return parse_options(options_type, ["--config", str(path)])


@pytest.mark.parametrize("name, most", [("compare_protocol", 1.02), ("compare_feed_forward", 1.05)])
def test_protocol_matches_parameters_and_tries_rates_and_warm_ups(name, most):
    options = shipped(name, CompareOptions)
    choices = sweep.grid(options.sweep)
    assert len(choices) == 9 and {choice["max_steps"] for choice in choices} == {600}
    assert len(options.seeds) >= 5 and options.pretrain["max_steps"] >= 1500
    with torch.device("meta"):
        sizes = [
            AutoModelForCausalLM.from_config(config).num_parameters()
            for config in variant_configs(options.variants, options.config_overrides, vocab_size=260).values()
        ]
    assert max(sizes) <= most * min(sizes)


@pytest.mark.parametrize("name, options", [("compare_sizes", CompareOptions), ("recall_capacity", RecallOptions)])
def test_names_end_with_the_width(name, options):
    options = shipped(name, options)
    configs = variant_configs(options.variants, options.config_overrides)
    assert {int(variant.rpartition("_")[2]) == config.hidden_size for variant, config in configs.items()} == {True}
    assert len({tuple(sorted(found)) for found in widths.by_kind({"variants": options.variants}).values()}) == 1


def test_ladder_takes_every_score_beside_a_convolution():
    for options in (shipped("ladder_compare", CompareOptions), shipped("ladder_recall", RecallOptions)):
        configs = variant_configs(options.variants, options.config_overrides)
        scores = {name: getattr(config, "score", None) for name, config in configs.items()}
        assert scores == {**{name: name for name in SCORES}, "convolution": None} and len(options.seeds) == 5


def test_table_of_linformer_takes_every_way_to_share():
    options = shipped("transfer_linformer", TransferOptions)
    made = {(v.get("projection_sharing"), v.get("projected_size")) for v in options.variants.values()}
    assert {share for share, _ in made} == {None, "none", "headwise", "key_value", "layerwise"}
    assert {("layerwise", k) for k in (64, 128, 256)} <= made
    assert set(options.task_name) >= {"sst2", "qnli", "imdb"} and len(options.seeds) == 5
    for name in options.variants:
        if name != "softmax":
            starts.options_of(name, options.variants[name], {**options.linearize, "train_file": "any"}, Path("any"))


@pytest.mark.parametrize("family", ["conv", "linformer"])
def test_shipped_tables_make_models(family):
    for name, options_type in (("compare", CompareOptions), ("recall", RecallOptions)):
        path = f"{recall_program.__file__.rsplit('/', 1)[0]}/configs/{name}_{family}.yaml"
        options = parse_options(options_type, ["--config", path])
        configs = variant_configs(options.variants, options.config_overrides)
        assert {config.model_type for config in configs.values()} == {f"{family}_lm", "softmax_lm"}
        assert len(options.seeds) >= 3
