"""Checkpoints of a training run: written whole or not at all, checked before they are used, resumed exactly.

A checkpoint is a model folder (`from_pretrained` loads it) with the tokenizer and, beside them, the optimizer,
scheduler and random states and `trainer_state.json`. Optimizer state is stored by parameter name, whatever the
number of processes and however they share the parameters, so that a run may resume on other hardware.
"""

import json
import logging
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, read_json_lines, sha256, write_json, write_text
from ordnung.scripts.training.runs import LOCK

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What a run writes into its output folder besides checkpoints and the model.
RUN_FILES = ("run.yaml", "metrics.jsonl", "results.json", "loss_curve.png")
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, oldest first."""
    return sorted(
        (path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)), key=_step
    )


def _step(folder: Path) -> int:
    return int(_CHECKPOINT.fullmatch(folder.name)[1])


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def checkpoint_fault(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there as it was written."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        expected = read_json(folder / MANIFEST)
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}): it was not written to the end"
    found = _digests(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"its file {name} is missing"
        if found[name] != digest:
            return f"its file {name} is not what was written"
    return None


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole, if there is one; warns of each that is not."""
    for folder in reversed(checkpoint_folders(output_dir)):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder
        logger.warning(f"skipping checkpoint {folder}: {fault}")
    return None


def find_checkpoint(output_dir: str | Path, resume_from: str | None, overwrite: bool) -> Path | None:
    """Decide where a run starts: from a checkpoint (returned) or from nothing (None).

    Raises:
        ScriptError: the output folder holds files that the run would mix with, or the checkpoint cannot be used.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ScriptError(f"--output_dir {output_dir} is a file; name a folder")
    contents = sorted({path.name for path in output_dir.glob("*")} - {LOCK})
    own = resume_from is not None and (
        resume_from == "auto" or Path(resume_from).resolve().parent == output_dir.resolve()
    )
    if overwrite and own:
        raise ScriptError("--overwrite_output_dir would delete the checkpoint to resume from; give one of the two")
    if resume_from not in (None, "auto"):
        fault = checkpoint_fault(resume_from)
        if fault is not None:
            whole = [str(path) for path in checkpoint_folders(Path(resume_from).parent) if not checkpoint_fault(path)]
            cure = f"use {whole[-1]}" if whole else "there is no other beside it"
            raise ScriptError(f"cannot resume from {resume_from}: {fault}; {cure}")
        if contents and not overwrite and not own:
            raise ScriptError(
                f"--output_dir {output_dir} is not empty and is not where {resume_from} comes from; name a new folder, "
                "or clear it by --overwrite_output_dir"
            )
        return Path(resume_from)
    if overwrite or not contents:
        return None
    if resume_from == "auto":
        found = newest_checkpoint(output_dir)
        if found is not None:
            return found
        if checkpoint_folders(output_dir):
            raise ScriptError(
                f"every checkpoint in {output_dir} is damaged: delete that folder to start again, or in pretrain "
                "itself give --overwrite_output_dir"
            )
        if "run.yaml" in contents:
            logger.warning(f"{output_dir} holds a run that left no checkpoint yet: starting at step 0")
            return None
        raise ScriptError(
            f"--output_dir {output_dir} is not empty ({', '.join(contents[:3])}, ...) and holds no checkpoint to "
            "resume from: delete that folder to start again, or in pretrain itself name a new one or give "
            "--overwrite_output_dir"
        )
    raise ScriptError(
        f"--output_dir {output_dir} is not empty ({', '.join(contents[:3])}, ...); go on with its run by "
        "--resume_from_checkpoint auto, start again by --overwrite_output_dir, or name a new folder"
    )


def prepare_output_dir(output_dir: str | Path, overwrite: bool, resumed_step: int | None):
    """Make the output folder ready for a run: delete what it would be mistaken for, and nothing else.

    Args:
        overwrite: delete everything that a run wrote.
        resumed_step: step to go on from; what lies after it (all, if None) leaves metrics.jsonl and the checkpoints.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    step = -1 if resumed_step is None else resumed_step
    doomed = [".tmp-*"]
    if overwrite:
        doomed += ["checkpoint-*", "best", "hub", "model*.safetensors", "model.safetensors.index.json", *RUN_FILES]
    for path in [path for pattern in doomed for path in output_dir.glob(pattern)]:
        _remove(path)
    for folder in checkpoint_folders(output_dir):
        if _step(folder) > step:
            logger.warning(f"deleting {folder}: the run goes on from step {step}")
            _remove(folder)
    metrics = output_dir / "metrics.jsonl"
    if metrics.exists():
        kept = [json.dumps(line) + "\n" for line in read_json_lines(metrics) if line["step"] <= step]
        write_text(metrics, "".join(kept))


def _remove(path: Path):
    if path.is_dir():
        # under another name first: a half-deleted folder must not look like a checkpoint
        hidden = path if path.name.startswith(".tmp-") else path.rename(path.with_name(f".tmp-old-{path.name}"))
        shutil.rmtree(hidden)
    else:
        path.unlink()


class CheckpointWriter:
    """Writes model folders and checkpoints of one run. All processes call its methods; the main one writes."""

    def __init__(self, accelerator: Accelerator, output_dir: str | Path, tokenizer, total_limit: int | None):
        self.accelerator, self.output_dir, self.tokenizer = accelerator, Path(output_dir), tokenizer
        self.total_limit = total_limit
        self.last: Path | None = None

    def save_model(self, model: torch.nn.Module, name: str, notes: dict[str, Any] | None = None):
        """Save model and tokenizer to the folder `name` of the output folder, or into it itself for ".".

        Args:
            notes: further JSON files, name to content.
        """
        weights = get_model_state_dict(model, options=_FULL)
        with self._saving(name) as temporary:
            if temporary is not None:
                self._write_model(model, weights, temporary)
                for file, content in (notes or {}).items():
                    write_json(temporary / file, content)

    def save_checkpoint(self, model, optimizer, scheduler, state: dict[str, Any]):
        """Save `checkpoint-<step>`, then delete the oldest beyond the limit.

        Args:
            state: JSON-serialisable state of the run; holds "step".
        """
        name = f"checkpoint-{state['step']}"
        weights = get_model_state_dict(model, options=_FULL)
        optimizer_state = get_optimizer_state_dict(model, optimizer.optimizer, options=_FULL)
        random_states = gather_object([_random_state()])
        with self._saving(name) as temporary:
            if temporary is not None:
                self._write_model(model, weights, temporary)
                torch.save(optimizer_state, temporary / "optimizer.pt")
                torch.save(scheduler.state_dict(), temporary / "scheduler.pt")
                torch.save(random_states, temporary / "random.pt")
                write_json(temporary / TRAINER_STATE, state)
                write_json(temporary / MANIFEST, _digests(temporary))
        self.last = self.output_dir / name
        if self.accelerator.is_main_process and self.total_limit is not None:
            for folder in checkpoint_folders(self.output_dir)[: -self.total_limit]:
                _remove(folder)

    def _write_model(self, model, weights, folder: Path):
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        unwrapped.save_pretrained(folder, state_dict=weights)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @contextmanager
    def _saving(self, name: str) -> Iterator[Path | None]:
        """Context of one save: gives the main process a temporary folder and puts it in place if all went well."""
        target, temporary = self.output_dir / name, self.output_dir / f".tmp-{'model' if name == '.' else name}"
        if self.accelerator.is_main_process:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            try:
                yield temporary
            except BaseException as error:
                shutil.rmtree(temporary, ignore_errors=True)
                if not isinstance(error, Exception):
                    raise
                free = shutil.disk_usage(self.output_dir).free
                last = f"the last good checkpoint is {self.last}" if self.last else "there is no checkpoint yet"
                raise ScriptError(
                    f"{target} could not be saved ({type(error).__name__}: {error}); {free / 2**20:.0f} MiB are free "
                    f"at {self.output_dir}; {last}"
                ) from error
            _put_in_place(temporary, target, is_root=name == ".")
        else:
            yield None
        self.accelerator.wait_for_everyone()


def _put_in_place(temporary: Path, target: Path, is_root: bool):
    """Move a folder to its place, or into the output folder what it holds."""
    if is_root:
        for path in temporary.iterdir():
            path.replace(target / path.name)
        temporary.rmdir()
        return
    old = None
    if target.exists():
        old = target.rename(target.with_name(f".tmp-old-{target.name}"))
    temporary.rename(target)
    if old is not None:
        shutil.rmtree(old)


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state given to `CheckpointWriter.save_checkpoint`."""
    return read_json(checkpoint / TRAINER_STATE)


def load_training_state(checkpoint: Path, accelerator: Accelerator, model, optimizer, scheduler):
    """Put optimizer, scheduler and random states of a checkpoint in place. The model already has its weights."""
    full = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    set_optimizer_state_dict(model, optimizer.optimizer, full, options=StateDictOptions(full_state_dict=True))
    scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
    states = torch.load(checkpoint / "random.pt", weights_only=True)
    if len(states) != accelerator.num_processes:
        logger.warning(
            f"{checkpoint} was saved by {len(states)} processes and is resumed by {accelerator.num_processes}: "
            "dropout will draw other random numbers"
        )
        return
    state = states[accelerator.process_index]
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
