"""One pretraining run: built from its options, trained, its results written."""

import logging
import math
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.utils import send_to_device, set_seed

from ordnung.scripts.common import limits
from ordnung.scripts.common.files import write_json, write_text
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.hub import sharing
from ordnung.scripts.pretraining.blocks import IGNORED, BatchMaker
from ordnung.scripts.pretraining.data import held_out_blocks, load_documents, load_tokenizer, training_blocks
from ordnung.scripts.pretraining.model import build_model, build_run_config
from ordnung.scripts.pretraining.options import PretrainOptions
from ordnung.scripts.pretraining.report import describe_data, describe_evaluation, plot_loss
from ordnung.scripts.training import checkpointing
from ordnung.scripts.training.accelerator import make_accelerator, summed
from ordnung.scripts.training.loop import Job, Loop, Step
from ordnung.scripts.training.optimization import recompute_activations

logger = logging.getLogger("ordnung.pretrain")  # __name__ is __main__ when run as a script


class Pretraining(Job):
    """One run: builds everything from the options, then `train()`.

    Raises:
        ScriptError: options, data, model or output folder that do not fit, before anything is trained.
    """

    keeps_best = True

    def __init__(self, options: PretrainOptions):
        self.options, self.output_dir = options, Path(options.output_dir)
        self.accelerator = make_accelerator(options)
        build_run_config(options)  # a wrong option is told before anything is read or written
        is_main = self.accelerator.is_main_process
        self.hub_target = sharing.find_target(options, self.output_dir) if is_main else None
        checkpoint = checkpointing.find_checkpoint(
            self.output_dir, options.resume_from_checkpoint, options.overwrite_output_dir
        )
        set_seed(options.seed)
        self._load_data(checkpoint)
        self.save_steps, self.save_total_limit = options.save_steps, options.save_total_limit
        self.evaluates_first = self.held_out is not None
        self.eval_steps = options.eval_steps if self.held_out is not None else None
        self.go_on = [] if options.resume_from_checkpoint == "auto" else ["--resume_from_checkpoint", "auto"]
        self.go_on += ["--overwrite_output_dir", "false"] if options.overwrite_output_dir else []
        self.loop = Loop(self.accelerator, options, self, self.output_dir, options.seed, checkpoint)

    def _load_data(self, checkpoint: Path | None):
        options = self.options
        with self.accelerator.main_process_first():  # the others then read what the first has cached
            train, held_out = load_documents(options)
        self.tokenizer = load_tokenizer(options, checkpoint, train, self.accelerator)
        separate = options.respect_document_boundaries
        self.make_batch = BatchMaker(options.objective, self.tokenizer, separate, options.mlm_probability, options.seed)
        several = separate and getattr(build_run_config(options, self.tokenizer), "packs_documents", False)
        with self.accelerator.main_process_first():
            self.blocks = training_blocks(options, train, self.tokenizer, several)
        self.held_out = None if held_out is None else held_out_blocks(options, held_out, self.tokenizer, several)
        self.step_blocks = options.step_rows(self.accelerator.num_processes)
        self.max_steps = options.max_steps or math.ceil(options.num_train_epochs * len(self.blocks) / self.step_blocks)
        self.about = f"vocabulary of {len(self.tokenizer):,}, {self.max_steps:,} steps of {self.step_blocks} x "
        self.about += f"{options.block_size} tokens"
        names = ("objective", "block_size", "respect_document_boundaries", "seed", "streaming")
        self.data = {name: getattr(options, name) for name in names}
        self.data["several documents in a block"] = several
        self.data["training blocks"] = None if options.streaming else len(self.blocks)

    def build_model(self, folder: Path | None) -> torch.nn.Module:
        options = self.options
        model = build_model(options, folder, self.tokenizer)
        if hasattr(model, "flops"):
            self.flops = model.flops(options.block_size) * self.step_blocks
        if options.gradient_checkpointing:
            recompute_activations(model)
        limits.fit_tokenizer(self.tokenizer, model, options.block_size)
        return model

    def state_dict(self) -> dict:
        return {"blocks": self.blocks.state_dict()}

    def load_state_dict(self, state: dict):
        self.blocks.load_state_dict(state["blocks"])

    def epoch(self, step: int) -> float:
        return self.blocks.epoch

    def begin(self):
        write_text(self.output_dir / "run.yaml", yaml.safe_dump(self.options.record(), sort_keys=False))

    def batches(self, step: int) -> Step:
        """The next blocks; the step's loss is a mean over all their target tokens."""
        accelerator, size = self.accelerator, self.options.per_device_train_batch_size
        first = self.blocks.position
        blocks, lengths = self.blocks.take(self.step_blocks)
        starts = range(accelerator.process_index * size, self.step_blocks, size * accelerator.num_processes)
        batches = [self.make_batch(blocks[i : i + size], lengths[i : i + size], first + i) for i in starts]
        counts = [self.make_batch.targets(batch) for batch in batches]
        (targets,) = summed(accelerator, torch.tensor([sum(counts)]))
        return Step([(batch, count / targets) for batch, count in zip(batches, counts)], int(lengths.sum()), targets)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss over a batch's target tokens."""
        return model(**batch, **({"use_cache": False} if self.options.objective == "causal" else {})).loss

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Loss over the held-out target tokens, perplexity and, for the causal objective, bits per byte of text.

        Bits per byte counts every token, those that end documents included, against the text's UTF-8 bytes.
        """
        accelerator, size = self.accelerator, self.options.per_device_eval_batch_size
        blocks, lengths = self.held_out.blocks, self.held_out.lengths
        nll, targets = 0.0, 0
        # Every process runs the same number of batches of one shape, as sharded and compiled models need.
        stride = size * accelerator.num_processes
        for begin in range(accelerator.process_index * size, math.ceil(len(blocks) / stride) * stride, stride):
            rows = np.arange(begin, begin + size)
            batch = self.make_batch(blocks[rows % len(blocks)], lengths[rows % len(blocks)], begin)
            batch["labels"][torch.from_numpy(rows >= len(blocks))] = IGNORED
            count = self.make_batch.targets(batch)
            loss = float(self.loss(model, send_to_device(batch, accelerator.device)))
            if count:
                nll, targets = nll + loss * count, targets + count
        nll, targets = summed(accelerator, torch.tensor([nll, targets], dtype=torch.float64))
        loss = nll / targets
        result = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
        if self.options.objective == "causal":
            result["eval_bits_per_byte"] = loss / math.log(2) * self.held_out.tokens_per_byte
        return result

    def train(self) -> int:
        """Train, then write the model, results.json and the loss curve, and share them if that was asked for.

        Returns:
            exit status: 0, or 128 + the number of the signal that stopped it.
        Raises:
            ScriptError: as `Loop.run`.
        """
        loop, options, accelerator = self.loop, self.options, self.accelerator
        status = loop.run()
        if status == 0:
            evaluation = None
            if self.held_out is not None:
                evaluation = {name: value for name, value in loop.evaluate().items() if name != "step"}
            loop.save_model(".")
            if loop.is_main:
                results = {
                    "model_type": accelerator.unwrap_model(loop.model).config.model_type,
                    "objective": options.objective,
                    **describe_data(options),
                    **loop.results(),
                    "evaluation": evaluation,
                    "eval_results": describe_evaluation(options, evaluation),
                    "best": loop.best,
                    "machine": machine_info("cpu" if options.use_cpu else None),
                }
                write_json(self.output_dir / "results.json", results)
                plot_loss(self.output_dir / "metrics.jsonl", self.output_dir / "loss_curve.png", self.output_dir.name)
            logger.info(f"model, results.json and loss_curve.png are in {self.output_dir}")
        accelerator.end_training()
        if status == 0 and self.hub_target is not None:
            sharing.push(self.output_dir, self.hub_target)
        return status or loop.told


def run(options: PretrainOptions) -> int:
    """Train as the options say; returns the exit status."""
    return Pretraining(options).train()
