"""What a conversion keeps, makes anew and says of it: heads, direction, layers, positions."""

import json

import pytest
import torch
import transformers
from convert_sources import DECODERS, assert_same, make
from family_tester import masked_batch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

import ordnung
from ordnung.modeling.registration import FAMILIES

pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_become_every_family(name):
    source = make(f"{name}ForCausalLM")
    ids = torch.randint(1, 50, (2, 9))
    sizes = {"conv_lm": {"kernel_size": 4}, "linformer_lm": {"projected_size": 8, "local_block_size": 4}}
    for family in FAMILIES:
        model, report = ordnung.convert(source, family, output_report=True, **sizes.get(family, {}))
        assert type(model).__name__.endswith("ForCausalLM")
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (2, 12)
        assert "model.layers.0.mlp.gate_proj.weight" in report.copied
        copied = "model.layers.0.mixer.v_proj.weight" in report.copied
        if not hasattr(model.model.layers[0].mixer, "k_proj"):  # values alone are as wide as the model
            assert copied == (name != "Qwen3")  # whose heads are not the width together
            assert ("repeated 2 times" in str(report)) == copied
        else:
            assert copied


def test_more_heads_of_keys_are_the_same_ones_repeated():
    source = make("LlamaForCausalLM")
    model, report = ordnung.convert(source, "softmax_lm", num_key_value_heads=4, output_report=True)
    assert report.notes == ["each head of keys and values is repeated 2 times"]
    assert_same(source, model, ["logits"])


def test_pooling_carries_over(tmp_path):
    source = make("GPT2ForSequenceClassification")
    model = ordnung.convert(source, "cubic_prefix_lm")  # which classifies by a bidirectional pass
    assert model.config.pooling == "last"
    assert ordnung.convert(source, "softmax_lm", classifier_pooling="mean").config.pooling == "mean"
    make("BertModel").float().save_pretrained(tmp_path)
    assert ordnung.convert(tmp_path, "softmax_lm").config.classifier_pooling is None
    (tmp_path / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    model = ordnung.convert(tmp_path, "softmax_lm", head="ForSequenceClassification")
    assert model.config.classifier_pooling == "mean"
    ordnung.save_standalone(model, tmp_path / "alone")
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "alone", trust_remote_code=True).eval()
    ids, mask = masked_batch()
    assert loaded.config.pooling == "mean"
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_heads_that_do_not_carry_over_are_new_and_named():
    labels = {0: "no", 1: "yes", 2: "both"}
    for class_name in ("BertForSequenceClassification", "RobertaForSequenceClassification", "BertForMultipleChoice"):
        model, report = ordnung.convert(make(class_name, id2label=labels), "softmax_lm", output_report=True)
        assert type(model).__name__ == class_name.replace("Bert", "SoftmaxLM").replace("Roberta", "SoftmaxLM")
        assert report.new == ["score.weight"]
        assert {name.split(".")[0] for name in report.left_out} <= {"bert", "classifier"}
        assert all("pooler" in name or "classifier" in name for name in report.left_out)
        assert model.config.id2label == labels
    source = make("BertForTokenClassification")
    model, report = ordnung.convert(source, "softmax_lm", num_labels=7, output_report=True)
    assert model.score.weight.shape[0] == 7
    assert report.new == ["score.weight", "score.bias"]
    assert report.left_out == ["classifier.weight", "classifier.bias"]
    model, report = ordnung.convert(source, "softmax_lm", head="ForSequenceClassification", output_report=True)
    assert report.new == ["score.weight"]


def test_direction_can_change():
    source = make("BertForMaskedLM")
    model, report = ordnung.convert(source, "softmax_lm", is_decoder=True, output_report=True)
    assert type(model).__name__ == "SoftmaxLMForCausalLM"
    assert report.notes == ["the model's attention is causal, the source's is not"]
    assert report.new == report.left_out == []
    assert torch.equal(model.model.lm_transform.dense.weight, source.cls.predictions.transform.dense.weight)
    model, report = ordnung.convert(make("GPT2LMHeadModel"), "softmax_lm", head="ForMaskedLM", output_report=True)
    assert model.config.is_decoder is False
    assert report.new == [
        *(f"lm_transform.{name}" for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias")),
        "lm_head.bias",
    ]


def test_what_a_conversion_keeps_is_counted():
    source = make("GPT2LMHeadModel")
    before = {name: p.clone() for name, p in source.named_parameters()}
    model, report = ordnung.convert(source, "conv_lm", kernel_size=8, output_report=True)
    assert report.new == [f"model.layers.{i}.mixer.kernel_logits" for i in range(3)]
    assert len(report.left_out) == 12
    assert "transformer.h.0.attn.c_attn.weight (q_proj)" in report.left_out
    text = str(report)
    assert "ConvLMForCausalLM from GPT2LMHeadModel" in text
    assert "model.layers.*.mixer.kernel_logits (3 layers)" in text
    assert "model.layers.*.mlp.up_proj.weight <- transformer.h.*.mlp.c_fc.weight (3 layers)" in text
    names = dict(model.named_parameters())
    assert set(report.copied) | set(report.new) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    weight = source.transformer.h[1].attn.c_attn.weight[:, 48:].T
    assert torch.equal(names["model.layers.1.mixer.v_proj.weight"], weight)
    assert all(torch.equal(p, before[name]) for name, p in source.named_parameters())
    assert all(p.data_ptr() not in {q.data_ptr() for q in source.parameters()} for p in model.parameters())
    # kernels that look at the current token only: the model is GPT-2 with the identity for attention weights
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.kernel_logits[:, 1:] = -torch.inf
    for block in source.transformer.h:
        block.attn.forward = lambda x, attn=block.attn, **kwargs: (attn.c_proj(attn.c_attn(x)[..., 48:]), None)
    ids = torch.randint(1, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-10)


def test_hybrid_keeps_attention_where_it_has_some():
    source = make("GPT2LMHeadModel")
    types = ["conv", "full_attention", "conv"]
    model, report = ordnung.convert(source, "conv_lm", kernel_size=8, layer_types=types, output_report=True)
    assert "model.layers.1.mixer.q_proj.weight" in report.copied
    assert report.new == [f"model.layers.{i}.mixer.kernel_logits" for i in (0, 2)]


def test_encoder_becomes_a_convolution():
    source, types = make("BertForMaskedLM"), torch.ones(1, 9, dtype=torch.long)
    ids = torch.randint(1, 50, (1, 9))
    model, report = ordnung.convert(source, "conv_lm", is_decoder=True, output_report=True)
    assert type(model).__name__ == "ConvLMForCausalLM"
    assert report.notes == ["the model's attention is causal, the source's is not"]
    assert model(ids, token_type_ids=types).logits.isfinite().all()
    model, report = ordnung.convert(source, "conv_lm", output_report=True)
    assert type(model).__name__ == "ConvLMForMaskedLM" and model.config.kernel_size == 63
    assert report.notes == []
    assert report.new == [f"model.layers.{i}.mixer.kernel_logits" for i in range(3)]


@pytest.mark.parametrize("class_name", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_gates_of_a_conversion_are_open(class_name):
    """With gates that read nothing and kernels of the current token alone, values pass as they are."""
    source = make(class_name)
    plain = ordnung.convert(source, "conv_lm", kernel_size=3)
    gated, report = ordnung.convert(source, "conv_lm", kernel_size=3, gate="input_output", output_report=True)
    assert [f"model.layers.0.mixer.gate_proj.{kind}" in report.new for kind in ("weight", "bias")] == [True] * 2
    ids = torch.randint(1, 50, (2, 9))
    expected = plain(ids).logits
    got = gated(ids).logits
    with torch.no_grad():
        for layer in gated.model.layers:
            assert torch.equal(layer.mixer.gate_proj.bias, torch.ones_like(layer.mixer.gate_proj.bias))
            layer.mixer.gate_proj.weight.zero_()
    torch.testing.assert_close(gated(ids).logits, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        for layer in gated.model.layers:
            layer.mixer.gate_proj.bias.zero_()
    closed = gated(ids).logits
    assert (got - expected).norm() < 0.5 * (closed - expected).norm()


@pytest.mark.parametrize("class_name", ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel"])
def test_table_of_positions_grows_and_shrinks(class_name):
    source = make(class_name)
    ids = torch.randint(1, 50, (1, 39))
    model, report = ordnung.convert(source, "softmax_lm", max_position_embeddings=100, output_report=True)
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-10)
    offset = model.config.position_offset
    assert report.notes == [f"the {40 - offset} learned positions are repeated to {100 - offset}"]
    table = model.model.embed_positions.weight[offset:]
    assert torch.equal(table[40 - offset : 80 - 2 * offset], table[: 40 - offset])
    model, report = ordnung.convert(source, "softmax_lm", max_position_embeddings=20, output_report=True)
    torch.testing.assert_close(model(ids[:, :19]).logits, source(ids[:, :19]).logits, rtol=0, atol=1e-10)
    assert report.notes == [f"the {40 - offset} learned positions are cut to {20 - offset}"]


def test_fewer_and_more_layers():
    source = make("BertForMaskedLM")
    model, report = ordnung.convert(source, "softmax_lm", num_hidden_layers=2, output_report=True)
    assert report.new == []
    assert sum(".layer.2." in name for name in report.left_out) == 16
    model, report = ordnung.convert(source, "softmax_lm", num_hidden_layers=4, output_report=True)
    assert len(report.new) == 16
    assert all(name.startswith("model.layers.3.") for name in report.new)


def test_log_names_what_is_new(caplog):
    logging.enable_propagation()
    try:
        ordnung.convert(make("GPT2LMHeadModel"), "softmax_lm")
        assert not caplog.records
        ordnung.convert(make("GPT2LMHeadModel"), "conv_lm")
        assert "mixer.kernel_logits (3 layers)" in caplog.text
    finally:
        logging.disable_propagation()


def test_wrong_input_is_refused_in_words(tmp_path):
    source = make("BertModel")
    known = "known are bert, big_bird, distilbert, gpt2, llama, longformer, mistral, qwen2, qwen3, roberta"
    with pytest.raises(ValueError, match=f"'opt' cannot be converted: {known}"):
        config = AutoConfig.for_model("opt", hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=1)
        config.num_attention_heads = 1
        ordnung.convert(AutoModel.from_config(config), "softmax_lm")
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(ValueError, match=f"'mystery' cannot be converted: {known}"):
        ordnung.convert(tmp_path, "softmax_lm")
    with pytest.raises(TypeError, match="Linear; of a wrapped model"):
        ordnung.convert(nn.Linear(2, 2), "softmax_lm")
    with pytest.raises(ValueError, match="`model_type` \\('soft_lm'\\) must be one of"):
        ordnung.convert(source, "soft_lm")
    with pytest.raises(ValueError, match="conv_lm has no head 'ForTables': give `head`, one of"):
        ordnung.convert(source, "conv_lm", head="ForTables")
    with pytest.raises(ValueError, match="'kernel_sise' is no field of ConvLMConfig; did you mean 'kernel_size'"):
        ordnung.convert(source, "conv_lm", kernel_sise=3)
    with pytest.raises(ValueError, match=r"`embed_tokens.weight` is \(60, 24\), but .* \(50, 24\)"):
        ordnung.convert(source, "softmax_lm", vocab_size=60)
