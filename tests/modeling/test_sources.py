"""Converted models compute what the originals compute, source by source and option by option."""

import pytest
import torch
import transformers
from convert_sources import CONFIGS, DECODERS, assert_same, make, run
from family_tester import masked_batch

import ordnung

pytestmark = pytest.mark.usefixtures("norms_in_float64")


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
