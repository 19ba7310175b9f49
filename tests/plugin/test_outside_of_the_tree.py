"""What users do with a family does not tell that it lies in a package of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from retention.modeling_retention_lm import RetentionLMForCausalLM
from strangers import REFUSE
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import ordnung
from ordnung.modeling import registration
from ordnung.modeling.registration import FAMILIES, LORA_TARGETS, REGISTERED
from ordnung.scripts import convert as convert_program
from ordnung.scripts import pretrain
from ordnung.scripts.hub.sharing import Target, write_folder

HERE = Path(__file__).parent
TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4}

# Runs where neither ordnung nor the plugin can be imported.
STRANGER = """
import json, sys, torch, transformers
torch.set_grad_enabled(False)
folder = sys.argv[1]
ids, logits, text = torch.load(folder + ".pt")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
head = transformers.AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True)
generated = model.generate(ids, max_new_tokens=8, do_sample=False)
equal = [torch.equal(model(ids).logits, logits), torch.equal(generated, text)]
known = [name for name in sys.modules if name.partition(".")[0] in ("ordnung", "retention")]
print(json.dumps({"equal": equal, "head": type(head).__name__, "known": known}))
"""


def make(**fields):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("retention_lm", **TINY, **fields)).eval()


def environment(*folders):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}


@torch.no_grad()
def check_as_stranger(model, folder):
    """Loads `folder` in a process without ordnung, and compares with `model`."""
    ids = torch.randint(1, 60, (1, 11))
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    torch.save((ids, model(ids).logits, text), f"{folder}.pt")
    result = subprocess.run(
        [sys.executable, "-c", REFUSE + STRANGER, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == {"equal": [True, True], "head": "RetentionLMForTokenClassification", "known": []}


def test_a_family_costs_no_more_than_200_lines():
    assert sum(len(path.read_text().splitlines()) for path in (HERE / "retention").glob("*.py")) <= 200


def test_its_classes_are_names_of_ordnung_too():
    assert ordnung.RetentionLMForCausalLM is RetentionLMForCausalLM
    assert "retention_lm" in REGISTERED and "retention_lm" not in FAMILIES
    assert type(make()) is RetentionLMForCausalLM


def test_a_stand_alone_folder_runs_without_either_package(tmp_path):
    model = make(eos_token_id=None)
    names = {path.name for path in ordnung.save_standalone(model, tmp_path / "folder")}
    assert {"configuration_retention_lm.py", "modeling_retention_lm.py", "retention_op.py", "backbone.py"} <= names
    check_as_stranger(model, tmp_path / "folder")


def test_adapters_go_to_all_projections_and_come_back(tmp_path):
    config = AutoConfig.for_model("retention_lm", **TINY, pad_token_id=0)
    base = AutoModelForSequenceClassification.from_config(config).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)).eval()
    mixer = {name.rpartition(".")[2] for name in model.targeted_module_names if ".0.mixer." in name}
    assert mixer == {"q_proj", "k_proj", "v_proj", "out_proj", "decay_proj"}
    ids = torch.randint(1, 60, (2, 9))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert table["retention_lm"] == LORA_TARGETS


@pytest.mark.parametrize("source", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_other_checkpoints_become_one(source, tokenizer, tmp_path):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    source_class = getattr(transformers, source)
    config = source_class.config_class(**sizes, intermediate_size=24, bos_token_id=1, eos_token_id=2)
    original = source_class(config).eval()
    for saved in (original, tokenizer):
        saved.save_pretrained(tmp_path / "source")
    model, report = ordnung.convert(tmp_path / "source", "retention_lm", output_report=True, chunk_size=4)
    assert type(model) is RetentionLMForCausalLM
    new = {name.rpartition("mixer.")[2] for name in report.new}
    assert new == {"decay_proj.weight", "decay_logits"}
    arguments = ["--source", tmp_path / "source", "--model_type", "retention_lm", "--output_dir", tmp_path / "out"]
    assert convert_program.main([*map(str, arguments)]) == 0
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    copied = "model.layers.1.mixer.v_proj.weight"
    assert copied in report.copied and torch.equal(written.state_dict()[copied], model.state_dict()[copied])


def test_it_is_pretrained_and_shared(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("the whale and the sea, a ship and a captain\n" * 60)
    options = {
        "model_type": "retention_lm",
        "config_overrides": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,chunk_size=4",
        "train_file": tmp_path / "text.txt",
        "tokenizer_name": tmp_path / "tokenizer",
        "output_dir": tmp_path / "run",
        "block_size": 16,
        "max_steps": 20,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
    }
    assert pretrain.main([f"--{name}={value}" for name, value in options.items()]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    folder = write_folder(tmp_path / "run", Target("ahab/retention"))
    assert "retention_lm" in (folder / "README.md").read_text()
    check_as_stranger(AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval(), folder)


def test_programs_know_the_families_of_installed_packages(tmp_path):
    """As `pip install` leaves it: an entry point beside the package."""
    info = tmp_path / "retention-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: retention\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[ordnung.families]\nretention_lm = retention\n")
    command = [sys.executable, "-m", "ordnung.scripts.convert", "--help"]
    for folders, known in (((tmp_path, HERE), True), ((HERE,), False)):
        result = subprocess.run(command, capture_output=True, text=True, env=environment(*folders))
        assert result.returncode == 0, result.stderr
        assert ("retention_lm" in result.stdout) is known
    result = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path))
    assert "retention_lm' of retention cannot be registered: mend or uninstall it" in result.stderr


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"model_type": "conv_lm"}, ValueError, "'conv_lm' is registered as .*prefix='ConvLM'"),
        ({"prefix": "ConvLM"}, ValueError, "'conv_lm' is registered .*: give 'other_lm' other names"),
        ({"model_type": "other-lm"}, ValueError, "'other-lm' .* must be names"),
        ({"heads": ["ForAnything"]}, ValueError, r"heads \['ForAnything'\], but there are"),
        ({"modeling": "retention.nowhere"}, ModuleNotFoundError, "no module retention.nowhere for the family"),
        ({"model_type": "bert"}, ValueError, "transformers has a model type 'bert' of its own"),
    ],
)
def test_a_wrong_registration_is_refused_in_words(changed, error, message):
    arguments = {
        "model_type": "other_lm",
        "prefix": "OtherLM",
        "configuration": "retention.configuration_retention_lm",
        "modeling": "retention.modeling_retention_lm",
    }
    before = dict(REGISTERED)
    with pytest.raises(error, match=message):
        ordnung.register_family(**{**arguments, **changed})
    assert REGISTERED == before


def test_registering_twice_changes_nothing():
    before = dict(REGISTERED)
    registration.register()
    family = REGISTERED["retention_lm"]
    registration.register_family("retention_lm", *family[:2], configuration=family[2], modeling=family[3])
    assert REGISTERED == before
