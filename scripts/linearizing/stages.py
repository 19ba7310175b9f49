"""The two stages of training: each mixer matched to the attention it replaces, and the whole to the teacher.

A stage says what it trains and what a batch costs. Costs are sums; counts, by the same names, say what they are means
over, so that a batch may be cut over processes and accumulation steps.
"""

import re
from contextlib import nullcontext
from types import MappingProxyType

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ordnung.modeling.registration import LORA_TARGETS
from ordnung.scripts.linearizing.data import IGNORED, documents_of, real_tokens
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.linearizing.teacher import (
    Mixed,
    Pair,
    TeacherOutputs,
    base_of,
    model_inputs,
    student_mixes,
    watched,
)

Batch = dict[str, torch.Tensor]


class Transfer:
    """Each new mixer's output matched to that of the teacher's attention, on the teacher's own inputs to that layer.

    The loss is the squared error over the variance of the teacher's outputs. Layers do not depend on each other: each
    one's gradients are made while the teacher runs, so that memory is that of one layer. LoLCATs' first stage (Zhang et
    al. 2024, arXiv 2410.10254).

    Args:
        variances: of the teacher's mixer outputs, by layer.
    """

    name, weights = "transfer", MappingProxyType({"transfer": 1.0})

    def __init__(self, options: LinearizeOptions, pair: Pair, variances: dict[int, float]):
        self.pair, self.variances = pair, variances
        self.peak_rate = options.transfer_learning_rate
        student = pair.student.requires_grad_(False)
        for number in pair.replaced:
            base_of(student).layers[number].mixer.requires_grad_(True)
        for name, parameter in student.named_parameters():
            if name in pair.new:  # those that all mixers share lie outside of them
                parameter.requires_grad_(True)

    @staticmethod
    def counts(batch: Batch) -> dict[str, int]:
        return {"transfer": int(real_tokens(batch).sum())}

    def backward(self, batch: Batch, scales: dict[str, float], accelerator, last: bool = True) -> dict[str, float]:
        """Add a batch's gradients; its costs times `scales` are what they are gradients of.

        Returns:
            the costs (sums), by name.
        """
        real, by_layer = real_tokens(batch), {}

        def match(call: Mixed):
            with torch.enable_grad(), accelerator.autocast():
                made = student_mixes(self.pair.student, call)
                error = (made - call.output).float().square().mean(-1)  # (B, N)
                cost = (error * real).sum() / self.variances[call.layer]
                (cost * scales["transfer"] / len(self.pair.replaced)).backward()
            by_layer[call.layer] = float(cost.detach())

        with watched(self.pair.teacher, self.pair.replaced, match), torch.no_grad(), accelerator.autocast():
            base = base_of(self.pair.teacher)
            base(**model_inputs(base, batch))
        return {"transfer": sum(by_layer.values()) / len(by_layer)}


class Distillation:
    """The student matched to the teacher end to end.

    A decoder: the Kullback-Leibler divergence of its next-token predictions from the teacher's, at a temperature T and
    times T^2 (Hinton et al. 2015, arXiv 1503.02531), the loss on the text, and the states after each layer. An encoder:
    those states (squared error over the teacher's variance), and 1 - cosine of the mean state of each document.
    """

    name = "distill"

    def __init__(self, options: LinearizeOptions, pair: Pair, outputs: TeacherOutputs, variances: list[float]):
        self.options, self.pair, self.outputs = options, pair, outputs
        self.variances = variances
        self.peak_rate = options.learning_rate
        self.hidden_weight = options.hidden_weight
        if self.hidden_weight is None:
            self.hidden_weight = 1.0 if pair.encoder else 0.0
        student = pair.student.requires_grad_(False)
        wanted = {"all": r"", "layers": r"layers\.\d+\.", "mixers": r"layers\.\d+\.mixer\."}[options.trainable]
        if options.use_peft:
            add_adapters(student, options)
        base = base_of(student)
        head = {id(p) for p in student.parameters()} - {id(p) for p in base.parameters()} if pair.encoder else set()
        for name, parameter in student.named_parameters():
            adapter = ".lora_" in name
            chosen = adapter if options.use_peft else re.search(wanted, name) and id(parameter) not in head
            parameter.requires_grad_(bool(chosen or plain_name(name) in pair.new))
        self.model: nn.Module = student  # what the accelerator made of it is put here

    def counts(self, batch: Batch) -> dict[str, int]:
        real = real_tokens(batch)
        counts = {"hidden": int(real.sum())}
        if self.pair.encoder:
            return counts | {"cosine": int(documents_of(batch).max()) + 1}
        return counts | {"kl": int(real.sum()), "lm": int((batch["labels"][:, 1:] != IGNORED).sum())}

    @property
    def weights(self) -> dict[str, float]:
        options = self.options
        if self.pair.encoder:
            weights = {"cosine": options.cosine_weight}
        else:
            weights = {"kl": options.kl_weight, "lm": options.lm_weight}
        return {name: weight for name, weight in (weights | {"hidden": self.hidden_weight}).items() if weight}

    def backward(self, batch: Batch, scales: dict[str, float], accelerator, last: bool = True) -> dict[str, float]:
        """As `Transfer.backward`; `last` is False where more batches of the step follow."""
        with nullcontext() if last else accelerator.no_sync(self.model):
            with accelerator.autocast():
                costs = self.costs(batch)
                loss = sum(weight * scales[name] * costs[name] for name, weight in self.weights.items())
            accelerator.backward(loss)
        return {name: float(cost.detach()) for name, cost in costs.items()}

    def costs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The sums of each cost of a batch."""
        real, weights = real_tokens(batch), self.weights
        if not self.pair.encoder and "hidden" not in weights:
            theirs = self.outputs.states(batch)
            logits = self.model(**model_inputs(self.pair.student, batch)).logits
            return self.predictions(batch, real, logits, theirs)
        if self.pair.encoder:
            theirs = self.outputs.states(batch)
            out = self.model(**model_inputs(self.pair.student, batch), output_hidden_states=True)
            costs = {"hidden": self.state_error(out.hidden_states[1:], theirs, real)}
            if "cosine" in weights:
                ours = mean_states(out.hidden_states[-1], documents_of(batch))
                costs["cosine"] = (1 - F.cosine_similarity(ours, mean_states(theirs[-1], documents_of(batch)))).sum()
            return costs
        with torch.no_grad():
            base = base_of(self.pair.teacher)
            made = base(**model_inputs(base, batch), output_hidden_states=True)
        out = self.model(**model_inputs(self.pair.student, batch), output_hidden_states=True)
        costs = {"hidden": self.state_error(out.hidden_states[1:], made.hidden_states[1:], real)}
        return costs | self.predictions(batch, real, out.logits, made.last_hidden_state)

    def state_error(self, ours, theirs, real) -> torch.Tensor:
        """Squared error of states after each layer, over the teacher's variance there, summed over tokens."""
        errors = [
            ((x - y).float().square().mean(-1) * real).sum() / variance
            for x, y, variance in zip(ours, theirs, self.variances)
        ]
        return sum(errors) / len(errors)

    def predictions(self, batch, real, logits, states) -> dict[str, torch.Tensor]:
        costs, T = {}, self.options.temperature
        if "kl" in self.weights:
            with torch.no_grad():
                wanted = F.log_softmax(self.outputs.logits(states).float() / T, dim=-1)
            kl = F.kl_div(F.log_softmax(logits.float() / T, dim=-1), wanted, reduction="none", log_target=True).sum(-1)
            costs["kl"] = T**2 * (kl * real).sum()
        if "lm" in self.weights:
            labels = batch["labels"][:, 1:].flatten()
            costs["lm"] = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels, reduction="sum")
        return costs


def mean_states(states: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """(documents, D), each document's mean state; `documents` (B, N) as `data.documents_of` numbers them."""
    real = documents.flatten() >= 0
    number = documents.flatten()[real]
    sums = states.new_zeros(int(number.max()) + 1, states.shape[-1]).float()
    sums = sums.index_add(0, number, states.flatten(0, 1)[real].float())
    return sums / number.bincount()[:, None]


def plain_name(name: str) -> str:
    """A parameter's name in a model without adapters."""
    return name.replace(".base_layer.", ".")


def add_adapters(student: nn.Module, options: LinearizeOptions):
    """Put LoRA adapters into every linear layer of those that are trained, in place."""
    targets = LORA_TARGETS if options.trainable != "mixers" else LORA_TARGETS.replace("(mixer|mlp)", "mixer")
    config = LoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=targets)
    get_peft_model(student, config)
    if hasattr(student, "peft_config"):
        del student.peft_config
    student._hf_peft_config_loaded = False  # saved whole, see `run`


def merge_adapters(student: nn.Module):
    """Add what LoRA adapters learned to the weights and take them out, in place."""
    for name, module in list(student.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(student.get_submodule(parent), child, module.get_base_layer())
