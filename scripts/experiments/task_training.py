"""Training on sequences that are drawn as they are needed: what the programs on synthetic tasks share."""

from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ordnung.scripts.common.machine import check_device, machine_info
from ordnung.scripts.experiments.earlier import EarlierTask
from ordnung.scripts.experiments.options import TrainingOptions
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.loop import Job, Loop, Step
from ordnung.scripts.training.options import LoopOptions
from ordnung.scripts.training.runs import claim_output_dir


class Drawn(Job):
    """A new model on sequences that are drawn step by step; `fit` trains it.

    Args:
        draw: takes the number of the step and gives tokens (batch, N) and labels of the same shape: at a token what is
            to be answered there, -100 where nothing is.
        measure: gives results by name, `answers` among them, of the model after each number of steps in `measured`.
    """

    loop: Loop

    def __init__(
        self,
        config: PreTrainedConfig,
        max_steps: int,
        draw: Callable[[int], tuple[np.ndarray, np.ndarray]],
        measure: Callable[[PreTrainedModel], dict[str, Any]] | None = None,
        measured: Collection[int] = (),
    ):
        self.config, self.max_steps, self.about = config, max_steps, f"{max_steps:,} steps"
        self.draw, self.measure, self.measured = draw, measure, measured
        self.losses: list[float] = []  # of every step
        self.curve: list[dict[str, Any]] = []  # step, seconds of training until then, results

    def build_model(self, folder: None) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(self.config)

    def batches(self, step: int) -> Step:
        tokens, labels = map(torch.from_numpy, self.draw(step))
        # labels lie at the token itself, so they are not shifted as those of a language model are
        return Step([({"input_ids": tokens, "labels": labels, "shift_labels": labels}, 1.0)], tokens.numel())

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch, use_cache=False).loss

    def logged(self, step: int, values: dict[str, float]):
        self.losses.append(values["loss"])

    def due(self, step: int) -> bool:
        return step in self.measured

    def evaluate(self, model: torch.nn.Module) -> dict[str, Any]:
        self.curve.append({"step": self.loop.step, "seconds": self.loop.seconds, **self.measure(model)})
        return self.curve[-1]

    def score(self, evaluation: dict[str, Any]) -> float:
        return evaluation["answers"]


def fit(options: TrainingOptions, seed: int, job: Drawn) -> Loop:
    """Train a job's model, on the device that the options name.

    Returns:
        the loop, with the model and the seconds.
    Raises:
        ScriptError: the loss is not finite.
        KeyboardInterrupt: a signal; the runs before this one are kept.
    """
    training = LoopOptions(
        output_dir=options.output_dir,
        use_cpu=options.device == "cpu",
        optim="adamw_torch",  # what the published runs were trained with
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        logging_steps=1,
    )
    job.loop = Loop(make_accelerator(training), training, job, None, seed)
    if job.loop.run() or job.loop.told:
        raise KeyboardInterrupt
    return job.loop


def train_all(
    options: TrainingOptions,
    configs: dict[str, PreTrainedConfig],
    run: Callable[[str, int, Path], dict],
    collect: Callable[[str, list[dict]], dict],
    steps: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Train every variant with every seed; runs that have finished are kept, as are results of `--earlier`.

    Args:
        configs: the variants by name.
        run: trains one, given its name, the seed and the file for its results, or reads that file.
        collect: the results of a variant, given its name and those of its runs, one for each seed.
        steps: that variants train for, where the settings do not tell.

    Returns:
        what the results of every program hold: `machine`, `settings`, `seeds` and `variants`, and `earlier` where some
        of these are taken over.
    Raises:
        ScriptError: as `check_device`, `EarlierTask`, `claim_output_dir` and `run`.
    """
    check_device(options.device)
    output_dir = Path(options.output_dir)
    settings = {
        name: value
        for name, value in asdict(options).items()
        if name not in ("output_dir", "variants", "seeds", "only", "earlier")
    }
    earlier = EarlierTask(options.earlier, settings | {"seeds": options.seeds}, options.variants)
    variants = earlier.finished(configs, steps)
    for name in variants:
        print(f"{options.earlier}: {name} taken over")
    own = settings.pop("training_by_variant")
    claimed = {f"training of {name}": own.get(name, {}) for name in options.variants}  # may be added with a variant
    claim_output_dir(output_dir, settings | claimed, options.variants, untold={"device": "cpu"})
    runs = {name: [] for name in configs if name not in variants}
    # Seeds outside, so that a disturbance of the machine meets all variants' times alike.
    for seed in options.seeds:
        for name in runs:
            runs[name].append(run(name, seed, output_dir / "runs" / f"{name}-seed{seed}.json"))
    settings |= {"variants": options.variants, "training_by_variant": own}
    results = {"machine": machine_info(options.device), "settings": settings, "seeds": options.seeds}
    results["variants"] = {name: variants[name] if name in variants else collect(name, runs[name]) for name in configs}
    return results | ({"earlier": earlier.origins(variants)} if variants else {})
