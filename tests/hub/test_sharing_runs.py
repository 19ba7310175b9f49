"""Programs that train end with a push, or tell before that they cannot."""

import json
import shlex
import sys

import pytest
from accelerate.state import AcceleratorState
from hub_models import STANDARD_FILES, write_tasks
from hub_server import WRITER
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from ordnung.scripts import finetune, push_to_hub
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.hub import sharing
from ordnung.scripts.hub.sharing import Target


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
