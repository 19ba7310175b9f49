"""One pretraining run: built from its options, trained, its results written."""

import logging
import math
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import append_json_line, read_json, write_json, write_text
from ordnung.scripts.common.machine import how_to_go_on, machine_info
from ordnung.scripts.hub import sharing
from ordnung.scripts.pretraining.blocks import IGNORED, BatchMaker
from ordnung.scripts.pretraining.data import held_out_blocks, load_documents, load_tokenizer, training_blocks
from ordnung.scripts.pretraining.model import build_model, build_run_config
from ordnung.scripts.pretraining.options import PretrainOptions
from ordnung.scripts.pretraining.report import describe_data, describe_evaluation, plot_loss
from ordnung.scripts.training import checkpointing
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.optimization import make_optimizer, make_scheduler, recompute_activations
from ordnung.scripts.training.runs import hold
from ordnung.scripts.training.signals import StopSignals

logger = logging.getLogger("ordnung.pretrain")  # __name__ is __main__ when run as a script


class Pretraining:
    """One run: builds everything from the options, then `train()`.

    Raises:
        ScriptError: options, data, model or output folder that do not fit, before anything is trained.
    """

    def __init__(self, options: PretrainOptions):
        self.options, self.output_dir = options, Path(options.output_dir)
        self.accelerator = make_accelerator(options, options.torch_compile)
        self.is_main = self.accelerator.is_main_process
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ordnung").setLevel(logging.INFO if self.is_main else logging.ERROR)
        transformers_logging.disable_progress_bar()
        if not self.is_main:
            datasets.disable_progress_bars()
        build_run_config(options)  # a wrong option is told before anything is read or written
        self.hub_target = sharing.find_target(options, self.output_dir) if self.is_main else None
        self.checkpoint = checkpointing.find_checkpoint(
            self.output_dir, options.resume_from_checkpoint, options.overwrite_output_dir
        )
        state = checkpointing.load_trainer_state(self.checkpoint) if self.checkpoint else {}
        self.step, self.tokens = state.get("step", 0), state.get("tokens", 0)
        self.seconds = state.get("seconds", 0.0)
        self.window = state.get("window", [])  # steps since the last logged line
        set_seed(options.seed)
        self._load_data()
        self._check_resumed_data(state.get("data", {}))
        model = build_model(options, self.checkpoint, self.tokenizer)
        self.flops = model.flops(options.block_size) if hasattr(model, "flops") else None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            f"{self.parameters:,} parameters, vocabulary of {len(self.tokenizer):,}, {self.max_steps:,} steps of "
            f"{self.step_blocks} x {options.block_size} tokens"
        )
        if options.gradient_checkpointing:
            recompute_activations(model)
        limits.fit_tokenizer(self.tokenizer, model, options.block_size)
        self._prepare_training(model)
        self.writer = checkpointing.CheckpointWriter(
            self.accelerator, self.output_dir, self.tokenizer, options.save_total_limit
        )
        # From here on each process draws its own random numbers, for dropout.
        set_seed(options.seed, device_specific=True)
        if self.checkpoint:
            self.blocks.load_state_dict(state["blocks"])
            checkpointing.load_training_state(
                self.checkpoint, self.accelerator, self.model, self.optimizer, self.scheduler
            )
            self.writer.last = self.checkpoint
            logger.info(f"going on from {self.checkpoint}, step {self.step}")
        self.best = self._read_best()
        if self.is_main:  # only now is it certain that the run can start
            hold(self.output_dir)
            checkpointing.prepare_output_dir(
                self.output_dir, options.overwrite_output_dir, self.step if self.checkpoint else None
            )
            write_text(self.output_dir / "run.yaml", yaml.safe_dump(options.record(), sort_keys=False))

    def _load_data(self):
        options = self.options
        with self.accelerator.main_process_first():  # the others then read what the first has cached
            train, held_out = load_documents(options)
        self.tokenizer = load_tokenizer(options, self.checkpoint, train, self.accelerator)
        separate = options.respect_document_boundaries
        self.make_batch = BatchMaker(options.objective, self.tokenizer, separate, options.mlm_probability, options.seed)
        several = separate and getattr(build_run_config(options, self.tokenizer), "packs_documents", False)
        with self.accelerator.main_process_first():
            self.blocks = training_blocks(options, train, self.tokenizer, several)
        self.held_out = None
        if held_out is not None:
            self.held_out = held_out_blocks(options, held_out, self.tokenizer, several)
        self.step_blocks = (
            options.per_device_train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        )
        self.max_steps = options.max_steps
        if self.max_steps is None:
            self.max_steps = math.ceil(options.num_train_epochs * len(self.blocks) / self.step_blocks)
        # What must not change for a resumed run to see the same blocks.
        names = ("objective", "block_size", "respect_document_boundaries", "seed", "streaming")
        self.data = {name: getattr(options, name) for name in names}
        self.data["several documents in a block"] = several
        self.data["training blocks"] = None if options.streaming else len(self.blocks)

    def _check_resumed_data(self, data: dict):
        for name, value in data.items():
            if self.data[name] != value:
                raise ScriptError(
                    f"{self.checkpoint} was trained with {name} {value}, not {self.data[name]}, so it cannot be "
                    "resumed exactly; use the same, or start a new run from it by --model_name_or_path"
                )

    def _prepare_training(self, model: torch.nn.Module):
        options = self.options
        optimizer = make_optimizer(model, options, self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = make_scheduler(
            self.optimizer.optimizer,
            options,
            options.warmup_steps,
            self.max_steps,
            scheduler_specific_kwargs=options.lr_scheduler_kwargs,
        )

    def _read_best(self) -> dict | None:
        """The best evaluation so far, if best/ holds its model and it lies before the step to go on from."""
        path = self.output_dir / "best" / "eval_results.json"
        best = read_json(path) if self.checkpoint and path.exists() else None
        return best if best and best["step"] <= self.step else None

    def _sum(self, *values: float) -> list[float]:
        """The values summed over processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(total, "sum").tolist()

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss over a batch's target tokens."""
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        if self.options.objective == "causal":
            batch["use_cache"] = False
        return self.model(**batch).loss

    def train_step(self, signals: StopSignals) -> tuple[dict[str, float], bool]:
        """One optimizer step; the loss is a mean over all target tokens of all its batches and processes.

        Returns:
            the step's loss, target tokens, learning rate and gradient norm; whether any process was told to stop.
        Raises:
            ScriptError: loss or gradient is not finite. The weights are those before the step.
        """
        accelerator, size = self.accelerator, self.options.per_device_train_batch_size
        first = self.blocks.position
        blocks, lengths = self.blocks.take(self.step_blocks)
        starts = range(accelerator.process_index * size, self.step_blocks, size * accelerator.num_processes)
        batches = [self.make_batch(blocks[i : i + size], lengths[i : i + size], first + i) for i in starts]
        counts = [self.make_batch.targets(batch) for batch in batches]
        (targets,) = self._sum(sum(counts))
        self.model.train()
        loss = 0.0
        for i, (batch, count) in enumerate(zip(batches, counts)):
            last = i == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                share = self._loss(batch) * (count / targets)
                # processes' gradients are averaged, the shares of the loss are to be added
                accelerator.backward(share * accelerator.num_processes)
            loss += share.detach()
        loss, stop = self._sum(float(loss), bool(signals.received))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ScriptError(
                f"loss {loss}, gradient norm {norm} at step {self.step + 1}: training stopped; the last good "
                f"checkpoint is {self.writer.last or 'none'}; try a lower --learning_rate or more --warmup_steps"
            )
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += int(lengths.sum())
        metrics = {"loss": loss, "targets": targets, "learning_rate": learning_rate, "grad_norm": norm}
        return {**metrics, "tokens": int(lengths.sum())}, bool(stop)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss over the held-out target tokens, perplexity and, for the causal objective, bits per byte of text.

        Bits per byte counts every token, those that end documents included, against the text's UTF-8 bytes.
        """
        accelerator, size = self.accelerator, self.options.per_device_eval_batch_size
        blocks, lengths = self.held_out.blocks, self.held_out.lengths
        self.model.eval()
        start, nll, targets = time.perf_counter(), 0.0, 0
        # Every process runs the same number of batches of one shape, as sharded and compiled models need.
        stride = size * accelerator.num_processes
        for begin in range(accelerator.process_index * size, math.ceil(len(blocks) / stride) * stride, stride):
            rows = np.arange(begin, begin + size)
            batch = self.make_batch(blocks[rows % len(blocks)], lengths[rows % len(blocks)], begin)
            batch["labels"][torch.from_numpy(rows >= len(blocks))] = IGNORED
            count, loss = self.make_batch.targets(batch), float(self._loss(batch))
            if count:
                nll, targets = nll + loss * count, targets + count
        nll, targets = self._sum(nll, targets)
        loss = nll / targets
        result = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
        if self.options.objective == "causal":
            result["eval_bits_per_byte"] = loss / math.log(2) * self.held_out.tokens_per_byte
        return {**result, "eval_seconds": time.perf_counter() - start}

    def _log(self, values: dict):
        """Append a line to metrics.jsonl and tell the trackers."""
        if self.is_main:
            append_json_line(self.output_dir / "metrics.jsonl", {"step": self.step, "tokens": self.tokens, **values})
        self.accelerator.log(values, step=self.step)

    def _evaluate_and_log(self, progress: tqdm) -> dict[str, float]:
        """Evaluate, and keep the model in best/ if it is the best so far."""
        result = self.evaluate()
        self._log(result)
        if self.is_main:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in result.items() if name != "eval_seconds")
            progress.write(f"step {self.step:>6}  {shown}")
        if self.step > 0 and (self.best is None or result["eval_loss"] < self.best["eval_loss"]):
            self.best = {"step": self.step, **result}
            self.writer.save_model(self.model, "best", {"eval_results.json": self.best})
        return result

    def _save_checkpoint(self):
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "window": self.window,
            "data": self.data,
            "blocks": self.blocks.state_dict(),
        }
        self.writer.save_checkpoint(self.model, self.optimizer, self.scheduler, state)

    def _log_window(self, progress: tqdm):
        """Log the steps since the last line; the loss is their mean over target tokens."""
        window, self.window = self.window, []
        targets, seconds = (sum(step[name] for step in window) for name in ("targets", "seconds"))
        loss = sum(step["loss"] * step["targets"] for step in window) / targets
        values = {
            "loss": loss,
            "learning_rate": window[-1]["learning_rate"],
            "grad_norm": window[-1]["grad_norm"],
            "epoch": self.blocks.epoch,
            "tokens_per_second": sum(step["tokens"] for step in window) / seconds,
            "seconds": self.seconds,
        }
        if self.flops is not None:  # a backward pass costs two forward passes; recomputation is not counted
            values["model_flops_per_second"] = 3 * self.flops * self.step_blocks * len(window) / seconds
        self._log(values)
        progress.set_postfix(loss=f"{loss:.3f}", tokens_s=f"{values['tokens_per_second']:.0f}")

    def train(self) -> int:
        """Train to the last step, or until a signal.

        Returns:
            exit status: 0, or 128 + the signal's number.
        Raises:
            ScriptError: the loss is not finite, or a checkpoint cannot be written.
        """
        options = self.options
        name = options.run_name or self.output_dir.resolve().name
        self.accelerator.init_trackers(name, config={key: str(value) for key, value in options.record().items()})
        evaluation = None
        with (
            StopSignals(self.accelerator.num_processes > 1) as signals,
            tqdm(total=self.max_steps, initial=self.step, disable=not self.is_main, unit="step") as progress,
        ):
            if self.step == 0 and self.held_out is not None:
                evaluation = self._evaluate_and_log(progress)
            while self.step < self.max_steps:
                start = time.perf_counter()
                metrics, stop = self.train_step(signals)
                self.window.append({**metrics, "seconds": time.perf_counter() - start})
                self.seconds += self.window[-1]["seconds"]
                progress.update()
                done = self.step == self.max_steps
                if self.step % options.logging_steps == 0 or done:
                    self._log_window(progress)
                if self.held_out is not None and (self.step % options.eval_steps == 0 or done):
                    evaluation = self._evaluate_and_log(progress)
                if self.step % options.save_steps == 0 or done or stop:
                    self._save_checkpoint()
                if stop and not done:
                    more = [] if options.resume_from_checkpoint == "auto" else ["--resume_from_checkpoint", "auto"]
                    more += ["--overwrite_output_dir", "false"] if options.overwrite_output_dir else []
                    goes_on = how_to_go_on(self.accelerator.num_processes > 1, *more)
                    logger.warning(f"told to stop: saved {self.writer.last}; {goes_on}")
                    self.accelerator.end_training()
                    return 128 + (signals.received or signal.SIGTERM)
        if evaluation is None and self.held_out is not None:  # the run had ended before it was resumed
            evaluation = self.evaluate()
        self._finish(evaluation)
        return 0

    def _finish(self, evaluation: dict[str, float] | None):
        """Write the model, results.json and the loss curve, and share them if that was asked for."""
        self.writer.save_model(self.model, ".")
        if self.is_main:
            results = {
                "model_type": self.accelerator.unwrap_model(self.model).config.model_type,
                "objective": self.options.objective,
                **describe_data(self.options),
                "parameters": self.parameters,
                "steps": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "evaluation": evaluation,
                "eval_results": describe_evaluation(self.options, evaluation),
                "best": self.best,
                "seed": self.options.seed,
                "num_processes": self.accelerator.num_processes,
                "distributed_type": self.accelerator.distributed_type.value,
                "mixed_precision": self.accelerator.mixed_precision,
                "machine": machine_info(),
            }
            write_json(self.output_dir / "results.json", results)
            plot_loss(self.output_dir / "metrics.jsonl", self.output_dir / "loss_curve.png", self.output_dir.name)
        logger.info(f"model, results.json and loss_curve.png are in {self.output_dir}")
        self.accelerator.end_training()
        if self.hub_target is not None:
            sharing.push(self.output_dir, self.hub_target)


def run(options: PretrainOptions) -> int:
    """Train as the options say; returns the exit status."""
    return Pretraining(options).train()
