"""What the tools around transformers do with every family: shards, placement, graphs, int8, pipelines, serving.

The graphs of causal models without padding, and `pipeline("text-generation")`, are in family_tester.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import AutoConfig, pipeline
from transformers.cli.serving import model_manager
from transformers.models.auto import modeling_auto

import ordnung
from ordnung.modeling.registration import FAMILIES, heads_of

# ForMultipleChoice is ForSequenceClassification on inputs of another shape
HEADS = [
    (model_type, auto)
    for model_type in FAMILIES
    for auto in heads_of(model_type)
    if auto != "AutoModelForMultipleChoice"
]
SMALL_FIELDS = {"linformer_lm": {"projected_size": 8, "local_block_size": 4}}
MASKED = [head for head in HEADS if head[1] == "AutoModelForMaskedLM"]
CLASSIFIERS = [(model_type, "AutoModelForSequenceClassification") for model_type in FAMILIES]
every_family = pytest.mark.parametrize("model_type", FAMILIES)
every_head = pytest.mark.parametrize(("model_type", "auto"), HEADS)


@pytest.fixture
def build(tokenizer):
    """Makes a small model of a family in eval mode, bidirectional where its head asks for that."""

    def build(model_type, auto="AutoModelForCausalLM", **fields):
        arguments = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "is_decoder": auto != "AutoModelForMaskedLM",
            "initializer_range": 0.2,  # so that outputs differ from each other
            **SMALL_FIELDS.get(model_type, {}),
            **fields,
        }
        return getattr(modeling_auto, auto).from_config(AutoConfig.for_model(model_type, **arguments)).eval()

    return build


@pytest.fixture
def batch(tokenizer):
    """Two rows of different length, padded."""
    return tokenizer(["the whale and the sea", "a ship"], padding=True, return_tensors="pt")


def outputs(model, batch):
    """Every tensor that a call returns."""
    with torch.no_grad():
        result = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return [value for value in result.to_tuple() if isinstance(value, torch.Tensor)]


def of_real_tokens(values, batch):
    """The outputs without those of padding, which no family promises anything about."""
    real = batch["attention_mask"] == 1
    return [value[real] if value.shape[:2] == real.shape else value for value in values]


def assert_equal(got, expected, **tolerance):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


# loading


@every_head
def test_sharded_safetensors(model_type, auto, build, batch, tmp_path):
    model = build(model_type, auto)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = getattr(modeling_auto, auto).from_pretrained(tmp_path).eval()
    assert_equal(outputs(loaded, batch), outputs(model, batch))


@every_head
def test_device_map_auto_with_layers_on_disk(model_type, auto, build, batch, tmp_path):
    """Weights reach a layer only when it is called: a mixer that reads a child's weight by itself would fail here."""
    model = build(model_type, auto)
    model.save_pretrained(tmp_path)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    loaded = getattr(modeling_auto, auto).from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": int(0.75 * size)}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    # a mixer may fold two products into one where nothing watches its modules: equal up to rounding
    assert_equal(outputs(loaded.eval(), batch), outputs(model, batch), rtol=1e-4, atol=1e-5)


# graphs, where padding and the other heads come in


@pytest.mark.parametrize(("model_type", "auto"), CLASSIFIERS + MASKED)
def test_compiled_whole_with_padding(model_type, auto, build, batch):
    model = build(model_type, auto, num_hidden_layers=3 if model_type == "cubic_prefix_lm" else 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(outputs(compiled, batch), outputs(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_type", "auto"), [head for head in HEADS if head[1] != "AutoModel"])
def test_exported_with_padding(model_type, auto, build, batch):
    # what lies between the layers is seen in the test before
    model = build(model_type, auto, use_cache=False, num_hidden_layers=2 if model_type == "cubic_prefix_lm" else 1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    got, expected = (of_real_tokens(outputs(made, other), batch) for made in (program.module(), model))
    assert_equal(got, expected, rtol=1e-4, atol=1e-5)


# int8


@every_head
def test_dynamic_int8(model_type, auto, build, batch):
    model = build(model_type, auto)
    quantized = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not [module for module in quantized.modules() if type(module) is nn.Linear]
    for got, expected in zip(outputs(quantized, batch), outputs(model, batch), strict=True):
        error = (got - expected).norm() / expected.norm()
        assert 0 < error < 0.15
    if model.can_generate():
        assert quantized.generate(batch["input_ids"], max_new_tokens=5).shape[1] > batch["input_ids"].shape[1]


# pipelines: a padded batch says what each text alone says

TEXTS = ["the whale and the sea", "a ship", "and a captain, a whale"]


def answers(pipe, texts, **arguments):
    alone = [pipe(text, **arguments) for text in texts]
    together = pipe(texts, batch_size=len(texts), **arguments)
    for a, b in zip(alone, together, strict=True):
        # a text's answer is one dictionary or a list of them
        a, b = (found if isinstance(found, list) else [found] for found in (a, b))
        assert len(a) == len(b) > 0
        for x, y in zip(a, b):
            assert x["score"] == pytest.approx(y["score"], abs=1e-4)
            assert {k: v for k, v in x.items() if k != "score"} == {k: v for k, v in y.items() if k != "score"}
    return together


@every_family
def test_text_classification_pipeline(model_type, build, tokenizer):
    model = build(model_type, "AutoModelForSequenceClassification", id2label={0: "dull", 1: "fine", 2: "odd"})
    found = answers(pipeline("text-classification", model=model, tokenizer=tokenizer), TEXTS, top_k=None)
    for scores in found:
        assert {score["label"] for score in scores} == {"dull", "fine", "odd"}
        assert sum(score["score"] for score in scores) == pytest.approx(1)


@every_family
def test_token_classification_pipeline(model_type, build, tokenizer):
    model = build(model_type, "AutoModelForTokenClassification", id2label={0: "B-SHIP", 1: "I-SHIP", 2: "B-SEA"})
    pipe = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple")
    for text, groups in zip(TEXTS, answers(pipe, TEXTS)):
        assert {group["entity_group"] for group in groups} <= {"SHIP", "SEA"}
        assert groups[-1]["end"] == len(text)


@pytest.mark.parametrize(("model_type", "auto"), MASKED)
def test_fill_mask_pipeline(model_type, auto, build, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = build(model_type, auto, vocab_size=len(tokenizer))
    texts = [f"the {tokenizer.mask_token} and the sea", f"a ship and {tokenizer.mask_token}"]
    found = answers(pipeline("fill-mask", model=model, tokenizer=tokenizer), texts)
    assert all(len(candidates) == 5 and "<mask>" not in candidates[0]["sequence"] for candidates in found)


# serving


@every_family
def test_transformers_serve_looks_classes_up_in_transformers(model_type, build, tokenizer, tmp_path, monkeypatch):
    """Why `transformers serve` does not take these models, trust_remote_code or not, and what it needs to."""
    model = build(model_type)
    ordnung.save_standalone(model, tmp_path, tokenizer)
    manager = model_manager.ModelManager(device="cpu", trust_remote_code=True)
    name, path = type(model).__name__, f"{tmp_path}@main"
    monkeypatch.delattr(model_manager.transformers, name, raising=False)  # `ordnung serve` may have run in this process
    with pytest.raises(AttributeError, match=f"has no attribute {name}"):
        manager.load_model_and_processor(path)
    monkeypatch.setattr(model_manager.transformers, name, type(model), raising=False)
    served, processor = manager.load_model_and_processor(path)
    ids = processor("the whale", return_tensors="pt")["input_ids"]
    assert torch.equal(served(ids).logits, model(ids).logits)
    for loaded in list(manager.loaded_models.values()):
        loaded.delete_model()  # its timer would keep the process alive
