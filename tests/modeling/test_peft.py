"""LoRA on every family: what is adapted by default, what trains, and adapters saved, loaded and merged."""

import shutil
import subprocess
import sys

import peft
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType, get_peft_model
from strangers import REFUSE
from tiny_tasks import TINY, results
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

import ordnung
from ordnung.modeling import registration
from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.common.errors import ScriptError

# Every way in which a family's mixers hold projections; a family without an entry is tried as it comes.
VARIANTS = {
    "conv_lm": [
        {"kernel_size": 4},
        {"kernel_size": 4, "gate": "input_output"},
        {"kernel_size": 4, "layer_types": ["causal_conv", "full_attention"]},
    ],
    "softmax_lm": [{}, {"is_decoder": False, "norm_position": "post"}],
    "sparse_attention_lm": [
        {"sliding_window": 4, "layer_types": ["sparse_attention", "full_attention"]},
        # the first token is a global one: only of others do the last layer's own projections make something
        {"sliding_window": 4, "is_decoder": False, "global_projections": "separate", "classifier_pooling": "mean"},
    ],
}
CASES = [
    pytest.param(name, more, id=f"{name}-{i}") for name in FAMILIES for i, more in enumerate(VARIANTS.get(name, [{}]))
]


def classifier(model_type, more):
    config = AutoConfig.for_model(model_type, vocab_size=50, num_labels=3, pad_token_id=0, **TINY, **more)
    return AutoModelForSequenceClassification.from_config(config)


def adapted(model, **kwargs):
    return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, **kwargs))


def projections(model):
    """Names of all linear layers inside mixers and MLPs, found by what they are."""
    return {
        f"{place}.{name}"
        for place, layer in model.model.layers.named_children()
        for part in (layer.mixer, layer.mlp)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and any(module is own for own in part.modules())
    }


@pytest.mark.parametrize("model_type, more", CASES)
class TestEveryFamily:
    def test_default_targets_are_all_projections(self, model_type, more):
        model = classifier(model_type, more)
        expected = projections(model)
        assert len(expected) >= 2 * model.config.num_hidden_layers + 2
        names = set(adapted(model).targeted_module_names)
        assert {name.removeprefix("model.layers.") for name in names} == expected

    def test_each_adapter_gets_gradients_and_nothing_else_trains(self, model_type, more):
        model = classifier(model_type, more)
        expected = len(projections(model))
        model = adapted(model, init_lora_weights=False)  # with B at its usual zero, A would get no gradient
        ids = torch.randint(1, 50, (3, 12))
        model(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
        assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)
        adapters = [name for name in trained if ".lora_" in name]
        assert len(adapters) == 2 * expected
        (other,) = trained.keys() - set(adapters)
        assert other.endswith("score.modules_to_save.default.weight")

    def test_merged_saved_and_loaded_it_is_the_same(self, model_type, more, tmp_path):
        base = classifier(model_type, more).eval()
        base.save_pretrained(tmp_path / "base")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        ids = torch.randint(1, 50, (2, 12))
        plain = base(ids).logits
        model = adapted(base, init_lora_weights=False).eval()
        expected = model(ids).logits
        assert (plain - expected).abs().max() > 1e-3
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
        kept, back = model.state_dict(), loaded.state_dict()  # every bit of them; sums of them round by where they lie
        assert kept.keys() == back.keys() and all(torch.equal(kept[key], back[key]) for key in kept)
        torch.testing.assert_close(loaded(ids).logits, expected)
        merged = model.merge_and_unload()
        assert type(merged) is type(base)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_causal_models_too(model_type):
    """Also where a family would rather use a projection's weight than call it, as CubicPrefixLM's last layer does."""
    config = AutoConfig.for_model(model_type, vocab_size=50, is_decoder=True, **TINY)
    base = AutoModelForCausalLM.from_config(config)
    ids, expected = torch.randint(1, 50, (2, 12)), len(projections(base))
    model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, init_lora_weights=False)).eval()
    output = model(ids, labels=ids)
    output.loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * expected and all(parameter.grad.abs().sum() > 0 for parameter in trained)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(ids).logits, output.logits, rtol=1e-4, atol=1e-5)


def test_the_targets_are_entered_where_peft_came_first(monkeypatch):
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert set(FAMILIES) <= set(targets)
    monkeypatch.delitem(targets, "conv_lm")
    registration.register()
    assert targets["conv_lm"] == registration.LORA_TARGETS


def test_the_program_trains_adapters(run_task, tasks, tmp_path):
    out = run_task("mnli", use_peft=True, lora_rank=4, merge_adapter=True, num_train_epochs=3, learning_rate=1e-2)
    folder = out / "mnli/seed-0"
    summary = results(folder)
    assert not (folder / "config.json").exists()
    config = AutoConfig.from_pretrained(folder / "base")
    assert config.id2label[1] == "neutral"
    rows = AutoTokenizer.from_pretrained(folder)("the ship was warm", "a cold sea", return_tensors="pt")
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
    assert summary["trainable_parameters"] == 2 * (2 * (16 + 16) + 2 * (16 + 64)) * 4 + 3 * 16
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert not isinstance(merged, PeftModel) and merged.config.id2label[2] == "contradiction"
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)
    # the weights that were not trained are the checkpoint's
    base = AutoModelForCausalLM.from_pretrained(tasks / "conv").state_dict()
    kept = model.get_base_model().state_dict()["model.layers.0.mixer.v_proj.base_layer.weight"]
    assert torch.equal(kept, base["model.layers.0.mixer.v_proj.weight"])


LABELS = ["entailment", "neutral", "contradiction"]
SIZES = {
    "conv_lm": {"kernel_size": 4},
    "linformer_lm": {"projected_size": 8, "local_block_size": 4, "is_decoder": True},
    "cubic_prefix_lm": {},
    "quadratic_kernel_lm": {"chunk_size": 4},
    "softmax_lm": {"position_embedding_type": "learned"},
    "sparse_attention_lm": {"sliding_window": 4},
}


@pytest.fixture(params=[*FAMILIES, "bert", "bert, another classifier", "softmax_lm, in shards"])
def adapter(request, run_task, tasks, tmp_path, monkeypatch):
    """The folder of an adapter that was trained on three labels, and the checkpoint under it."""
    name, _, kind = request.param.partition(", ")
    tokenizer = AutoTokenizer.from_pretrained(tasks / "conv")
    if name == "bert":
        tiny = {"vocab_size": len(tokenizer), "intermediate_size": 32, "max_position_embeddings": 64, **TINY}
        model = BertForSequenceClassification(BertConfig(**tiny, num_labels=2 if kind else 3))
        if not kind:
            model = model.bert
    else:
        shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, **TINY}
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape, **special, **SIZES.get(name, {})))
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB" if kind == "in shards" else "1GB")
    tokenizer.save_pretrained(tmp_path / "source")
    if kind == "in shards":
        assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 1
    monkeypatch.chdir(tmp_path)
    options = {"use_peft": True, "model_name_or_path": "source", "max_steps": 2, "learning_rate": 0.1}
    options |= {"ignore_mismatched_sizes": True} if kind == "another classifier" else {}
    folder = run_task("mnli", "adapter", merge_adapter=True, **options) / "mnli/seed-0"
    monkeypatch.chdir("/")  # it loads from anywhere
    return folder, kind


def test_an_adapter_loads_with_its_labels_in_three_ways(adapter):
    folder, kind = adapter
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(["the ship was warm", "a cold sea"], padding=True, return_tensors="pt")
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    expected = merged(**inputs).logits
    classify = pipeline("text-classification", str(folder), top_k=None)
    models = [
        classify.model,
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoPeftModelForSequenceClassification.from_pretrained(folder).eval(),
    ]
    for model in models:
        assert list(model.config.id2label.values()) == LABELS
        assert sum("lora_A" in name for name, _ in model.named_parameters()) > 0
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    scores = {answer["label"]: answer["score"] for answer in classify(["the ship was warm"])[0]}
    single = tokenizer("the ship was warm", return_tensors="pt")
    probabilities = merged(single["input_ids"], single["attention_mask"]).logits[0].softmax(-1).tolist()
    assert scores == pytest.approx(dict(zip(LABELS, probabilities)), rel=1e-3)
    assert classify.tokenizer.model_max_length == tokenizer.model_max_length
    weights = list((folder / "base").glob("*.safetensors"))
    assert len(weights) == (kind == "another classifier")  # nothing is copied that need not be


def test_an_adapter_of_a_stand_alone_base_loads_without_ordnung(run_task, tasks, tmp_path):
    model, tokenizer = (auto.from_pretrained(tasks / "conv") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ordnung.save_standalone(model, tmp_path / "source", tokenizer)
    folder = run_task("mnli", use_peft=True, model_name_or_path=tmp_path / "source", max_steps=1) / "mnli/seed-0"
    program = f"""{REFUSE}
from transformers import pipeline
classify = pipeline("text-classification", {str(folder)!r}, trust_remote_code=True, top_k=None)
print(sorted(answer["label"] for answer in classify(["the ship was warm"])[0]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(sorted(LABELS))


def test_the_best_adapter_is_kept(run_task):
    options = {"learning_rate": 0.5, "num_train_epochs": 12, "eval_steps": 2, "lr_scheduler_type": "constant"}
    out = run_task("sst2", use_peft=True, early_stopping_patience=2, **options)
    summary = results(out / "sst2/seed-0")
    assert summary["best"]["step"] < summary["steps"]
    assert summary["metrics"]["validation"]["loss"] == pytest.approx(summary["best"]["loss"], rel=1e-5)


def test_other_models(run_task, bert, tmp_path):
    options = {"use_peft": True, "model_name_or_path": bert, "max_steps": 2, "ignore_mismatched_sizes": True}
    run_task("sst2", **options)  # PEFT has its own targets for BERT
    run_task("sst2", "all", lora_target_modules="all-linear", **options)
    trained = [results(tmp_path / out / "sst2/seed-0")["trainable_parameters"] for out in ("out", "all")]
    assert trained[0] < trained[1]
    with pytest.raises(ScriptError, match="lora_target_modules for bert: No modules were targeted .*all-linear"):
        run_task("sst2", "none", lora_target_modules="nothing", **options)


def test_a_model_that_peft_does_not_know(run_task, tasks, tmp_path, monkeypatch):
    shutil.copytree(tasks / "conv", tmp_path / "conv")
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.delitem(targets, "conv_lm")
    with pytest.raises(ScriptError, match="specify `target_modules`.*all-linear"):
        run_task("sst2", use_peft=True, model_name_or_path=tmp_path / "conv")


PROMPTS = [peft.PromptTuningConfig, peft.PromptEncoderConfig]
ADAPTERS = [
    peft.IA3Config,
    peft.OFTConfig,
    peft.BOFTConfig,
    peft.LoHaConfig,
    peft.VeraConfig,
    peft.LNTuningConfig,
    lambda **kwargs: peft.AdaLoraConfig(total_step=10, **kwargs),
]


def causal(model_type, more):
    more = {name: value for name, value in more.items() if name != "global_projections"}  # which encoders have
    config = AutoConfig.for_model(model_type, vocab_size=50, **TINY, **more | {"is_decoder": True})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type, more", CASES)
@pytest.mark.parametrize("method", [*PROMPTS, *ADAPTERS], ids=lambda method: getattr(method, "__name__", "AdaLora"))
def test_every_method_trains_and_generates(model_type, more, method):
    """With the targets that PEFT knows the family by, and with a cache as without."""
    arguments = {"num_virtual_tokens": 4} if method in PROMPTS else {}
    arguments |= {"oft_block_size": 4} if method is peft.OFTConfig else {}
    model = get_peft_model(causal(model_type, more), method(task_type="CAUSAL_LM", **arguments))
    ids = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in trained)
    with torch.no_grad():
        for p in trained:  # away from what changes nothing
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(input_ids=ids, attention_mask=mask, **fixed)
    assert torch.equal(cached, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **fixed))


@pytest.mark.parametrize("model_type, more", CASES)
def test_prefix_tuning_works_or_is_refused_in_words(model_type, more):
    model = causal(model_type, more)
    stock = set(model.config.layer_types) == {"full_attention"}
    model = get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids = torch.randint(1, 50, (2, 9))
    if stock:
        model(input_ids=ids, labels=ids).loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    else:
        with pytest.raises(ValueError, match="prefix tuning gives keys and values.*use prompt tuning, P-tuning"):
            model(input_ids=ids, labels=ids)
