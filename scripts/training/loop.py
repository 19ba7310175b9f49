"""The loop that trains. A program says by a `Job` what is trained on what; all else stands here, once.

    class Distillation(Job):
        max_steps, eval_steps, save_steps = 1000, 100, 500

        def build_model(self, folder): ...      # also from a checkpoint's folder
        def batches(self, step): ...            # the same for the same step, whatever came before
        def evaluate(self, model): return {"eval_loss": ...}

    loop = Loop(make_accelerator(options), options, Distillation(...), folder, seed)
    status = loop.run()                         # 0, or 128 + the number of the signal that stopped it
    if status == 0:
        loop.save_model(".")

Without a folder nothing is written. Nothing waits for a step on an accelerator: losses are read where a line is logged,
and before an evaluation and a checkpoint.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from tqdm import tqdm

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import append_json_line, read_json
from ordnung.scripts.common.machine import how_to_go_on
from ordnung.scripts.training import checkpointing
from ordnung.scripts.training.accelerator import summed
from ordnung.scripts.training.optimization import make_optimizer, make_scheduler
from ordnung.scripts.training.options import LoopOptions
from ordnung.scripts.training.runs import hold
from ordnung.scripts.training.signals import StopSignals

logger = logging.getLogger("ordnung.training")


class NotFiniteError(ScriptError):
    """A loss or gradient norm that is not finite."""


@dataclass
class Step:
    """What one process takes of an optimizer step.

    Args:
        batches: a model's inputs, each with the share of its loss in that of the step. The shares of all batches of all
            processes sum to 1.
        tokens: those of all processes.
        targets: what the step's loss is a mean over: its weight in that of several steps.
    """

    batches: list[tuple[dict[str, torch.Tensor], float]]
    tokens: int = 0
    targets: float = 1.0


class Job:
    """What is trained. A program derives its own from it; all processes call the methods at the same steps."""

    name = ""  # of the run among others, as sst2/seed-0
    about = ""  # data and steps in words
    tokenizer = None  # saved with each model
    max_steps: int
    eval_steps: int | None = None  # steps between evaluations; None: no evaluation
    save_steps: int | None = None  # steps between checkpoints; None: none
    save_total_limit: int | None = 1
    evaluates_first = False  # also evaluate before the first step
    keeps_best = False  # keep the best model in best/
    patience: int | None = None  # stop after so many evaluations without a better one
    flops: float | None = None  # of a step's forward passes
    data: dict[str, Any] = {}  # what must be the same in a resumed run, by name
    go_on: list[str] = []  # what the command needs besides its words to go on

    def build_model(self, folder: Path | None) -> torch.nn.Module:
        """The model in float32: as the run begins with it, or as it was saved to a folder."""
        raise NotImplementedError

    def batches(self, step: int) -> Step:
        """What step `step` (from 0) is taken on."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of a batch, which is on the model's device."""
        return model(**batch).loss

    def optimizer(self, model: torch.nn.Module, options: LoopOptions, device: torch.device) -> torch.optim.Optimizer:
        """What updates the model's parameters."""
        return make_optimizer(model, options, device)

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Results by name, `eval_...`, the same on every process; called without gradients and dropout."""
        raise NotImplementedError

    def score(self, evaluation: dict[str, float]) -> float:
        """By which evaluations are compared: more is better."""
        return -evaluation["eval_loss"]

    def due(self, step: int) -> bool:
        """Whether to evaluate after so many steps."""
        return self.eval_steps is not None and (step % self.eval_steps == 0 or step == self.max_steps)

    def epoch(self, step: int) -> float | None:
        """Passes over the data after so many steps, for the log."""

    def state_dict(self) -> dict[str, Any]:
        """What `batches` needs besides the step to go on, as JSON has it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]):
        """Put the state of a checkpoint in place."""

    def logged(self, step: int, values: dict[str, float]):
        """Called with each line of losses."""

    def begin(self):
        """Called on the main process when nothing can go wrong any more and the folder is ready."""


class Loop:
    """A job's model, optimizer and books.

    Args:
        options: also those of a program, which derive from `LoopOptions`.
        folder: for metrics.jsonl, checkpoints, best/ and the model; None: nothing is kept.
        seed: of the new model's weights and of dropout.
        checkpoint: where to go on from.

    Raises:
        ScriptError: model, options and checkpoint do not fit; nothing is written by then.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: LoopOptions,
        job: Job,
        folder: Path | None,
        seed: int,
        checkpoint: Path | None = None,
    ):
        self.accelerator, self.options, self.job = accelerator, options, job
        self.folder, self.seed = folder, seed
        self.told = 0
        self.is_main, self.said = accelerator.is_main_process, f"{job.name}: " if job.name else ""
        self.made_with = {**job.data, "mixed_precision": accelerator.mixed_precision}
        state = checkpointing.load_trainer_state(checkpoint) if checkpoint else {}
        for name, value in state.get("data", {}).items():
            if self.made_with[name] != value:
                raise ScriptError(
                    f"{checkpoint} was trained with {name} {value}, not {self.made_with[name]}, so it cannot be "
                    "resumed exactly; use the same, or start a new run"
                )
        self.step, self.tokens, self.seconds = (state.get(name, 0) for name in ("step", "tokens", "seconds"))
        self.window = state.get("window", [])  # steps since the last logged line
        self.logged_at = state.get("logged_at", self.seconds)
        self.evaluation = state.get("evaluation")  # the last one, with its step
        self.best, self.stale = self._kept_best(state.get("best")), state.get("stale", 0)
        set_seed(seed)
        model = job.build_model(checkpoint)
        parameters = list(model.parameters())
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        trained = "" if self.trainable == self.parameters else f", {self.trainable:,} of them trained"
        logger.info(f"{self.said}{self.parameters:,} parameters{trained}; {job.about}")
        self._prepare(model)
        self.writer = checkpointing.CheckpointWriter(accelerator, folder or Path(), job.tokenizer, job.save_total_limit)
        set_seed(seed, device_specific=True)  # each process draws its own dropout
        if checkpoint:
            job.load_state_dict(state)
            checkpointing.load_training_state(checkpoint, accelerator, self.model, self.optimizer, self.scheduler)
            self.writer.last = checkpoint
            logger.info(f"{self.said}going on from {checkpoint}, step {self.step}")

    def _kept_best(self, best: dict | None) -> dict | None:
        """The best evaluation so far; where models are kept, the one that best/ holds, if the run goes on after it."""
        if not self.job.keeps_best or self.folder is None:
            return best
        path = self.folder / "best" / "eval_results.json"
        best = read_json(path) if self.step and path.exists() else None
        return best if best and best["step"] <= self.step else None

    def _prepare(self, model: torch.nn.Module):
        options, steps = self.options, self.job.max_steps
        optimizer = self.job.optimizer(model, options, self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        warmup = options.warmup_steps
        warmup = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
        self.scheduler = make_scheduler(self.optimizer.optimizer, options, warmup, steps)

    def run(self) -> int:
        """Train to the last step, until it gets no better, or until a signal.

        A signal from the last step on leaves a finished run, for which this returns 0; `told` is its status then, for
        programs that would begin another.

        Returns:
            exit status: 0, or 128 + the signal's number; a checkpoint was saved then.
        Raises:
            ScriptError: a loss or gradient is not finite; a checkpoint cannot be written; the folder is held.
        """
        job, several = self.job, self.accelerator.num_processes > 1
        if self.is_main and self.folder is not None:
            hold(self.folder)
            overwrite = getattr(self.options, "overwrite_output_dir", False)
            checkpointing.prepare_output_dir(self.folder, overwrite, self.step or None)
            job.begin()
        self._start_trackers()
        with (
            StopSignals(several) as signals,
            tqdm(
                total=job.max_steps,
                initial=self.step,
                disable=not self.is_main or self.folder is None,
                unit="step",
                desc=job.name or None,
            ) as self.progress,
        ):
            if self.step == 0 and job.evaluates_first:
                self._evaluate()
            self.model.train()
            self._clock = time.perf_counter()
            while not self.done:
                self.take_step()
                self.progress.update()
                last, due = self.step == job.max_steps, job.due(self.step)
                line = due or last or self.step % self.options.logging_steps == 0
                save = job.save_steps is not None and (last or self.step % job.save_steps == 0)
                stop = bool(signals.received) and not several
                if not (line or save or stop):
                    continue
                stop = self._read(bool(signals.received))  # several processes agree here, and only here, to stop
                if line:
                    self._log_window()
                if due:
                    self._evaluate()
                if save or stop and job.save_steps is not None:
                    self._save_checkpoint()
                if stop and not self.done:
                    saved = "" if self.writer.last is None else f": saved {self.writer.last}"
                    logger.warning(f"told to stop{saved}; {how_to_go_on(several, *job.go_on)}")
                    return 128 + (signals.received or signal.SIGTERM)
                self._clock = time.perf_counter()
            (late,) = summed(self.accelerator, torch.tensor([float(bool(signals.received))]))
            if late:
                self.told = 128 + (signals.received or signal.SIGTERM)
                logger.warning(f"{self.said}told to stop in the last step: finished, and nothing else is begun")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()  # or the next run would be logged to them too
        return 0

    @property
    def done(self) -> bool:
        patience = self.job.patience
        return self.step >= self.job.max_steps or (patience is not None and self.stale >= patience)

    def take_step(self):
        """One optimizer step on the summed shares of its batches' losses. Nothing waits for it."""
        accelerator, device = self.accelerator, self.accelerator.device
        taken, loss = self.job.batches(self.step), 0.0
        for i, (batch, share) in enumerate(taken.batches):
            batch = send_to_device(batch, device, non_blocking=True)
            last = i == len(taken.batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                part = self.job.loss(self.model, batch) * share
                # processes' gradients are averaged, the shares of the loss are to be added
                accelerator.backward(part * accelerator.num_processes)
            loss += part.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += taken.tokens
        numbers = {"targets": taken.targets, "tokens": taken.tokens, "learning_rate": rate}
        self.window.append({"loss": loss, "grad_norm": norm, **numbers})

    def _read(self, told: bool) -> bool:
        """Read losses and gradient norms of the steps since the last call, the losses summed over processes.

        Args:
            told: this process was told to stop.
        Returns:
            whether any process was.
        Raises:
            ScriptError: one is not finite.
        """
        fresh = [taken for taken in self.window if isinstance(taken["loss"], torch.Tensor)]
        values = torch.stack(
            [torch.tensor(float(told)).to(self.accelerator.device), *(taken["loss"] for taken in fresh)]
        )
        stop, *losses = summed(self.accelerator, values)
        norms = torch.stack([taken["grad_norm"] for taken in fresh]).tolist()
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        for step, taken, loss, norm in zip(range(self.step - len(fresh) + 1, self.step + 1), fresh, losses, norms):
            taken["loss"], taken["grad_norm"] = loss, norm
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFiniteError(
                    f"{self.said}loss {loss}, gradient norm {norm} at step {step}: training stopped; the last good "
                    f"checkpoint is {self.writer.last or 'none'}; try a lower --learning_rate or more --warmup_steps"
                )
        return bool(stop)

    def _log(self, values: dict[str, float]):
        """Append a line to metrics.jsonl and tell the trackers."""
        if self.is_main and self.folder is not None:
            append_json_line(self.folder / "metrics.jsonl", {"step": self.step, "tokens": self.tokens, **values})
        self.accelerator.log(values, step=self.step)

    def _log_window(self):
        """Log the steps since the last line; the loss is their mean over targets."""
        window, self.window = self.window, []
        seconds, self.logged_at = self.seconds - self.logged_at, self.seconds
        epoch = self.job.epoch(self.step)
        values = {
            "loss": sum(taken["loss"] * taken["targets"] for taken in window)
            / sum(taken["targets"] for taken in window),
            "learning_rate": window[-1]["learning_rate"],
            "grad_norm": window[-1]["grad_norm"],
            **({} if epoch is None else {"epoch": epoch}),
            "tokens_per_second": sum(taken["tokens"] for taken in window) / seconds,
            "seconds": self.seconds,
        }
        if self.job.flops is not None:  # a backward pass costs two forward passes; recomputation is not counted
            values["model_flops_per_second"] = 3 * self.job.flops * len(window) / seconds
        self._log(values)
        self.job.logged(self.step, values)
        self.progress.set_postfix(loss=f"{values['loss']:.3f}", tokens_s=f"{values['tokens_per_second']:.0f}")

    @contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The model without dropout and gradients."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            yield self.model
        self.model.train(training)

    def evaluate(self) -> dict[str, float]:
        """The evaluation of the model as it is, with the step; what was evaluated last is not evaluated again."""
        if self.evaluation is None or self.evaluation["step"] != self.step:
            start = time.perf_counter()
            with self.evaluating() as model:
                result = self.job.evaluate(model)
            self.evaluation = {"step": self.step, **result, "eval_seconds": time.perf_counter() - start}
        return self.evaluation

    def _evaluate(self):
        """Evaluate, log, and keep the model in best/ if it is the best so far."""
        result = {name: value for name, value in self.evaluate().items() if name != "step"}
        self._log(result)
        if not self.progress.disable:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in result.items() if name != "eval_seconds")
            self.progress.write(f"{self.said}step {self.step:>6}  {shown}")
        if self.step == 0:
            return
        self.stale += 1
        if self.best is None or self.job.score(self.evaluation) > self.job.score(self.best):
            self.best, self.stale = self.evaluation, 0
            if self.job.keeps_best:
                self.save_model("best", {"eval_results.json": self.best})

    def restore_best(self):
        """Go back to the model of the best evaluation."""
        if self.best["step"] != self.step:
            self.accelerator.free_memory()
            # with a new optimizer, as FSDP2 prepares no model without one
            self._prepare(self.job.build_model(self.folder / "best"))
            self.evaluation = {**self.best, "step": self.step}

    def save_model(self, name: str, notes: dict[str, Any] | None = None):
        """Save model and tokenizer to a folder in that of the run, or into it itself: `CheckpointWriter.save_model`."""
        self.writer.save_model(self.model, name, notes)

    def results(self) -> dict[str, Any]:
        """What the results of every program say of a run."""
        accelerator = self.accelerator
        return {
            "seed": self.seed,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "num_processes": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "mixed_precision": accelerator.mixed_precision,
        }

    def _save_checkpoint(self):
        names = ("step", "tokens", "seconds", "logged_at", "window", "evaluation", "best", "stale")
        state = {**{name: getattr(self, name) for name in names}, "data": self.made_with, **self.job.state_dict()}
        self.writer.save_checkpoint(self.model, self.optimizer, self.scheduler, state)

    def _start_trackers(self):
        options, name = self.options, self.job.name
        config = {key: str(value) for key, value in options.record().items()}
        output_dir = Path(options.output_dir)
        if name:
            config["run"] = name
            # TensorBoard tells runs apart by their folders
            self.accelerator.project_configuration.logging_dir = str(output_dir / "logs" / name)
        self.accelerator.init_trackers(options.run_name or output_dir.resolve().name, config)
