"""One linearization: converted, measured, trained in two stages, measured again, its results written."""

import json
import logging
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from accelerate import load_checkpoint_in_model
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import append_json_line, read_json, write_json, write_text
from ordnung.scripts.common.machine import how_to_go_on
from ordnung.scripts.hub import sharing
from ordnung.scripts.linearizing import measure, report
from ordnung.scripts.linearizing.data import Batches, load_blocks, load_pairs
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.linearizing.stages import Distillation, Transfer, merge_adapters
from ordnung.scripts.linearizing.teacher import (
    FULL,
    Pair,
    TeacherOutputs,
    check_source,
    fingerprint,
    load_student,
    load_teacher,
    load_tokenizer,
)
from ordnung.scripts.training import checkpointing
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.optimization import make_scheduler, parameter_groups
from ordnung.scripts.training.runs import hold
from ordnung.scripts.training.signals import StopSignals

logger = logging.getLogger("ordnung.linearize")

MEASURED = "stage0.json"  # what was measured before training, kept so that no restart pays for it again
STAGES = ("transfer", "distill")


class Linearization:
    """One run: builds everything from the options, then `train()`.

    Raises:
        ScriptError: options, teacher, data, student or output folder that do not fit, before anything is trained.
    """

    def __init__(self, options: LinearizeOptions):
        self.options, self.output_dir = options, Path(options.output_dir)
        self.accelerator = make_accelerator(options)
        self.is_main = self.accelerator.is_main_process
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ordnung").setLevel(logging.INFO if self.is_main else logging.ERROR)
        transformers_logging.disable_progress_bar()
        if not self.is_main:
            datasets.disable_progress_bars()
        check_source(options)
        self.hub_target = sharing.find_target(options, self.output_dir) if self.is_main else None
        self.checkpoint = checkpointing.find_checkpoint(
            self.output_dir, options.resume_from_checkpoint, options.overwrite_output_dir
        )
        self.state = checkpointing.load_trainer_state(self.checkpoint) if self.checkpoint else {}
        self.step, self.tokens = self.state.get("step", 0), self.state.get("tokens", 0)
        self.seconds, self.curve = self.state.get("seconds", {}), self.state.get("curve", [])
        set_seed(options.seed)
        self._load_models()
        self._load_data()
        self.made_with = self._made_with()
        self._check_resumed()
        self.writer = checkpointing.CheckpointWriter(
            self.accelerator, self.output_dir, self.tokenizer, options.save_total_limit
        )
        self.writer.last = self.checkpoint
        self.outputs = TeacherOutputs(
            self.pair.teacher,
            self.pair.encoder,
            options.teacher_outputs,
            {"teacher": self.pair.fingerprint, "mixed_precision": self.accelerator.mixed_precision},
        )
        if self.is_main:  # only now is it certain that the run can start
            self._prepare_output_dir()
        self.accelerator.wait_for_everyone()

    def _load_models(self):
        options = self.options
        with self.accelerator.main_process_first():
            teacher = load_teacher(options)
        self.tokenizer = load_tokenizer(options, teacher)
        layers = teacher.config.num_hidden_layers
        if options.keep_attention is not None and options.keep_attention >= layers:
            raise ScriptError(
                f"--keep_attention {options.keep_attention} leaves none of the teacher's {layers} layers to replace: "
                f"give at most {layers - 1}"
            )
        student, new = load_student(options, teacher, self.state.get("layer_types"))
        self.pair = Pair(teacher, student, new, fingerprint(teacher))
        if not self.pair.replaced:
            raise ScriptError(
                f"the {options.model_type} has full attention in every layer, so that nothing is replaced: change "
                "layer_types in --config_overrides, or use `ordnung convert`"
            )
        for model in (teacher, student):
            limits.check_length(model, options.block_size, "block_size", extrapolate=True)
        self._to_device()
        self._tell_of_state()

    def _to_device(self):
        for model in (self.pair.teacher, self.pair.student):
            model.to(self.accelerator.device)

    def _tell_of_state(self):
        """Say so where the student's state is no smaller than the teacher's."""
        ours, theirs = (measure.state_bytes(model) for model in (self.pair.student, self.pair.teacher))
        length = max(ours.keys() & theirs.keys(), key=int, default=None)
        if not self.pair.encoder and length is not None and ours[length] >= theirs[length]:
            logger.warning(
                f"the student's generation state after {int(length):,} tokens ({ours[length]:,} bytes) is no smaller "
                f"than the teacher's ({theirs[length]:,}): replace more layers, or make their state smaller by "
                "--config_overrides"
            )

    def _load_data(self):
        options, pair = self.options, self.pair
        separate = options.respect_document_boundaries or pair.encoder
        several = separate and pair.student.config.packs_documents
        with self.accelerator.main_process_first():
            self.blocks, held_out, lengths = load_blocks(options, self.tokenizer, pair.encoder, several)
        self.separate = separate
        self.batches = Batches(options, self.tokenizer, pair.encoder, separate)
        size = options.per_device_eval_batch_size
        self.held_out = [
            self._batch(held_out[i : i + size], lengths[i : i + size], i) for i in range(0, len(held_out), size)
        ]
        self.held_out_tokens = int(lengths.sum())
        self.held_out_text = np.concatenate([row[:length] for row, length in zip(held_out, lengths)])
        self.similar = load_pairs(options.similarity_file) if options.similarity_file else None
        self.held_out_text = np.where(self.held_out_text < 0, ~self.held_out_text, self.held_out_text)
        self.step_blocks = (
            options.per_device_train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        )

    def _batch(self, rows: np.ndarray, lengths: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        if self.separate:
            rows = rows[:, : max(int(lengths.max()), 2)]
        batch = self.batches(rows, lengths, first)
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def _made_with(self) -> dict[str, Any]:
        """What must not change for a run to be resumed exactly."""
        options = self.options
        names = ("model_type", "config_overrides", "keep_attention", "block_size", "seed", "mlm_probability")
        names += ("trainable", "use_peft", "lora_r", "lora_alpha", "transfer_steps", "distill_steps")
        made = {"teacher": self.pair.fingerprint} | {name: getattr(options, name) for name in names}
        made |= {"blocks in a step": self.step_blocks, "training blocks": len(self.blocks)}
        return json.loads(json.dumps(made))

    def _check_resumed(self):
        for name, value in self.state.get("made_with", {}).items():
            if self.made_with.get(name) != value:
                raise ScriptError(
                    f"{self.checkpoint} was made with {name} {value}, not {self.made_with.get(name)}, so it cannot be "
                    "resumed exactly: use the same, or start again in a new --output_dir"
                )

    def _prepare_output_dir(self):
        hold(self.output_dir)
        if self.options.overwrite_output_dir:
            for name in (MEASURED, report.RESULTS, report.PICTURE, report.CARD):
                (self.output_dir / name).unlink(missing_ok=True)
        checkpointing.prepare_output_dir(
            self.output_dir, self.options.overwrite_output_dir, self.step if self.checkpoint else None
        )
        write_text(self.output_dir / "run.yaml", yaml.safe_dump(self.options.record(), sort_keys=False))

    # Stage 0: convert and measure

    def measure_before(self) -> dict[str, Any]:
        """What is measured before training: teacher, student as converted, floor, layers; which ones stay.

        It is read where an earlier start of the same run has measured it.
        """
        path = self.output_dir / MEASURED
        if path.exists() and (kept := read_json(path))["made_with"] == self.made_with:
            self.before = kept
            self._set_layers(kept["layer_types"])
            return kept
        pair, before = self.pair, {"made_with": self.made_with, "layer_types": None}
        if self.options.keep_attention is not None:
            before["replaced_alone"] = measure.replaced_alone(pair, self.held_out)
            order = sorted(before["replaced_alone"], key=before["replaced_alone"].get, reverse=True)
            kept = sorted(order[: self.options.keep_attention])
            types = pair.student.config.layer_types
            before["layer_types"] = [FULL if i in kept else kind for i, kind in enumerate(types)]
            self._set_layers(before["layer_types"])
            logger.info(f"full attention stays in layers {', '.join(map(str, kept)) or 'none'}")
        mixed, states = measure.teacher_variances(self.pair, self.held_out)
        before |= {"variances": mixed, "state_variances": states}
        before["layers"] = measure.fidelity(self.pair, self.held_out)
        before |= self.compare_models()
        before = json.loads(json.dumps(before))  # as it is read again
        if self.is_main:
            write_json(path, before)
        self.accelerator.wait_for_everyone()
        return before

    def _set_layers(self, layer_types: list[str] | None):
        if layer_types in (None, self.pair.student.config.layer_types):
            return
        self.pair.student, self.pair.new = load_student(self.options, self.pair.teacher, layer_types)
        self._to_device()

    def compare_models(self) -> dict[str, Any]:
        """Held-out losses of the teacher, the student and the student without its mixers' output."""
        pair = self.pair
        if pair.encoder:
            found = {"student": measure.states_beside(pair.student, pair, self.held_out)}
            with measure.without_mixing(pair):
                found["floor"] = measure.states_beside(pair.student, pair, self.held_out)
            if self.similar is not None:
                self._add_similarities(found)
        else:
            self.teacher_scores = measure.score(pair.teacher, pair.teacher, self.held_out)
            found = {"teacher": self.teacher_scores.summary()}
            student = measure.score(pair.student, pair.student, self.held_out)
            found["student"] = student.summary(self.teacher_scores)
            with measure.without_mixing(pair):
                floor = measure.score(pair.student, pair.student, self.held_out)
            found["floor"] = floor.summary(self.teacher_scores)
        return found

    def _add_similarities(self, found: dict[str, dict]):
        """How well each model's mean states tell similar texts, into `found`."""
        options, pair = self.options, self.pair

        def correlation(model):
            size = max(options.per_device_eval_batch_size, 16)
            return measure.similarity(model, self.tokenizer, self.similar, size, options.block_size)

        found["student"]["similarity"] = correlation(pair.student)
        with measure.without_mixing(pair):
            found["floor"]["similarity"] = correlation(pair.student)
        found["teacher"] = {"similarity": correlation(pair.teacher)}

    # Stages 1 and 2

    def _stage(self, name: str) -> Transfer | Distillation:
        """The stage, its optimizer and schedule made."""
        options, pair = self.options, self.pair
        if name == "transfer":
            stage = Transfer(options, pair, {int(i): value for i, value in self.before["variances"].items()})
        else:
            stage = Distillation(options, pair, self.outputs, self.before["state_variances"])
        groups = []
        new = {id(p) for name, p in pair.student.named_parameters() if name.replace(".base_layer.", ".") in pair.new}
        for group in parameter_groups(pair.student, options.weight_decay):
            for is_new in (False, True):
                own = [p for p in group["params"] if (id(p) in new) == is_new]
                rate = stage.peak_rate * (options.new_learning_rate if is_new else 1)
                groups += [{**group, "params": own, "lr": rate}] if own else []
        if not groups:
            raise ScriptError(f"--trainable {options.trainable} leaves nothing to train in this student: take layers")
        optimizer = torch.optim.AdamW(
            groups, betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon, fused=True
        )
        if name == "transfer":
            self.optimizer = SimpleNamespace(optimizer=optimizer)
            self.model = pair.student
        else:
            self.model, self.optimizer = self.accelerator.prepare(pair.student, optimizer)
            stage.model = self.model
        steps = self._steps(name)
        self.scheduler = make_scheduler(
            self.optimizer.optimizer,
            options,
            round(options.warmup_ratio * steps),
            steps,
            scheduler_specific_kwargs=options.lr_scheduler_kwargs,
        )
        return stage

    def _steps(self, name: str) -> int:
        return getattr(self.options, f"{name}_steps")

    def _sum(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(total, "sum").tolist()

    def train_step(self, stage, signals: StopSignals) -> tuple[dict[str, float], bool]:
        """One optimizer step; its costs are means over all tokens of all its batches and processes.

        Returns:
            its metrics; whether any process was told to stop.
        Raises:
            ScriptError: loss or gradient is not finite. The weights are those before the step.
        """
        accelerator, size = self.accelerator, self.options.per_device_train_batch_size
        processes, first = accelerator.num_processes, self.blocks.position
        rows, lengths = self.blocks.take(self.step_blocks)
        starts = range(accelerator.process_index * size, self.step_blocks, size * processes)
        batches = [self._batch(rows[i : i + size], lengths[i : i + size], first + i) for i in starts]
        counts = [stage.counts(batch) for batch in batches]
        names = list(counts[0])
        totals = dict(zip(names, self._sum([float(sum(count[name] for count in counts)) for name in names])))
        distributed = stage.name == "distill"  # its gradients are averaged over processes; costs are to be added
        scales = {name: (processes if distributed else 1) / max(total, 1) for name, total in totals.items()}
        sums = dict.fromkeys(stage.weights, 0.0)
        for i, batch in enumerate(batches):
            for name, cost in stage.backward(batch, scales, accelerator, i == len(batches) - 1).items():
                sums[name] += cost
        *summed, stop = self._sum([*sums.values(), float(bool(signals.received))])
        costs = {name: value / max(totals[name], 1) for name, value in zip(sums, summed)}
        parameters = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        if not distributed and processes > 1:
            for parameter in parameters:
                parameter.grad = accelerator.reduce(parameter.grad, "sum")
        limit = self.options.max_grad_norm or math.inf
        if distributed:
            norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        loss = sum(weight * costs[name] for name, weight in stage.weights.items())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ScriptError(
                f"loss {loss}, gradient norm {norm} at step {self.step + 1} ({stage.name}): training stopped; the last "
                f"good checkpoint is {self.writer.last or 'none'}; try a lower learning rate"
            )
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.optimizer.step()
        self.scheduler.step()
        self.optimizer.optimizer.zero_grad()
        self.step += 1
        self.tokens += int(lengths.sum())
        return {"loss": loss, **costs, "learning_rate": rate, "grad_norm": norm}, bool(stop)

    def evaluate(self, stage) -> dict[str, Any]:
        """A point of the curve: the student's held-out loss now."""
        pair, point = self.pair, {"stage": stage.name, "step": self.step, "tokens": self.tokens}
        point["seconds"] = sum(self.seconds.values())
        with self.accelerator.autocast():
            if pair.encoder:
                return point | measure.states_beside(self.model, pair, self.held_out)
            scores = measure.score(self.model, pair.student, self.held_out).summary()
        return point | {"loss": scores["loss"], "loss_by_position": scores["loss_by_position"]}

    def _log(self, values: dict):
        if self.is_main:
            append_json_line(self.output_dir / "metrics.jsonl", {"step": self.step, "tokens": self.tokens, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.step)

    def _evaluate_and_log(self, stage, progress: tqdm):
        point = self.evaluate(stage)
        self.curve.append(point)
        self._log({"stage": stage.name, **{f"eval_{name}": point[name] for name in point.keys() & {"loss", "cosine"}}})
        if self.is_main:
            progress.write(f"step {self.step:>6}  {stage.name}  held-out loss {point['loss']:.4f}")

    def _save_checkpoint(self, stage, done: int):
        state = {
            "step": self.step,
            "stage": stage.name,
            "stage_step": done,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "curve": self.curve,
            "layer_types": self.before["layer_types"],
            "made_with": self.made_with,
            "blocks": self.blocks.state_dict(),
        }
        self.writer.save_checkpoint(self.model, self.optimizer, self.scheduler, state)

    def _run_stage(self, name: str, done: int, signals: StopSignals) -> bool:
        """Run a stage from step `done` of it; returns whether the run was told to stop."""
        options, steps = self.options, self._steps(name)
        stage = self._stage(name)
        if self.state and self.state["stage"] == name:
            load_checkpoint_in_model(self.pair.student, str(self.checkpoint))
            checkpointing.load_training_state(
                self.checkpoint, self.accelerator, self.model, self.optimizer, self.scheduler
            )
        begun, window = time.perf_counter(), []
        with tqdm(total=steps, initial=done, disable=not self.is_main, unit="step", desc=name) as progress:
            if not self.curve:
                self._evaluate_and_log(stage, progress)
            while done < steps:
                start = time.perf_counter()
                metrics, stop = self.train_step(stage, signals)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
                done += 1
                window.append(metrics["loss"])
                progress.update()
                last = done == steps
                if done % options.logging_steps == 0 or last:
                    left = (steps - done) * (time.perf_counter() - begun) / progress_steps(progress)
                    metrics |= {"loss": sum(window) / len(window), "seconds": self.seconds[name], "seconds_left": left}
                    self._log({"stage": name, **metrics})
                    progress.set_postfix(loss=f"{metrics['loss']:.4f}")
                    window = []
                if done % options.eval_steps == 0 or last:
                    self._evaluate_and_log(stage, progress)
                if done % options.save_steps == 0 or last or stop:
                    self._save_checkpoint(stage, done)
                if stop:
                    return not (last and name == STAGES[-1])
        return False

    def train(self) -> int:
        """All stages, or until a signal.

        Returns:
            exit status: 0, or 128 + the signal's number.
        Raises:
            ScriptError: the loss is not finite, or a checkpoint cannot be written.
        """
        options = self.options
        self.before = self.measure_before()
        if self.checkpoint:
            self.blocks.load_state_dict(self.state["blocks"])
            logger.info(f"going on from {self.checkpoint}, step {self.step} ({self.state['stage']})")
        name = options.run_name or self.output_dir.resolve().name
        self.accelerator.init_trackers(name, config={key: str(value) for key, value in options.record().items()})
        begun = STAGES.index(self.state["stage"]) if self.state else 0
        if self.state and self.state["stage_step"] == self._steps(self.state["stage"]):
            self._load_finished_stage()
            begun += 1
        with StopSignals(self.accelerator.num_processes > 1) as signals:
            for stage in STAGES[begun:]:
                done = self.state["stage_step"] if self.state and self.state["stage"] == stage else 0
                if self._steps(stage) and self._run_stage(stage, done, signals):
                    more = [] if options.resume_from_checkpoint == "auto" else ["--resume_from_checkpoint", "auto"]
                    more += ["--overwrite_output_dir", "false"] if options.overwrite_output_dir else []
                    goes_on = how_to_go_on(self.accelerator.num_processes > 1, *more)
                    logger.warning(f"told to stop: saved {self.writer.last}; {goes_on}")
                    self.accelerator.end_training()
                    return 128 + (signals.received or signal.SIGTERM)
        self._finish()
        return 0

    def _load_finished_stage(self):
        """The weights of a checkpoint that ends a stage."""
        if self.state["stage"] == "distill":  # with its adapters, to be merged
            Distillation(self.options, self.pair, self.outputs, self.before["state_variances"])
        load_checkpoint_in_model(self.pair.student, str(self.checkpoint))

    def _finish(self):
        """Write the student, its results, picture and card, and share them if that was asked for."""
        options, pair = self.options, self.pair
        model = getattr(self, "model", pair.student)
        pair.student = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        merge_adapters(pair.student)
        pair.student.requires_grad_(True)
        if self.is_main:
            limits.fit_tokenizer(self.tokenizer, pair.student, options.block_size)
        self.writer.save_model(pair.student, ".")
        if self.is_main:
            pair.student = type(pair.student).from_pretrained(self.output_dir, dtype=torch.float32)
            pair.student.to(self.accelerator.device).eval()
            results = report.results(self, self.compare_models(), measure.fidelity(pair, self.held_out))
            write_json(self.output_dir / report.RESULTS, results)
            report.draw(results, self.output_dir / report.PICTURE)
            report.write_card(results, pair.student, self.output_dir)
            print(report.text(results))
        logger.info(f"the student and {report.RESULTS} are in {self.output_dir}")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.hub_target is not None:
            sharing.push(self.output_dir, self.hub_target, self.output_dir / report.RESULTS)


def progress_steps(progress: tqdm) -> int:
    """Steps since a bar began to count, at least one."""
    return max(progress.n - progress.initial, 1)


def run(options: LinearizeOptions) -> int:
    """Linearize as the options say; returns the exit status."""
    return Linearization(options).train()
