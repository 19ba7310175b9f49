"""Sharing on the Hub, over HTTP against hub_server: what is pushed, what goes wrong, what others load."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import datasets
import peft
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hub_server import READER, WRITER, File, HubServer, Repository, take_for_the_hub
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from safetensors.torch import load as load_tensors
from strangers import REFUSE
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from ordnung.modeling.registration import FAMILIES, heads_of
from ordnung.scripts import finetune, pretrain, push_to_hub
from ordnung.scripts.common import machine
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.hub import sharing
from ordnung.scripts.hub.model_card import HELD_OUT
from ordnung.scripts.hub.sharing import Target, check_target, push

ROOT = Path(__file__).parents[1]
TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
RESULTS = {
    "data": "nyu-mll/glue sst2",
    "datasets": ["nyu-mll/glue"],
    "tokens": 1234,
    "seed": 0,
    "eval_results": [
        {
            "task_type": "text-classification",
            "dataset_type": "nyu-mll/glue",
            "dataset_name": "GLUE SST-2",
            "dataset_config": "sst2",
            "dataset_split": "validation",
            "metric_type": metric,
            "metric_value": value,
            "over_seeds": {"mean": 0.5, "standard_deviation": 0.25, "values": [0.25, 0.75]},
        }
        for metric, value in (("accuracy", 0.75), ("f1", 0.625))
    ],
    "machine": {**machine.machine_info(), "command": "python scripts/train.py --seed 0"},
}
STANDARD_FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "configuration_conv_lm.py", "configuration_backbone.py", "modeling_conv_lm.py",
    "backbone.py", "heads.py", "mixer.py", "attention.py", "rows.py", "state.py", "norms.py", "projections.py",
    "pooling.py", "causal_conv.py", "centred_conv.py", "chunks.py",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running server that huggingface_hub takes for the Hub, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # retries without their pauses
    with HubServer() as server:
        take_for_the_hub(server, monkeypatch)
        yield server


def save_model(folder, tokenizer, model_type="conv_lm", auto="AutoModelForCausalLM", **fields):
    config = AutoConfig.for_model(
        model_type, **TINY, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **fields
    )
    model = getattr(modeling_auto, auto).from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A ConvLM checkpoint with results."""
    save_model(tmp_path / "run", tokenizer, kernel_size=4)
    (tmp_path / "run" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path / "run"


def test_a_push_is_one_complete_commit(hub, checkpoint):
    (checkpoint / "run.yaml").write_text("seed: 0\n")
    (checkpoint / "optimizer.pt").write_text("not for others")
    address = push(checkpoint, check_target(Target("whale", language=["en"])))
    assert address == f"{hub.url}/ahab/whale"
    repository = hub.repositories["ahab/whale"]
    assert repository.messages == ["initial commit", Target.commit_message] and not repository.private
    files = repository.files()
    extra = {".gitattributes", "results.json", "run.yaml", ".eval_results/nyu-mll_glue.yaml"}
    assert set(files) == STANDARD_FILES | extra
    expected = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    weights = load_tensors(files["model.safetensors"])
    assert weights and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert all((checkpoint / "hub" / name).read_bytes() == files[name] for name in set(files) - {".gitattributes"})


def test_the_card_says_what_was_measured(hub, checkpoint):
    push(checkpoint, Target("ahab/whale", language=["en"]))
    card = ModelCard(hub.repositories["ahab/whale"].files()["README.md"].decode())
    data = card.data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "transformers")
    assert data.pipeline_tag == "text-generation" and data.datasets == ["nyu-mll/glue"]
    assert data.metrics == ["accuracy", "f1"] and {"ordnung", "conv_lm", "custom_code"} == set(data.tags)
    assert data.model_name == "whale"
    read = [(result.dataset_config, result.metric_type, result.metric_value) for result in data.eval_results]
    assert read == [("sst2", "accuracy", 0.75), ("sst2", "f1", 0.625)]
    assert re.search(r"GLUE SST-2 validation \| accuracy \| 0.75 +\| 0.5000 ± 0.2500 over 2 runs", card.text)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert f"{model.num_parameters():,} parameters" in card.text and "learned causal convolution" in card.text.lower()
    for length in (128, 8192):
        flops, state = model.flops(length) / 1e9, model.cache_bytes(length) / 1024
        assert re.search(rf"\| {length:,} +\| {flops:,.3f} +\| .*\| {state:,.1f} ", card.text)
    assert "more than the last 4 tokens" in card.text and "python scripts/train.py --seed 0" in card.text


def test_evaluation_results_in_the_hubs_own_format(hub, checkpoint):
    push(checkpoint, Target("ahab/whale"))
    text = hub.repositories["ahab/whale"].files()[".eval_results/nyu-mll_glue.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "sst2", 0.75)
    assert entry.notes == "accuracy, validation" and entry.date == RESULTS["machine"]["date"]


def test_local_data_is_no_benchmark_of_the_hub(hub, tmp_path, tokenizer):
    save_model(tmp_path, tokenizer)
    entry = {**RESULTS["eval_results"][0], "dataset_type": "text"}
    held_out = {**RESULTS["eval_results"][0], "dataset_split": HELD_OUT}
    (tmp_path / "results.json").write_text(json.dumps({"eval_results": [entry, held_out]}))
    folder = sharing.write_folder(tmp_path, Target("ahab/whale"))
    assert not (folder / ".eval_results").exists()
    assert ModelCard.load(folder / "README.md").data.datasets is None


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "learned", "position_offset": 2, "max_position_embeddings": 66},
        {
            "model_type": "linformer_lm", "auto": "AutoModelForMaskedLM", "projected_size": 8,
            "position_embedding_type": "rope", "max_position_embeddings": 64,
        },
    ],
    ids=["conv_lm", "linformer_lm"],
)  # fmt: skip
def test_a_card_tells_how_long_a_text_may_be(tmp_path, tokenizer, fields):
    save_model(tmp_path, tokenizer, **fields)
    text = ModelCard.load(sharing.write_folder(tmp_path, Target("ahab/whale")) / "README.md").text
    assert "at most 64 tokens" in text and re.search(r"\| 64 +\| [\d.]+ +\|", text)


def test_pushing_again_changes_nothing(hub, checkpoint):
    for _ in range(2):
        push(checkpoint, Target("ahab/whale"))
    assert len(hub.repositories["ahab/whale"].commits) == 2
    assert len(hub.seen("PUT /lfs/")) == 1


@pytest.mark.parametrize("lost_answers", [0, 1])
def test_an_existing_repository_keeps_its_files_and_loses_old_weights(lost_answers, hub, checkpoint):
    hub.faults["/commit/main!"] = lost_answers
    repository = hub.repositories["ahab/whale"] = Repository(private=True)
    kept = {"notes.txt": b"mine", "results.json": b'{"mine": 1}', ".eval_results/mine.yaml": b"[]"}
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    old |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"old"}
    repository.commit("main", {name: File(content, False) for name, content in (kept | old).items()}, "by hand")
    (checkpoint / "results.json").unlink()
    push(checkpoint, check_target(Target("ahab/whale")))
    files = repository.files()
    assert kept.items() <= files.items() and "model.safetensors" in files and not old.keys() & files.keys()
    assert repository.private and repository.messages == ["by hand", Target.commit_message]


def test_the_scores_of_an_earlier_model_go_with_it(hub, checkpoint):
    (checkpoint / "run.yaml").write_text("seed: 0\n")
    push(checkpoint, Target("ahab/whale"))
    repository = hub.repositories["ahab/whale"]
    scores = {".eval_results/nyu-mll_glue.yaml", "results.json", "run.yaml"}
    assert scores < set(repository.files())
    tree = repository.commits[repository.branches["main"]]
    repository.commit("main", {**tree, ".eval_results/mine.yaml": File(b"[]", False)}, "by hand")
    for name in ("run.yaml", "results.json"):
        (checkpoint / name).unlink()
    push(checkpoint, Target("ahab/whale"))
    files = set(repository.files())
    assert not scores & files and files >= STANDARD_FILES | {".eval_results/mine.yaml"}


@pytest.mark.parametrize(
    "part",
    ["/repos/create", "/repos/create!", "/branch/", "/branch/!", "PUT /lfs/", "PUT /lfs/!", "/preupload/"]
    + ["/commit/small", "/commit/small!"],
)
def test_a_dropped_connection_is_taken_up_again(part, hub, checkpoint):
    hub.faults[part] = 1
    push(checkpoint, check_target(Target("ahab/whale", revision="small")))
    assert hub.faults[part] == 0
    repository = hub.repositories["ahab/whale"]
    assert STANDARD_FILES < set(repository.files("small"))
    assert repository.messages == ["initial commit", Target.commit_message]  # a lost answer makes no second commit


def test_a_half_finished_upload_goes_on_with_the_command_that_is_told(hub, checkpoint, capsys):
    hub.faults["/commit/main"] = 100
    target = Target("ahab/whale", revision="v1.0", private=True, language=["en", "fr"], commit_message="It's here")
    hub.faults["/commit/v1.0"] = 100
    with pytest.raises(ScriptError, match="is complete, but it was not uploaded .* cannot be reached") as caught:
        push(checkpoint, check_target(target))
    assert STANDARD_FILES < {path.name for path in (checkpoint / "hub").iterdir()}
    assert set(hub.repositories["ahab/whale"].files("v1.0")) == {".gitattributes"}
    hub.faults.clear()
    command = str(caught.value).partition("push it again by: ")[2]
    assert push_to_hub.main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/ahab/whale/tree/v1.0"
    repository = hub.repositories["ahab/whale"]
    assert STANDARD_FILES < set(repository.files("v1.0")) and repository.messages[-1] == "It's here"
    assert ModelCard((checkpoint / "hub" / "README.md").read_text()).data.language == ["en", "fr"]
    assert len(hub.seen("PUT /lfs/")) == 1 and len(hub.objects) == 1


def test_a_revision_leaves_main_alone(hub, checkpoint):
    address = push(checkpoint, check_target(Target("ahab/whale", revision="small")))
    assert address == f"{hub.url}/ahab/whale/tree/small"
    repository = hub.repositories["ahab/whale"]
    assert set(repository.files("main")) == {".gitattributes"}
    assert STANDARD_FILES < set(repository.files("small"))
    assert '"ahab/whale", revision="small"' in repository.files("small")["README.md"].decode()


def test_private_is_private(hub, checkpoint):
    push(checkpoint, check_target(Target("ahab/whale", private=True)))
    assert hub.repositories["ahab/whale"].private
    hub.repositories["ahab/open"] = Repository(private=False)
    hub.repositories["ahab/open"].commit("main", {}, "by hand")
    with pytest.raises(ScriptError, match="ahab/open is there already and public"):
        check_target(Target("ahab/open", private=True))


def test_what_the_hub_would_refuse_is_told_first(hub, monkeypatch, tmp_path):
    for target, message in (
        (Target("whale", token="hf_wrong"), "refuses the access token"),
        (Target("whale", token=READER), "the token of ahab may only read"),
        (Target("melville/whale"), "cannot make a repository for 'melville'; there are ahab, pequod"),
        (Target("a whale!"), "cannot push to a whale!: .*"),
    ):
        with pytest.raises(ScriptError, match=message):
            check_target(target)
    hub.repositories["melville/whale"] = Repository(private=False)
    hub.repositories["melville/whale"].commit("main", {}, "by hand")
    with pytest.raises(ScriptError, match="may not write there"):
        check_target(Target("melville/whale"))
    assert check_target(Target("pequod/whale")).repo_id == "pequod/whale"
    assert not hub.seen("POST")  # nothing was made on the way

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ScriptError, match="no access token; run `hf auth login`"):
        check_target(Target("whale"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ScriptError, match="http://127.0.0.1:9 cannot be reached .* HF_ENDPOINT"):
        check_target(Target("whale"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ScriptError, match="offline mode is on; unset HF_HUB_OFFLINE"):
        check_target(Target("whale"))


def test_a_dry_run_shows_all_and_asks_nobody(hub, checkpoint, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    arguments = ["--model_name_or_path", str(checkpoint), "--hub_model_id", "ahab/whale", "--private", "--dry_run"]
    assert push_to_hub.main(arguments) == 0
    shown = capsys.readouterr().out
    assert not hub.requests and f"{hub.url}/ahab/whale (private, if new)" in shown
    for path in (checkpoint / "hub").iterdir():
        assert not path.is_file() or re.search(rf"^ +{path.stat().st_size:,}  {re.escape(path.name)}$", shown, re.M)
    assert shown.endswith((checkpoint / "hub" / "README.md").read_text())
    assert push_to_hub.main([*arguments, "--hub_model_id", "whale"]) == 0  # who the user is would be asked
    assert 'from_pretrained("your-name/whale", trust' in capsys.readouterr().out and not hub.requests
    with pytest.raises(ScriptError, match="cannot push to a whale!"):
        push_to_hub.main([*arguments, "--hub_model_id", "a whale!"])


def test_what_cannot_be_shared_is_told_in_words(hub, checkpoint, tmp_path, tokenizer):
    target = Target("ahab/whale")
    with pytest.raises(ScriptError, match="nowhere holds no config.json"):
        sharing.write_folder(tmp_path / "nowhere", target)
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "must hold an object, not a list"),
        ('{"eval_results": [{"metric": 1}]}', "no EvalResult can be made"),
    ):
        (checkpoint / "results.json").write_text(content)
        with pytest.raises(ScriptError, match=message):
            sharing.write_folder(checkpoint, target)
        assert not (checkpoint / "hub").exists() and not (checkpoint / ".tmp-hub").exists()
    (checkpoint / "results.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    for name, message in (
        ("LossyLM", "of class LossyLM, which neither"),
        ("T5ForConditionalGeneration", "none of the heads"),
        ("GPT2DoubleHeadsModel", "none of the heads"),
    ):
        (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        with pytest.raises(ScriptError, match=message):
            sharing.write_folder(checkpoint, target)
    for fields in ({"hidden_size": 24}, {"hidden_size": 17}):  # not that of the weights; not a multiple of the heads
        (checkpoint / "config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(ScriptError, match="cannot be loaded"):
            sharing.write_folder(checkpoint, target)
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ScriptError, match="cannot be loaded"):
        sharing.write_folder(checkpoint, target)
    (checkpoint / "model.safetensors").write_bytes(weights)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    with pytest.raises(ScriptError, match="tokenizer of .* cannot be loaded"):
        sharing.write_folder(checkpoint, target)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_models_of_transformers_need_no_code(model_type, hub, tmp_path, tokenizer):
    fields = {"num_key_value_heads": 2, "intermediate_size": 32} if model_type == "llama" else {}
    save_model(tmp_path, tokenizer, model_type, **fields)
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "base_model": "ahab/small"}))
    push(tmp_path, Target("ahab/whale"))
    files = hub.repositories["ahab/whale"].files()
    assert not [name for name in files if name.endswith(".py")]
    card = ModelCard(files["README.md"].decode())
    assert "trust_remote_code" not in card.text and "AutoModelForCausalLM.from_pretrained" in card.text
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model == "ahab/small"


def test_an_adapter_goes_to_the_hub_if_its_base_is_there(hub, tmp_path, tokenizer):
    base = save_model(tmp_path / "base", tokenizer)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    for name, fails in ((str(tmp_path / "base"), True), ("ahab/base", False)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
        if fails:
            with pytest.raises(ScriptError, match="which others do not have.*merge"):
                push(tmp_path / "adapter", Target("ahab/adapter"))
    push(tmp_path / "adapter", Target("ahab/adapter"))
    files = hub.repositories["ahab/adapter"].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < set(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "ahab/base" and card.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM.from_pretrained" in card.text


def test_a_fine_tuned_adapter_is_shared_under_its_bases_name(run_task, tasks):
    """Locally it names a folder beside it as its base, for the labels (see `finetuning/adapters.py`)."""
    folder = run_task("mnli", use_peft=True, max_steps=1) / "mnli/seed-0"
    with pytest.raises(ScriptError, match=f"an adapter for {tasks / 'conv'}, which others do not have"):
        sharing.write_folder(folder, Target("ahab/adapter"))
    note = folder / "base/base_model.json"
    assert json.loads(note.read_text()) == {"base_model_name_or_path": str(tasks / "conv")}
    note.write_text(json.dumps({"base_model_name_or_path": "ahab/base"}))
    shared = sharing.write_folder(folder, Target("ahab/adapter"))
    adapter = json.loads((shared / "adapter_config.json").read_text())
    kept = json.loads((folder / "adapter_config.json").read_text())
    assert adapter == kept | {"base_model_name_or_path": "ahab/base"}
    assert kept["base_model_name_or_path"] == str(folder / "base")
    assert not (shared / "base").exists() and str(folder) not in (shared / "README.md").read_text()
    card = ModelCard((shared / "README.md").read_text())
    assert card.data.base_model == "ahab/base" and "neutral" in card.text


# from training


@pytest.fixture
def train(tmp_path):
    def train(*more):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "text.txt").write_text("the whale and the sea, a ship and a captain\n" * 60)
        overrides = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,kernel_size=4"
        arguments = ["--model_type", "conv_lm", "--config_overrides", overrides, "--block_size", "16", "--use_cpu"]
        arguments += ["--train_file", str(tmp_path / "text.txt"), "--train_tokenizer_vocab_size", "270"]
        arguments += ["--max_steps", "2", "--output_dir", str(tmp_path / "whale"), *more]
        assert pretrain.main(arguments) == 0
        return tmp_path / "whale"

    return train


def test_training_ends_with_a_push(hub, train, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py", "--push_to_hub", "--hub_token", WRITER])
    out = train("--push_to_hub", "--hub_token", WRITER)
    repository = hub.repositories["ahab/whale"]
    files = repository.files()
    assert STANDARD_FILES | {"results.json", "run.yaml"} < set(files)
    results = json.loads((out / "results.json").read_text())
    card = ModelCard(files["README.md"].decode())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {
        "loss": results["evaluation"]["eval_loss"],
        "perplexity": results["evaluation"]["eval_perplexity"],
        "bits_per_byte": results["evaluation"]["eval_bits_per_byte"],
    }
    assert "data: text.txt" in card.text and "scripts/pretrain.py --push_to_hub --hub_token ..." in card.text
    for path in out.rglob("*"):  # the token is nowhere
        assert not path.is_file() or WRITER.encode() not in path.read_bytes()
    assert not any(WRITER.encode() in content for content in files.values())
    assert "hub" not in (out / "run.yaml").read_text()


def test_a_failed_push_loses_nothing_that_was_trained(hub, train, tmp_path):
    hub.faults["PUT /lfs/"] = 100
    with pytest.raises(ScriptError, match="push it again by: ordnung share ") as caught:
        train("--push_to_hub", "--hub_private", "--hub_revision", "small", "--hub_license", "mit")
    out = tmp_path / "whale"
    AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "results.json").read_text())["steps"] == 2 and (out / "loss_curve.png").exists()
    hub.faults.clear()
    command = str(caught.value).partition("push it again by: ")[2]
    assert push_to_hub.main(shlex.split(command)[2:]) == 0
    files = hub.repositories["ahab/whale"].files("small")
    assert hub.repositories["ahab/whale"].private and STANDARD_FILES < set(files)
    assert ModelCard(files["README.md"].decode()).data.license == "mit"


def test_training_does_not_start_without_a_way_to_push(hub, train, tmp_path, monkeypatch):
    for arguments, message in (
        (["--push_to_hub", "--hub_token", "hf_wrong"], "refuses the access token"),
        (["--hub_model_id", "ahab/whale"], "--hub_model_id does nothing without --push_to_hub"),
    ):
        with pytest.raises(ScriptError, match=message):
            train(*arguments)
        assert not (tmp_path / "whale").exists()
    assert not hub.repositories


def write_tasks(folder):
    """SST-2 and RTE of a few rows each."""
    for task, columns in (("sst2", ["sentence"]), ("rte", ["sentence1", "sentence2"])):
        (folder / task).mkdir(parents=True)
        for split, rows in (("train", 24), ("validation", 12)):
            table = {column: ["a ship and the sea", "the whale"] * (rows // 2) for column in columns}
            datasets.Dataset.from_dict({**table, "label": [0, 1] * (rows // 2)}).to_json(
                folder / task / f"{split}.jsonl"
            )
    return folder


def test_fine_tuning_ends_with_a_push_of_the_best_run_of_each_task(hub, train, tmp_path):
    source, data = train(), write_tasks(tmp_path / "data")
    arguments = ["--model_name_or_path", str(source), "--dataset_path", str(data), "--max_steps", "3", "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "tuned"), "--seeds", "0", "1", "--push_to_hub"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert finetune.main([*arguments, "--task_name", "sst2", "rte", "--hub_model_id", "whale-glue"]) == 0
    assert set(hub.repositories) == {"ahab/whale-glue-sst2", "ahab/whale-glue-rte"}
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())["tasks"]["sst2"]
    files = hub.repositories["ahab/whale-glue-sst2"].files()
    assert STANDARD_FILES - {"generation_config.json"} < set(files)
    card = ModelCard(files["README.md"].decode())
    [measured] = card.data.eval_results
    assert (measured.metric_type, measured.dataset_split) == ("accuracy", "validation")
    assert measured.metric_value == max(results["score"]["values"])
    assert "over 2 runs" in card.text and f"fine-tuned from: {source}" in card.text
    assert card.data.pipeline_tag == "text-classification" and not card.data.datasets
    # one failure does not stop the rest
    hub.faults["more-sst2/preupload"] = 100
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ScriptError, match=r"^sst2: [^\n]*\npush it again by: .*ahab/more-sst2 .*$"):
        finetune.main([*arguments, "--task_name", "sst2", "rte", "--hub_model_id", "more"])
    assert "model.safetensors" in hub.repositories["ahab/more-rte"].files()
    # the same command again pushes what is there already, and trains nothing
    AcceleratorState._reset_state(reset_partial_state=True)
    assert finetune.main([*arguments, "--task_name", "sst2", "--hub_model_id", "other"]) == 0
    assert set(hub.repositories) >= {"ahab/other"}


def test_an_adapter_that_nobody_could_load_is_refused_before_it_is_trained(hub, train, tmp_path):
    source, data = train(), write_tasks(tmp_path / "data")
    arguments = ["--model_name_or_path", str(source), "--dataset_path", str(data), "--max_steps", "3", "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "tuned"), "--task_name", "sst2", "--push_to_hub", "--use_peft"]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ScriptError, match="a local folder, is of no use to others: add --merge_adapter"):
        finetune.main(arguments)
    assert not (tmp_path / "tuned").exists() and not hub.repositories
    AcceleratorState._reset_state(reset_partial_state=True)
    assert finetune.main([*arguments, "--merge_adapter"]) == 0
    assert "model.safetensors" in hub.repositories["ahab/tuned"].files()
    # the merged model alone: its scores lie one folder up
    merged = tmp_path / "tuned/sst2/seed-0/merged"
    assert push_to_hub.main(["--model_name_or_path", str(merged), "--hub_model_id", "w", "--dry_run"]) == 0
    card = (merged / "hub" / "README.md").read_text()
    assert "None were recorded" not in card and "accuracy" in card


def test_commands_are_shown_without_tokens():
    line = machine.command_line(["train.py", "--hub_token", "hf_a", "--token=hf_b", "--max_new_tokens", "3"])
    assert line.endswith("train.py --hub_token ... --token=... --max_new_tokens 3") and "hf_" not in line
    line = machine.command_line(["train.py", "--hub-token", "hf_a", "--hub-token=hf_b", "--seed", "3"])
    assert line.endswith("train.py --hub-token ... --hub-token=... --seed 3") and "hf_" not in line


# what others do with it

# Runs where ordnung cannot be imported: loads every repository from the endpoint, then runs its card's snippet.
STRANGER = """
import json, re, torch, transformers
from huggingface_hub import ModelCard
torch.set_grad_enabled(False)  # attention has other kernels, with other rounding, where gradients are needed
expected, reports = torch.load(sys.argv[1]), {}
for repo, (auto, ids, logits) in expected.items():
    (snippet,) = re.findall("```python\\n(.*?)```", ModelCard.load(repo).text, re.S)
    names = {}
    exec(snippet, names)
    models = [names["model"]]
    if auto:
        models.append(getattr(transformers, auto).from_pretrained(repo, trust_remote_code=True))
    reports[repo] = all(torch.equal(model.eval()(ids)[0], logits) for model in models)
    if not auto:
        assert names["model"].config.id2label[0] == "sunk", names["model"].config
print(json.dumps({"equal": reports, "ordnung": "ordnung" in sys.modules}))
"""


@pytest.mark.slow
def test_everybody_can_load_every_head_and_run_its_snippet(hub, tmp_path, tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    expected = {}
    for model_type in FAMILIES:
        for auto in heads_of(model_type):
            name = f"{model_type}-{auto}"
            fields = {"is_decoder": auto != "AutoModelForMaskedLM"}
            model = save_model(tmp_path / name, tokenizer, model_type, auto, **fields)
            push(tmp_path / name, Target(f"ahab/{name}", private=True))
            ids = torch.arange(3, 15).view((1, 2, 6) if auto == "AutoModelForMultipleChoice" else (1, 12))
            with torch.no_grad():
                expected[f"ahab/{name}"] = (auto, ids, model(ids)[0])
    assert len(expected) >= 11
    for labels in (["sunk"], ["sunk", "afloat", "lost"]):  # adapters, of a regression and of three classes
        name, source = f"adapter-{len(labels)}", "conv_lm-AutoModelForCausalLM"
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / source, **names)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
        model.peft_config["default"].base_model_name_or_path = f"ahab/{source}"
        for saved in (model, model.config, tokenizer):
            saved.save_pretrained(tmp_path / name)
        push(tmp_path / name, Target(f"ahab/{name}", private=True))
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            expected[f"ahab/{name}"] = (None, ids, model(ids)[0])
    torch.save(expected, tmp_path / "expected.pt")
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", REFUSE + STRANGER, tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["ordnung"] and report["equal"] == dict.fromkeys(expected, True)


@pytest.mark.slow
def test_the_command_as_a_user_gives_it(hub, checkpoint, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/push_to_hub.py", "--model_name_or_path", checkpoint, "--hub_model_id", "w"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
    )
    assert done.returncode == 0 and done.stdout == f"{hub.url}/ahab/w\n", done.stderr
    assert STANDARD_FILES < set(hub.repositories["ahab/w"].files())
