"""The pretraining script on several processes, started by `accelerate launch` with the shipped configs."""

import json
from pathlib import Path

import launching
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from launching import SCRIPTS, launch, launch_sharded
from tiny_runs import TINY, write_text
from transformers import AutoModelForCausalLM

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import pretrain
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError

# Programs that run several times in the processes of one launch, which take long to start: (words, why refused) each.
SEVERAL = """
import json
import sys
from accelerate.state import PartialState
from ordnung.scripts import pretrain
destroy = PartialState.destroy_process_group
PartialState.destroy_process_group = lambda *args: None
for words, _ in json.load(open(sys.argv[1])):
    assert pretrain.main(words) == 0
destroy(PartialState())
"""
SHARDED = """
import json
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.pretraining.run import Pretraining
from ordnung.scripts.pretraining.options import PretrainOptions
from accelerate.state import AcceleratorState
PartialState.destroy_process_group = lambda *args: None
for words, refusal in json.load(open(sys.argv[1])):
    if AcceleratorState._shared_state:  # it remembers the layer classes of the last model
        AcceleratorState().fsdp_plugin.transformer_cls_names_to_wrap = None
    run = Pretraining(parse_options(PretrainOptions, words))
    check_sharded(run.loop)
    try:
        assert run.train() == 0 and not refusal
    except ValueError as error:
        assert refusal and refusal in str(error), error
end(0)
"""


# model type -> config fields, of families that need some
MODELS = {
    "conv_lm": "kernel_size=8",
    "linformer_lm": "is_decoder=true,projected_size=4,local_block_size=8",
    "cubic_prefix_lm": "prefix_group_tokens=64",
    "sparse_attention_lm": "sliding_window=8,global_stride=8,num_random_blocks=1,random_block_size=8",
    "quadratic_kernel_lm": "chunk_size=16",
}
MIXERS = [name for name in FAMILIES if name != "softmax_lm"]
RESUMED = ("conv_lm", "linformer_lm")  # the latter's layers share a parameter of the model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with documents of many lengths and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    texts = write_text(folder)[:150]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus.train_tokenizer(texts, 300, masked=False).save_pretrained(folder / "tokenizer")
    return folder


def options_of(model_type, data):
    """Options of one run with 8 blocks a step, whatever the number of processes."""
    run = {
        "model_type": model_type,
        "config_overrides": f"{TINY},{MODELS.get(model_type, 'is_decoder=true')}",
        "train_file": data / "documents.jsonl",
        "tokenizer_name": data / "tokenizer",
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
def single(data, tmp_path_factory):
    """The folder of each family's run in one process."""
    folder = tmp_path_factory.mktemp("single")
    return {name: run_here(options_of(name, data), folder / name) for name in MIXERS}


def write_runs(folder, runs):
    """The file of runs that the programs read, which has the words of two rows a process and a list of refusals."""
    runs = [([*words, "--per_device_train_batch_size=2"], refusal) for words, refusal in runs]
    (folder / "runs.json").write_text(json.dumps(runs))
    return [folder / "runs.json"]


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
def test_two_cpu_processes_equal_one(data, single, tmp_path):
    (tmp_path / "several.py").write_text(SEVERAL)
    runs = [([*options_of(name, data), f"--output_dir={tmp_path / name}"], None) for name in MIXERS]
    launch("accelerate_cpu.yaml", tmp_path / "several.py", write_runs(tmp_path, runs))
    for name in MIXERS:
        out = tmp_path / name
        assert (results(out)["num_processes"], results(out)["distributed_type"]) == (2, "MULTI_CPU")
        assert_same_curves(out, single[name])
        # the checkpoint does not depend on the number of processes: one process goes on from it
        more = f"--resume_from_checkpoint={out / 'checkpoint-3'}"
        resumed = run_here(options_of(name, data), tmp_path / f"{name}-resumed", more)
        assert curve(resumed, "loss") == pytest.approx(curve(single[name], "loss")[3:], rel=2e-5)


@pytest.mark.slow
def test_fsdp2_equals_one_process(data, single, tmp_path):
    runs = []
    for name in MIXERS:
        out, words = tmp_path / name, options_of(name, data)
        runs.append(([*words, f"--output_dir={out}"], None))
        if name not in RESUMED:
            continue
        resumed = [f"--output_dir={tmp_path / name}-resumed", f"--resume_from_checkpoint={out / 'checkpoint-3'}"]
        runs.append(([*words, *resumed], None))
    # with documents apart, processes would need different numbers of passes, and wait for each other for ever
    strided = [*options_of("cubic_prefix_lm", data), "--max_steps=1", "--config_overrides=prefix_stride=4"]
    runs.append(([*strided, f"--output_dir={tmp_path / 'refused'}"], "takes no padding"))
    full_rows = ["--respect_document_boundaries=False", f"--output_dir={tmp_path / 'strided'}"]
    runs.append(([*strided, *full_rows], None))
    launch_sharded(SHARDED, tmp_path, write_runs(tmp_path, runs))
    for name in MIXERS:
        out = tmp_path / name
        assert (results(out)["num_processes"], results(out)["distributed_type"]) == (2, "FSDP")
        assert_same_curves(out, single[name])
    for name in RESUMED:
        assert curve(tmp_path / f"{name}-resumed", "loss") == curve(tmp_path / name, "loss")[3:]
    assert results(tmp_path / "strided")["steps"] == 1 and not (tmp_path / "refused/results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config, processes", [("accelerate_single.yaml", 1), ("accelerate_multi.yaml", 2)])
def test_the_other_configs_start(data, tmp_path, config, processes):
    out = tmp_path / "out"
    arguments = [
        *options_of("conv_lm", data),
        "--max_steps=1",
        "--per_device_train_batch_size=2",
        f"--output_dir={out}",
    ]
    launch(config, SCRIPTS / "pretrain.py", arguments)
    assert results(out)["num_processes"] == processes and results(out)["steps"] == 1


def test_every_shipped_config_is_tested():
    tested = Path(__file__).read_text() + Path(launching.__file__).read_text()
    for path in (SCRIPTS / "configs").glob("accelerate_*.yaml"):
        assert f'"{path.name}"' in tested
        assert yaml.safe_load(path.read_text())["num_machines"] == 1


def test_fsdp_on_the_cpu_is_refused_in_words(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ScriptError, match="FSDP needs an accelerator device.*accelerate_cpu.yaml"):
        run_here(options_of("conv_lm", data), tmp_path / "out")
