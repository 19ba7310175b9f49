"""Fine-tuning on text classification: tasks and seeds, one run after the other.

The output folder receives results.json and results.md and, for each task and seed, a folder <task>/seed-<n> with the
model, its tokenizer, metrics.jsonl, results.json and the predictions for test splits. Finished runs are kept and
stopped ones resumed from their last evaluation: the same command goes on where it was stopped, and a task or seed can
be added later. results.json and results.md tell of all tasks in the folder that have a run with each of the call's
seeds; where a run fails, of the seeds that each task of the call has by then, or else of the first.
"""

import inspect
import logging
import math
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import append_json_line, write_json
from ordnung.scripts.common.limits import model_length
from ordnung.scripts.common.machine import how_to_go_on, machine_info
from ordnung.scripts.finetuning.adapters import write_base
from ordnung.scripts.finetuning.data import Batches, Examples, encode, load_splits, prepare_tokenizer
from ordnung.scripts.finetuning.figures import plot_curves, write_details
from ordnung.scripts.finetuning.inference import predict
from ordnung.scripts.finetuning.model import bare, build_config, build_model, empty_model, source
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.own import read_task
from ordnung.scripts.finetuning.report import collect, is_finished, publish, write_submission
from ordnung.scripts.finetuning.scores import class_weights, mean_score, score, weighted_loss
from ordnung.scripts.finetuning.sharing import describe_run, find_targets, push_best
from ordnung.scripts.finetuning.structured import encoder_of
from ordnung.scripts.finetuning.tasks import Task, choose_tasks
from ordnung.scripts.training import checkpointing
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.optimization import make_optimizer, make_scheduler
from ordnung.scripts.training.runs import claim_output_dir
from ordnung.scripts.training.signals import StopSignals

logger = logging.getLogger("ordnung.finetune")

# Rows are grouped by length among so many steps' worth of them: enough to save padding, few enough to stay random.
STEPS_PER_GROUP = 50


@dataclass
class TaskData:
    """A task's tokenized splits: what is trained on, what checkpoints are compared on (or None), what is scored."""

    task: Task
    config: PreTrainedConfig
    max_length: int
    train: Examples
    selection: Examples | None
    scored: dict[str, Examples]
    tests: dict[str, Examples]
    truncated: dict[str, dict[str, int]]  # by split: rows, and how many of them were cut to max_length tokens

    def digest(self) -> str:
        splits = [self.train, self.selection, *self.scored.values(), *self.tests.values()]
        return " ".join(split.digest() for split in splits if split is not None)


def prepare_task(task: Task, options: FinetuneOptions, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Read, check and tokenize a task's data.

    Raises:
        ScriptError: data, model and options do not fit.
    """
    splits = load_splits(task, options)
    config = build_config(task, options, tokenizer)
    model = empty_model(options, config, task.head)
    max_length = options.max_length or model_length(model, tokenizer)
    limits.check_length(model, max_length, "max_length")
    encoder = encoder_of(task.head)(tokenizer, task.columns, max_length, options.truncation)
    marks = {"gold": task.head != "ForSequenceClassification", "windows": task.head == "ForQuestionAnswering"}
    examples = {
        name: encode(split, encoder, options.preprocessing_num_workers, **marks) for name, split in splits.items()
    }
    truncated = {name: {"rows": len(split), "cut": split.cut, "to": max_length} for name, split in examples.items()}
    for name, split in examples.items():
        if split.cut:
            logger.info(
                f"{task.name} {name}: {split.cut:,} of {len(split):,} examples are longer than {max_length} tokens "
                f"and were cut ({options.truncation} kept)"
            )
    train, selection = examples["train"], examples[task.evaluation[0]]
    fraction = task.held_out if options.validation_fraction is None else options.validation_fraction
    if fraction and not task.split_off:
        # the same rows whatever the seed, so that seeds differ in nothing else
        order = np.random.default_rng(0).permutation(len(train))
        count = max(1, int(fraction * len(train)))
        if count == len(train):
            raise ScriptError(f"{task.name} has {count} training rows: none is left when {fraction} are held out")
        selection, train = (train.subset(np.sort(rows)) for rows in (order[:count], order[count:]))
    elif task.held_out:
        selection = None
        if options.load_best_model_at_end:
            raise ScriptError(
                f"{task.name} has a test split only, on which models must not be chosen: --load_best_model_at_end and "
                "--early_stopping_patience need --validation_fraction above 0"
            )
    scored = {name: examples[name] for name in task.evaluation}
    tests = {name: examples[name] for name in task.tests if name in examples}
    return TaskData(task, config, max_length, train, selection, scored, tests, truncated)


class Finetuning:
    """One run: a task with a seed. `train()` leaves the folder complete or, stopped, ready to go on."""

    def __init__(
        self,
        accelerator: Accelerator,
        options: FinetuneOptions,
        data: TaskData,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        folder: Path,
    ):
        self.accelerator, self.options, self.data, self.seed, self.folder = accelerator, options, data, seed, folder
        self.is_main, self.name = accelerator.is_main_process, f"{data.task.name}/seed-{seed}"
        self.step_rows = (
            options.per_device_train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes
        )
        self.steps_per_epoch = math.ceil(len(data.train) / self.step_rows)
        self.max_steps = options.max_steps or math.ceil(options.num_train_epochs * self.steps_per_epoch)
        self.checkpoint = self._find_checkpoint()
        state = checkpointing.load_trainer_state(self.checkpoint) if self.checkpoint else {}
        # what must not change for a resumed run to see the same rows
        self.layout = {"training rows": len(data.train), "rows a step": self.step_rows}
        if state and state["layout"] != self.layout:
            raise ScriptError(f"{self.checkpoint} was trained with {state['layout']}, not {self.layout}: delete it")
        self.step, self.seconds, self.tokens = (state.get(name, 0) for name in ("step", "seconds", "tokens"))
        self.best, self.stale = state.get("best"), state.get("stale", 0)  # stale: evaluations since the best one
        self.window_steps = state.get("window_steps", 0)  # steps since the last logged line, and their summed loss
        self.window_loss = torch.tensor(state.get("window_loss", 0.0), device=accelerator.device)

        set_seed(seed)
        model = build_model(options, data.config, self.checkpoint, data.task.head)
        limits.fit_tokenizer(tokenizer, bare(model), data.max_length)
        self.writer = checkpointing.CheckpointWriter(accelerator, folder, tokenizer, total_limit=1)
        self.writer.last = self.checkpoint
        parameters = list(model.parameters())
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        names = set(inspect.signature(bare(model).forward).parameters)
        self.constants = {"use_cache": False} if "use_cache" in names else {}
        multiple = 1 if accelerator.device.type == "cpu" else 8  # accelerators multiply such matrices faster
        numeric = data.task.problem_type in ("regression", "multi_label_classification")
        self.make_batch = Batches(tokenizer, numeric, names, multiple)
        weights = class_weights(data.task, data.train) if options.class_weights else None
        self.class_weights = None if weights is None else torch.tensor(weights, device=accelerator.device).float()
        self._prepare_training(model)
        set_seed(seed, device_specific=True)  # each process draws its own dropout
        if self.checkpoint:
            checkpointing.load_training_state(self.checkpoint, accelerator, self.model, self.optimizer, self.scheduler)
            logger.info(f"{self.name}: going on from step {self.step}")
        if self.is_main:
            checkpointing.prepare_output_dir(folder, False, self.step if self.checkpoint else None)
        logger.info(
            f"{self.name}: {self.parameters:,} parameters, {self.trainable:,} of them trained; {len(data.train):,} "
            f"examples, {self.max_steps:,} steps of {self.step_rows}"
        )

    def _find_checkpoint(self) -> Path | None:
        for folder in reversed(checkpointing.checkpoint_folders(self.folder)):
            fault = checkpointing.checkpoint_fault(folder)
            if fault is None:
                return folder
            logger.warning(f"skipping checkpoint {folder}: {fault}")
        return None

    def _prepare_training(self, model: torch.nn.Module):
        options = self.options
        optimizer = make_optimizer(model, options, self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        warmup = options.warmup_steps
        warmup = math.ceil(warmup * self.max_steps) if warmup < 1 else int(warmup)
        self.scheduler = make_scheduler(self.optimizer.optimizer, options, warmup, self.max_steps)

    def rows(self, step: int) -> np.ndarray:
        """The training rows of a step (from 0): an epoch's last step may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return self._order[place * self.step_rows : (place + 1) * self.step_rows]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.data.train))
        if not self.options.group_by_length:
            return order
        lengths, size, steps = self.data.train.lengths, self.step_rows * STEPS_PER_GROUP, []
        for start in range(0, len(order), size):
            group = order[start : start + size]
            group = group[np.argsort(lengths[group], kind="stable")]
            steps += [group[i : i + self.step_rows] for i in range(0, len(group), self.step_rows)]
        short = [steps.pop()] if len(steps[-1]) < self.step_rows else []  # must stay the last
        return np.concatenate([steps[i] for i in random.permutation(len(steps))] + short)

    def _outputs(self, examples: Examples, rows: np.ndarray):
        batch = self.make_batch(examples, rows)
        batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        outputs = self.model(**batch, **self.constants)
        if self.class_weights is not None and outputs.loss is not None:
            outputs.loss = weighted_loss(outputs.logits, batch["labels"], self.class_weights)
        return outputs

    def train_step(self):
        """One optimizer step on the mean loss of its rows, over all batches and processes. Nothing waits for it."""
        accelerator, size = self.accelerator, self.options.per_device_train_batch_size
        rows, train = self.rows(self.step), self.data.train
        starts = range(0, len(rows), size * accelerator.num_processes)
        for start in starts:
            first = start + accelerator.process_index * size
            own = rows[first : first + size]
            with nullcontext() if start == starts[-1] else accelerator.no_sync(self.model):
                # a process without rows of its own still takes part, with no weight
                loss = self._outputs(train, own if len(own) else rows[:1]).loss * (len(own) / len(rows))
                # processes' gradients are averaged, the shares of the loss are to be added
                accelerator.backward(loss * accelerator.num_processes)
            self.window_loss += loss.detach()
        if self.options.max_grad_norm:
            accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.window_steps += 1
        self.tokens += int(train.lengths[rows].sum())

    def predict(self, examples: Examples) -> np.ndarray:
        """Scores of every row, in the order of the rows, on every process: see `inference.predict`."""
        self.model.eval()
        size = self.options.per_device_eval_batch_size
        run = partial(self.model, **self.constants)
        logits = predict(self.accelerator, lambda batch: run(**batch), self.make_batch, examples, size)
        self.model.train()
        return logits

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The task's scores and the loss on labelled examples."""
        return score(self.data.task, self.predict(examples), examples)

    def _log(self, values: dict):
        if self.is_main:
            append_json_line(self.folder / "metrics.jsonl", {"step": self.step, "tokens": self.tokens, **values})
        self.accelerator.log(values, step=self.step)

    def _check_finite(self, loss: float):
        if not math.isfinite(loss):
            raise ScriptError(
                f"{self.name}: the loss is {loss} at step {self.step}: training stopped; the last good checkpoint is "
                f"{self.writer.last or 'none'}; try a lower --learning_rate or more --warmup_steps"
            )

    def log_window(self, signals: StopSignals) -> bool:
        """Log the mean loss since the last line.

        Returns:
            whether any process was told to stop.
        Raises:
            ScriptError: the loss is not finite.
        """
        told = torch.tensor(float(bool(signals.received)), device=self.accelerator.device)
        values = torch.stack([self.window_loss.float(), told])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
        loss, stop = values.tolist()
        self._check_finite(loss)
        rate, epoch = self.scheduler.get_last_lr()[0], self.step / self.steps_per_epoch
        self._log({"loss": loss / self.window_steps, "learning_rate": rate, "epoch": epoch})
        self.window_loss.zero_()
        self.window_steps = 0
        return bool(stop)

    def _select(self, progress: tqdm):
        """Evaluate on the examples that models are compared on; keep the best in best/ if the best is wanted."""
        scores = self.evaluate(self.data.selection)
        score = mean_score(scores)
        self._log({f"eval_{name}": value for name, value in scores.items()})
        if self.is_main:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            progress.write(f"{self.name} step {self.step:>6}  {shown}")
        self.stale += 1
        if self.best is None or score > self.best["score"]:
            self.best, self.stale = {"step": self.step, "score": score, **scores}, 0
            if self.options.load_best_model_at_end:
                self.writer.save_model(self.model, "best")

    def _save_checkpoint(self):
        self._check_finite(float(self.window_loss))
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "best": self.best,
            "stale": self.stale,
            "window_steps": self.window_steps,
            "window_loss": float(self.window_loss),
            "layout": self.layout,
        }
        self.writer.save_checkpoint(self.model, self.optimizer, self.scheduler, state)

    def _enough(self) -> bool:
        patience = self.options.early_stopping_patience
        return self.step >= self.max_steps or (patience is not None and self.stale >= patience)

    def train(self) -> int:
        """Train, score and save.

        Returns:
            exit status: 0, or 128 + the number of the signal that stopped it.
        Raises:
            ScriptError: the loss is not finite, or a checkpoint cannot be written.
        """
        several, every = self.accelerator.num_processes > 1, self.options.eval_steps or self.steps_per_epoch
        self.model.train()
        with (
            StopSignals(several) as signals,
            tqdm(total=self.max_steps, initial=self.step, disable=not self.is_main, unit="step", desc=self.name) as bar,
        ):
            start = time.perf_counter()
            while not self._enough():
                self.train_step()
                bar.update()
                stop = bool(signals.received) and not several
                pause = self.step % every == 0 or self.step == self.max_steps
                if pause or self.step % self.options.logging_steps == 0:
                    stop = self.log_window(signals) or stop  # processes agree here, and only here, to stop
                if pause or stop:
                    self.seconds += time.perf_counter() - start
                    if pause and self.data.selection is not None:
                        self._select(bar)
                    self._save_checkpoint()
                    start = time.perf_counter()
                if stop and not self._enough():
                    logger.warning(f"told to stop: saved {self.writer.last}; {how_to_go_on(several)}")
                    return 128 + (signals.received or signal.SIGTERM)
        self._finish()
        return 0

    def _finish(self):
        """Score the chosen model, write predictions and the model, and results.json last of all."""
        options, task = self.options, self.data.task
        if options.load_best_model_at_end and self.best["step"] != self.step:
            self.accelerator.free_memory()
            # with a new optimizer, as FSDP2 prepares no model without one
            self._prepare_training(build_model(options, self.data.config, self.folder / "best", task.head))
        logits = {name: self.predict(examples) for name, examples in self.data.scored.items()}
        scores = {name: score(task, logits[name], examples) for name, examples in self.data.scored.items()}
        for split, examples in self.data.tests.items():
            predicted = self.predict(examples)
            if self.is_main:
                write_submission(task, self.folder / task.tests[split], predicted, examples.numbers)
        model = self.accelerator.unwrap_model(self.model)
        self.writer.save_model(self.model, ".")
        if options.use_peft and self.is_main:
            write_base(self.folder, bare(model), self.writer.tokenizer, options)
        if options.merge_adapter:
            self.writer.save_model(model.merge_and_unload(), "merged")
        if not self.is_main:
            return
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        trained = epochs * len(self.data.train) + rest * self.step_rows
        results = {
            "task": task.name,
            "model": options.model_name_or_path,
            "seed": self.seed,
            **describe_run(task, options, scores),
            "metrics": scores,
            "score": fmean(mean_score(values) for values in scores.values()),
            "best": self.best,
            "steps": self.step,
            "epochs": self.step / self.steps_per_epoch,
            "training_rows": len(self.data.train),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "examples_per_second": trained / self.seconds,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "truncated": self.data.truncated,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "machine": machine_info(),
        }
        if task.splits:
            results["details"] = write_details(self.folder, self.data, logits)
        plot_curves(self.folder, f"{Path(options.model_name_or_path).name}, {task.name}, seed {self.seed}")
        write_json(self.folder / "results.json", results)
        for folder in [*checkpointing.checkpoint_folders(self.folder), self.folder / "best"]:
            shutil.rmtree(folder, ignore_errors=True)


def run(options: FinetuneOptions) -> int:
    """Fine-tune on each task with each seed and write the results.

    All data, the tokenizer and the config are checked before the first run.

    Returns:
        exit status: 0, or 128 + the number of the signal that stopped a run.
    Raises:
        ScriptError: options, data or model do not fit; a run fails.
    """
    accelerator, output_dir = make_accelerator(options), Path(options.output_dir)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ordnung").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    transformers_logging.disable_progress_bar()
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    with accelerator.main_process_first():
        tasks = choose_tasks(options.task_name) if options.task_name else [read_task(options)]
    targets = find_targets(options, tasks) if accelerator.is_main_process else {}
    with accelerator.main_process_first():  # the others then read what the first has cached
        tokenizer = prepare_tokenizer(options)
        prepared = [prepare_task(task, options, tokenizer) for task in tasks]
    if accelerator.is_main_process:
        made_of = source(options.model_name_or_path, prepared[0].config)
        made_of |= {f"sha256 of the data of {data.task.name}": data.digest() for data in prepared}
        claim_output_dir(output_dir, options.record() | made_of, {})
    accelerator.wait_for_everyone()
    try:
        status = _run_all(accelerator, options, prepared, tokenizer)
    except ScriptError:
        if accelerator.is_main_process:
            # what is finished can be read, though not of all seeds
            complete = [
                seed
                for seed in options.seeds
                if all(is_finished(output_dir / task.folder / f"seed-{seed}") for task in tasks)
            ]
            results = collect(output_dir, complete or options.seeds[:1], options)
            if results["tasks"]:
                publish(results, output_dir)
        raise
    if accelerator.is_main_process and status == 0:
        results = collect(output_dir, options.seeds, options)
        publish(results, output_dir)
        push_best(results, options, targets)
    accelerator.end_training()
    return status


def _run_all(
    accelerator: Accelerator,
    options: FinetuneOptions,
    prepared: list[TaskData],
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Each task with each seed, but for the finished ones; returns the exit status."""
    output_dir = Path(options.output_dir)
    # seeds outside: after the first round every task has a score
    for seed in options.seeds:
        for data in prepared:
            folder = output_dir / data.task.folder / f"seed-{seed}"
            if is_finished(folder):
                logger.info(f"{folder}: finished, kept")
                continue
            finetuning = Finetuning(accelerator, options, data, tokenizer, seed, folder)
            config = {name: str(value) for name, value in options.record().items()}
            # TensorBoard tells runs apart by their folders
            accelerator.project_configuration.logging_dir = str(output_dir / "logs" / finetuning.name)
            accelerator.init_trackers(output_dir.resolve().name, config | {"run": finetuning.name})
            status = finetuning.train()
            if status:
                return status
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers.clear()  # or the next run would be logged to them too
            accelerator.free_memory()
    return 0
