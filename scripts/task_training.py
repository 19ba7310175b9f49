"""Training on sequences that are drawn as they are needed: what the programs on synthetic tasks share."""

import math
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, get_scheduler, set_seed

from ordnung.scripts.common import ScriptError
from ordnung.scripts.pretrain_setup import parameter_groups


def fit(
    options,
    config: PreTrainedConfig,
    seed: int,
    draw: Callable[[int], tuple[np.ndarray, np.ndarray]],
    after_step: Callable[[int, PreTrainedModel], None] | None = None,
    steps: int | None = None,
) -> tuple[PreTrainedModel, list[float]]:
    """Train a new model.

    Args:
        options: has `max_steps`, `learning_rate`, `weight_decay` and `warmup_steps`.
        draw: takes the number of the step and gives tokens (batch, N) and labels of the same shape: at a token what is
            to be answered there, -100 where nothing is.
        after_step: called with the number of steps taken and the model.
        steps: in place of `max_steps`.

    Returns:
        the model and the loss of every step.
    Raises:
        ScriptError: the loss is not finite.
    """
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=(0.9, 0.95)
    )
    scheduler = get_scheduler("constant_with_warmup", optimizer, options.warmup_steps)
    losses = []
    for step in range(steps or options.max_steps):
        tokens, labels = map(torch.from_numpy, draw(step))
        model.train()
        # labels lie at the token itself, so they are not shifted as those of a language model are
        loss = model(tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ScriptError(
                f"loss {losses[-1]} at step {step + 1}; try a lower --learning_rate or more --warmup_steps"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step + 1, model)
    return model, losses
