"""The pretraining script on several processes, started by `accelerate launch` with the shipped configs."""

import json
from pathlib import Path

import launching
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from launching import SCRIPTS, launch, launch_sharded
from transformers import AutoModelForCausalLM

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import pretrain
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError

WORDS = "whale ship sea captain the a of and sailed harpoon white wind storm night day mast".split()

# Trains where the model is sharded.
SHARDED = """
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.pretraining.run import Pretraining
from ordnung.scripts.pretraining.options import PretrainOptions
run = Pretraining(parse_options(PretrainOptions))
check_sharded(run.loop)
end(run.train())
"""


# model type -> config fields, of families that need some
MODELS = {
    "conv_lm": "kernel_size=8",
    "linformer_lm": "is_decoder=true,projected_size=4,local_block_size=8",
    "cubic_prefix_lm": "prefix_group_tokens=64",
    "sparse_attention_lm": "sliding_window=8,global_stride=8,num_random_blocks=1,random_block_size=8",
    "quadratic_kernel_lm": "chunk_size=16",
}


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "softmax_lm"])
def options(request, tmp_path_factory):
    """Options of one run with 8 blocks a step, whatever the number of processes; documents are of many lengths."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, size=random.integers(2, 60))) for _ in range(150)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus.train_tokenizer(texts, 300, masked=False).save_pretrained(folder / "tokenizer")
    run = {
        "model_type": request.param,
        "config_overrides": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,"
        + MODELS.get(request.param, "is_decoder=true"),
        "train_file": folder / "documents.jsonl",
        "tokenizer_name": folder / "tokenizer",
        "respect_document_boundaries": True,
        "block_size": 32,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "max_eval_blocks": 11,
    }
    return [f"--{name}={value}" for name, value in run.items()]


def run_here(options, output, *more):
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = [*options, "--per_device_train_batch_size=4", f"--output_dir={output}", "--use_cpu", *more]
    assert pretrain.main(arguments) == 0
    return output


@pytest.fixture(scope="module")
def single(options, tmp_path_factory):
    return run_here(options, tmp_path_factory.mktemp("single") / "out")


def results(folder):
    return json.loads((folder / "results.json").read_text())


def curve(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def assert_same_curves(folder, single):
    for name in ("loss", "grad_norm", "eval_loss", "eval_bits_per_byte", "tokens"):
        assert curve(folder, name) == pytest.approx(curve(single, name), rel=2e-5)
    a, b = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (folder, single))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_cpu_processes_equal_one(options, single, tmp_path):
    out = tmp_path / "out"
    arguments = [*options, "--per_device_train_batch_size=2", f"--output_dir={out}"]
    launch("accelerate_cpu.yaml", SCRIPTS / "pretrain.py", arguments)
    assert (results(out)["num_processes"], results(out)["distributed_type"]) == (2, "MULTI_CPU")
    assert_same_curves(out, single)
    # the checkpoint does not depend on the number of processes: one process goes on from it
    resumed = run_here(options, tmp_path / "resumed", f"--resume_from_checkpoint={out / 'checkpoint-3'}")
    assert curve(resumed, "loss") == pytest.approx(curve(single, "loss")[3:], rel=2e-5)


@pytest.mark.slow
def test_fsdp2_equals_one_process(options, single, tmp_path):
    out, resumed = tmp_path / "out", tmp_path / "resumed"
    arguments = [*options, "--per_device_train_batch_size=2"]
    launch_sharded(SHARDED, tmp_path, [*arguments, f"--output_dir={out}"])
    assert (results(out)["num_processes"], results(out)["distributed_type"]) == (2, "FSDP")
    assert_same_curves(out, single)
    arguments += [f"--output_dir={resumed}", f"--resume_from_checkpoint={out / 'checkpoint-3'}"]
    launch_sharded(SHARDED, tmp_path, arguments)
    assert curve(resumed, "loss") == curve(out, "loss")[3:]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["cubic_prefix_lm"], indirect=True)
def test_fsdp2_with_a_stride_takes_full_rows_only(options, tmp_path):
    """With documents apart, processes would need different numbers of passes, and wait for each other for ever."""
    arguments = [*options, "--per_device_train_batch_size=2", "--max_steps=1", "--config_overrides=prefix_stride=4"]
    with pytest.raises(AssertionError, match="takes no padding"):
        launch_sharded(SHARDED, tmp_path, [*arguments, f"--output_dir={tmp_path / 'refused'}"])
    arguments += ["--respect_document_boundaries=False", f"--output_dir={tmp_path / 'out'}"]
    launch_sharded(SHARDED, tmp_path, arguments)
    assert results(tmp_path / "out")["steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", ["conv_lm"], indirect=True)
@pytest.mark.parametrize("config, processes", [("accelerate_single.yaml", 1), ("accelerate_multi.yaml", 2)])
def test_the_other_configs_start(options, tmp_path, config, processes):
    out = tmp_path / "out"
    arguments = [*options, "--max_steps=1", "--per_device_train_batch_size=2", f"--output_dir={out}"]
    launch(config, SCRIPTS / "pretrain.py", arguments)
    assert results(out)["num_processes"] == processes and results(out)["steps"] == 1


def test_every_shipped_config_is_tested():
    tested = Path(__file__).read_text() + Path(launching.__file__).read_text()
    for path in (SCRIPTS / "configs").glob("accelerate_*.yaml"):
        assert f'"{path.name}"' in tested
        assert yaml.safe_load(path.read_text())["num_machines"] == 1


@pytest.mark.parametrize("options", ["conv_lm"], indirect=True)
def test_fsdp_on_the_cpu_is_refused_in_words(options, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ScriptError, match="FSDP needs an accelerator device.*accelerate_cpu.yaml"):
        run_here(options, tmp_path / "out")
