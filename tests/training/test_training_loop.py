"""The training loop: against the same training written out plainly, bit for bit, and what it promises every program."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler, set_seed

import ordnung  # noqa: F401  (its model types enter the Auto classes)
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.checkpointing import newest_checkpoint
from ordnung.scripts.training.loop import Job, Loop, Step
from ordnung.scripts.training.optimization import parameter_groups
from ordnung.scripts.training.options import LoopOptions

CONFIG = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40, "hidden_dropout": 0.1}


def new_model():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("conv_lm", kernel_size=4, **CONFIG))


def tokens(step, rows):
    return torch.from_numpy(np.random.default_rng(step).integers(40, size=(rows, 12)))


class Tiny(Job):
    """A step has three batches of 1, 2 and 3 rows, each with its share of them."""

    max_steps, eval_steps, save_steps, keeps_best, save_total_limit = 9, 3, 3, True, None

    def __init__(self, **attributes):
        self.lines = []
        vars(self).update(attributes)

    def build_model(self, folder):
        return new_model() if folder is None else AutoModelForCausalLM.from_pretrained(folder)

    def batches(self, step):
        parts = tokens(step, 6).split([1, 2, 3])
        return Step(
            [({"input_ids": part, "labels": part}, len(part) / 6) for part in parts], tokens=72, targets=step + 1
        )

    def evaluate(self, model):
        return {"eval_loss": float(model(tokens(100, 5), labels=tokens(100, 5)).loss)}

    def logged(self, step, values):
        self.lines.append({"step": step, **values})


@pytest.fixture
def loop(tmp_path):
    """Makes the loop of a tiny job on the CPU, in a folder, going on from the newest checkpoint in it."""

    def make(folder="run", job=None, seed=0, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {"max_grad_norm": 0.5, "warmup_steps": 2, "logging_steps": 1, "weight_decay": 0.3, **options}
        options = LoopOptions(output_dir=str(tmp_path), use_cpu=True, **options)
        folder = folder and tmp_path / folder
        checkpoint = folder and newest_checkpoint(folder)
        return Loop(make_accelerator(options), options, job or Tiny(), folder, seed, checkpoint)

    return make


def written_out(optim, max_grad_norm, warmup, schedule, **schedule_kwargs):
    """The training of `Tiny`: losses, learning rates and gradient norms by step, held-out losses, the model."""
    set_seed(0)
    model = new_model()
    fused = optim == "adamw_torch_fused"
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.3), lr=1e-3, betas=(0.9, 0.95), fused=fused or None)
    scheduler = get_scheduler(schedule, optimizer, warmup, 9, scheduler_specific_kwargs=schedule_kwargs)
    set_seed(0)
    losses, rates, norms, held_out = [], [], [], []
    model.train()
    for step in range(9):
        loss = 0.0
        for part in tokens(step, 6).split([1, 2, 3]):
            share = model(part, labels=part).loss * (len(part) / 6)
            share.backward()
            loss += share.detach()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        losses.append(float(loss))
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % 3 == 0:
            model.eval()
            with torch.no_grad():
                held_out.append(float(model(tokens(100, 5), labels=tokens(100, 5)).loss))
            model.train()
    return losses, rates, norms, held_out, model


def lines(folder, name):
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[name] for line in every if name in line]


def assert_same_weights(model, other):
    expected = other.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize(
    "options, plain",
    [
        ({}, (0.5, 2, "cosine")),
        ({"max_grad_norm": 0, "warmup_steps": 0.3, "lr_scheduler_type": "linear"}, (math.inf, 3, "linear")),
    ],
)
def test_the_loop_is_what_it_says(loop, tmp_path, optim, options, plain):
    trained = loop(optim=optim, **options)
    assert trained.run() == 0
    losses, rates, norms, held_out, model = written_out(optim, *plain)
    run = tmp_path / "run"
    assert lines(run, "loss") == losses and lines(run, "learning_rate") == rates and lines(run, "grad_norm") == norms
    assert lines(run, "eval_loss") == held_out
    assert_same_weights(trained.model, model)
    best = 3 * (held_out.index(min(held_out)) + 1)
    assert trained.best["step"] == best and trained.tokens == 9 * 72 and trained.step == 9
    trained.restore_best()
    with trained.evaluating() as restored:
        assert Tiny().evaluate(restored)["eval_loss"] == min(held_out)


def test_a_line_of_several_steps_is_a_mean_over_targets(loop):
    job = Tiny(eval_steps=None, save_steps=None)
    assert loop(None, job, logging_steps=4).run() == 0
    losses = written_out("adamw_torch_fused", 0.5, 2, "cosine")[0]
    assert [line["step"] for line in job.lines] == [4, 8, 9]
    for line, steps in zip(job.lines, ([0, 1, 2, 3], [4, 5, 6, 7], [8])):
        assert line["loss"] == pytest.approx(np.average([losses[step] for step in steps], weights=np.add(steps, 1)))


def test_a_run_stopped_between_lines_goes_on_exactly(loop, tmp_path, monkeypatch):
    whole = loop("whole", logging_steps=4)
    assert whole.run() == 0
    stopped, step = loop(logging_steps=4), Loop.take_step

    def take_step(self):
        if self.step == 4:
            signal.raise_signal(signal.SIGTERM)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "take_step", take_step)
        assert stopped.run() == 128 + signal.SIGTERM
    resumed = loop(logging_steps=4)
    assert resumed.step == 5 and resumed.run() == 0
    for name in ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "tokens"):
        assert lines(tmp_path / "run", name) == lines(tmp_path / "whole", name)
    assert resumed.best["step"] == whole.best["step"]
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("where", ["take_step", "_evaluate", "_save_checkpoint"])
def test_a_signal_in_the_last_step_is_told_to_what_follows(loop, monkeypatch, where):
    finished, own = loop(job=Tiny(max_steps=3)), getattr(Loop, where)

    def last(self):
        own(self)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)

    assert loop("other", job=Tiny(max_steps=3)).told == 0
    monkeypatch.setattr(Loop, where, last)
    assert finished.run() == 0 and finished.step == 3 and finished.told == 128 + signal.SIGTERM


def test_patience(loop, tmp_path):
    """Evaluations that get worse from the second on: two of them are waited for."""
    scores = {2: 1.0, 4: 2.0}
    job = Tiny(max_steps=99, eval_steps=2, save_steps=2, patience=2, score=lambda result: scores.get(result["step"], 0))
    trained = loop(job=job)
    assert trained.run() == 0
    assert (trained.step, trained.best["step"], trained.stale) == (8, 4, 2)
    assert json.loads((tmp_path / "run/best/eval_results.json").read_text(encoding="utf-8"))["step"] == 4


def test_what_was_evaluated_is_not_evaluated_again(loop):
    count = []
    job = Tiny(max_steps=3, evaluate=lambda model: count.append(1) or {"eval_loss": 1.0})
    trained = loop(job=job)
    trained.run()
    assert trained.evaluate()["eval_loss"] == 1.0 and len(count) == 1
    again = loop(job=job)  # the run had ended before it was resumed
    assert again.run() == 0 and again.evaluate()["step"] == 3 and len(count) == 1


def test_nothing_is_saved_once_a_loss_is_not_finite(loop, tmp_path):
    """Between two lines, before a checkpoint and an evaluation that would be due."""
    job = Tiny()
    job.loss = lambda model, batch: model(**batch).loss * (math.nan if trained.step == 4 else 1)
    trained = loop(job=job, logging_steps=99)
    with pytest.raises(ScriptError, match="loss nan, gradient norm nan at step 5: .*last good checkpoint is .*-3; try"):
        trained.run()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-3" and lines(tmp_path / "run", "eval_loss")[1:] == []


def test_other_data_are_refused(loop):
    loop(job=Tiny(data={"rows": 6}, max_steps=3)).run()
    with pytest.raises(ScriptError, match="was trained with rows 6, not 7, so it cannot be resumed exactly"):
        loop(job=Tiny(data={"rows": 7}))


def test_without_a_folder_nothing_is_written(loop, tmp_path):
    trained = loop(None, Tiny(eval_steps=None, save_steps=None))
    assert trained.run() == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("names, chosen", [(["avx512_bf16"], "bf16"), (["amx_bf16"], "bf16"), (["avx2"], "no")])
def test_precision_is_chosen_by_the_processor_once(loop, caplog, monkeypatch, names, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    with caplog.at_level("INFO", logger="ordnung"):
        first = loop(job=Tiny(max_steps=3), mixed_precision="auto")
    said = [record.message for record in caplog.records if record.message.startswith("--mixed_precision auto")]
    has = "computes" if chosen == "bf16" else "does not compute"
    assert said == [f"--mixed_precision auto: {chosen}, as the processor {has} in bf16"]
    assert first.options.record()["mixed_precision"] == first.results()["mixed_precision"] == chosen
    first.run()
    losses = [line["loss"] for line in first.job.lines]
    assert (losses == written_out("adamw_torch_fused", 0.5, 2, "cosine")[0][:3]) == (chosen == "no")
    # on the other kind of processor it would go on otherwise
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": chosen == "no"})
    with pytest.raises(ScriptError, match=f"was trained with mixed_precision {chosen}, not .*use the same"):
        loop(job=Tiny(max_steps=6), mixed_precision="auto")
    assert loop(job=Tiny(max_steps=6), mixed_precision=chosen).step == 3
