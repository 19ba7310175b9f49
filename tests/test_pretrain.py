"""The pretraining script from end to end on tiny data: results, resuming, equalities, bad input."""

import errno
import json
import logging
import math
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from ordnung.scripts import plot_loss, pretrain
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.pretraining.model import build_run_config
from ordnung.scripts.pretraining.options import PretrainOptions
from ordnung.scripts.pretraining.run import Pretraining
from ordnung.scripts.training.loop import Loop
from ordnung.scripts.training.optimization import parameter_groups

TINY = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2"
SOFTMAX = ["--model_type", "softmax_lm", "--config_overrides", TINY + ",position_embedding_type=rope"]
LINFORMER = ["--model_type", "linformer_lm", "--config_overrides", TINY + ",projected_size=8,local_block_size=8"]
CUBIC = ["--model_type", "cubic_prefix_lm", "--config_overrides", TINY + ",max_position_embeddings=32"]
WORDS = "whale ship sea captain the a of and sailed harpoon white wind storm night day mast".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with text.txt (one document) and documents.jsonl (200 documents of many lengths)."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS, size=random.integers(2, 40))) for _ in range(200)]
    (folder / "text.txt").write_text(".\n".join(sentences))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    return folder


@pytest.fixture(scope="module")
def tokenizer(data):
    """Folder of a tokenizer trained on the data, so that most runs need not train one."""
    texts = [(data / "text.txt").read_text()]
    trained = corpus.train_tokenizer(texts, 300, masked=True)
    trained.save_pretrained(data / "tokenizer")
    return data / "tokenizer"


@pytest.fixture
def run(data, tokenizer, tmp_path, monkeypatch):
    """Runs the program on text.txt with a tiny ConvLM; keyword arguments are further options, None removes one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(output="out", model=None, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            "train_file": data / "text.txt",
            "tokenizer_name": tokenizer,
            "output_dir": tmp_path / output,
            "block_size": 32,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "eval_steps": 4,
            "save_steps": 4,
            "use_cpu": True,
            **options,
        }
        argv = (
            model if model is not None else ["--model_type", "conv_lm", "--config_overrides", TINY + ",kernel_size=8"]
        )
        argv = argv + [f"--{name}={value}" for name, value in options.items() if value is not None]
        assert pretrain.main([*argv]) == 0
        return tmp_path / output

    return run


def metrics(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same_run(a, b):
    """Bit-equal losses, evaluations and weights."""
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "eval_loss"):
        assert metrics(a, name) == metrics(b, name)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


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


@pytest.mark.parametrize("kind", ["memory", "streaming", "linformer", "cubic", "masked", "masked-linformer"])
def test_a_resumed_run_equals_an_uninterrupted_one(run, data, kind):
    options = {"gradient_accumulation_steps": 2, "max_steps": 9, "save_total_limit": 1, "warmup_steps": 2}
    model = ["--model_type", "conv_lm", "--config_overrides", TINY + ",kernel_size=8,hidden_dropout=0.1"]
    if kind == "streaming":
        options |= {"train_file": data / "documents.jsonl", "validation_file": data / "text.txt", "streaming": True}
    for name, other in (("masked", SOFTMAX), ("linformer", LINFORMER), ("cubic", CUBIC)):
        if name in kind:
            model = [*other[:-1], other[-1] + ",hidden_dropout=0.1,attention_dropout=0.1"]
    if kind.startswith("masked"):
        # the line of step 6 covers steps on both sides of the checkpoint of step 5
        options |= {"objective": "masked", "logging_steps": 3}
    whole = run("whole", model, **options)
    again = run("again", model, **{**options, "save_steps": 5, "save_total_limit": 2})
    shutil.rmtree(again / "checkpoint-9")
    resumed = run("again", model, **{**options, "resume_from_checkpoint": "auto"})
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "eval_loss"):
        assert metrics(resumed, name) == metrics(whole, name)
    assert list(metrics(resumed)) == list(metrics(whole))
    auto_class = AutoModelForMaskedLM if kind.startswith("masked") else AutoModelForCausalLM
    weights = [auto_class.from_pretrained(folder).state_dict() for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert ("eval_bits_per_byte" in (whole / "metrics.jsonl").read_text()) == (not kind.startswith("masked"))


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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": ["--model_type", "convlm"]}, "unknown model_type 'convlm'; did you mean 'conv_lm'"),
        ({"model": []}, "give one of --model_type"),
        (
            {"model": ["--model_type=conv_lm", "--config_overrides", "hiden_size=8"]},
            "'hiden_size', which is no field of ConvLMConfig; did you mean 'hidden_size'",
        ),
        ({"model": ["--model_type=conv_lm", "--config_overrides", "hidden_size=abc"]}, "hidden_size"),
        (
            {"model": ["--model_type=conv_lm", "--config_overrides", "vocab_size=100"]},
            "300 tokens.*100.*vocab_size=300",
        ),
        ({"objective": "masked"}, "must be odd in a bidirectional model"),
        ({"model": ["--model_type=gpt2"], "objective": "masked"}, "gpt2 has no model for the masked objective"),
        ({"model": ["--model_name_or_path", "nowhere/nothing"]}, "nowhere/nothing cannot be made"),
        ({"model": ["--model_type=conv_lm", "--lerning_rate=1"]}, "'--lerning_rate=1'; did you mean 'learning_rate'"),
        ({"max_steps": "many"}, "--max_steps.*: invalid int value: 'many'"),
        ({"max_steps": 0}, "--max_steps must be at least 1, not 0"),
        ({"objective": "sideways"}, "sideways"),
        ({"train_file": "nothing*.txt"}, r"nothing\*.txt: no such file"),
        ({"train_file": None}, "give one of --train_file and --dataset_name"),
        ({"dataset_name": "x"}, "give one of --train_file and --dataset_name"),
        ({"train_file": None, "dataset_name": "nowhere/nothing"}, "nowhere/nothing cannot be loaded"),
        ({"tokenizer_name": None}, "give --tokenizer_name, or --train_tokenizer_vocab_size"),
        ({"tokenizer_name": "nowhere/nothing"}, "no tokenizer can be loaded from nowhere/nothing"),
        ({"block_size": 100000}, "the training data holds .* tokens, less than one block of 100000"),
        ({"block_size": 2000}, "the held-out text holds .* --validation_fraction"),
        ({"max_steps": None, "streaming": True}, "--streaming needs --max_steps"),
        ({"streaming": True}, "nothing can be held out of a stream"),
        ({"report_to": "trackoi"}, "trackoi: unknown tracker.*trackio"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr: .*min_lr"),
        ({"config": "nowhere.yaml"}, "--config nowhere.yaml: no such file"),
        (
            {"model": ["--model_type=softmax_lm", "--config_overrides", TINY + ",max_position_embeddings=16"]},
            r"32 is above the model's max_position_embeddings \(16\); set max_position_embeddings=32 in --config_ov",
        ),
        (
            {
                "model": [
                    *LINFORMER[:3],
                    LINFORMER[3] + ",max_position_embeddings=16,position_embedding_type=none",
                    "--objective=masked",
                ]
            },
            r"32 is above the model's max_position_embeddings \(16\)",
        ),
    ],
)
def test_bad_input_is_told_before_training(run, tmp_path, options, message):
    with pytest.raises(ScriptError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_unknown_keys_in_a_file_are_errors(run, tmp_path):
    (tmp_path / "run.yaml").write_text("lerning_rate: 1\n")
    with pytest.raises(ScriptError, match="'lerning_rate' in .*run.yaml; did you mean 'learning_rate'"):
        run(config=tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("- a\n- b\n")
    with pytest.raises(ScriptError, match="option: value"):
        run(config=tmp_path / "run.yaml")


def test_a_full_output_folder_needs_a_decision(run, tmp_path):
    out = run(max_steps=2)
    for options in ({}, {"model": SOFTMAX}):
        with pytest.raises(ScriptError, match="is not empty .*--resume_from_checkpoint auto.*--overwrite_output_dir"):
            run(**options)
    (out / "mine.txt").write_text("kept")
    before = metrics(out)
    with pytest.raises(ScriptError, match="no such file"):
        run(overwrite_output_dir=True, train_file="nothing.txt")
    assert metrics(out) == before  # a run that cannot start deletes nothing
    run(overwrite_output_dir=True, max_steps=2, seed=1)
    assert metrics(out) != before and (out / "mine.txt").read_text() == "kept"
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("kept")
    with pytest.raises(ScriptError, match="precious.txt.*holds no checkpoint"):
        run("other", resume_from_checkpoint="auto")
    with pytest.raises(ScriptError, match="is not where .*checkpoint-2 comes from"):
        run("other", resume_from_checkpoint=out / "checkpoint-2")
    with pytest.raises(ScriptError, match="would delete the checkpoint"):
        run(resume_from_checkpoint="auto", overwrite_output_dir=True)
    assert [path.name for path in other.iterdir()] == ["precious.txt"]


def test_damaged_checkpoints_are_skipped_or_refused(run, caplog):
    whole = run("whole", max_steps=6, save_steps=2, save_total_limit=3)
    out = run(max_steps=6, save_steps=2, save_total_limit=3)
    optimizer = out / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    (out / "checkpoint-4" / "manifest.json").unlink()
    (out / ".tmp-checkpoint-5").mkdir()
    with pytest.raises(
        ScriptError, match="checkpoint-6: its file optimizer.pt is not what was written; use .*checkpoint-2"
    ):
        run(max_steps=6, resume_from_checkpoint=out / "checkpoint-6")
    with pytest.raises(ScriptError, match="checkpoint-5: there is no such folder"):
        run(max_steps=6, resume_from_checkpoint=out / "checkpoint-5")
    with caplog.at_level(logging.WARNING):
        run(max_steps=6, save_steps=2, save_total_limit=3, resume_from_checkpoint="auto")
    for name in ("checkpoint-6: its file optimizer.pt", "checkpoint-4: its manifest.json cannot be read"):
        assert any(f"skipping checkpoint {out}/{name}" in text for text in caplog.messages)
    assert_same_run(out, whole)
    assert not (out / ".tmp-checkpoint-5").exists()
    for folder in out.glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(ScriptError, match="every checkpoint in .* is damaged; --overwrite_output_dir"):
        run(max_steps=6, resume_from_checkpoint="auto")


def test_going_back_discards_what_came_after(run):
    whole = run("whole", save_steps=2, save_total_limit=4)
    out = run(save_steps=2, save_total_limit=4)
    run(save_steps=2, save_total_limit=4, resume_from_checkpoint=out / "checkpoint-2")
    assert_same_run(out, whole)
    assert len(list(out.glob("checkpoint-*"))) == 4
    forked = run("fork", resume_from_checkpoint=out / "checkpoint-4")
    assert list(metrics(forked)) == [5, 6, 7, 8]
    assert metrics(forked)[8] == metrics(whole)[8]


def test_resuming_another_run_is_refused(run):
    out = run(max_steps=2, save_steps=1)
    with pytest.raises(ScriptError, match="trained with block_size 32, not 16"):
        run(block_size=16, resume_from_checkpoint=out / "checkpoint-1")
    with pytest.raises(ScriptError, match="another model|size mismatch|sizes"):
        run(
            model=["--model_type=conv_lm", "--config_overrides", TINY + ",kernel_size=4"], resume_from_checkpoint="auto"
        )
    with pytest.raises(ScriptError, match="another model"):
        layers = TINY.replace("num_hidden_layers=2", "num_hidden_layers=3") + ",kernel_size=8"
        run(model=["--model_type=conv_lm", "--config_overrides", layers], resume_from_checkpoint="auto")
    assert (out / "checkpoint-2").exists()


def test_a_full_disk_leaves_the_previous_checkpoint(run, tmp_path, monkeypatch):
    save = torch.save

    def save_until_full(value, path, **kwargs):
        if "checkpoint-4" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    message = (
        "checkpoint-4 could not be saved .*No space left.* MiB are free at .*last good checkpoint is .*checkpoint-2"
    )
    with pytest.raises(ScriptError, match=message):
        run(save_steps=2)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-2"] and not list(out.glob(".tmp*"))
    monkeypatch.undo()
    whole = run("whole", save_steps=2)
    run(save_steps=2, resume_from_checkpoint="auto")
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_at_a_checkpoint(run, tmp_path, monkeypatch, number):
    whole = run("whole")
    step = Loop.take_step

    def step_with_signal(self):
        if self.step == 2:
            signal.raise_signal(number)
        step(self)

    monkeypatch.setattr(Loop, "take_step", step_with_signal)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(AssertionError, match=f"{128 + number} == 0"):
        run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (out / "results.json").exists()
    monkeypatch.undo()
    run(resume_from_checkpoint="auto")
    assert_same_run(out, whole)


def test_a_second_process_does_not_write_to_the_same_folder(run, tmp_path):
    holder = "import sys, pathlib; from ordnung.scripts.training.runs import hold; hold(pathlib.Path(sys.argv[1]))"
    holder += "; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ScriptError, match="another process is writing to --output_dir .*out: wait for it"):
            run(max_steps=2)
        other.kill()
    run(max_steps=2)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_command_that_is_told_after_a_stop_goes_on(data, tokenizer, tmp_path, overwrite):
    """A config that begins anew each time, as that of `make demo`, is no hindrance."""
    program = """
import signal, sys
from ordnung.scripts import pretrain
from ordnung.scripts.common.errors import run_script
from ordnung.scripts.training.loop import Loop
step = Loop.take_step
Loop.take_step = lambda self: (self.step == 2 and signal.raise_signal(2)) or step(self)
sys.argv[0] = "ordnung"
run_script(lambda: pretrain.main(sys.argv[2:]))
"""
    options = f"pretrain --model_type conv_lm --config_overrides {TINY} --train_file {data / 'text.txt'} --use_cpu "
    options += f"--tokenizer_name {tokenizer} --output_dir {tmp_path / 'out'} --max_steps 5 --block_size 32"
    options += " --overwrite_output_dir" * overwrite
    stopped = subprocess.run([sys.executable, "-c", program, *options.split()], capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    (line,) = (line for line in stopped.stderr.splitlines() if "told to stop" in line)
    command = shlex.split(line.partition("to go on: ")[2])
    assert command[: len(options.split()) + 1] == ["ordnung", *options.split()]
    again = subprocess.run([sys.executable, "-m", "ordnung.scripts.cli", *command[1:]], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    assert json.loads((tmp_path / "out/results.json").read_text())["steps"] == 5


def test_a_killed_save_leaves_the_previous_checkpoint(data, tokenizer, tmp_path):
    """The process dies, without any cleaning up, when the second checkpoint is nearly written."""
    program = """
import os, sys, torch
from ordnung.scripts import pretrain
from ordnung.scripts.training import checkpointing
digests = checkpointing._digests
checkpointing._digests = lambda folder: os._exit(9) if "checkpoint-4" in folder.name else digests(folder)
pretrain.main(sys.argv[1:])
"""
    options = f"--model_type conv_lm --config_overrides {TINY} --train_file {data / 'text.txt'} --block_size 32"
    options += f" --tokenizer_name {tokenizer} --output_dir {tmp_path / 'out'} --max_steps 6 --save_steps 2 --use_cpu"
    dead = subprocess.run([sys.executable, "-c", program, *options.split()], capture_output=True, text=True)
    assert dead.returncode == 9, dead.stderr
    names = sorted(path.name for path in (tmp_path / "out").glob("*checkpoint-*"))
    assert names == [".tmp-checkpoint-4", "checkpoint-2"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert pretrain.main([*options.split(), "--resume_from_checkpoint=auto"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-6"]


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch):
    loss = Pretraining.loss

    def broken(self, model, batch):
        return loss(self, model, batch) * (math.nan if self.loop.step == 5 and model.training else 1)

    monkeypatch.setattr(Pretraining, "loss", broken)
    with pytest.raises(ScriptError, match="loss nan.*at step 6.*last good checkpoint is .*checkpoint-4"):
        run()
    assert not (tmp_path / "out" / "results.json").exists()
    with pytest.raises(ScriptError, match=r"at step \d: .*last good checkpoint is none"):
        run("wild", learning_rate=1e30, max_grad_norm=0, save_steps=100)


def test_errors_are_one_line_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "ordnung.scripts.pretrain", "--model_type", "convlm", "--output_dir", "x"]
    command += ["--train_file", "x.txt", "--train_tokenizer_vocab_size", "300"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: unknown model_type 'convlm'")
    assert "Traceback" not in failed.stderr and not (tmp_path / "x").exists()


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


def test_a_line_cut_short_by_a_crash_does_not_prevent_resuming(run):
    whole = run("whole")
    out = run(max_steps=4)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tokens": 640, "lo')
    shutil.rmtree(out / "best")
    run(resume_from_checkpoint="auto", max_steps=8)
    assert list(metrics(out)) == list(range(1, 9)) and metrics(out)[1] == metrics(whole)[1]
    assert json.loads((out / "best" / "eval_results.json").read_text())["step"] == 8
    finished = metrics(run(resume_from_checkpoint="auto", max_steps=8), "eval_loss")
    assert json.loads((out / "results.json").read_text())["evaluation"]["eval_loss"] == finished[8]
