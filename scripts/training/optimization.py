"""Optimizer, schedule and recomputed activations of all training."""

import re

import torch
from transformers import get_scheduler

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.training.options import LoopOptions


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: no decay for biases, 1-D parameters (norms) and names matching `model._no_weight_decay`."""
    exempt = [re.compile(pattern) for pattern in getattr(model, "_no_weight_decay", ())]
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim < 2 or name.endswith("bias") or any(pattern.search(name) for pattern in exempt)
            (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def recompute_activations(model: torch.nn.Module):
    """Have a transformers model recompute its layers' activations in the backward pass."""
    # the newer name of the two; transformers before 5.23 knows the older alone
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def make_optimizer(model: torch.nn.Module, options: LoopOptions, device: torch.device) -> torch.optim.AdamW:
    """AdamW as the options set it."""
    # where the device has no fused one, and for plain AdamW, torch chooses as it does
    fused = options.optim == "adamw_torch_fused" and device.type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=fused or None,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, options: LoopOptions, warmup_steps: int, max_steps: int):
    """The learning rate's schedule.

    Raises:
        ScriptError: a schedule that needs other settings, or does not take those given.
    """
    kind, settings = options.lr_scheduler_type, options.lr_scheduler_kwargs
    try:
        return get_scheduler(kind, optimizer, warmup_steps, max_steps, scheduler_specific_kwargs=settings)
    except (TypeError, ValueError) as error:
        raise ScriptError(f"--lr_scheduler_type {kind}: {error}") from error
