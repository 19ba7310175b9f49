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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.tables import write_results
from ordnung.scripts.finetuning.adapters import write_base
from ordnung.scripts.finetuning.data import Batches, Examples, encode, load_splits, prepare_tokenizer
from ordnung.scripts.finetuning.figures import plot_curves, write_details
from ordnung.scripts.finetuning.inference import predict
from ordnung.scripts.finetuning.model import bare, build_config, build_model, empty_model, source
from ordnung.scripts.finetuning.options import LEARNING_RATE, WIDTH, FinetuneOptions
from ordnung.scripts.finetuning.own import read_task
from ordnung.scripts.finetuning.report import collect, is_finished, markdown, write_submission
from ordnung.scripts.finetuning.scores import (
    answer_loss,
    best_threshold,
    class_weights,
    mean_score,
    score,
    weighted_loss,
)
from ordnung.scripts.finetuning.sharing import describe_run, find_targets, push_best
from ordnung.scripts.finetuning.structured import encoder_of
from ordnung.scripts.finetuning.tasks import Task, choose_tasks
from ordnung.scripts.training import checkpointing
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.loop import Job, Loop, Step
from ordnung.scripts.training.runs import claim_output_dir

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
    if options.class_weights and task.problem_type in ("regression", "question_answering"):
        kind = "numbers" if task.regression else "answers in a context"
        raise ScriptError(
            f"--class_weights {options.class_weights}: {task.name} has {kind}, no classes to weigh: leave it out"
        )
    splits = load_splits(task, options)
    config = build_config(task, options, tokenizer)
    model = empty_model(options, config, task.head)
    max_length = options.max_length or limits.model_length(model, tokenizer)
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


class Finetuning(Job):
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
        self.accelerator, self.options, self.task_data = accelerator, options, data
        self.seed, self.folder, self.name = seed, folder, f"{data.task.name}/seed-{seed}"
        self.tokenizer = tokenizer
        self.step_rows = options.step_rows(accelerator.num_processes)
        self.steps_per_epoch = math.ceil(len(data.train) / self.step_rows)
        self.max_steps = options.max_steps or math.ceil(options.num_train_epochs * self.steps_per_epoch)
        self.save_steps = options.eval_steps or self.steps_per_epoch
        self.eval_steps = None if data.selection is None else self.save_steps
        self.keeps_best, self.patience = options.load_best_model_at_end, options.early_stopping_patience
        self.label_counts = data.train.label_counts()
        self.data = {"training rows": len(data.train), "rows a step": self.step_rows}
        self.about = f"{len(data.train):,} examples, {self.max_steps:,} steps of {self.step_rows}"
        self.loop = Loop(accelerator, options, self, folder, seed, checkpointing.newest_checkpoint(folder))

    def build_model(self, folder: Path | None) -> torch.nn.Module:
        model = build_model(self.options, self.task_data.config, folder, self.task_data.task.head)
        limits.fit_tokenizer(self.tokenizer, bare(model), self.task_data.max_length)
        packs = hasattr(bare(model).config, "longest_row")
        self.packing = self.options.packing
        if self.packing is None:  # a compiled model would be compiled again for each length
            task = self.task_data.task
            one_row = task.head != "ForQuestionAnswering" and not self.options.torch_compile
            self.packing = bool(task.splits) and packs and one_row
        if self.packing and not packs:
            kind = bare(model).config.model_type
            raise ScriptError(f"--packing: {kind} does not keep the examples of a row apart, only ordnung's models do")
        names = set(inspect.signature(bare(model).forward).parameters)
        self.constants = {"use_cache": False} if "use_cache" in names else {}
        multiple = 1 if self.accelerator.device.type == "cpu" else 8  # accelerators multiply such matrices faster
        numeric = self.task_data.task.problem_type in ("regression", "multi_label_classification")
        self.make_batch = Batches(self.tokenizer, numeric, names, multiple)
        weights = class_weights(self.task_data.task, self.task_data.train) if self.options.class_weights else None
        self.class_weights = None if weights is None else torch.tensor(weights, device=self.accelerator.device).float()
        return model

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """The training rows of a step (from 0): an epoch's last step may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return self._order[place * self.step_rows : (place + 1) * self.step_rows]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.task_data.train))
        if not self.options.group_by_length:
            return order
        lengths, size, steps = self.task_data.train.lengths, self.step_rows * STEPS_PER_GROUP, []
        for start in range(0, len(order), size):
            group = order[start : start + size]
            group = group[np.argsort(lengths[group], kind="stable")]
            steps += [group[i : i + self.step_rows] for i in range(0, len(group), self.step_rows)]
        short = [steps.pop()] if len(steps[-1]) < self.step_rows else []  # must stay the last
        return np.concatenate([steps[i] for i in random.permutation(len(steps))] + short)

    def batches(self, step: int) -> Step:
        """A step's rows; its loss is the mean over their labels."""
        rows, train, size = self.rows(step), self.task_data.train, self.options.per_device_train_batch_size
        starts = range(self.accelerator.process_index * size, self.step_rows, size * self.accelerator.num_processes)
        count = math.ceil(len(rows) / (size * self.accelerator.num_processes))
        counts, batches = self.label_counts, []
        for start in starts[:count]:
            own = rows[start : start + size]
            # a process without rows of its own still takes part, with no weight
            batch = self.make_batch(train, own if len(own) else rows[:1], self.packing)
            batches.append((batch, float(counts[own].sum() / counts[rows].sum())))
        return Step(batches, tokens=int(train.lengths[rows].sum()))

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = model(**batch, **self.constants)
        if "start_positions" in batch:
            return answer_loss(outputs, batch)
        if self.class_weights is None:
            return outputs.loss
        return weighted_loss(outputs.logits, batch["labels"], self.class_weights)

    def predict(self, model: torch.nn.Module, examples: Examples) -> np.ndarray:
        """Scores of every row, in the order of the rows, on every process: see `inference.predict`."""
        size = self.options.per_device_eval_batch_size
        return predict(
            self.accelerator, lambda batch: model(**batch, **self.constants), self.make_batch, examples, size
        )

    def scores(self, model: torch.nn.Module, examples: Examples) -> dict[str, float]:
        """The task's scores and the loss on labelled examples."""
        return score(self.task_data.task, self.predict(model, examples), examples)

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """The scores on the examples that models are compared on."""
        return {f"eval_{name}": value for name, value in self.scores(model, self.task_data.selection).items()}

    def score(self, evaluation: dict[str, float]) -> float:
        return mean_score(scores_of(evaluation))

    def train(self) -> int:
        """Train, score and save.

        Returns:
            exit status: 0, or 128 + the number of the signal that stopped it.
        Raises:
            ScriptError: as `Loop.run`.
        """
        status = self.loop.run()
        if status == 0:
            self._finish()
        return status or self.loop.told

    def _with_threshold(self, model: torch.nn.Module) -> TaskData:
        """The task's data with the threshold of several labels chosen, and the model's config with it."""
        data, task = self.task_data, self.task_data.task
        if task.problem_type != "multi_label_classification":
            return data
        if task.threshold is None:
            chosen = best_threshold(self.predict(model, data.selection), data.selection)
            data = replace(data, task=replace(task, threshold=chosen))
            logger.info(f"{self.name}: labels from a probability of {chosen:.2f} on score best")
        config = bare(self.accelerator.unwrap_model(self.loop.model, keep_torch_compile=False)).config
        config.label_threshold = data.task.threshold
        return data

    def _finish(self):
        """Score the chosen model, write predictions and the model, and results.json last of all."""
        loop, options, data, task = self.loop, self.options, self.task_data, self.task_data.task
        if options.load_best_model_at_end:
            loop.restore_best()
        with loop.evaluating() as model:
            if task.splits:
                logits = {name: self.predict(model, examples) for name, examples in data.scored.items()}
                data = self.task_data = self._with_threshold(model)
                task = data.task
                scores = {name: score(task, logits[name], examples) for name, examples in data.scored.items()}
            else:
                scores = {
                    # what models were compared on has its scores already
                    name: scores_of(loop.evaluate()) if examples is data.selection else self.scores(model, examples)
                    for name, examples in data.scored.items()
                }
            for split, examples in data.tests.items():
                predicted = self.predict(model, examples)
                if loop.is_main:
                    write_submission(task, self.folder / task.tests[split], predicted, examples.numbers)
        model = self.accelerator.unwrap_model(loop.model, keep_torch_compile=False)
        loop.save_model(".")
        if options.use_peft and loop.is_main:
            write_base(self.folder, bare(model), self.tokenizer, options)
        if options.merge_adapter:
            loop.writer.save_model(model.merge_and_unload(), "merged")
        if not loop.is_main:
            return
        epochs, rest = divmod(loop.step, self.steps_per_epoch)
        trained = epochs * len(data.train) + rest * self.step_rows
        best = loop.best and {"step": loop.best["step"], "score": self.score(loop.best), **scores_of(loop.best)}
        results = {
            "task": task.name,
            "model": options.model_name_or_path,
            **loop.results(),
            **describe_run(task, options, scores),
            "metrics": scores,
            "score": fmean(mean_score(values) for values in scores.values()),
            "best": best,
            "epochs": loop.step / self.steps_per_epoch,
            "training_rows": len(data.train),
            "examples_per_second": trained / loop.seconds,
            "truncated": data.truncated,
            "packing": self.packing,
            "machine": machine_info("cpu" if options.use_cpu else None),
        }
        title = f"{Path(options.model_name_or_path).name}, {task.name}, seed {self.seed}"
        if task.splits:
            results["details"] = write_details(self.folder, data, logits, title)
        plot_curves(self.folder, title)
        write_json(self.folder / "results.json", results)
        for folder in [*checkpointing.checkpoint_folders(self.folder), self.folder / "best"]:
            shutil.rmtree(folder, ignore_errors=True)


def scores_of(evaluation: dict[str, float]) -> dict[str, float]:
    """The task's scores and the loss of an evaluation by the loop."""
    values = {name.removeprefix("eval_"): value for name, value in evaluation.items() if name.startswith("eval_")}
    return {name: value for name, value in values.items() if name != "seconds"}


def run(options: FinetuneOptions) -> int:
    """Fine-tune on each task with each seed and write the results.

    All data, the tokenizer and the config are checked before the first run.

    Returns:
        exit status: 0, or 128 + the number of the signal that stopped a run.
    Raises:
        ScriptError: options, data or model do not fit; a run fails.
    """
    accelerator, output_dir = make_accelerator(options), Path(options.output_dir)
    with accelerator.main_process_first():
        tasks = choose_tasks(options.task_name) if options.task_name else [read_task(options)]
    targets = find_targets(options, tasks) if accelerator.is_main_process else {}
    with accelerator.main_process_first():  # the others then read what the first has cached
        tokenizer = prepare_tokenizer(options)
        prepared = [prepare_task(task, options, tokenizer) for task in tasks]
    if options.learning_rate is None:
        width = getattr(prepared[0].config, "hidden_size", WIDTH)
        options.learning_rate = float(f"{LEARNING_RATE * WIDTH / width:.2g}")
        logger.info(f"--learning_rate {options.learning_rate:g}, as the model is {width} wide")
    # seeds outside: after the first round every task has a score
    runs = [(data, seed, output_dir / data.task.folder / f"seed-{seed}") for seed in options.seeds for data in prepared]
    if accelerator.is_main_process:
        made_of = source(options.model_name_or_path, prepared[0].config)
        made_of |= {f"sha256 of the data of {data.task.name}": data.digest() for data in prepared}
        if not all(is_finished(folder) for *_, folder in runs):  # what is finished may be told or shared anywhere
            rows = options.step_rows(accelerator.num_processes)
            made_of |= {"rows a step": rows, "precision": accelerator.mixed_precision}
        claim_output_dir(output_dir, options.record() | made_of, {})
    accelerator.wait_for_everyone()
    status = 0
    try:
        for data, seed, folder in runs:
            if is_finished(folder):
                logger.info(f"{folder}: finished, kept")
                continue
            status = Finetuning(accelerator, options, data, tokenizer, seed, folder).train()
            if status:
                break
            accelerator.free_memory()
    except ScriptError:
        if accelerator.is_main_process:
            # what is finished can be read, though not of all seeds
            unfinished = {seed for _, seed, folder in runs if not is_finished(folder)}
            complete = [seed for seed in options.seeds if seed not in unfinished]
            results = collect(output_dir, complete or options.seeds[:1], options)
            if results["tasks"]:
                write_results(output_dir, results, markdown)
        raise
    if accelerator.is_main_process and all(is_finished(folder) for *_, folder in runs):
        results = collect(output_dir, options.seeds, options)
        write_results(output_dir, results, markdown)
        push_best(results, options, targets)
    accelerator.end_training()
    return status
