"""The two stages of training: each mixer matched to the attention it replaces, and the whole to the teacher.

Costs of a batch are sums, and its `scales` say what they are means over: so a step may be cut over processes and
accumulation steps, whatever its rows hold.
"""

import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, load_checkpoint_in_model
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ordnung.modeling.registration import LORA_TARGETS
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.linearizing import measure
from ordnung.scripts.linearizing.data import Text, documents_of, mean_states, real_tokens
from ordnung.scripts.linearizing.divergence import divergence
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.linearizing.teacher import (
    Mixed,
    Pair,
    TeacherOutputs,
    base_of,
    load_student,
    model_inputs,
    student_mixes,
    watched,
)
from ordnung.scripts.pretraining.blocks import IGNORED
from ordnung.scripts.training.accelerator import summed
from ordnung.scripts.training.loop import Job, Step
from ordnung.scripts.training.optimization import make_optimizer, recompute_activations

Batch = dict[str, torch.Tensor]
CALIBRATION = 8192  # tokens by which outputs are scaled before they are trained
SCALE = "scale of "  # what a batch holds besides a model's inputs: the scale of each cost


class Stage(Job):
    """What both stages share. Rows are taken in one order over both.

    Args:
        weights: of the costs by name.
        first_step: steps of the stages before.
    """

    weights: dict[str, float]

    def __init__(self, accelerator: Accelerator, options: LinearizeOptions, pair: Pair, text: Text, first_step: int):
        self.accelerator, self.options, self.pair, self.text = accelerator, options, pair, text
        self.tokenizer, self.first_step = text.tokenizer, first_step
        self.max_steps = getattr(options, f"{self.name}_steps")
        self.eval_steps, self.save_steps, self.save_total_limit = options.eval_steps, options.save_steps, 1
        self.evaluates_first = first_step == 0
        self.step_blocks = options.step_rows(accelerator.num_processes)
        self.data = {"rows a step": self.step_blocks}
        self.about = f"{self.max_steps:,} steps of {self.step_blocks} x {options.block_size} tokens"

    def choose(self):
        """Say which of the student's parameters are trained."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """What the costs of a batch are sums over, by name."""
        raise NotImplementedError

    def load(self, folder: Path):
        """The student as a checkpoint of this stage has it."""
        self.choose()
        load_checkpoint_in_model(self.pair.student, str(folder))

    def build_model(self, folder: Path | None) -> nn.Module:
        if folder is None:
            self.choose()
        else:
            self.load(folder)
        if not any(parameter.requires_grad for parameter in self.pair.student.parameters()):
            raise ScriptError(f"--trainable {self.options.trainable} leaves nothing to train: take layers")
        return self.pair.student

    def optimizer(self, model, options, device):
        """AdamW, with a higher rate for what the teacher does not have."""
        optimizer = make_optimizer(model, options, device)
        new = {id(p) for name, p in self.pair.student.named_parameters() if plain_name(name) in self.pair.new}
        groups = []
        for group in optimizer.param_groups:
            for factor, chosen in ((1.0, False), (self.options.new_learning_rate, True)):
                own = [p for p in group["params"] if (id(p) in new) == chosen]
                groups += [{**group, "params": own, "lr": factor * group["lr"]}] if own else []
        optimizer.param_groups[:] = groups
        return optimizer

    def batches(self, step: int) -> Step:
        rows, lengths, first = self.text.rows((self.first_step + step) * self.step_blocks, self.step_blocks)
        size, processes = self.options.per_device_train_batch_size, self.accelerator.num_processes
        starts = range(self.accelerator.process_index * size, self.step_blocks, size * processes)
        batches = [self.text.batch(rows[i : i + size], lengths[i : i + size], first + i) for i in starts]
        counts = [self.counts(batch) for batch in batches]
        names = list(self.weights)
        sums = torch.tensor([float(sum(count[name] for count in counts)) for name in names])
        totals = summed(self.accelerator, sums.to(self.accelerator.device))
        for batch in batches:
            batch |= {SCALE + name: torch.tensor(1 / max(total, 1)) for name, total in zip(names, totals)}
        return Step([(batch, 1.0) for batch in batches], tokens=int(lengths.sum()))

    def total(self, costs: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        return sum(weight * batch[SCALE + name] * costs[name] for name, weight in self.weights.items())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The student's held-out loss, and from positions on; an encoder's distance from the teacher."""
        if self.pair.encoder:
            found = measure.states_beside(self.plain(model), self.pair, self.text.held_out)
            return {f"eval_{name}": value for name, value in found.items()}
        summary = measure.score(self.plain(model), self.pair.student, self.text.held_out).summary()
        found = {"eval_loss": summary["loss"]}
        for start in measure.FROM[1:]:
            if (loss := measure.loss_from(summary, start)) is not None:
                found[f"eval_loss_from_{start}"] = loss
        return found

    def plain(self, model: nn.Module):
        """What calls the student in a model that the loop has."""
        return model

    def take_back(self, model: nn.Module):
        """The student of a finished loop, whole and as it was before: not sharded, and without its autocast."""
        bare = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if any(isinstance(parameter, DTensor) for parameter in bare.parameters()):
            weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            weights = {name.removeprefix("student."): value for name, value in weights.items()}
            types = self.pair.student.config.layer_types
            self.pair.student = load_student(self.options, self.pair.teacher, types)[0].to(self.accelerator.device)
            self.choose()
            self.pair.student.load_state_dict(weights, strict=False)


class Transfer(Stage):
    """Each new mixer's output matched to that of the teacher's attention, on the teacher's own inputs to that layer.

    The loss is the squared error over the variance of the teacher's outputs, a mean over layers. Layers do not depend
    on each other: nothing is passed back through the stack. First their outputs are scaled.
    LoLCATs' first stage (Zhang et al. 2024, arXiv 2410.10254).

    Args:
        variances: of the teacher's mixer outputs, by layer.
    """

    name, weights = "transfer", {"transfer": 1.0}

    def __init__(self, *args, variances: dict[int, float]):
        super().__init__(*args)
        self.variances = variances

    def choose(self):
        student = self.pair.student.requires_grad_(False)
        for number in self.pair.replaced:
            base_of(student).layers[number].mixer.requires_grad_(True)
        for name, parameter in student.named_parameters():
            if name in self.pair.new:  # those that all mixers share lie outside of them
                parameter.requires_grad_(True)

    def build_model(self, folder: Path | None) -> nn.Module:
        super().build_model(folder)
        if folder is None:
            calibrate(self.pair, self.text.first_rows(CALIBRATION))
        return MixerTransfer(self.pair, self.variances, self.options.gradient_checkpointing)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"transfer": int(real_tokens(batch).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.total({"transfer": model(batch=batch)}, batch)

    def plain(self, model: nn.Module):
        return partial(model, batch=None)


@torch.no_grad()
def calibrate(pair: Pair, batches: list[Batch]):
    """Scale each channel of the new mixers' outputs, and shift it where they have biases, to fit the attention's.

    This is the best that a change of `out_proj`'s rows by a factor can do, in squares: a mixer that says too much, as a
    new kernel may, no longer drowns the stack when training begins.
    """
    sums = {number: [0.0] * 5 for number in pair.replaced}

    def add(call: Mixed):
        made, wanted = (x[real].double() for x in (student_mixes(pair.student, call), call.output))
        found = (len(made), made.sum(0), wanted.sum(0), made.square().sum(0), (made * wanted).sum(0))
        sums[call.layer] = [old + new for old, new in zip(sums[call.layer], found)]

    for batch in batches:
        real = real_tokens(batch)
        with watched(pair.teacher, pair.replaced, add):
            base_of(pair.teacher)(**model_inputs(base_of(pair.teacher), batch))
    for number, (count, made, wanted, squares, products) in sums.items():
        out = base_of(pair.student).layers[number].mixer.out_proj
        shifts = out.bias is not None
        mean = made / count if shifts else 0 * made
        spread = squares - mean * made
        factor = (products - mean * wanted) / spread.clamp(min=1e-12 * squares.max().clamp(min=1e-30))
        out.weight.mul_(factor[:, None].to(out.weight.dtype))
        if shifts:
            out.bias.copy_(factor * out.bias + (wanted / count - factor * mean))


class MixerTransfer(nn.Module):
    """A student whose call gives what its mixers cost beside the teacher's; saved as the student.

    Args:
        recompute: keep the activations of one mixer at a time.
    """

    def __init__(self, pair: Pair, variances: dict[int, float], recompute: bool = False):
        super().__init__()
        self.student, self.pair, self.variances, self.recompute = pair.student, (pair,), variances, recompute
        self._no_split_modules = pair.student._no_split_modules

    def forward(self, batch: Batch | None, **inputs):
        """The mean over layers of the squared errors over their variance, summed over tokens.

        Args:
            batch: what the teacher takes; None to call the student itself with `inputs`.
        """
        if batch is None:
            return self.student(**inputs)
        (pair,), real, costs = self.pair, real_tokens(batch), []
        training = torch.is_grad_enabled()

        def match(call: Mixed):
            with torch.set_grad_enabled(training):
                costs.append(checkpoint(cost, call, use_reentrant=False) if self.recompute else cost(call))

        def cost(call: Mixed) -> torch.Tensor:
            error = (student_mixes(pair.student, call) - call.output).float().square().mean(-1)  # (B, N)
            return (error * real).sum() / self.variances[call.layer]

        with watched(pair.teacher, pair.replaced, match), torch.no_grad():
            base = base_of(pair.teacher)
            base(**model_inputs(base, batch))
        return sum(costs) / len(costs)

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor]):
        weights = {name.removeprefix("student."): value for name, value in state_dict.items()}
        self.student.save_pretrained(folder, state_dict=weights)


class Distillation(Stage):
    """The student matched to the teacher end to end.

    A decoder: the Kullback-Leibler divergence of its next-token predictions from the teacher's, at a temperature T and
    times T^2 (Hinton et al. 2015, arXiv 1503.02531), the loss on the text, and the states after each layer. An encoder:
    those states (squared error over the teacher's variance), and 1 - cosine of the mean state of each document.

    Args:
        variances: of the teacher's states after each layer.
    """

    name = "distill"

    def __init__(self, *args, outputs: TeacherOutputs, variances: list[float]):
        super().__init__(*args)
        self.outputs, self.variances, options = outputs, variances, self.options
        hidden = options.hidden_weight
        if hidden is None:
            hidden = 1.0 if self.pair.encoder else 0.0
        weights = {"kl": options.kl_weight, "lm": options.lm_weight, "hidden": hidden}
        if self.pair.encoder:
            weights = {"hidden": hidden, "cosine": options.cosine_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def choose(self):
        options, student = self.options, self.pair.student.requires_grad_(False)
        wanted = {"all": r"", "layers": r"layers\.\d+\.", "mixers": r"layers\.\d+\.mixer\."}[options.trainable]
        if options.use_peft:
            add_adapters(student, options)
        inside = {id(parameter) for parameter in base_of(student).parameters()}
        for name, parameter in student.named_parameters():
            chosen = ".lora_" in name if options.use_peft else bool(re.search(wanted, name))
            # an encoder's head has no part in what is matched
            chosen = chosen and (id(parameter) in inside or not self.pair.encoder)
            parameter.requires_grad_(chosen or plain_name(name) in self.pair.new)

    def build_model(self, folder: Path | None) -> nn.Module:
        if self.options.gradient_checkpointing:
            recompute_activations(self.pair.student)
        return super().build_model(folder)

    def counts(self, batch: Batch) -> dict[str, int]:
        real = int(real_tokens(batch).sum())
        if self.pair.encoder:
            return {"hidden": real, "cosine": int(documents_of(batch).max()) + 1}
        return {"hidden": real, "kl": real, "lm": int((batch["labels"][:, 1:] != IGNORED).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.total(self.costs(model, batch), batch)

    def costs(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The sums of each cost of a batch."""
        real, inputs = real_tokens(batch), model_inputs(self.pair.student, batch)
        if self.pair.encoder:
            theirs = self.outputs.states(batch)
            ours = model(**inputs, output_hidden_states=True).hidden_states[1:]
            costs = {"hidden": self.state_error(ours, theirs, real)}
            if "cosine" in self.weights:
                means = [mean_states(states[-1], documents_of(batch)) for states in (ours, theirs)]
                costs["cosine"] = (1 - F.cosine_similarity(*means)).sum()
            return costs
        if "hidden" not in self.weights:
            theirs = self.outputs.states(batch) if "kl" in self.weights else None
            return self.predictions(batch, real, model(**inputs).logits, theirs)
        with torch.no_grad():
            base = base_of(self.pair.teacher)
            made = base(**model_inputs(base, batch), output_hidden_states=True)
        out = model(**inputs, output_hidden_states=True)
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
        costs = {}
        if "kl" in self.weights:
            with torch.no_grad():
                wanted = self.outputs.logits(states)
            costs["kl"] = divergence(logits, wanted, real, self.options.temperature)
        if "lm" in self.weights:
            labels = batch["labels"][:, 1:].flatten()
            costs["lm"] = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels, reduction="sum")
        return costs


def plain_name(name: str) -> str:
    """A parameter's name in a model without adapters."""
    return name.replace(".base_layer.", ".")


def add_adapters(student: nn.Module, options: LinearizeOptions):
    """Put LoRA adapters into every linear layer of those that are trained, in place."""
    targets = LORA_TARGETS if options.trainable != "mixers" else LORA_TARGETS.replace("(mixer|mlp)", "mixer")
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets)
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
