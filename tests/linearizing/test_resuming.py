"""Linearization stopped and resumed, in parts, and on several processes is one run."""

import os
import shutil
import signal

import pytest
import torch
from launching import SCRIPTS, launch, launch_sharded
from linear_runs import SPARSE, assert_same, encoder, metrics, results, weights
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.linearizing import measure
from ordnung.scripts.training.checkpointing import checkpoint_fault
from ordnung.scripts.training.loop import Loop


@pytest.mark.parametrize(
    "options, steps",
    [({}, 2), ({}, 4), ({"use_peft": True, "lora_rank": 2}, 6), ({"keep_attention": 1, "trainable": "mixers"}, 7)],
    ids=["transfer", "last of transfer", "adapters", "layers kept"],
)
def test_an_interrupted_run_goes_on_exactly(run, data, tmp_path, monkeypatch, options, steps):
    check_resumed(run, data, tmp_path, monkeypatch, options, steps)


def test_an_interrupted_encoder_goes_on_exactly(run, data, tmp_path, monkeypatch):
    check_resumed(run, data, tmp_path, monkeypatch, encoder(data, mlm_probability=0.2), 6)


def uninterrupted(run, data, **options):
    """The folder of a run that nothing stops: one for all tests with these options."""
    folder = data / " ".join(["whole", *options])
    if not (folder / "linearize_results.json").exists():
        run(output_dir=folder, **options)
    return folder


def check_resumed(run, data, tmp_path, monkeypatch, options, steps):
    """Stop a run after so many steps over both stages, by a signal."""
    whole = uninterrupted(run, data, **options)
    own, taken = Loop.take_step, []

    def take_step(self):
        own(self)
        taken.append(0)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "take_step", take_step)
    run(status=128 + signal.SIGTERM, **options)
    out = tmp_path / "out"
    left = [path.relative_to(out).as_posix() for path in sorted(out.glob("*/checkpoint-*"))]
    assert left[::-1] == (
        ["transfer/checkpoint-4", f"distill/checkpoint-{steps - 4}"] if steps > 4 else [f"transfer/checkpoint-{steps}"]
    )
    assert not (out / "model.safetensors").exists()
    monkeypatch.setattr(Loop, "take_step", own)
    # what was measured before training is not measured again
    monkeypatch.setattr(measure, "fidelity", once(measure.fidelity))
    assert_same(whole, run(**options))


def test_similarity_may_be_asked_for_when_a_run_goes_on(run, data, tmp_path):
    options = encoder(data, transfer_steps=1, distill_steps=1)
    out = run(**options)
    (out / "linearize_results.json").unlink()  # as if it had stopped before its end
    found = results(run(**options, similarity_file=data / "pairs.jsonl"))
    assert {"floor", "student", "teacher"} <= found["converted"].keys() | {"teacher"}
    assert -1 <= found["converted"]["floor"]["similarity"] <= 1 and found["teacher"]["similarity"]
    # nor are numbers of other pairs kept beside those of new ones
    pairs = (data / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "others.jsonl").write_text("\n".join(pairs[3:]) + "\n")
    (run("begun", **options, similarity_file=data / "pairs.jsonl") / "linearize_results.json").unlink()
    again = results(run("begun", **options, similarity_file=tmp_path / "others.jsonl"))
    fresh = results(run("fresh", **options, similarity_file=tmp_path / "others.jsonl"))
    for one in ("converted", "recovered"):
        assert again[one] == fresh[one] != found[one]


def once(function):
    calls = []

    def called(*args):
        calls.append(0)
        assert len(calls) == 1
        return function(*args)

    return called


def test_a_finished_run_is_kept(run, monkeypatch):
    out = run(transfer_steps=1, distill_steps=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix in (".safetensors", ".png")}
    monkeypatch.setattr(Loop, "take_step", None)
    run(transfer_steps=1, distill_steps=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_without_training_a_converted_model_is_measured_once(run, monkeypatch):
    own, calls = measure.score, []
    monkeypatch.setattr(measure, "score", lambda *args: calls.append(0) or own(*args))
    out = run(transfer_steps=0, distill_steps=0)
    found = results(out)
    assert len(calls) == 3 and found["student"] == found["converted"]["student"] and found["recovered"]["0"] == 0
    assert found["layers"]["student"] == found["layers"]["converted"] and found["tokens"] == 0 and found["curve"] == []


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_accumulation_and_kept_outputs_change_nothing(run, data, tmp_path, kind):
    options = encoder(data) if kind == "encoder" else {"lm_weight": 0.3}
    options |= {"transfer_steps": 2, "distill_steps": 2}
    whole = run("whole", per_device_train_batch_size=4, **options)
    kept = tmp_path / "kept"
    parts = run("parts", gradient_accumulation_steps=4, per_device_train_batch_size=1, teacher_outputs=kept, **options)
    for name in ("loss", "grad_norm"):
        assert metrics(parts, name) == pytest.approx(metrics(whole, name), rel=1e-4)
    files = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    assert files
    again = run("again", gradient_accumulation_steps=4, per_device_train_batch_size=1, teacher_outputs=kept, **options)
    assert_same(parts, again)
    assert {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")} == files


def test_kept_outputs_of_another_teacher_are_refused(run, data, tmp_path):
    other = shutil.copytree(data / "llama", tmp_path / "other")
    short = {"transfer_steps": 1, "distill_steps": 1}
    run(source=other, teacher_outputs=tmp_path / "kept", **short)
    model = LlamaForCausalLM.from_pretrained(other)
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(other)
    with pytest.raises(ScriptError, match="holds outputs with teacher .* name another folder"):
        run("second", source=other, teacher_outputs=tmp_path / "kept", **short)
    config = LlamaConfig.from_pretrained(other)
    model.model.norm.weight.data[0] -= 1
    model.save_pretrained(other)
    (other / "config.json").write_text(
        (data / "llama" / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1')
    )
    assert LlamaConfig.from_pretrained(other).rms_norm_eps != config.rms_norm_eps  # weights alike, another result
    with pytest.raises(ScriptError, match="holds outputs with teacher .* name another folder"):
        run("second", source=other, teacher_outputs=tmp_path / "kept", **short)
    shutil.copytree(tmp_path / "out", tmp_path / "third")
    with pytest.raises(ScriptError, match="holds runs with teacher .* name another folder, or delete this one"):
        run("third", source=other, **short)


@pytest.mark.slow
def test_two_processes_equal_one(run, data, arguments, tmp_path):
    # no parameters without a gradient, whose first steps AdamW makes of rounding
    single = uninterrupted(run, data, per_device_train_batch_size=4, **SPARSE)
    launch("accelerate_cpu.yaml", SCRIPTS / "linearize.py", arguments("double", **SPARSE))
    double = tmp_path / "double"
    assert results(double)["num_processes"] == 2
    for name in ("loss", "grad_norm", "tokens", "learning_rate"):
        assert metrics(double, name) == pytest.approx(metrics(single, name), rel=2e-4)
    first, second = weights(single), weights(double)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)


SHARDED = """
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.linearizing import run
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.training.loop import Loop
own = Loop.run
def checked(self):
    check_sharded(self)
    return own(self)
Loop.run = checked
end(run.run(parse_options(LinearizeOptions)))
"""


@pytest.mark.slow
def test_fsdp2_equals_one_process(run, data, arguments, tmp_path):
    single = uninterrupted(run, data, per_device_train_batch_size=4, **SPARSE)
    launch_sharded(SHARDED, tmp_path, arguments("sharded", use_cpu=None, **SPARSE))
    sharded = tmp_path / "sharded"
    assert results(sharded)["num_processes"] == 2
    for name in ("loss", "grad_norm"):
        assert metrics(sharded, name) == pytest.approx(metrics(single, name), rel=2e-4)
    first, second = weights(single), weights(sharded)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)


def test_a_broken_save_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    own, saved = PreTrainedModel.save_pretrained, []

    def save_pretrained(self, *args, **kwargs):
        saved.append(0)
        if len(saved) == 4:
            raise OSError(28, "No space left on device")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    with pytest.raises(ScriptError, match="could not be saved .* the last good checkpoint is .*distill/checkpoint-3"):
        run()
    (left,) = (tmp_path / "out" / "distill").glob("checkpoint-*")
    assert left.name == "checkpoint-3" and checkpoint_fault(left) is None
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", own)
    run()
