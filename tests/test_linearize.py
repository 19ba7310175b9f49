"""The linearization program on tiny random teachers: what it trains, measures, resumes, refuses."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from launching import SCRIPTS, launch, launch_sharded
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ordnung import SoftmaxLMConfig
from ordnung.scripts import linearize
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.linearizing import measure
from ordnung.scripts.linearizing import run as running
from ordnung.scripts.linearizing.data import documents_of, mean_states, real_tokens
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.linearizing.stages import SCALE, calibrate
from ordnung.scripts.linearizing.teacher import base_of, model_inputs, student_mixes, watched
from ordnung.scripts.pretraining import perplexity
from ordnung.scripts.pretraining.losses import position_losses
from ordnung.scripts.reports import linearized
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.checkpointing import checkpoint_fault
from ordnung.scripts.training.loop import Loop

WORDS = "whale ship sea captain the a of and sailed harpoon white wind storm night day mast".split()
TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
LINFORMER = "projected_size=4,local_block_size=8"
LAYER = "causal_linformer_attention"
POOLED = "projected_size=4,projection_type=adaptive_mean_pool"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with text.txt, documents.jsonl, pairs.jsonl and the teachers llama and bert."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS, size=random.integers(2, 40))) for _ in range(200)]
    (folder / "text.txt").write_text(".\n".join(sentences))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    pairs = [
        {"sentence1": a, "sentence2": b, "label": i % 6} for i, (a, b) in enumerate(zip(sentences, sentences[9:30]))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenizer = corpus.train_tokenizer(sentences, 300, masked=True)
    torch.manual_seed(0)
    teachers = {
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, initializer_range=0.2, **TINY)),
        "bert": BertModel(BertConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.2, **TINY)),
    }
    for name, teacher in teachers.items():
        teacher.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def arguments(data, tmp_path, monkeypatch):
    """Words for the program: a LinformerLM of the decoder; keyword arguments are further options, None removes one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def arguments(output="out", **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            "source": data / "llama",
            "model_type": "linformer_lm",
            "config_overrides": LINFORMER,
            "train_file": data / "text.txt",
            "output_dir": tmp_path / output,
            "block_size": 32,
            "max_eval_blocks": 4,
            "transfer_steps": 4,
            "distill_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "eval_steps": 2,
            "save_steps": 3,
            "decode_lengths": 8,
            "use_cpu": True,
            **options,
        }
        return [f"--{name}={value}" for name, value in options.items() if value is not None]

    return arguments


@pytest.fixture
def run(arguments, tmp_path):
    def run(output="out", status=0, **options):
        assert linearize.main(arguments(output, **options)) == status
        return tmp_path / output

    return run


ENCODER = {"config_overrides": POOLED}


def encoder(data, **more):
    return {"source": data / "bert", "train_file": data / "documents.jsonl", "block_size": 24, **ENCODER, **more}


def built(words):
    """The run that these words ask for, measured before training."""
    options = parse_options(LinearizeOptions, words)
    made = running.Linearization(options, make_accelerator(options))
    made.before = made.measure_before()
    return made


def scaled(stage, batch):
    """A batch as a stage's step has it alone."""
    counts = stage.counts(batch)
    return batch | {SCALE + name: torch.tensor(1 / counts[name]) for name in stage.weights}


def results(folder):
    return json.loads((folder / "linearize_results.json").read_text())


def metrics(folder, name="loss"):
    """Values by step, over both stages."""
    found = {}
    for stage in ("transfer", "distill"):
        path = folder / stage / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found |= {(stage, line["step"]): line[name] for line in lines if name in line}
    return found


def weights(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def assert_same(a, b):
    """Bit-equal losses, evaluations, results and weights."""
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        assert metrics(a, name) == metrics(b, name)
    assert [{**p, "seconds": 0} for p in results(a)["curve"]] == [{**p, "seconds": 0} for p in results(b)["curve"]]
    for name in ("tokens", "teacher", "student", "floor", "layers", "converted"):
        assert results(a)[name] == results(b)[name]
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_decoder_is_linearized(run, data):
    out = run(transfer_steps=3, distill_steps=3, long_file=data / "text.txt", long_tokens=700, eval_block_size=48)
    found = results(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == "linformer_lm" and len(tokenizer) == 300
    # the numbers are those of the folder's own model, and of the source
    blocks = built_blocks(out, data, tokenizer)
    for name, one in (("student", model), ("teacher", AutoModelForCausalLM.from_pretrained(data / "llama"))):
        assert found[name]["loss"] == pytest.approx(position_losses(one, blocks, 2).mean(), abs=1e-5)
    logits = [
        one(torch.from_numpy(blocks).long()).logits[:, :-1]
        for one in (model, LlamaForCausalLM.from_pretrained(data / "llama"))
    ]
    assert found["student"]["agreement"] == pytest.approx(
        float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    )
    assert sum(bucket["tokens"] for bucket in found["student"]["loss_by_position"]) == found["student"]["tokens"]
    layers = found["layers"]
    assert [layer["layer"] for layer in layers["student"]] == [0, 1, 2]
    assert list(metrics(out)) == [(stage, step) for stage in ("transfer", "distill") for step in (1, 2, 3)]
    assert [(p["stage"], p["step"]) for p in found["curve"]]== [
        ("transfer", 0), ("transfer", 2), ("transfer", 3), ("distill", 5), ("distill", 6)
    ]  # fmt: skip
    assert found["tokens"] == 6 * 2 * 32 == sum(metrics(out, "tokens")[stage, 3] for stage in ("transfer", "distill"))
    assert found["state_bytes"]["student"]["512"] == model.model.cache_bytes(512)
    assert found["decoding"][0]["tokens"] == 8 and {row["model"] for row in found["decoding"]} == {
        "student", "teacher", "teacher_static_cache"
    }  # fmt: skip
    assert (out / "linearize.png").read_bytes().startswith(b"\x89PNG")
    # one row of more tokens than a piece: the loss is that of the whole row at once
    text = perplexity.encode(corpus.load_files([str(data / "text.txt")], "x", "text", False), tokenizer, 700)[0]
    whole = position_losses(model, text[None], 1)
    last = found["longer"][-1]
    assert last["last"] == 699 and last["student_loss"] == pytest.approx(whole[last["first"] - 1 :].mean(), abs=1e-5)
    assert last["student_state_bytes"] == model.model.cache_bytes(699) < last["teacher_state_bytes"]
    student, teacher = found["converted"]["student"]["loss"], found["teacher"]["loss"]
    table = linearized.converted({"tiny": found})
    assert f"{student:.3f} | {student - teacher:.3f} |" in " ".join(table.split())
    table = linearized.decoders({"tiny": found})
    assert f"{found['student']['loss']:.3f}" in table and "tiny, no mixing" in table and "3 of 3" in table
    card = (out / "README.md").read_text()
    assert (
        "`llama`" in card and "(floor)" in card and "Layer by layer" in card and f"{found['tokens']:,} tokens" in card
    )
    for who in ("student", "teacher"):
        assert f"- {who}: {' '.join(found['text'][who].split())}" in card


def built_blocks(out, data, tokenizer):
    """The run's held-out blocks, made from its options."""
    options = parse_options(LinearizeOptions, ["--config", str(out / "run.yaml")])
    from ordnung.scripts.linearizing.data import load_blocks

    return load_blocks(options, tokenizer, False, False)[1]


def test_losses_are_told_by_position():
    positions = np.arange(1, 1500)
    found = measure.Scores(positions / 1000, positions, positions).summary()
    ends = {"all": (1, 1500), "before 256": (1, 256), "256 to 511": (256, 512), "from 512": (512, 1500)}
    ends["from 1024"] = (1024, 1500)
    wanted = {name: np.mean(positions[first - 1 : end - 1]) / 1000 for name, (first, end) in ends.items()}
    assert measure.told(found) == pytest.approx(wanted) and list(measure.told(found)) == list(ends)
    assert measure.told(measure.Scores(positions[:99] / 1000, positions[:99], positions[:99]).summary()) == {
        "all": pytest.approx(0.05)
    }


def test_transfer_makes_each_layer_more_like_the_teachers(run):
    steps = {"transfer_steps": 30, "distill_steps": 0, "eval_steps": 30, "per_device_train_batch_size": 8}
    found = results(run(transfer_learning_rate=2e-3, **steps))
    for before, after in zip(found["layers"]["converted"], found["layers"]["student"]):
        assert after["relative_error"] < before["relative_error"] and after["cosine"] > before["cosine"]


def test_transfers_gradients_are_those_of_the_formula(arguments):
    made = built(arguments())
    stage = made.stage("transfer")
    pair, batch = made.pair, made.text.held_out[0]
    model = stage.build_model(None)
    stage.loss(model, scaled(stage, batch)).backward()
    got = {name: p.grad.clone() for name, p in pair.student.named_parameters() if p.grad is not None}
    pair.student.zero_grad()
    # straight from the formula: all layers' inputs first, then one sum
    calls = []
    with watched(pair.teacher, pair.replaced, calls.append), torch.no_grad():
        pair.teacher(batch["input_ids"])
    loss = 0.0
    for call in calls:
        mixer, kwargs = (
            base_of(pair.student).layers[call.layer].mixer,
            {**call.kwargs, "attention_mask": None, "past_key_values": None},
        )
        shared = base_of(pair.student).shared_inputs(mixer.layer_type)
        torch.testing.assert_close(student_mixes(pair.student, call), mixer(call.inputs, **kwargs, **shared)[0])
        variance = float(made.before["variances"][str(call.layer)])
        loss = loss + (student_mixes(pair.student, call) - call.output).square().mean() / variance / 3
    loss.backward()
    wanted = {name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and all(".mixer." in name or name in pair.new for name in got)
    assert {name.split(".")[2] for name in got if ".mixer." in name} == {"0", "1", "2"}
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_outputs_are_scaled_to_fit_before_they_are_trained(arguments, data, kind):
    made = built(arguments(**(encoder(data) if kind == "encoder" else {}), per_device_eval_batch_size=4))
    pair, batches = made.pair, made.text.held_out[:1]
    for layer in base_of(pair.student).layers:  # far off
        layer.mixer.out_proj.weight.data *= 7
    calls, real = [], real_tokens(batches[0])
    with watched(pair.teacher, pair.replaced, calls.append), torch.no_grad():
        base_of(pair.teacher)(**model_inputs(base_of(pair.teacher), batches[0]))
        wanted = []
        for call in calls:  # each channel by numpy's least squares
            ours, theirs = (x[real].double().numpy() for x in (student_mixes(pair.student, call), call.output))
            biased = base_of(pair.student).layers[0].mixer.out_proj.bias is not None
            columns = [np.stack([o, np.ones(len(o))] if biased else [o], 1) for o in ours.T]
            fits = [c @ np.linalg.lstsq(c, t, rcond=None)[0] for c, t in zip(columns, theirs.T)]
            wanted.append(np.stack(fits, 1))
    calibrate(pair, batches)
    for call, fit in zip(calls, wanted):
        with torch.no_grad():
            np.testing.assert_allclose(student_mixes(pair.student, call)[real].numpy(), fit, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_costs_of_a_decoder_are_those_of_the_formulas(arguments, temperature):
    made = built(arguments(temperature=temperature, lm_weight=0.5, hidden_weight=0.25))
    stage = made.stage("distill")
    batch, pair = made.text.held_out[0], made.pair
    costs = stage.costs(stage.build_model(None), batch)
    ours = pair.student(batch["input_ids"], output_hidden_states=True)
    theirs = pair.teacher(batch["input_ids"], output_hidden_states=True)
    p, q = ((x.logits.double() / temperature).softmax(-1) for x in (theirs, ours))
    kl = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    assert float(costs["kl"]) == pytest.approx(float(kl.sum()), rel=1e-4)
    assert float(costs["lm"]) == pytest.approx(
        float(pair.student(batch["input_ids"], labels=batch["input_ids"]).loss * 62), rel=1e-4
    )
    errors = [
        float((x - y).square().mean()) * 64 / variance
        for x, y, variance in zip(ours.hidden_states[1:], theirs.hidden_states[1:], made.before["state_variances"])
    ]
    assert float(costs["hidden"]) == pytest.approx(np.mean(errors), rel=1e-4)
    assert stage.weights == {"kl": 1.0, "lm": 0.5, "hidden": 0.25}
    assert stage.counts(batch) == {"kl": 64, "lm": 62, "hidden": 64}


def test_an_encoder_is_linearized(run, data):
    out = run(**encoder(data, distill_steps=30, transfer_steps=30, similarity_file=data / "pairs.jsonl", eval_steps=30))
    found = results(out)
    assert found["student"]["loss"] < found["converted"]["student"]["loss"] < found["converted"]["floor"]["loss"]
    model, teacher, tokenizer = (
        AutoModel.from_pretrained(out),
        AutoModel.from_pretrained(data / "bert"),
        AutoTokenizer.from_pretrained(out),
    )
    assert type(model).__name__ == "LinformerLMModel" and not model.config.is_decoder
    from scipy.stats import spearmanr

    pairs = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    for name, one in (("student", model), ("teacher", teacher)):
        cosines = []
        for pair in pairs:
            means = []
            for key in ("sentence1", "sentence2"):
                ids = tokenizer(pair[key], return_tensors="pt", truncation=True, max_length=24)
                means.append(one(input_ids=ids["input_ids"]).last_hidden_state.mean(1))
            cosines.append(float(F.cosine_similarity(*means)))
        wanted = spearmanr(cosines, [pair["label"] for pair in pairs]).statistic
        assert found[name]["similarity"] == pytest.approx(wanted, abs=2e-3)
    assert AutoModel.from_pretrained(out).config.layer_types == found["layer_types"]
    table = linearized.encoders({"tiny": found})
    assert f"{found['student']['similarity']:.3f}" in table and "100 %" in table


def test_costs_of_an_encoder_see_each_document_alone(arguments, data):
    made = built(arguments(**encoder(data, block_size=48, validation_fraction=0.3)))
    stage = made.stage("distill")
    pair = made.pair
    batch = max(made.text.held_out, key=lambda batch: int(documents_of(batch).max()))
    documents = documents_of(batch)
    assert documents.max() + 1 > len(documents), "no row holds several documents"
    costs, cosine, hidden = stage.costs(stage.build_model(None), batch), 0.0, np.zeros(3)
    for number in range(int(documents.max()) + 1):
        ids = batch["input_ids"][documents == number][None]
        ours, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (pair.student, pair.teacher))
        cosine += 1 - float(F.cosine_similarity(ours[-1].mean(1), theirs[-1].mean(1)))
        hidden += [float((x - y).square().mean(-1).sum()) for x, y in zip(ours[1:], theirs[1:])]
    assert float(costs["cosine"]) == pytest.approx(cosine, rel=1e-3, abs=1e-5)
    wanted = (hidden / made.before["state_variances"]).mean()
    assert float(costs["hidden"]) == pytest.approx(wanted, rel=1e-3)
    assert (
        stage.counts(batch)["cosine"] == documents.max() + 1 and stage.counts(batch)["hidden"] == (documents >= 0).sum()
    )


def test_mean_states_leave_padding_out():
    states = torch.arange(12.0).view(2, 3, 2)
    documents = torch.tensor([[0, 0, 1], [2, -1, -1]])
    torch.testing.assert_close(mean_states(states, documents), torch.tensor([[1.0, 2.0], [4.0, 5.0], [6.0, 7.0]]))


def test_the_floor_is_a_model_whose_mixers_give_zero(run, arguments, tmp_path):
    found = results(run(transfer_steps=0, distill_steps=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in model.model.layers:
        layer.mixer.out_proj.weight.data.zero_()
    made = built(arguments("again", transfer_steps=0, distill_steps=1))
    blocks = torch.cat([batch["input_ids"] for batch in made.text.held_out]).numpy()
    assert found["floor"]["loss"] == pytest.approx(position_losses(model, blocks, 2).mean(), abs=1e-5)
    assert found["floor"]["loss"] != pytest.approx(found["student"]["loss"], abs=1e-3)


def test_attention_stays_where_it_is_missed_most(arguments, run):
    made = built(arguments(keep_attention=1))
    losses, rows = made.before["replaced_alone"], made.text.first_rows(running.CHOOSING)
    base = base_of(made.pair.teacher)
    for number in range(3):  # in words: the teacher with that layer's mixer changed for the student's
        if made.pair.student.config.layer_types[number] == "full_attention":
            continue
        own = base.layers[number].mixer
        shared = base_of(made.pair.student).shared_inputs(LAYER)
        new = base_of(made.pair.student).layers[number].mixer

        class Swapped(torch.nn.Module):
            def forward(self, states, attention_mask=None, new=new, shared=shared, **kwargs):
                return new(states, **kwargs, **shared)

        base.layers[number].mixer = Swapped()
        base.layers[number].mixer.layer_type = "full_attention"
        assert losses[str(number)] == pytest.approx(
            measure.score(made.pair.teacher, made.pair.teacher, rows).losses.mean(), abs=1e-5
        )
        base.layers[number].mixer = own
    worst = max(losses, key=losses.get)
    assert made.pair.student.config.layer_types[int(worst)] == "full_attention"
    out = run("kept", keep_attention=1)
    assert AutoModelForCausalLM.from_pretrained(out).config.layer_types == made.pair.student.config.layer_types
    assert results(out)["replaced_alone"] == losses and len(results(out)["layers"]["student"]) == 2


@pytest.mark.parametrize(
    "options, steps",
    [({}, 2), ({}, 4), ({"use_peft": True, "lora_rank": 2}, 6), ({"keep_attention": 1, "trainable": "mixers"}, 7)],
    ids=["transfer", "last of transfer", "adapters", "layers kept"],
)
def test_an_interrupted_run_goes_on_exactly(run, tmp_path, monkeypatch, options, steps):
    check_resumed(run, tmp_path, monkeypatch, options, steps)


def test_an_interrupted_encoder_goes_on_exactly(run, data, tmp_path, monkeypatch):
    check_resumed(run, tmp_path, monkeypatch, encoder(data, mlm_probability=0.2), 6)


def check_resumed(run, tmp_path, monkeypatch, options, steps):
    """Stop a run after so many steps over both stages, by a signal."""
    whole = run("whole", **options)
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


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_accumulation_and_kept_outputs_change_nothing(run, data, tmp_path, kind):
    options = encoder(data) if kind == "encoder" else {"lm_weight": 0.3}
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
    run(source=other, teacher_outputs=tmp_path / "kept")
    model = LlamaForCausalLM.from_pretrained(other)
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(other)
    with pytest.raises(ScriptError, match="holds outputs with teacher .* name another folder"):
        run("second", source=other, teacher_outputs=tmp_path / "kept")
    shutil.copytree(tmp_path / "out", tmp_path / "third")
    with pytest.raises(ScriptError, match="holds runs with teacher .* name another folder, or delete this one"):
        run("third", source=other)


SPARSE = {"model_type": "sparse_attention_lm", "config_overrides": "sliding_window=4,num_global_tokens=1"}


def test_two_processes_equal_one(run, arguments, tmp_path):
    # no parameters without a gradient, whose first steps AdamW makes of rounding
    single = run("single", per_device_train_batch_size=4, **SPARSE)
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
def test_fsdp2_equals_one_process(run, arguments, tmp_path):
    single = run("single", per_device_train_batch_size=4, **SPARSE)
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep_attention": 3}, "--keep_attention 3 leaves none of the teacher's 3 layers to replace: give at most 2"),
        ({"model_type": "softmax_lm", "config_overrides": None}, "full attention in every layer.*ordnung convert"),
        ({"model_type": "linformr_lm"}, "did you mean 'linformer_lm'"),
        ({"config_overrides": f"layer_types=[{LAYER},{LAYER}]"}, "has 2 entries for `num_hidden_layers` .3."),
        ({"config_overrides": "projekted_size=4"}, "did you mean 'projected_size'"),
        ({"source": "no/such/folder"}, "no such checkpoint folder: no/such/folder"),
        ({"block_size": 4096}, "less than one block of 4096"),
        ({"config_overrides": f"layer_types=[{LAYER}]", "keep_attention": 1}, "give one of them"),
        ({"kl_weight": 0}, "nothing is left to train on"),
        ({"model_type": "cubic_prefix_lm", "config_overrides": None}, "over each prefix.*ordnung convert"),
        ({"max_steps": 5}, "the stages' lengths are --transfer_steps and --distill_steps; leave it out"),
        ({"mlm_probability": 0.2}, "--mlm_probability 0.2 is for encoders, and .* is a language model: leave it out"),
        ({"eval_block_size": 4096}, "held-out text holds .* than one block of 4096: give more by --validation_file"),
        ({"transfer_steps": -1}, "--transfer_steps must be at least 0"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_training(run, tmp_path, options, message):
    with pytest.raises(ScriptError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(run, data, tmp_path):
    corpus.train_tokenizer([(data / "text.txt").read_text()], 310, masked=False)
    tokenizer = AutoTokenizer.from_pretrained(data / "llama")
    tokenizer.add_tokens(["xx", "yy"])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(ScriptError, match="302 tokens, the model's vocabulary 300; name the teacher's own"):
        run(tokenizer_name=tmp_path / "larger")


def test_a_family_of_the_other_direction_is_refused(run, data, monkeypatch):
    monkeypatch.setattr(SoftmaxLMConfig, "attends_causally", property(lambda config: not config.is_decoder))
    with pytest.raises(ScriptError, match="is .* here and the teacher .*: take another family, or say is_decoder="):
        run(**encoder(data))


def test_a_state_as_large_as_the_teachers_is_told(caplog):
    pair = SimpleNamespace(encoder=False, student=state_of(100), teacher=state_of(100))
    with caplog.at_level("WARNING"):
        running.tell_of_state(pair)
    assert "is no smaller than the teacher's" in caplog.text and "replace more layers" in caplog.text
    caplog.clear()
    pair.student = state_of(99)
    running.tell_of_state(pair)
    assert caplog.text == ""


def state_of(size):
    inner = SimpleNamespace(cache_bytes=lambda length: size * length)
    return SimpleNamespace(config=SimpleNamespace(longest_row=None), base_model_prefix="model", model=inner)


def test_distillation_trains_what_it_is_told_to(arguments):
    for what, wanted in (("mixers", {"mixer"}), ("layers", {"mixer", "mlp", "mixer_norm", "mlp_norm"})):
        made = built(arguments("of " + what, trainable=what))
        model = made.stage("distill").build_model(None)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert {name.split(".")[3] for name in names if ".layers." in name} == wanted
        assert not any("embed" in name for name in names) and made.pair.new == [n for n in names if ".layers." not in n]


@pytest.mark.parametrize("name", ["linearize_minilm", "linearize_smollm2"])
def test_shipped_configs_are_valid(name):
    options = parse_options(LinearizeOptions, ["--config", name, "--train_file", "any"])
    config = AutoConfig.for_model(options.model_type, **options.config_overrides)
    assert config.model_type == options.model_type and options.transfer_steps and options.distill_steps


def test_without_training_a_converted_model_is_measured_once(run, monkeypatch):
    own, calls = measure.score, []
    monkeypatch.setattr(measure, "score", lambda *args: calls.append(0) or own(*args))
    out = run(transfer_steps=0, distill_steps=0)
    found = results(out)
    assert len(calls) == 3 and found["student"] == found["converted"]["student"] and found["recovered"]["0"] == 0
    assert found["layers"]["student"] == found["layers"]["converted"] and found["tokens"] == 0 and found["curve"] == []
