"""The linearization program on tiny random teachers: what it trains, measures and refuses."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_runs import LAYER, built, encoder, metrics, results
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ordnung import SoftmaxLMConfig
from ordnung.scripts import push_to_hub
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.linearizing import measure
from ordnung.scripts.linearizing import run as running
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.pretraining import perplexity
from ordnung.scripts.pretraining.losses import position_losses
from ordnung.scripts.reports import linearized


@pytest.mark.draws
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
    told = linearized.one_decoder(found)
    assert f"{last['student_loss']:.3f}" in told and "teacher, static cache" in told
    assert f"- student: {' '.join(found['text']['student'].split())}" in told
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


def test_the_floor_is_a_model_whose_mixers_give_zero(run, arguments, tmp_path):
    found = results(run(transfer_steps=0, distill_steps=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in model.model.layers:
        layer.mixer.out_proj.weight.data.zero_()
    made = built(arguments("again", transfer_steps=0, distill_steps=1))
    blocks = torch.cat([batch["input_ids"] for batch in made.text.held_out]).numpy()
    assert found["floor"]["loss"] == pytest.approx(position_losses(model, blocks, 2).mean(), abs=1e-5)
    assert found["floor"]["loss"] != pytest.approx(found["student"]["loss"], abs=1e-3)


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
        ({"config_overrides": f"layer_types=[{','.join(4 * [LAYER])}]"}, "has 4 entries for `num_hidden_layers` .3."),
        ({"lora_rank": 4}, "--lora_rank: adapters need --use_peft"),
        ({"teacher_outputs": "x", "hidden_weight": 1}, "--teacher_outputs x keeps .* only --kl_weight"),
        ({"teacher_outputs": "x", "kl_weight": 0, "lm_weight": 1}, "--teacher_outputs x keeps .*: leave it out"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_training(run, tmp_path, options, message):
    with pytest.raises(ScriptError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


@pytest.mark.draws
def test_a_teacher_with_few_positions(run, data, tmp_path):
    """Nothing is asked of it that it has no positions for; a long text is refused before training."""
    few = {"source": data / "gpt2", "transfer_steps": 1, "distill_steps": 1}
    with pytest.raises(ScriptError, match=r"--long_tokens 100 is above the model's max_position_embeddings \(40\)"):
        run(**few, long_file=data / "text.txt", long_tokens=100)
    assert not (tmp_path / "out").exists()
    found = results(run(**few, long_file=data / "text.txt", long_tokens=40))
    assert found["longer"][-1]["last"] == 39 and found["text"]["student"]


def test_a_student_is_shared_with_what_is_known_of_it(run, data):
    out = run(transfer_steps=1, distill_steps=1)
    own = (out / "README.md").read_text()
    assert push_to_hub.main(["--model_name_or_path", str(out), "--hub_model_id", "me/student", "--dry_run"]) == 0
    card = (out / "hub" / "README.md").read_text()
    linearized = own[own.index("## Linearized") :].split("\n## ")[0]
    assert linearized in card and "It has seen" not in card + own and "- data: " in card and "['" not in card


@pytest.mark.parametrize("weights, passes", [({"kl_weight": 0, "lm_weight": 1}, 0), ({"kl_weight": 1}, 1)])
def test_the_teacher_is_asked_where_something_needs_it(arguments, weights, passes):
    made, calls = built(arguments(**weights)), []
    stage = made.stage("distill")
    made.pair.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    stage.costs(stage.build_model(None), made.text.held_out[0])
    assert len(calls) == passes


def test_bad_input_of_encoders_is_told_before_training(run, data, tmp_path):
    with pytest.raises(ScriptError, match="--hidden_weight and --cosine_weight are 0: nothing is left to train on"):
        run(**encoder(data, hidden_weight=0, cosine_weight=0))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ScriptError, match="empty.jsonl holds no text in its column 'text'"):
        run(**encoder(data) | {"train_file": tmp_path / "empty.jsonl"})
    with pytest.raises(
        ScriptError,
        match="quadratic_kernel_lm is causal here and the teacher bidirectional: .* or say is_decoder=True in --config",
    ):
        run(**encoder(data) | {"model_type": "quadratic_kernel_lm", "config_overrides": None})
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    few = "1 documents, none of two tokens or more: give more by"
    for files, message in (
        ({"train_file": tmp_path / "short.jsonl"}, f"the training data holds {few} --train_file"),
        ({"validation_file": tmp_path / "short.jsonl"}, f"the held-out text holds {few} --validation_file or"),
    ):
        files = {"train_file": data / "documents.jsonl", "validation_file": data / "documents.jsonl", **files}
        with pytest.raises(ScriptError, match=message):
            run(**encoder(data) | files)
    (tmp_path / "kept").write_text("")
    with pytest.raises(ScriptError, match="--teacher_outputs .*kept is a file; name a folder"):
        run(**encoder(data, teacher_outputs=tmp_path / "kept"))


def test_the_cure_of_a_wrong_direction_works(arguments, data):
    family = {"model_type": "quadratic_kernel_lm", "config_overrides": "is_decoder=True"}
    made = built(arguments(**encoder(data) | family))
    assert made.pair.student.config.attends_causally and made.pair.encoder


def test_a_quantized_teacher_without_its_library_is_refused(run, data, tmp_path):
    folder = shutil.copytree(data / "llama", tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ScriptError, match="AWQ quantized model requires gptqmodel. Please install it"):
        run(source=folder)


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


@pytest.mark.parametrize(
    "name, more",
    [
        ("linearize_minilm", []),
        ("linearize_smollm2", ["--model_type=sparse_attention_lm", "--config_overrides", "sliding_window=64"]),
        ("linearize_smollm2", ["--model_type=linformer_lm", "--config_overrides", ""]),
    ],
)
def test_shipped_configs_are_valid(name, more):
    options = parse_options(LinearizeOptions, ["--config", name, "--train_file", "any", *more])
    config = AutoConfig.for_model(options.model_type, **options.config_overrides)
    assert config.model_type == options.model_type and options.transfer_steps and options.distill_steps
