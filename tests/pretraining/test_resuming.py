"""Pretraining that is stopped, by whatever, goes on as if it had not been; and whose folder is whose."""

import errno
import json
import logging
import math
import shlex
import shutil
import signal
import subprocess
import sys

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from launching import holding
from tiny_runs import CUBIC, LINFORMER, SOFTMAX, TINY, assert_same_run, metrics
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from ordnung.scripts import cli, pretrain
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.pretraining.run import Pretraining
from ordnung.scripts.training.loop import Loop


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
    with pytest.raises(ScriptError, match="is damaged: delete that folder to start again, or in pretrain itself"):
        run(max_steps=6, resume_from_checkpoint="auto")


def test_going_back_discards_what_came_after(run, whole):
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


def test_a_full_disk_leaves_the_previous_checkpoint(run, whole, tmp_path, monkeypatch):
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
    run(save_steps=2, resume_from_checkpoint="auto")
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_at_a_checkpoint(run, whole, tmp_path, monkeypatch, number):
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
    with holding(tmp_path / "out") as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ScriptError, match="another process is writing to --output_dir .*out: wait for it"):
            run(max_steps=2)
        other.kill()
    run(max_steps=2)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_command_that_is_told_after_a_stop_goes_on(data, tokenizer, tmp_path, monkeypatch, caplog, overwrite):
    """A config that begins anew each time, as that of `make demo`, is no hindrance."""
    options = f"pretrain --model_type conv_lm --config_overrides {TINY} --train_file {data / 'text.txt'} --use_cpu "
    options += f"--tokenizer_name {tokenizer} --output_dir {tmp_path / 'out'} --max_steps 5 --block_size 32"
    options += " --overwrite_output_dir" * overwrite
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ordnung", *options.split()])
    step = Loop.take_step
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(Loop, "take_step", lambda self: (self.step == 2 and signal.raise_signal(2)) or step(self))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(options.split()) == 130
    (line,) = (line for line in caplog.messages if "told to stop" in line)
    command = shlex.split(line.partition("to go on: ")[2])
    assert command[: len(options.split()) + 1] == ["ordnung", *options.split()]
    AcceleratorState._reset_state(reset_partial_state=True)
    with caplog.at_level(logging.INFO):
        assert cli.main(command[1:]) == 0
    assert "going on from" in caplog.text
    assert json.loads((tmp_path / "out/results.json").read_text())["steps"] == 5


def test_a_killed_save_leaves_the_previous_checkpoint(data, tokenizer, tmp_path):
    """The process dies, without any cleaning up, when the second checkpoint is nearly written."""
    program = """
import os, sys, torch
from ordnung.scripts import cli, pretrain
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


def test_a_line_cut_short_by_a_crash_does_not_prevent_resuming(run, whole):
    out = run(max_steps=4)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tokens": 640, "lo')
    shutil.rmtree(out / "best")
    run(resume_from_checkpoint="auto", max_steps=8)
    assert list(metrics(out)) == list(range(1, 9)) and metrics(out)[1] == metrics(whole)[1]
    assert json.loads((out / "best" / "eval_results.json").read_text())["step"] == 8
    finished = metrics(run(resume_from_checkpoint="auto", max_steps=8), "eval_loss")
    assert json.loads((out / "results.json").read_text())["evaluation"]["eval_loss"] == finished[8]
