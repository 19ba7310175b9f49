"""The card and the results that a shared checkpoint comes with."""

import json
import re

import pytest
import yaml
from hub_models import RESULTS, save_model
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoModelForCausalLM

from ordnung.scripts.common import machine
from ordnung.scripts.hub import sharing
from ordnung.scripts.hub.model_card import HELD_OUT
from ordnung.scripts.hub.sharing import Target, push


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
    assert re.search(r"GLUE SST-2 validation \| accuracy \| 0.75 +\| 0.5000 ± 3.1766 over 2 runs", card.text)
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


def test_commands_are_shown_without_tokens():
    line = machine.command_line(["train.py", "--hub_token", "hf_a", "--token=hf_b", "--max_new_tokens", "3"])
    assert line.endswith("train.py --hub_token ... --token=... --max_new_tokens 3") and "hf_" not in line
    line = machine.command_line(["train.py", "--hub-token", "hf_a", "--hub-token=hf_b", "--seed", "3"])
    assert line.endswith("train.py --hub-token ... --hub-token=... --seed 3") and "hf_" not in line
