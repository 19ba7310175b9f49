"""Conversion: the weights of BERT-style, Longformer, GPT-2 and Llama-style checkpoints in a family of this package.

What an architecture calls its config fields and modules stands in `sources`. Everything else is generic: a parameter
goes where the model has one of that name, so a new family needs nothing, and a new architecture one table.
"""

import copy
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging
from transformers.utils.import_utils import is_gguf_available

from ordnung.modeling.registration import AUTO_CLASSES, REGISTERED, heads_of
from ordnung.modeling.sources import COMMON_FIELDS, SOURCES, Source, check_options

__all__ = ["ConversionReport", "convert"]

logger = logging.get_logger(__name__)

LM_HEADS = {"ForCausalLM", "ForMaskedLM"}
# class name endings of the sources -> the heads that they are here
HEAD_ALIASES = {"ForPreTraining": "ForMaskedLM", "LMHeadModel": "ForCausalLM", "DoubleHeadsModel": "ForCausalLM"}


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
        try:
            config, _ = PreTrainedConfig.get_config_dict(source, gguf_file=gguf_file)
        except ValueError as error:
            raise ValueError(
                f"`gguf_file` ({gguf_file!r}) cannot be read ({error}): give a GGUF file that was downloaded whole"
            ) from error
        _check_architecture(config.get("model_type"))
        loading = {"gguf_file": gguf_file, "dtype": torch.float32, "output_loading_info": True}
        if hasattr(transformers, "GgufConfig"):  # earlier versions dequantize always
            loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, loading = AutoModelForCausalLM.from_pretrained(source, **loading)
        return model, set(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if isinstance(source, PreTrainedModel):
        _check_plain(source)
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
    _check_plain(model)
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


def _check_plain(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    quantized = quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False)
    if quantized or getattr(model, "_hf_peft_config_loaded", False):
        what = f"quantized ({quantizer.quantization_config.quant_method})" if quantized else "one with adapters"
        raise TypeError(
            f"convert needs plain weights, and the source is {what}: give the checkpoint that it was made of, or the "
            "model after `dequantize()`, its adapters merged"
        )


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
