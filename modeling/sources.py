"""Sources of a conversion: what config fields and modules of other architectures are called here.

A `Source` is the table of one architecture, and `check_options` refuses what an architecture computes and no table can
say. Another architecture is one entry in `SOURCES`.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from types import SimpleNamespace

from transformers import PreTrainedConfig

from ordnung.configuration.configuration_backbone import check_rope_type

# Fields that have the same name in every source.
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "chunk_size_feed_forward",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "label2id",
    "problem_type",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What one architecture calls the things that the backbone has.

    Args:
        fields: config -> fields of ours that `COMMON_FIELDS` does not have.
        modules: module of the base model -> module of ours, "*" for the layer's number. Several of ours, separated by
            spaces, share the output rows of one of the source.
        heads: head -> the same for the modules of that head.
        query_scale: (config, layer number) -> what attention scores are multiplied by beyond 1 / sqrt(head size).
        notes: config -> what of the source's computation has no counterpart, and does not change what it gives.
        windows: config -> fields of a family that has windows, by which it sees what the source sees; empty if the
            source sees the whole row.
    """

    fields: Callable[[PreTrainedConfig], dict]
    modules: dict[str, str]
    heads: dict[str, dict[str, str]]
    query_scale: Callable[[PreTrainedConfig, int], float] = lambda config, layer: 1.0
    notes: Callable[[PreTrainedConfig], list[str]] = lambda config: []
    windows: Callable[[PreTrainedConfig], dict] = lambda config: {}


def bert_fields(config) -> dict:
    return {
        "norm_position": "post",
        "position_embedding_type": "learned",
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "classifier_dropout": config.classifier_dropout,
        "type_vocab_size": config.type_vocab_size,
        "is_decoder": config.is_decoder,
    }


def roberta_fields(config) -> dict:
    # its positions begin after the row that is numbered as the padding token
    return {**bert_fields(config), "position_offset": config.pad_token_id + 1}


def roberta_notes(config) -> list[str]:
    if config.hidden_act == "gelu":
        return []
    return [f"RoBERTa's masked-LM head uses gelu, the one here `hidden_act` ({config.hidden_act!r})"]


def longformer_fields(config) -> dict:
    without = {"classifier_dropout": None, "is_decoder": False}  # fields that its config does not have
    return {**roberta_fields(SimpleNamespace(**config.to_dict() | without))}


def longformer_windows(config) -> dict:
    # its windows count both sides, and its global tokens are those of a mask at call
    windows = config.attention_window
    windows = windows if isinstance(windows, list) else [windows] * config.num_hidden_layers
    return {
        "sliding_window": [window // 2 for window in windows],
        "num_global_tokens": 0,
        "global_projections": "separate",
    }


def big_bird_notes(config) -> list[str]:
    return ["the embeddings are normed before their dropout, BigBird's after it"] if config.hidden_dropout_prob else []


def gpt2_fields(config) -> dict:
    return {
        "norm_position": "pre",
        "position_embedding_type": "learned",
        "intermediate_size": config.n_inner,
        "hidden_act": config.activation_function,
        "layer_norm_eps": config.layer_norm_epsilon,
        "hidden_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
        "is_decoder": True,
    }


def gpt2_query_scale(config, layer: int) -> float:
    scale = 1.0 if config.scale_attn_weights else (config.n_embd // config.n_head) ** 0.5
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def gpt2_notes(config) -> list[str]:
    if config.embd_pdrop == config.resid_pdrop:
        return []
    return [
        f"dropout of the embeddings is `resid_pdrop` ({config.resid_pdrop}), not `embd_pdrop` ({config.embd_pdrop})"
    ]


def distilbert_fields(config) -> dict:
    return {
        "norm_position": "post",
        "position_embedding_type": "learned",
        "intermediate_size": config.hidden_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-12,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "classifier_dropout": config.seq_classif_dropout,
        "is_decoder": False,
    }


def llama_fields(config) -> dict:
    return {
        "norm_position": "pre",
        "norm_type": "rms_norm",
        "layer_norm_eps": config.rms_norm_eps,
        "position_embedding_type": "rope",
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None),
        "attention_bias": getattr(config, "attention_bias", False),
        "intermediate_size": config.intermediate_size,
        "mlp_type": "gated",
        "mlp_bias": getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act,
        "attention_dropout": config.attention_dropout,
        "is_decoder": True,
    }


def decoder_windows(config) -> dict:
    """Of those layers that have the window, the last `sliding_window` tokens."""
    if config.sliding_window is None:
        return {}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    ours = {"sliding_attention": "sparse_attention", "full_attention": "full_attention"}
    return {
        "sliding_window": config.sliding_window,
        "num_global_tokens": 0,
        "layer_types": [ours[kind] for kind in kinds],
    }


def qwen2_fields(config) -> dict:
    return {**llama_fields(config), "attention_bias": "qkv"}


def qwen3_fields(config) -> dict:
    return {**llama_fields(config), "qk_norm": True}


ENCODER_MODULES = {
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "embed_positions",
    "embeddings.token_type_embeddings": "embed_token_types",
    "embeddings.LayerNorm": "embed_norm",
    "encoder.layer.*.attention.self.query": "layers.*.mixer.q_proj",
    "encoder.layer.*.attention.self.key": "layers.*.mixer.k_proj",
    "encoder.layer.*.attention.self.value": "layers.*.mixer.v_proj",
    "encoder.layer.*.attention.output.dense": "layers.*.mixer.out_proj",
    "encoder.layer.*.attention.output.LayerNorm": "layers.*.mixer_norm",
    "encoder.layer.*.intermediate.dense": "layers.*.mlp.up_proj",
    "encoder.layer.*.output.dense": "layers.*.mlp.down_proj",
    "encoder.layer.*.output.LayerNorm": "layers.*.mlp_norm",
}


BERT_HEAD = {
    "cls.predictions.transform.dense": "lm_transform.dense",
    "cls.predictions.transform.LayerNorm": "lm_transform.norm",
    "cls.predictions.decoder": "lm_head",
}
ROBERTA_HEAD = {
    "lm_head.dense": "lm_transform.dense",
    "lm_head.layer_norm": "lm_transform.norm",
    "lm_head.decoder": "lm_head",
}


def encoder_heads(language_modelling: dict[str, str]) -> dict[str, dict[str, str]]:
    """`Source.heads` of an encoder; `language_modelling` is that of its language modelling head.

    Classifiers of sequences and choices read a pooler that the heads here do not have: those do not carry over.
    """
    return {
        "ForMaskedLM": language_modelling,
        "ForCausalLM": language_modelling,
        "ForTokenClassification": {"classifier": "score"},
        "ForQuestionAnswering": {"qa_outputs": "qa_outputs"},
    }


LLAMA_MODULES = {
    "embed_tokens": "embed_tokens",
    "layers.*.input_layernorm": "layers.*.mixer_norm",
    "layers.*.self_attn.q_proj": "layers.*.mixer.q_proj",
    "layers.*.self_attn.k_proj": "layers.*.mixer.k_proj",
    "layers.*.self_attn.v_proj": "layers.*.mixer.v_proj",
    "layers.*.self_attn.o_proj": "layers.*.mixer.out_proj",
    "layers.*.self_attn.q_norm": "layers.*.mixer.q_norm",
    "layers.*.self_attn.k_norm": "layers.*.mixer.k_norm",
    "layers.*.post_attention_layernorm": "layers.*.mlp_norm",
    "layers.*.mlp.gate_proj": "layers.*.mlp.gate_proj",
    "layers.*.mlp.up_proj": "layers.*.mlp.up_proj",
    "layers.*.mlp.down_proj": "layers.*.mlp.down_proj",
    "norm": "norm",
}
DECODER_HEADS = {
    "ForCausalLM": {"lm_head": "lm_head"},
    "ForSequenceClassification": {"score": "score"},
    "ForTokenClassification": {"score": "score"},
    "ForQuestionAnswering": {"qa_outputs": "qa_outputs"},
}

# Options of the sources and their kin that change what a model computes and are not known here -> values that do not.
FOREIGN_OPTIONS = {
    "sliding_window": (None,),
    "attention_window": (None,),
    "attention_type": (None, "original_full"),
    "rescale_embeddings": (None, False),
    "use_bias": (None, True),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1),
    "query_pre_attn_scalar": (None,),
    "scale_embedding": (None, False),
    "partial_rotary_factor": (None, 1),
    "use_parallel_residual": (None, False),
    "parallel_attn": (None, False),
}
# What to do about some of them.
CURES = {
    "sliding_window": "convert to 'sparse_attention_lm', which has windows, or set it to None if no row is longer",
    "attention_window": "convert to 'sparse_attention_lm', which has windows",
    "attention_type": "BigBird draws its random blocks for each head and length; set config.attention_type = "
    "'original_full', which has the same weights, and give a sparse target a pattern of its own",
}


def check_options(config: PreTrainedConfig, windows: Iterable[str] = ()) -> None:
    """Refuses what a source computes and the model does not.

    Args:
        windows: options that the model has windows for.

    Raises:
        ValueError: an option is set that would change the result; the message names it, its value and the cure.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type in ("llama", "mistral", "qwen2", "qwen3"):
        check_rope_type(rope)
    given = {name: getattr(config, name, None) for name in FOREIGN_OPTIONS}
    given["partial_rotary_factor"] = rope.get("partial_rotary_factor", given["partial_rotary_factor"])
    for name, neutral in FOREIGN_OPTIONS.items():
        if given[name] not in neutral and name not in windows:
            raise ValueError(
                f"`{name}` ({given[name]!r}) of the source changes its result, and has no counterpart here: "
                f"{CURES.get(name) or f'only {neutral[-1]!r} can be converted'}"
            )


SOURCES = {
    "bert": Source(
        fields=bert_fields,
        modules=ENCODER_MODULES,
        heads=encoder_heads(BERT_HEAD),
    ),
    "roberta": Source(
        fields=roberta_fields,
        modules=ENCODER_MODULES,
        heads=encoder_heads(ROBERTA_HEAD),
        notes=roberta_notes,
    ),
    "longformer": Source(
        fields=longformer_fields,
        modules=ENCODER_MODULES
        | {
            f"encoder.layer.*.attention.self.{name}_global": f"layers.*.mixer.{name[0]}_global_proj"
            for name in ("query", "key", "value")
        },
        heads=encoder_heads(ROBERTA_HEAD),
        notes=roberta_notes,
        windows=longformer_windows,
    ),
    "big_bird": Source(
        fields=bert_fields,
        modules=ENCODER_MODULES,
        # its answers are read by a head of more layers
        heads={name: modules for name, modules in encoder_heads(BERT_HEAD).items() if name != "ForQuestionAnswering"},
        notes=big_bird_notes,
    ),
    "gpt2": Source(
        fields=gpt2_fields,
        modules={
            "wte": "embed_tokens",
            "wpe": "embed_positions",
            "h.*.ln_1": "layers.*.mixer_norm",
            "h.*.attn.c_attn": "layers.*.mixer.q_proj layers.*.mixer.k_proj layers.*.mixer.v_proj",
            "h.*.attn.c_proj": "layers.*.mixer.out_proj",
            "h.*.ln_2": "layers.*.mlp_norm",
            "h.*.mlp.c_fc": "layers.*.mlp.up_proj",
            "h.*.mlp.c_proj": "layers.*.mlp.down_proj",
            "ln_f": "norm",
        },
        heads=DECODER_HEADS | {"ForTokenClassification": {"classifier": "score"}},
        query_scale=gpt2_query_scale,
        notes=gpt2_notes,
    ),
    "distilbert": Source(
        fields=distilbert_fields,
        modules={
            "embeddings.word_embeddings": "embed_tokens",
            "embeddings.position_embeddings": "embed_positions",
            "embeddings.LayerNorm": "embed_norm",
            "transformer.layer.*.attention.q_lin": "layers.*.mixer.q_proj",
            "transformer.layer.*.attention.k_lin": "layers.*.mixer.k_proj",
            "transformer.layer.*.attention.v_lin": "layers.*.mixer.v_proj",
            "transformer.layer.*.attention.out_lin": "layers.*.mixer.out_proj",
            "transformer.layer.*.sa_layer_norm": "layers.*.mixer_norm",
            "transformer.layer.*.ffn.lin1": "layers.*.mlp.up_proj",
            "transformer.layer.*.ffn.lin2": "layers.*.mlp.down_proj",
            "transformer.layer.*.output_layer_norm": "layers.*.mlp_norm",
        },
        heads=encoder_heads(
            {
                "vocab_transform": "lm_transform.dense",
                "vocab_layer_norm": "lm_transform.norm",
                "vocab_projector": "lm_head",
            }
        ),
    ),
    "llama": Source(fields=llama_fields, modules=LLAMA_MODULES, heads=DECODER_HEADS),
    "mistral": Source(fields=llama_fields, modules=LLAMA_MODULES, heads=DECODER_HEADS, windows=decoder_windows),
    "qwen2": Source(fields=qwen2_fields, modules=LLAMA_MODULES, heads=DECODER_HEADS, windows=decoder_windows),
    "qwen3": Source(fields=qwen3_fields, modules=LLAMA_MODULES, heads=DECODER_HEADS, windows=decoder_windows),
}

__all__ = ["COMMON_FIELDS", "SOURCES", "Source", "check_options"]
