"""Training on sequences that are drawn as they are needed: what the programs on synthetic tasks share."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, get_scheduler, set_seed

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json, write_text
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.experiments.options import TrainingOptions
from ordnung.scripts.training.optimization import parameter_groups
from ordnung.scripts.training.runs import claim_output_dir


def fit(
    options: TrainingOptions,
    config: PreTrainedConfig,
    seed: int,
    draw: Callable[[int], tuple[np.ndarray, np.ndarray]],
    after_step: Callable[[int, PreTrainedModel], None] | None = None,
    steps: int | None = None,
) -> tuple[PreTrainedModel, list[float]]:
    """Train a new model.

    Args:
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


def train_all(
    options: TrainingOptions, configs: dict[str, PreTrainedConfig], run: Callable[[str, int, Path], dict]
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """Train every variant with every seed; runs that have finished are kept.

    Args:
        configs: the variants by name.
        run: trains one, given its name, the seed and the file for its results, or reads that file.

    Returns:
        what the results of every program hold: `machine`, `settings` and `seeds`; the results of the runs by variant,
        one for each seed.
    Raises:
        ScriptError: as `claim_output_dir` and `run`.
    """
    output_dir = Path(options.output_dir)
    settings = {
        name: value for name, value in asdict(options).items() if name not in ("output_dir", "variants", "seeds")
    }
    own = settings.pop("training_by_variant")
    claimed = {f"training of {name}": own.get(name, {}) for name in options.variants}  # may be added with a variant
    claim_output_dir(output_dir, settings | claimed, options.variants)
    runs = {name: [] for name in configs}
    # Seeds outside, so that a disturbance of the machine meets all variants' times alike.
    for seed in options.seeds:
        for name in configs:
            runs[name].append(run(name, seed, output_dir / "runs" / f"{name}-seed{seed}.json"))
    settings |= {"variants": options.variants, "training_by_variant": own}
    return {"machine": machine_info(), "settings": settings, "seeds": options.seeds}, runs


def write_results(output_dir: str, results: dict, markdown: Callable[[dict], str], plot: Callable[[dict, Path], None]):
    """Write results.json, results.md and accuracy.png, and print the tables."""
    folder, text = Path(output_dir), markdown(results)
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", text + "\n")
    plot(results, folder / "accuracy.png")
    print(f"\n{text}\n\nWritten: results.json, results.md and accuracy.png in {folder}")
