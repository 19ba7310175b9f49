"""Teacher and student: loaded, told apart, and what passes through the teacher's layers."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ordnung
from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.common.models import check_overrides
from ordnung.scripts.linearizing.options import LinearizeOptions

FULL = "full_attention"


@dataclass
class Pair:
    """A teacher, as an exact SoftmaxLM, and its student of another family.

    Args:
        new: names of the student's parameters that the teacher has nothing for.
        fingerprint: of the teacher's config and weights.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    new: list[str]
    fingerprint: str

    @property
    def replaced(self) -> list[int]:
        """Numbers of the layers whose attention the student does not have."""
        return [i for i, kind in enumerate(self.student.config.layer_types) if kind != FULL]

    @property
    def encoder(self) -> bool:
        return not writes_text(self.teacher)


def writes_text(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForCausalLM")


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of layers of a model, which may be its own."""
    return getattr(model, model.base_model_prefix, model)


def _convert(options: LinearizeOptions, source, model_type: str, **overrides):
    gguf = options.gguf_file if isinstance(source, str) else None
    try:
        return ordnung.convert(source, model_type, output_report=True, gguf_file=gguf, **overrides)
    except (ImportError, OSError, ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ScriptError(f"cannot make a {model_type} of {options.source}: {reason}") from error


def load_teacher(options: LinearizeOptions) -> PreTrainedModel:
    """The teacher in float32.

    Raises:
        ScriptError: it cannot be converted, or is a classifier made of a causal model.
    """
    teacher = _convert(options, options.source, "softmax_lm")[0]
    if not writes_text(teacher) and teacher.config.is_decoder:
        raise ScriptError(
            f"{options.source} is a {type(teacher).__name__} of a causal model: linearize the language model, and "
            "fine-tune the student on the task afterwards"
        )
    if head_of(teacher) == "Model" and type(teacher).__name__ != "SoftmaxLMModel":  # a classifier: its encoder
        teacher = _convert(options, options.source, "softmax_lm", head="Model")[0]
    return teacher.float().requires_grad_(False).eval()


def load_student(options: LinearizeOptions, teacher: PreTrainedModel, layer_types: list[str] | None = None):
    """The student with the teacher's weights, in float32, and the names of its new parameters.

    Args:
        layer_types: in place of those that the options say.
    Raises:
        ScriptError: the family cannot be made so, or cannot take the teacher's direction.
    """
    overrides = check_overrides(CONFIG_MAPPING[options.model_type], options.config_overrides)
    overrides |= {} if layer_types is None else {"layer_types": layer_types}
    # dropout is noise beside a teacher; `run.restore_dropout` writes it into the config again
    overrides |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    student, report = _convert(options, options.source, options.model_type, head=head_of(teacher), **overrides)
    if student.config.encoder_generates:
        raise ScriptError(
            f"--model_type {options.model_type} runs its layers over each prefix, so that no mixer stands in the place "
            "of an attention: use `ordnung convert`, which is exact for an encoder"
        )
    ours, theirs = student.config.attends_causally, teacher.config.attends_causally
    if ours != theirs and "is_decoder" not in overrides:
        words = {True: "causal", False: "bidirectional"}
        raise ScriptError(
            f"--model_type {options.model_type} is {words[ours]} here and the teacher {words[theirs]}: take another "
            f"family, or say is_decoder={ours} in --config_overrides if that is wanted"
        )
    return student.float().eval(), report.new


def head_of(teacher: PreTrainedModel) -> str:
    """The student's head: the teacher's where it models language, else none."""
    name = type(teacher).__name__
    return next((head for head in ("ForCausalLM", "ForMaskedLM") if name.endswith(head)), "Model")


def load_tokenizer(options: LinearizeOptions, teacher: PreTrainedModel):
    """The tokenizer, which must fit the teacher.

    Raises:
        ScriptError: there is none, or one with more tokens than the teacher.
    """
    name = options.tokenizer_name or options.source
    gguf = {"gguf_file": options.gguf_file} if options.gguf_file and not options.tokenizer_name else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **gguf)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScriptError(f"no tokenizer can be loaded from {name}: {error}; name one by --tokenizer_name") from error
    limits.check_vocabulary(tokenizer, teacher.config, "name the teacher's own by --tokenizer_name")
    return tokenizer


def fingerprint(model: PreTrainedModel) -> str:
    """Of a model's config, where it is not the default, and of its weights: their names, shapes and values."""
    told = model.config.to_diff_dict()
    config = {name: told[name] for name in told.keys() - {"_name_or_path", "transformers_version", "dtype"}}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Mixed:
    """A mixer's call in the teacher: its input (B, N, D), its output (B, N, D), the other arguments."""

    layer: int
    inputs: torch.Tensor
    output: torch.Tensor
    kwargs: dict[str, Any]


@contextmanager
def watched(model: PreTrainedModel, layers: Sequence[int], see: Callable[[Mixed], Any]) -> Iterator[None]:
    """Context in which `see` is called with each call of these layers' mixers, as soon as it is made.

    Where it returns states, they take the place of what the mixer gave.
    """
    handles = []
    for number in layers:

        def hook(module, args, kwargs, output, number=number):
            mixed = see(Mixed(number, args[0], output[0], kwargs))
            return None if mixed is None else (mixed, *output[1:])

        handles.append(base_of(model).layers[number].mixer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def student_mixes(student: PreTrainedModel, call: Mixed) -> torch.Tensor:
    """What the student's mixer of that layer makes of the teacher's input to its own: (B, N, D)."""
    base = base_of(student)
    layer = base.layers[call.layer]
    kwargs = {name: value for name, value in call.kwargs.items() if name not in ("attention_mask", "past_key_values")}
    kwargs |= base.shared_inputs(layer.mixer.layer_type)

    def mixer(states, **kwargs):
        return layer.mixer(states, **kwargs)[0]

    # by the layer's own call, which what shards it hooks into
    layer.forward = mixer
    try:
        return layer(call.inputs.detach(), **kwargs)
    finally:
        del layer.forward


def model_inputs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch a model takes."""
    known = inspect.signature(type(model).forward).parameters
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return inputs | ({"use_cache": False} if "use_cache" in known else {})


class TeacherOutputs:
    """The teacher's states for batches: computed, or read where they were kept.

    A decoder's are its last ones (B, N, D), from which its head makes the logits; an encoder's are those after each
    layer, (L, B, N, D).

    Args:
        folder: where to keep them, a file for each row of tokens; None for nowhere.
        made_with: what they depend on besides the tokens.
    Raises:
        ScriptError: the folder holds another teacher's.
    """

    def __init__(self, teacher: PreTrainedModel, encoder: bool, folder: str | None, made_with: dict[str, str]):
        self.teacher, self.encoder = teacher, encoder
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ScriptError(f"--teacher_outputs {folder} is a file; name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "teacher.json"
        if path.exists() and (kept := read_json(path)) != made_with:
            name = next(name for name in made_with if kept.get(name) != made_with[name])
            raise ScriptError(
                f"--teacher_outputs {folder} holds outputs with {name} {kept.get(name)}, not {made_with[name]}: name "
                "another folder, or delete this one"
            )
        write_json(path, made_with)

    @torch.no_grad()
    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """See the class."""
        if self.folder is None:
            return self.compute(batch)
        tokens, names = batch["input_ids"].shape[1], []
        lengths = [tokens] * len(batch["input_ids"])
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(1).tolist()
        for row, length in enumerate(lengths):
            marks = [batch[name][row, :length].cpu().numpy() for name in ("input_ids", "position_ids") if name in batch]
            names.append(hashlib.sha256(b"".join(mark.tobytes() for mark in marks)).hexdigest()[:32])
        paths = [self.folder / f"{name}.safetensors" for name in names]
        if all(path.exists() for path in paths):
            rows = [load_file(path)["states"] for path in paths]
            rows = [F.pad(row, (0, 0, 0, tokens - row.shape[-2])) for row in rows]
            return torch.stack(rows, dim=1 if self.encoder else 0).to(batch["input_ids"].device)
        states = self.compute(batch)
        for path, row, length in zip(paths, states.unbind(1 if self.encoder else 0), lengths):
            temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
            save_file({"states": row[..., :length, :].contiguous().cpu()}, temporary)
            temporary.replace(path)
        return states

    def compute(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        base = base_of(self.teacher)
        inputs = model_inputs(base, batch)
        if not self.encoder:
            return base(**inputs).last_hidden_state
        return torch.stack(base(**inputs, output_hidden_states=True).hidden_states[1:])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.teacher.get_output_embeddings()(states)
