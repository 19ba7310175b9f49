"""One linearization: converted, measured, trained in two stages, measured again, its results written."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, read_json_lines, write_json, write_text
from ordnung.scripts.common.models import check_overrides, check_source
from ordnung.scripts.hub import sharing
from ordnung.scripts.linearizing import measure, report
from ordnung.scripts.linearizing.data import PAIR_COLUMNS, Text, load_long_text, load_pairs
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.linearizing.stages import Distillation, Stage, Transfer, merge_adapters
from ordnung.scripts.linearizing.teacher import (
    FULL,
    Pair,
    TeacherOutputs,
    fingerprint,
    load_student,
    load_teacher,
    load_tokenizer,
    writes_text,
)
from ordnung.scripts.training import checkpointing
from ordnung.scripts.training.accelerator import make_accelerator
from ordnung.scripts.training.checkpointing import CheckpointWriter
from ordnung.scripts.training.loop import Loop
from ordnung.scripts.training.runs import claim_output_dir

logger = logging.getLogger("ordnung.linearize")

MEASURED = "before.json"  # what was measured before training
STAGES = ("transfer", "distill")
# options that only teachers of one kind have a use for
OF_DECODERS = ("long_file", "temperature", "kl_weight", "lm_weight")
OF_ENCODERS = ("mlm_probability", "similarity_file", "cosine_weight")
CHOOSING = 4096  # tokens, of those to train on, by which it is chosen where attention stays


class Linearization:
    """One run: builds everything from the options, then `train()`.

    Raises:
        ScriptError: options, teacher, data, student or output folder that do not fit, before anything is trained.
    """

    def __init__(self, options: LinearizeOptions, accelerator: Accelerator):
        self.options, self.accelerator, self.output_dir = options, accelerator, Path(options.output_dir)
        self.is_main = accelerator.is_main_process
        set_seed(options.seed)
        with accelerator.main_process_first():  # the others then read what the first has cached
            self._load_models()
            pair = self.pair
            several = pair.student.config.packs_documents
            self.text = Text(options, self.tokenizer, pair.encoder, several, accelerator.device)
            self.long_text = load_long_text(options, self.tokenizer) if options.long_file and not pair.encoder else None
            if self.long_text is not None:
                for model in (pair.teacher, pair.student):
                    limits.check_length(model, len(self.long_text), "long_tokens", extrapolate=True)
            self.similar = load_pairs(options.similarity_file) if options.similarity_file else None
        made_with = {"teacher": pair.fingerprint, "mixed_precision": accelerator.mixed_precision}
        self.outputs = TeacherOutputs(pair.teacher, pair.encoder, options.teacher_outputs, made_with)
        if self.is_main:  # only now is it certain that the run can start
            record = options.record()
            texts = {"training blocks": len(self.text.blocks), "held-out tokens": len(self.text.held_out_tokens)}
            claim_output_dir(self.output_dir, {"teacher": pair.fingerprint, **record, **texts}, {})
            record["output_dir"] = options.output_dir
            write_text(self.output_dir / "run.yaml", yaml.safe_dump(record, sort_keys=False))
        accelerator.wait_for_everyone()

    def _load_models(self):
        options = self.options
        teacher = load_teacher(options)
        self.tokenizer = load_tokenizer(options, teacher)
        layers = teacher.config.num_hidden_layers
        if options.keep_attention is not None and options.keep_attention >= layers:
            raise ScriptError(
                f"--keep_attention {options.keep_attention} leaves none of the teacher's {layers} layers to replace: "
                f"give at most {layers - 1}"
            )
        check_kind(options, not writes_text(teacher))
        student, new = load_student(options, teacher)
        self.pair = Pair(teacher, student, new, fingerprint(teacher))
        if not self.pair.replaced:
            raise ScriptError(
                f"the {options.model_type} has full attention in every layer, so that nothing is replaced: change "
                "layer_types in --config_overrides, or use `ordnung convert`"
            )
        for model in (teacher, student):
            for name in ("block_size", "eval_block_size"):
                limits.check_length(model, getattr(options, name), name, extrapolate=True)
            model.to(self.accelerator.device)
        tell_of_state(self.pair)

    def train(self) -> int:
        """All stages, or until a signal.

        Returns:
            exit status: 0, or 128 + the signal's number.
        Raises:
            ScriptError: the loss is not finite, or a checkpoint cannot be written.
        """
        self.before = self.measure_before()
        self.steps, self.tokens, self.seconds = 0, 0, {}
        for name in STAGES:
            if not getattr(self.options, f"{name}_steps"):
                continue
            status = self._run_stage(self.stage(name))
            if status:
                return status
        self._finish()
        return 0

    def stage(self, name: str) -> Stage:
        shared = (self.accelerator, self.options, self.pair, self.text, getattr(self, "steps", 0))
        if name == "transfer":
            return Transfer(*shared, variances={int(i): value for i, value in self.before["variances"].items()})
        return Distillation(*shared, outputs=self.outputs, variances=self.before["state_variances"])

    def _run_stage(self, stage: Stage) -> int:
        """Run a stage, or take its end from where it was finished; returns the exit status."""
        told = 0
        folder = self.output_dir / stage.name
        checkpoint = checkpointing.newest_checkpoint(folder)
        state = checkpointing.load_trainer_state(checkpoint) if checkpoint else {}
        if state.get("step") == stage.max_steps:
            stage.load(checkpoint)
            tokens, seconds = state["tokens"], state["seconds"]
        else:
            options = self.options.for_stage(stage.name)
            loop = Loop(self.accelerator, options, stage, folder, options.seed, checkpoint)
            status = loop.run()
            if status:
                return status
            tokens, seconds, told = loop.tokens, loop.seconds, loop.told
            stage.take_back(loop.model)
            self.accelerator.free_memory()
        self.steps += stage.max_steps
        self.tokens += tokens
        self.seconds[stage.name] = seconds
        return told

    # Stage 0: convert and measure

    def measure_before(self) -> dict[str, Any]:
        """What is measured before training: teacher, student as converted, floor, layers; which ones stay.

        It is read where an earlier start of the same run has measured it.
        """
        path = self.output_dir / MEASURED
        if path.exists():
            before = read_json(path)
            self._set_layers(before["layer_types"])
            if self.similar is not None and before.get("similarity_of") != self._similarity_of():
                self._add_similarities(before)  # it was not asked for then, or of other pairs
            return before
        pair, before = self.pair, {"layer_types": None}
        logger.info(f"measuring on {len(self.text.held_out_tokens):,} held-out tokens")
        if self.options.keep_attention is not None:
            before["replaced_alone"] = measure.replaced_alone(pair, self.text.first_rows(CHOOSING))
            order = sorted(before["replaced_alone"], key=before["replaced_alone"].get, reverse=True)
            kept = sorted(order[: self.options.keep_attention])
            types = pair.student.config.layer_types
            before["layer_types"] = [FULL if i in kept else kind for i, kind in enumerate(types)]
            self._set_layers(before["layer_types"])
            logger.info(f"full attention stays in layers {', '.join(map(str, kept)) or 'none'}")
        mixed, states = measure.teacher_variances(pair, self.text.held_out)
        before |= {"variances": mixed, "state_variances": states}
        before["layers"] = measure.fidelity(pair, self.text.held_out)
        before |= self.compare_models()
        if self.similar is not None:
            before["similarity_of"] = self._similarity_of()
        before = json.loads(json.dumps(before))  # as it is read again
        self.accelerator.wait_for_everyone()
        if self.is_main:
            write_json(path, before)
        return before

    def _set_layers(self, layer_types: list[str] | None):
        if layer_types in (None, self.pair.student.config.layer_types):
            return
        set_seed(self.options.seed)
        self.pair.student, self.pair.new = load_student(self.options, self.pair.teacher, layer_types)
        self.pair.student.to(self.accelerator.device)

    @torch.no_grad()
    def compare_models(self) -> dict[str, Any]:
        """Held-out losses of the teacher, the student and the student without its mixers' output."""
        pair, held_out = self.pair, self.text.held_out
        pair.student.eval()
        if pair.encoder:
            found = {"student": measure.states_beside(pair.student, pair, held_out)}
            with measure.without_mixing(pair):
                found["floor"] = measure.states_beside(pair.student, pair, held_out)
            if self.similar is not None:
                self._add_similarities(found)
            return found
        teacher = measure.score(pair.teacher, pair.teacher, held_out)
        found = {"teacher": teacher.summary()}
        found["student"] = measure.score(pair.student, pair.student, held_out).summary(teacher)
        with measure.without_mixing(pair):
            found["floor"] = measure.score(pair.student, pair.student, held_out).summary(teacher)
        return found

    def _similarity_of(self) -> str:
        """A digest of the pairs that similarity is measured on."""
        pairs = [list(self.similar[name]) for name in PAIR_COLUMNS]
        return hashlib.sha256(json.dumps(pairs, default=str).encode()).hexdigest()

    def _add_similarities(self, found: dict[str, dict]):
        """How well each model's mean states tell similar texts, into `found`."""
        options = self.options
        size = max(options.per_device_eval_batch_size, 16)
        made = measure.similarities(self.pair, self.tokenizer, self.similar, size, options.eval_block_size)
        for name, value in made.items():
            found.setdefault(name, {})["similarity"] = value

    def _finish(self):
        """Write the student, its results, picture and card."""
        pair, options = self.pair, self.options
        merge_adapters(pair.student)
        restore_dropout(pair.student, pair.teacher, options)
        limits.fit_tokenizer(self.tokenizer, pair.student, options.block_size)
        CheckpointWriter(self.accelerator, self.output_dir, self.tokenizer, None).save_model(pair.student, ".")
        if self.is_main:
            pair.student = type(pair.student).from_pretrained(self.output_dir, dtype=torch.float32)
            pair.student.to(self.accelerator.device).eval()
            after, layers = self.before, self.before["layers"]
            if self.steps:
                after, layers = self.compare_models(), measure.fidelity(pair, self.text.held_out)
            results = report.results(self, after, layers)
            report.draw(results, self.output_dir / report.PICTURE)
            report.write_card(results, pair.student, self.output_dir)
            write_json(self.output_dir / report.RESULTS, results)
            for folder in STAGES:
                for path in checkpointing.checkpoint_folders(self.output_dir / folder):
                    shutil.rmtree(path)
            print(report.text(results))
            logger.info(f"the student and {report.RESULTS} are in {self.output_dir}")
        self.accelerator.wait_for_everyone()

    def curve(self) -> list[dict[str, Any]]:
        """The evaluations of both stages, with steps and tokens counted over both."""
        points, before = [], {"step": 0, "tokens": 0}
        for name in STAGES:
            path = self.output_dir / name / "metrics.jsonl"
            lines = read_json_lines(path) if path.exists() else []
            for line in lines:
                if "eval_loss" in line:
                    found = {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}
                    points.append({"stage": name, **found} | {key: line[key] + before[key] for key in before})
            if lines:
                before = {key: before[key] + lines[-1][key] for key in before}
        return points


def check_kind(options: LinearizeOptions, encoder: bool):
    """Raise a ScriptError where an option is of teachers of the other kind, and would have no effect."""
    for name in OF_DECODERS if encoder else OF_ENCODERS:
        value, default = getattr(options, name), options.__dataclass_fields__[name].default
        if value != default:
            kind, other = ("an encoder", "language models") if encoder else ("a language model", "encoders")
            raise ScriptError(f"--{name} {value} is for {other}, and {options.source} is {kind}: leave it out")
    if options.teacher_outputs and not encoder and (options.hidden_weight or not options.kl_weight):
        raise ScriptError(
            f"--teacher_outputs {options.teacher_outputs} keeps a language model's last states, which only --kl_weight "
            "without --hidden_weight reads: leave it out"
        )
    if encoder and options.hidden_weight == options.cosine_weight == 0 and options.distill_steps:
        raise ScriptError("--hidden_weight and --cosine_weight are 0: nothing is left to train on")


def restore_dropout(student, teacher, options: LinearizeOptions):
    """Write the dropout that the student would have, had it not been trained without, into its config."""
    for name in ("hidden_dropout", "attention_dropout"):
        setattr(student.config, name, options.config_overrides.get(name, getattr(teacher.config, name)))


def tell_of_state(pair: Pair):
    """Say so where the student's state is no smaller than the teacher's."""
    ours, theirs = (measure.state_bytes(model) for model in (pair.student, pair.teacher))
    length = max(ours.keys() & theirs.keys(), key=int, default=None)
    if not pair.encoder and length is not None and ours[length] >= theirs[length]:
        logger.warning(
            f"the student's generation state after {int(length):,} tokens ({ours[length]:,} bytes) is no smaller "
            f"than the teacher's ({theirs[length]:,}): replace more layers, or make their state smaller by "
            "--config_overrides"
        )


def run(options: LinearizeOptions) -> int:
    """Linearize as the options say; returns the exit status.

    The same command goes on where it was stopped; what is finished is kept.
    """
    accelerator, output_dir = make_accelerator(options), Path(options.output_dir)
    check_source(options.source, options.gguf_file)
    check_overrides(CONFIG_MAPPING[options.model_type], options.config_overrides)
    target = sharing.find_target(options, output_dir) if accelerator.is_main_process else None
    made = Linearization(options, accelerator)
    status = 0
    if (output_dir / report.RESULTS).exists():
        logger.info(f"{output_dir}: finished, kept")
    else:
        status = made.train()
    accelerator.end_training()
    if target is not None and not status:
        sharing.push(output_dir, target, output_dir / report.RESULTS)
    return status
