"""The pretraining program from end to end on tiny data: results, equalities, options."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tiny_runs import SOFTMAX, TINY, assert_same_run, metrics
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from ordnung.scripts import plot_loss, pretrain
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.pretraining.model import build_run_config
from ordnung.scripts.pretraining.options import PretrainOptions
from ordnung.scripts.training.optimization import parameter_groups


@pytest.mark.draws
def test_a_run_leaves_a_model_and_its_record(run, data):
    out = run(tokenizer_name=None, train_tokenizer_vocab_size=290, max_steps=30, eval_steps=10, learning_rate=3e-3)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "conv_lm" and model.config.vocab_size == len(tokenizer) == 290
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
    losses, evaluations = metrics(out), metrics(out, "eval_loss")
    assert list(losses) == list(range(1, 31)) and list(evaluations) == [0, 10, 20, 30]
    assert evaluations[0] == pytest.approx(math.log(290), abs=0.1)
    assert evaluations[30] < evaluations[10] < evaluations[0] - 0.2
    assert metrics(out, "eval_perplexity")[30] == pytest.approx(math.exp(evaluations[30]))
    assert set(metrics(out, "tokens").values()) >= {4 * 32 * step for step in range(31)}
    flops, speed = metrics(out, "model_flops_per_second")[30], metrics(out, "tokens_per_second")[30]
    assert flops == pytest.approx(speed / 32 * 3 * model.flops(32))
    results = json.loads((out / "results.json").read_text())
    assert results["evaluation"]["eval_loss"] == evaluations[30] and results["best"]["step"] == 30
    assert results["parameters"] == model.num_parameters() and results["tokens"] == 30 * 4 * 32
    assert results["machine"]["torch"] == torch.__version__ and results["seed"] == 0
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-28", "checkpoint-30"]
    assert not list(out.glob(".tmp*"))
    for folder in (out / "best", out / "checkpoint-30"):
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_evaluation_is_the_mean_over_the_held_out_tokens(run, data):
    out = run(validation_file=data / "documents.jsonl", respect_document_boundaries=True, max_steps=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    nll = tokens = encoded = size = 0
    for line in (data / "documents.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        encoded, size = encoded + len(ids), size + len(text.encode())
        for start in range(0, len(ids), 32):
            block = torch.tensor([ids[start : start + 32]])
            if block.shape[1] > 1:
                with torch.no_grad():
                    nll += float(model(block, labels=block).loss) * (block.shape[1] - 1)
                tokens += block.shape[1] - 1
    assert metrics(out, "eval_loss")[2] == pytest.approx(nll / tokens, rel=1e-5)
    expected = nll / tokens / math.log(2) * encoded / size
    assert metrics(out, "eval_bits_per_byte")[2] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", ["conv_lm", "gpt2"])
def test_gradient_accumulation_changes_nothing(run, data, model):
    """Blocks hold different numbers of tokens here, so that a mean of batch means would differ."""
    names = "n_embd=16,n_layer=2,n_head=2,embd_pdrop=0,attn_pdrop=0,resid_pdrop=0" if model == "gpt2" else TINY
    argv = ["--model_type", model, "--config_overrides", names]
    options = {"train_file": data / "documents.jsonl", "respect_document_boundaries": True, "max_steps": 4}
    whole = run("whole", argv, per_device_train_batch_size=8, **options)
    split = run("split", argv, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert list(metrics(split, name).values()) == pytest.approx(list(metrics(whole, name).values()), rel=1e-5)


def test_masked_objective_trains_a_bidirectional_model(run):
    out = run(model=SOFTMAX, objective="masked", learning_rate=3e-3, max_steps=20, eval_steps=10)
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert model.config.is_decoder is False
    evaluations = metrics(out, "eval_loss")
    assert evaluations[20] < evaluations[0] - 0.2


def test_options_from_a_file_yield_to_the_command_line(run, tmp_path):
    file = tmp_path / "run.yaml"
    values = {"learning_rate": "2e-3", "max_steps": 99, "config_overrides": {"hidden_size": 16, "kernel_size": 4}}
    file.write_text(yaml.safe_dump({**values, "respect_document_boundaries": True, "report_to": None}))
    overrides = "kernel_size=6,num_hidden_layers=1,num_attention_heads=2"
    argv = ["--model_type=conv_lm", "--config", str(file), "--config_overrides", overrides]
    out = run("first", argv, max_steps=2)
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert (
        record["learning_rate"] == 2e-3 and record["max_steps"] == 2 and record["respect_document_boundaries"] is True
    )
    config = AutoConfig.from_pretrained(out)
    assert (config.hidden_size, config.kernel_size, config.num_hidden_layers) == (16, 6, 1)
    # the record of a run, given as a file, makes the same run
    again = run("again", ["--config", str(out / "run.yaml")], train_file=None, max_steps=None, block_size=None)
    assert_same_run(out, again)


def test_the_shipped_run_config_is_valid():
    file = Path(pretrain.__file__).parent / "configs" / "demo.yaml"
    options = parse_options(PretrainOptions, ["--config", str(file), "--max_steps", "7"])
    assert options.max_steps == 7
    assert build_run_config(options).model_type == "conv_lm"


def test_a_model_continues_from_a_checkpoint_or_a_config_file(run, tmp_path):
    first = run("first", max_steps=3)
    argv = ["--model_name_or_path", str(first), "--config_overrides", "hidden_dropout=0.1"]
    second = run("second", argv, tokenizer_name=None, max_steps=1)
    assert metrics(second, "eval_loss")[0] == pytest.approx(metrics(first, "eval_loss")[3], rel=1e-6)
    assert AutoConfig.from_pretrained(second).hidden_dropout == 0.1
    third = run("third", ["--config_name", str(first / "config.json")], max_steps=3)
    assert_same_run(first, third)
    # a config may name another type, as of a checkpoint that was saved in it: training is in float32
    fields = json.loads((first / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "half.json").write_text(json.dumps(fields))
    assert_same_run(first, run("half", ["--config_name", str(tmp_path / "half.json")], max_steps=3))


def test_numerics_options_train_the_same_model(run):
    plain = metrics(run("plain"))
    assert metrics(run("recomputed", gradient_checkpointing=True)) == pytest.approx(plain, rel=1e-6)
    rounded = metrics(run("rounded", mixed_precision="bf16"))
    assert rounded == pytest.approx(plain, rel=2e-2) and rounded != plain


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_model_trains_the_same(run):
    model = ["--model_type=conv_lm", "--config_overrides", TINY.replace("layers=2", "layers=1") + ",kernel_size=8"]
    options = {"validation_fraction": 0, "save_steps": 3, "max_steps": 4}  # an evaluation would be compiled too
    plain = run("plain", model, **options)
    compiled = run("compiled", model, **options, torch_compile=True)
    assert metrics(compiled) == pytest.approx(metrics(plain), rel=1e-4)
    # what is saved does not know of the compilation: a run without it goes on from there
    (compiled / "checkpoint-4" / "manifest.json").unlink()
    resumed = run("compiled", model, **options, resume_from_checkpoint="auto")
    assert metrics(resumed)[4] == pytest.approx(metrics(plain)[4], rel=1e-4)
    torch.compiler.reset()


def test_weight_decay_spares_biases_norms_and_what_the_model_names():
    config = AutoConfig.for_model("conv_lm", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)
    model = AutoModelForCausalLM.from_config(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, spared))
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert sum("kernel_logits" in name for name in spared) == 2
    assert all("norm" in name or "bias" in name or "kernel_logits" in name for name in spared)
    assert not any("norm" in name or "bias" in name or "kernel_logits" in name for name in decayed)


def test_trackers_get_what_metrics_jsonl_gets(run, monkeypatch):
    seen = {}

    class Recorder(GeneralTracker):
        name = "recorder"
        requires_logging_directory = False
        main_process_only = True

        def __init__(self, run_name, **kwargs):
            super().__init__()
            seen["name"] = run_name

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            seen["options"] = values

        def log(self, values, step=None, **kwargs):
            seen.setdefault("logged", []).append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    out = run(report_to="recorder", run_name="named", max_steps=2)
    assert seen["name"] == "named" and seen["options"]["max_steps"] == "2"
    logged = {step: values["loss"] for step, values in seen["logged"] if "loss" in values}
    assert logged == metrics(out)


@pytest.mark.draws
def test_the_loss_curve_can_be_drawn_again(run, tmp_path, capsys):
    out = run(max_steps=2)
    (out / "loss_curve.png").unlink()
    plot_loss.main(["--run", str(out), "--output", str(tmp_path / "curve.svg"), "--title", "a title"])
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    plot_loss.main(["--run", str(out / "metrics.jsonl")])
    assert (out / "loss_curve.png").exists()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ScriptError, match="holds no losses yet"):
        plot_loss.main(["--run", str(tmp_path)])


def test_a_data_set_folder_brings_its_own_validation(run, data, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    shutil.copy(data / "documents.jsonl", folder / "train.jsonl")
    shutil.copy(data / "documents.jsonl", folder / "validation.jsonl")
    named = run("named", train_file=None, dataset_name=folder, max_steps=2)
    files = dict.fromkeys(("train_file", "validation_file"), data / "documents.jsonl")
    assert_same_run(named, run("files", **files, max_steps=2))
    streamed = run("streamed", train_file=None, dataset_name=folder, streaming=True, max_eval_blocks=5, max_steps=2)
    assert list(metrics(streamed)) == [1, 2]
