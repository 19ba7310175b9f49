"""Conversion: the weights of BERT-style, Longformer, GPT-2 and Llama-style checkpoints in a family of this package.

A `Source` says, for one architecture, what its config fields and modules are called here. Everything else is generic:
a parameter goes where the model has one of that name, so a new family needs nothing, and a new architecture one table.
"""

import copy
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging
from transformers.utils.import_utils import is_gguf_available

from ordnung.modeling.registration import AUTO_CLASSES, REGISTERED, heads_of

__all__ = ["ConversionReport", "convert"]

logger = logging.get_logger(__name__)

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
LM_HEADS = {"ForCausalLM", "ForMaskedLM"}
# class name endings of the sources -> the heads that they are here
HEAD_ALIASES = {"ForPreTraining": "ForMaskedLM", "LMHeadModel": "ForCausalLM", "DoubleHeadsModel": "ForCausalLM"}


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
        known = ("default", *ROPE_INIT_FUNCTIONS)
        if rope.get("rope_type", "default") not in known:
            raise ValueError(f"`rope_type` ({rope['rope_type']!r}) is not known: it must be one of {sorted(known)}")
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


@dataclasses.dataclass
class ConversionReport:
    """What a conversion did; `str()` of it is for reading.

    Args:
        source: class name of the source.
        target: class name of the model.
        copied: parameter of the model -> parameter of the source that it was copied from.
        new: parameters of the model that the source has nothing for; they start as in a new model.
        left_out: parameters of the source, or named parts of them, that the model has no place for.
        notes: what else differs from the source.
    """

    source: str
    target: str
    copied: dict[str, str] = dataclasses.field(default_factory=dict)
    new: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.target} from {self.source}"]
        for title, names in (
            ("copied", [f"{ours} <- {theirs}" for ours, theirs in self.copied.items()]),
            ("new, initialised", self.new),
            ("left out of the source", self.left_out),
        ):
            lines += [f"  {title}: {len(names) or 'nothing'}", *(f"    {name}" for name in _count_layers(names))]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def convert(
    source: PreTrainedModel | str | os.PathLike,
    model_type: str,
    head: str | None = None,
    output_report: bool = False,
    gguf_file: str | None = None,
    **config_overrides,
) -> PreTrainedModel | tuple[PreTrainedModel, ConversionReport]:
    """A model of this package with the weights of a checkpoint of another architecture, one of `SOURCES`.

    Embeddings, norms, MLPs, projections and heads are copied where the family has them; sizes, activation, dropout,
    token ids, labels, tying and dtype are the source's. SoftmaxLM then computes what the source computes, and
    CubicPrefixLM predicts at each token what an encoder with its masked-LM head computes at the end of that prefix.
    Positions count each row's real tokens, where BERT and GPT-2 without `position_ids` count padding too. GPT-2's token
    types, which are word embeddings, have no counterpart.

    `classifier_pooling` is what the source's classifier reads, or what a sentence-transformers folder has beside it.

    With a larger `max_position_embeddings` the learned positions are repeated along the longer table, as Longformer
    starts from RoBERTa's (Beltagy et al. 2020, arXiv 2004.05150, section 5); with a smaller one the first are kept.

    Args:
        source: a model, which is left as it is, or a local folder or Hub name.
        model_type: the family, such as "softmax_lm" or "conv_lm".
        head: ending of the class to make, such as "Model" or "ForSequenceClassification"; by default the source's, a
            language modelling head being the one that fits `is_decoder`.
        output_report: return the report too; otherwise it is logged if anything is new, left out or noted.
        gguf_file: name of a GGUF file of a causal model in `source`, a folder or Hub name; its weights are dequantized
            to float32. Needs the package `gguf`, of `ordnung[gguf]`.
        config_overrides: fields of the family's config, such as `kernel_size=64`.

    Returns:
        The model in evaluation mode on the source's device; with `output_report`, a pair of it and the
        `ConversionReport`.

    Raises:
        ImportError: `gguf_file` without the package `gguf`.
        TypeError: `source` is neither a bare model of transformers nor a name.
        ValueError: an unknown architecture, family, head or config field, an option of the source that changes its
            result and is not known here, or overrides that give a part of the base
            model another shape than the source's.
    """
    model, missing, unexpected = _load(source, gguf_file)
    table, source_head = SOURCES[model.config.model_type], _head_of(type(model))
    windows = table.windows(model.config) if _has_windows(model_type) else {}
    check_options(model.config, ("sliding_window", "attention_window") if windows else ())
    pooling = _pooling_of(source, table, source_head)
    config_overrides = {"classifier_pooling": pooling, **windows, **config_overrides}
    head, config = _target(model, table, source_head, model_type, head, config_overrides)
    target = getattr(modeling_auto, AUTO_CLASSES[head]).from_config(config).eval().to(model.device)
    if target.can_generate() and model.can_generate():
        target.generation_config = copy.deepcopy(model.generation_config)

    report = ConversionReport(type(model).__name__, type(target).__name__, notes=table.notes(model.config))
    if config.attends_causally != table.fields(model.config)["is_decoder"]:
        direction = "causal" if config.attends_causally else "bidirectional"
        report.notes.append(f"the model's attention is {direction}, the source's is not")
    base = "" if head == "Model" else "model."
    modules = {theirs: [base + ours for ours in names.split()] for theirs, names in table.modules.items()}
    if source_head == head or {source_head, head} <= LM_HEADS:
        # the transform of a causal head is part of its base model
        inside = base if head == "ForCausalLM" else ""
        modules |= {
            theirs: [inside + ours if ours.startswith("lm_transform.") else ours]
            for theirs, ours in table.heads.get(source_head, {}).items()
        }
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in missing}
    parts = {name: _split(name, p, model, modules, table.query_scale) for name, p in parameters.items()}
    _copy(parameters, parts, target, base, report)
    _copy_global(target, report)
    with torch.no_grad():
        for layer in getattr(target, target.base_model_prefix, target).layers:
            layer.mixer.init_converted()
    report.left_out += unexpected

    if output_report:
        return target, report
    if report.new or report.left_out or report.notes:
        logger.warning(str(report))
    return target


def _load(source, gguf_file: str | None = None) -> tuple[PreTrainedModel, set[str], list[str]]:
    """The source, the parameters that its checkpoint does not have, and what else the checkpoint has."""
    if gguf_file is not None:
        if isinstance(source, PreTrainedModel):
            raise TypeError(f"`gguf_file` ({gguf_file!r}) is a file in a folder or on the Hub: give that as `source`")
        if not is_gguf_available():
            raise ImportError(f"`gguf_file` ({gguf_file!r}) is read by the package gguf: pip install 'ordnung[gguf]'")
        config, _ = PreTrainedConfig.get_config_dict(source, gguf_file=gguf_file)
        _check_architecture(config.get("model_type"))
        loading = {"gguf_file": gguf_file, "dtype": torch.float32, "output_loading_info": True}
        if hasattr(transformers, "GgufConfig"):  # earlier versions dequantize always
            loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, loading = AutoModelForCausalLM.from_pretrained(source, **loading)
        return model, set(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if isinstance(source, PreTrainedModel):
        quantizer = getattr(source, "hf_quantizer", None)
        quantized = quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False)
        if quantized or getattr(source, "_hf_peft_config_loaded", False):
            raise TypeError("convert needs plain weights: dequantize the model, or merge its adapters, first")
        _check_architecture(source.config.model_type)
        return source, set(), []
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"convert needs a model of transformers, a folder or a Hub name, not {type(source).__name__}; of a wrapped "
            "model (PEFT, torch.compile) give the one inside, adapters merged"
        )
    config, _ = PreTrainedConfig.get_config_dict(source)
    _check_architecture(config.get("model_type"))
    names = config.get("architectures") or ["AutoModel"]
    source_class = getattr(transformers, names[0], AutoModel)
    model, loading = source_class.from_pretrained(source, output_loading_info=True)
    return model, set(loading["missing_keys"]), sorted(loading["unexpected_keys"])


def _pooling_of(source, table: Source, source_head: str) -> str | None:
    """`classifier_pooling` of the source: what its classifier reads, or what sentence-transformers wrote beside it."""
    if source_head == "ForSequenceClassification" and source_head in table.heads:
        return "last"  # the heads without a pooler are those of causal models
    if isinstance(source, PreTrainedModel):
        return None
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(source, "1_Pooling/config.json", **missing)
    modes = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    named = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}
    chosen = [pooling for mode, pooling in named.items() if modes.get(mode)]
    return chosen[0] if len(chosen) == 1 else None


def _check_architecture(model_type: str | None) -> None:
    if model_type not in SOURCES:
        raise ValueError(f"the architecture {model_type!r} cannot be converted: known are {', '.join(sorted(SOURCES))}")


def _head_of(source_class: type) -> str:
    endings = {**HEAD_ALIASES, **{head: head for head in AUTO_CLASSES}}
    return next((head for ending, head in endings.items() if source_class.__name__.endswith(ending)), "Model")


def _target(model, table, source_head, model_type, head, overrides) -> tuple[str, PreTrainedConfig]:
    """The head to make, and its config."""
    if model_type not in REGISTERED:
        raise ValueError(f"`model_type` ({model_type!r}) must be one of {sorted(REGISTERED)}")
    auto_classes = heads_of(model_type)
    heads = [name for name, auto_class in AUTO_CLASSES.items() if auto_class in auto_classes]
    source = model.config
    fields = (
        {name: getattr(source, name) for name in COMMON_FIELDS if hasattr(source, name)}
        | table.fields(source)
        | {"dtype": model.dtype}
    )
    config_class = CONFIG_MAPPING[model_type]
    if "ForMaskedLM" not in heads or config_class.encoder_generates:
        fields["is_decoder"] = True
    if "lm_transform.dense" in table.heads.get(source_head, {}).values():
        fields |= {"lm_head_transform": True, "lm_head_bias": True}
    if head in LM_HEADS:
        fields["is_decoder"] = head == "ForCausalLM"
    if "num_labels" in overrides:
        del fields["id2label"], fields["label2id"]
    fields |= overrides
    if config_class.head_dim is not None:  # a family whose queries and keys have a size of their own takes the source's
        size = source.num_attention_heads * _head_size(source) // fields["num_attention_heads"]
        sizes = (name for name in ("head_dim", "v_head_dim") if hasattr(config_class, name))
        fields |= {name: overrides.get(name, size) for name in sizes}
    if fields.get("tie_word_embeddings") and not source.tie_word_embeddings and source_head in LM_HEADS:
        raise ValueError(
            "`tie_word_embeddings` (True) would put one matrix in the place of two, as the source's head has weights "
            "of its own: leave it out"
        )
    if head is None:
        head = source_head
        if head in LM_HEADS:
            head = "ForCausalLM" if fields["is_decoder"] else "ForMaskedLM"
    if head not in heads:
        raise ValueError(f"{model_type} has no head {head!r}: give `head`, one of {heads}")

    known = {field.name for field in dataclasses.fields(config_class)} | {"num_labels", "attn_implementation"}
    for name in overrides.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is no field of {config_class.__name__}{hint}")
    return head, config_class(**fields)


def _split(name, parameter, model, modules, query_scale) -> dict[str, torch.Tensor]:
    """What a parameter of the source is here: place -> values; empty if it has no counterpart."""
    path, _, kind = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", path)
    ours = modules.get(re.sub(r"\.\d+\.", ".*.", path.removeprefix(f"{model.base_model_prefix}.")), [])
    values = parameter.detach()
    if kind == "weight" and isinstance(model.get_submodule(path), Conv1D):
        values = values.T  # GPT-2's weights are (in, out)
    parts = {}
    for module, part in zip(ours, values.chunk(max(len(ours), 1))):
        if module.endswith(".q_proj") and (scale := query_scale(model.config, int(layer[1]))) != 1:
            part = part * scale
        parts[f"{module}.{kind}".replace("*", layer[1] if layer else "")] = part
    return parts


@torch.no_grad()
def _copy(parameters, parts, target, base, report) -> None:
    """Copies parts to the parameters of `target` and says in `report` what was done."""
    places = dict(target.named_parameters(remove_duplicate=False))
    done, left = set(), {}  # ids of parameters, as tied ones have several names; id -> name
    for name, parameter in parameters.items():
        used = []
        for place, values in parts[name].items():
            if place not in places:
                continue
            if place == f"{base}embed_positions.weight":
                values = _fit_positions(values, target.config, report)
            if re.search(r"\.mixer\.[kv]_proj\.", place):
                values = _fit_heads(values, place, len(places[place]), target.config, report)
            if values.shape == places[place].shape:
                places[place].copy_(values)
                used.append(place)
            elif re.sub(r"(v|out)_proj\.\w+$", "q_proj.weight", place) not in places and ".mixer." in place:
                continue  # a mixer without queries has one width, whatever the heads of the source are
            elif type(target.config).head_dim is not None and ".mixer." in place:
                continue  # the sizes of queries, keys and values are this family's to choose
            elif place.startswith(base):
                raise ValueError(
                    f"`{place}` is {tuple(places[place].shape)}, but {name} of the source {tuple(values.shape)}: leave "
                    "the config override that changes it out (`resize_token_embeddings` changes the vocabulary after)"
                )
        report.copied |= dict.fromkeys(used, name)
        done |= {id(places[place]) for place in used}
        if used:
            done.add(id(parameter))
            report.left_out += [f"{name} ({place.split('.')[-2]})" for place in parts[name] if place not in used]
        else:
            left.setdefault(id(parameter), name)
    report.left_out += [name for identity, name in left.items() if identity not in done]
    report.new += [name for name, parameter in target.named_parameters() if id(parameter) not in done]


@torch.no_grad()
def _copy_global(target, report) -> None:
    """Projections of global tokens that the source does not have start as those of all tokens, as Longformer's do."""
    places = dict(target.named_parameters())
    for name in [name for name in report.new if "_global_proj." in name]:
        own = name.replace("_global_proj.", "_proj.")
        if own in report.copied:
            places[name].copy_(places[own])
            report.copied[name] = report.copied[own]
            report.new.remove(name)


def _has_windows(model_type: str) -> bool:
    """Whether a family takes the fields of `Source.windows`."""
    fields = dataclasses.fields(CONFIG_MAPPING[model_type]) if model_type in REGISTERED else ()
    return "sliding_window" in {field.name for field in fields}


def _fit_positions(table: torch.Tensor, config, report) -> torch.Tensor:
    """The source's table of positions with `config.max_position_embeddings` rows, repeated or cut."""
    rows, offset = config.max_position_embeddings, config.position_offset
    if rows != len(table):
        change = "repeated" if rows > len(table) else "cut"
        report.notes.append(f"the {len(table) - offset} learned positions are {change} to {config.num_positions}")
    index = torch.arange(rows, device=table.device)
    return table[torch.where(index < offset, index, offset + (index - offset) % (len(table) - offset))]


def _head_size(config: PreTrainedConfig) -> int:
    """Channels of a head of the source."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _fit_heads(values: torch.Tensor, place: str, rows: int, config, report) -> torch.Tensor:
    """The source's keys or values with `rows` rows, each head repeated for the query heads that it serves."""
    size = getattr(config, "v_head_dim", config.head_dim) if ".v_proj." in place else config.head_dim
    if rows == len(values) or rows % len(values) or len(values) % size:
        return values
    note = f"each head of keys and values is repeated {rows // len(values)} times"
    if note not in report.notes:
        report.notes.append(note)
    return values.unflatten(0, (-1, size)).repeat_interleave(rows // len(values), 0).flatten(0, 1)


def _count_layers(names: Iterable[str]) -> list[str]:
    """The names; those that differ only in their layer's number as one, with how many they are."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [f"{pattern} ({count} layers)" if "*" in pattern else pattern for pattern, count in counts.items()]
