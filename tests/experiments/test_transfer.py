"""The evidence of fine-tuning: baselines, and the recipe that pretrains, fine-tunes and compares."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from tiny_tasks import TINY, sentences
from transformers import AutoModel, AutoTokenizer

import ordnung
from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import baselines as baselines_program
from ordnung.scripts import transfer as transfer_program
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.common.tables import summarise
from ordnung.scripts.experiments import baselines, compare, starts, transfer
from ordnung.scripts.experiments.options import TransferOptions
from ordnung.scripts.experiments.variants import variant_configs
from ordnung.scripts.finetuning import run as finetuning
from ordnung.scripts.finetuning.tasks import GLUE
from ordnung.scripts.pretraining import run as pretraining
from ordnung.scripts.reports import pooling


def test_majority(tasks, tmp_path):
    rows = {"label": [1, 0, 1, 1], "sentence": list("abcd")}
    assert baselines.fit_majority(rows, GLUE["sst2"])(rows).tolist() == [1, 1, 1, 1]
    assert baselines.fit_majority(rows, GLUE["stsb"])(rows).tolist() == [0.75] * 4


def test_too_few_rows_are_told(tasks, tmp_path):
    argv = ["--task_name", "sst2", "--dataset_path", str(tasks), "--output_dir", str(tmp_path)]
    with pytest.raises(ScriptError, match="sst2: 1 training rows are too few for tfidf .*: give more by --max_train"):
        baselines_program.main([*argv, "--max_train_samples", "1"])


def test_tasks_may_be_named_together():
    options = parse_options(TransferOptions, ["--config", "transfer_minilm", "--task_name", "imdb", "all", "sst2"])
    assert options.task_name == ["imdb", *GLUE]


def test_tfidf_finds_the_telling_words(tasks, tmp_path):
    argv = ["--task_name", "sst2", "stsb", "mnli", "--dataset_path", str(tasks), "--output_dir", str(tmp_path)]
    assert baselines_program.main(argv) == 0
    tasks = json.loads((tmp_path / "results.json").read_text())["tasks"]
    learned, constant = (tasks["sst2"][kind]["metrics"]["validation"]["accuracy"] for kind in ("tfidf", "majority"))
    assert learned > 0.8 > constant
    assert tasks["stsb"]["tfidf"]["score"] > 0.2 and tasks["stsb"]["majority"]["score"] == 0
    assert set(tasks["mnli"]["tfidf"]["metrics"]) == {"validation_matched", "validation_mismatched"}


@pytest.fixture
def argv(tasks, tmp_path, monkeypatch):
    """A recipe of two tiny variants on two tasks; the second baseline is what a constant would have scored."""
    monkeypatch.setitem(baselines.BASELINES, "tfidf", baselines.fit_majority)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tasks / "cache")
    texts = [text for text, _ in sentences(400, 7)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "config_overrides": TINY,
        "variants": {
            "conv": {"model_type": "conv_lm", "kernel_size": 4},
            "softmax": {"model_type": "softmax_lm", "position_embedding_type": "rope"},
        },
        "pretrain": {
            "train_file": str(tmp_path / "train.jsonl"),
            "train_tokenizer_vocab_size": 300,
            "block_size": 16,
            "max_steps": 4,
            "use_cpu": True,
        },
        "task_name": ["sst2", "imdb"],
        "finetune": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "use_cpu": True},
        "finetune_by_task": {"imdb": {"max_length": 8}},
        "seeds": [0, 1],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "out"]
    return list(map(str, [*argv, "--glue_path", tasks, "--imdb_path", tasks / "imdb"]))


def test_the_recipe_from_end_to_end_and_again(argv, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stops = iter([0, 143])
    real = finetuning.run
    monkeypatch.setattr(finetuning, "run", lambda options: next(stops) or real(options))
    assert transfer_program.main(argv) == 143  # stopped in the second variant
    monkeypatch.setattr(finetuning, "run", real)
    monkeypatch.setattr(pretraining, "run", None)  # both are pretrained
    assert transfer_program.main(argv) == 0
    results = json.loads((out / "results.json").read_text())
    for name in ("conv", "softmax"):
        result = results["variants"][name]
        assert result["pretraining"]["steps"] == 4
        for task in ("sst2", "imdb"):
            folder = out / "finetune" / name / task / task
            runs = [json.loads((folder / f"seed-{seed}/results.json").read_text()) for seed in (0, 1)]
            score = result["tasks"][task]["score"]
            assert score["values"] == [run_task["score"] for run_task in runs]
            assert score["mean"] == pytest.approx(np.mean(score["values"]))
            assert runs[0]["parameters"] == result["tasks"][task]["parameters"]
    assert results["variants"]["conv"]["tasks"]["imdb"]["truncated"]["test"]["to"] == 8
    table = (out / "results.md").read_text()
    below = [
        f"{name} on {task}"
        for name in ("conv", "softmax")
        for task in ("sst2", "imdb")
        if results["variants"][name]["tasks"][task]["score"]["mean"] <= results["baselines"][task]["majority"]["score"]
    ]
    assert f"Not above majority class: {', '.join(below) or 'none'}." in table
    assert table.count("\n| conv ") == 2 and "TF-IDF + logistic regression" in table
    # a further seed runs, what is there is kept
    monkeypatch.setattr(baselines, "run", None)
    assert transfer_program.main([*argv, "--seeds", "0", "1", "2"]) == 0
    with pytest.raises(ScriptError, match="holds runs with pretrain"):
        transfer_program.main([*argv, "--pretrain", "max_steps=5"])


def test_variants_now_and_later_on_another_machine(argv, tmp_path, monkeypatch, capsys):
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    assert transfer_program.main([*argv, "--only", "conv", "--output_dir", first]) == 0
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert list(results["variants"]) == ["conv"]
    ran, real = [], finetuning.run
    monkeypatch.setattr(finetuning, "run", lambda options: ran.append(options) or real(options))
    earlier = ["--earlier", str(tmp_path / "first" / "results.json")]
    assert transfer_program.main([*argv, *earlier, "--output_dir", second]) == 0
    assert len(ran) == 2 and all("softmax" in options.model_name_or_path for options in ran)
    both = json.loads((tmp_path / "second" / "results.json").read_text())
    assert both["variants"]["conv"] == results["variants"]["conv"] and set(both["variants"]) == {"conv", "softmax"}
    assert both["earlier"] == [{"machine": results["machine"], "variants": ["conv"]}]
    assert "Trained earlier: conv." in (tmp_path / "second" / "results.md").read_text()
    # fewer tasks are there; more must be trained
    one = ["--task_name", "sst2"]
    assert transfer_program.main([*argv, *earlier, *one, "--only", "conv", "--output_dir", third]) == 0
    assert len(ran) == 2 and "conv taken over" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "third" / "results.json").read_text())["variants"].values()
    assert list(found["tasks"]) == ["sst2"]

    monkeypatch.setattr(pretraining, "run", None)
    for wrong, message in (
        (["--pretrain", "max_steps=5"], 'was made with pretrain .*"max_steps": 4.*, not .*"max_steps": 5'),
        (["--seeds", "0"], r"was made with seeds \[0, 1\], not \[0\]"),
        (["--finetune_by_task", "imdb={max_length: 9}"], "was made with finetune imdb .*8.*, not .*9"),
        (["--only", "no"], "--only no must be one of the variants conv, softmax"),
    ):
        with pytest.raises(ScriptError, match=message):
            transfer_program.main([*argv, *earlier, *wrong, "--output_dir", str(tmp_path / "wrong")])
    results["baselines"]["sst2"]["tfidf"]["score"] += 0.01
    (tmp_path / "first" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ScriptError, match="was made with other data of sst2: tfidf scores"):
        transfer_program.main([*argv, *earlier, "--output_dir", str(tmp_path / "wrong")])


def test_baselines_are_of_the_data_that_is_given_now(argv, tasks, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere" / "sst2"
    shutil.copytree(tasks / "sst2", folder)
    rows = datasets.Dataset.from_parquet(str(folder / "validation.parquet"))
    rows.map(lambda row: {"label": 1}).to_parquet(folder / "validation.parquet")
    monkeypatch.setattr(pretraining, "run", lambda options: 143)
    argv, found = [*argv, "--task_name", "sst2"], []
    for path in (tasks / "sst2", folder, folder):
        assert transfer_program.main([*argv, "--glue_path", str(path)]) == 143
        made = json.loads((tmp_path / "out" / "baselines" / "sst2" / "results.json").read_text())
        found.append((made["tasks"]["sst2"]["majority"]["score"], made["machine"]["date"]))
        monkeypatch.setattr(baselines, "run", baselines.run if len(found) < 2 else None)
    assert found[0][0] != found[1][0] and found[1] == found[2]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--finetune", "seeds=3"], "--finetune seeds: it is set for each run"),
        (["--pretrain", "seed=3"], "--pretrain seed"),
        (["--finetune", "a=1", "b=2"], "unknown option 'b=2': several NAME=VALUE of one option are joined by commas"),
        (["--finetune", "learning_rat=3"], "unknown option '--learning_rat'; did you mean 'learning_rate'"),
        (["--task_name", "sst"], "unknown --task_name 'sst'; did you mean 'sst2'"),
        (["--finetune_by_task", "sst={}"], "unknown --task_name 'sst'"),
        (["--seeds", "1", "1"], "different numbers"),
        (["--baseline", "gru"], "--baseline gru must be one of the variants"),
        (["--imdb_path", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(argv, tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(pretraining, "run", None)
    with pytest.raises(ScriptError, match=message):
        transfer_program.main([*argv, *wrong])


def test_shipped_recipes_are_valid():
    folder = f"{ordnung.__path__[0]}/scripts/configs"
    for name in ("transfer_cpu", "transfer_longer", "transfer_gpu"):
        options = parse_options(TransferOptions, ["--config", f"{folder}/{name}.yaml"])
        models = {config.model_type for config in variant_configs(options.variants, options.config_overrides).values()}
        assert {"conv_lm", "softmax_lm"} <= models <= set(FAMILIES)
        assert len(options.seeds) >= 3
        compare.check_pretrain({**options.pretrain, "train_file": "any.parquet"})
        for task in options.task_name:
            assert transfer.finetune_options(options, task, folder, folder).num_train_epochs >= 1


@pytest.fixture
def started(argv, bert, tmp_path):
    """The recipe with variants of a checkpoint: as it is, converted, linearized."""
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    linformer = {"model_type": "linformer_lm", "projection_type": "adaptive_mean_pool", "projected_size": 4}
    recipe["variants"] = {
        "teacher": {"source": str(bert), "model_type": "softmax_lm"},
        "converted": {"source": str(bert), **linformer},
        "distilled": {"source": str(bert), **linformer, "distill": {"transfer_steps": 2, "distill_steps": 2}},
    }
    texts = (("no", "the sea"), ("a ship", "the ship"), ("whales", "a whale"), ("yes", "an old book"))
    pairs = [{"sentence1": a, "sentence2": b, "label": i} for i, (a, b) in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    steps = {"block_size": 16, "per_device_train_batch_size": 4, "use_cpu": True, "validation_fraction": 0.2}
    steps["similarity_file"] = str(tmp_path / "pairs.jsonl")
    recipe["linearize"] = {"train_file": recipe.pop("pretrain")["train_file"], **steps}
    recipe |= {"task_name": ["sst2"], "seeds": [0], "finetune_by_task": {}, "baseline": "teacher"}
    del recipe["config_overrides"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return argv


def test_variants_may_start_from_a_checkpoint(started, tmp_path, monkeypatch, capsys):
    assert transfer_program.main(started) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    variants = results["variants"]
    assert variants.keys() == {"teacher", "converted", "distilled"}
    assert {name for name in variants if variants[name]["start"]["tokens"]} == {"distilled"}
    assert variants["converted"]["start"]["parameters"] == variants["distilled"]["start"]["parameters"]
    states = [
        AutoModel.from_pretrained(tmp_path / "out" / "start" / name).state_dict() for name in ("converted", "distilled")
    ]
    name = "layers.0.mixer.v_proj.weight"
    assert states[0][name].shape == states[1][name].shape and not torch.equal(states[0][name], states[1][name])
    assert 0 <= variants["teacher"]["tasks"]["sst2"]["score"]["mean"] <= 1
    similar = {name: variant["start"]["student"]["similarity"] for name, variant in variants.items()}
    measured = variants["distilled"]["start"]
    assert similar["teacher"] == pytest.approx(measured["teacher"]["similarity"])
    assert similar["converted"] == pytest.approx(measured["converted"]["student"]["similarity"])
    # what is told of a distilled variant is told of one that is converted alone, and of the teacher's attention nothing
    start = variants["converted"]["start"]
    assert start["teacher"]["similarity"] == pytest.approx(measured["teacher"]["similarity"])
    floors = [each["converted"]["floor"]["similarity"] for each in (start, measured)]
    assert floors[0] == pytest.approx(floors[1]) and "converted" not in variants["teacher"]["start"]
    shown = capsys.readouterr().out
    scores = {name: found["tasks"]["sst2"]["score"]["mean"] for name, found in variants.items()}
    (row,) = (line.split("|")[1:3] for line in shown.splitlines() if "converted - teacher, points" in line)
    assert row[1].strip() == f"{100 * (scores['converted'] - scores['teacher']):.1f} (n = 1)"
    assert "teacher - teacher" not in shown
    assert f"Training rows: sst2 {variants['teacher']['tasks']['sst2']['training_rows']}." in shown
    assert "distillation tokens" in shown and "held-out bits per byte" not in shown
    # again: everything is kept, and no text is read for what is linearized, unless from another teacher
    monkeypatch.setattr(starts, "convert", None)
    monkeypatch.setattr(starts.linearizing, "Text", None)
    assert transfer_program.main(started) == 0
    monkeypatch.setattr(starts, "fingerprint", lambda teacher: "another")
    with pytest.raises(TypeError, match="not callable"):
        transfer_program.main(started)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"projekted_size": 4}, "variant converted: .*did you mean 'projected_size'"),
        ({"model_type": "bert"}, "variant converted: model_type 'bert' is none of"),
        ({"keep_attention": 1}, "variant converted: keep_attention .* add distill"),
        (
            {"distill": {"keep_attention": 1}},
            "variant converted: distill keep_attention: give it in each variant's own table",
        ),
        ({"source": None}, "variant converted is pretrained: give --pretrain, or the source"),
    ],
)
def test_wrong_starts_are_told(started, tmp_path, change, message):
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["variants"]["converted"] |= change
    if change.get("source", "") is None:
        del recipe["variants"]["converted"]["source"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ScriptError, match=message):
        transfer_program.main(started)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--config_overrides", "projekted_size=4"], "variant converted: .*'projekted_size'"),
        (
            ["--linearize", "keep_attention=1,train_file=any.txt"],
            "--linearize keep_attention: give it in each variant's own table",
        ),
    ],
)
def test_what_is_given_for_all_variants_reaches_those_that_start(started, tmp_path, wrong, message):
    with pytest.raises(ScriptError, match=message):
        transfer_program.main([*started, *wrong])
    assert not (tmp_path / "out").exists()


def test_a_converted_variant_is_read_as_a_distilled_one(bert, tmp_path):
    variant = {"source": str(bert), "model_type": "softmax_lm"}
    tokenizer = AutoTokenizer.from_pretrained(bert, padding_side="left")
    tokenizer.save_pretrained(tmp_path / "other")
    starts.convert("any", variant, {"tokenizer_name": str(tmp_path / "other")}, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "left"
    with pytest.raises(ScriptError, match="variant any: .*gguf"):
        starts.convert("any", variant, {"gguf_file": "none.gguf"}, tmp_path / "gguf")
    for option, cure in (
        ("keep_attention", "give it in each variant's own table"),
        ("config_overrides", "give the fields themselves in each variant's own table"),
        ("output_dir", "it is set for each variant, leave it out"),
    ):
        with pytest.raises(ScriptError, match=f"--linearize {option}: {cure}"):
            starts.options_of("any", variant, {option: 1}, tmp_path)


def test_new_weights_of_a_converted_variant_are_the_same_whatever_was_drawn_before(bert, tmp_path):
    variant = {"source": str(bert), "model_type": "conv_lm", "kernel_size": 3, "gate": "input_output"}
    for i in range(2):
        torch.manual_seed(i)
        starts.convert("any", variant, {}, tmp_path / str(i))
    states = [AutoModel.from_pretrained(tmp_path / str(i)).state_dict() for i in range(2)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_recipe_of_pooling_differs_in_nothing_else():
    options = parse_options(TransferOptions, ["--config", "transfer_pooling"])
    assert options.pretrained == {} and len(options.seeds) >= 3
    fields = {name: starts.fields_of(name, variant) for name, variant in options.started.items()}
    assert fields == {name: {"classifier_pooling": name} for name in ("first", "last", "mean")}
    assert len({(variant["source"], variant["model_type"]) for variant in options.started.values()}) == 1


def test_pooling_is_judged_by_pairs_of_seeds():
    """What is higher in every seed by nearly as much is higher; one task that fails is enough."""
    values = {
        "first": {"rte": [0.5, 0.6, 0.7], "sst2": [0.8, 0.81, 0.8]},
        "last": {"rte": [0.51, 0.63, 0.69], "sst2": [0.95, 0.94, 0.95]},
        "mean": {"rte": [0.52, 0.62, 0.721], "sst2": [0.9, 0.91, 0.901]},
    }
    variants = {
        name: {"tasks": {task: {"score": summarise(some), "training_rows": 9} for task, some in tasks.items()}}
        for name, tasks in values.items()
    }
    baselines = {task: {"majority": {"score": 0.5}} for task in ("rte", "sst2")}
    machine = {"cpu": "any", "gpu": []} | dict.fromkeys(("threads", "torch", "transformers", "ordnung", "date"), "1")
    results = {"task_name": ["rte", "sst2"], "variants": variants, "seeds": [0, 1, 2], "baselines": baselines}
    shown = pooling.markdown(results | {"machine": machine})
    assert '"mean scores higher than first on every task": holds (rte holds, sst2 holds)' in shown
    assert '"mean scores higher than last on every task": does not hold (rte not decided, sst2 does not hold)' in shown
    rows = {cells[1].strip(): cells[2].strip() for line in shown.splitlines() if len(cells := line.split("|")) > 3}
    assert rows["first"] == "60.0 ± 24.8" and rows["mean - first, points"] == "2.0 (1.9 to 2.2, n = 3)"


def test_the_shipped_starts_are_valid():
    options = parse_options(TransferOptions, ["--config", "transfer_minilm"])
    assert options.pretrained == {} and len(options.started) == 7
    for name, variant in options.started.items():
        starts.fields_of(name, variant)
        if "distill" in variant:
            made = starts.options_of(name, variant, {**options.linearize, "train_file": "any"}, tmp := "any")
            assert made.source == variant["source"] and made.output_dir == tmp
