"""Folders that hold several runs: with which seeds, and made with what."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_json

LOCK = ".lock"
_held: dict[Path, FileLock] = {}


def check_seeds(seeds: Sequence[int]):
    """Raise a ScriptError where there are no seeds, or one twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ScriptError(f"--seeds {list(seeds)} must be one or more different numbers")


def hold(output_dir: Path):
    """Make a folder, and keep other processes from writing runs to it until this one ends.

    Raises:
        ScriptError: another process holds it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = _held.setdefault(output_dir.resolve(), FileLock(output_dir / LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ScriptError(
            f"another process is writing to --output_dir {output_dir}: wait for it, or name another folder"
        ) from None


def claim_output_dir(
    output_dir: Path, settings: dict[str, Any], variants: dict[str, Any], untold: dict[str, Any] | None = None
):
    """Hold a folder, and record in settings.json what its runs are made with.

    A later call may add variants; what the finished runs were made with must be the same.

    Args:
        untold: what runs were made with where a folder of an earlier version does not tell.
    Raises:
        ScriptError: as `hold`; the folder holds runs that were made otherwise, or something else.
    """
    path = output_dir / "settings.json"
    settings = json.loads(json.dumps({**settings, **{f"variant {name}": value for name, value in variants.items()}}))
    if output_dir.exists() and not output_dir.is_dir():
        raise ScriptError(f"--output_dir {output_dir} is a file; name a folder")
    hold(output_dir)
    recorded = {}
    # Settings alone are left by a call that failed before its first run.
    if {entry.name for entry in output_dir.iterdir()} - {path.name, LOCK}:
        if not path.exists():
            raise ScriptError(f"--output_dir {output_dir} holds something else than runs of this program: name another")
        recorded = {**(untold or {}), **read_json(path)}
    for name in recorded.keys() & settings.keys():
        if recorded[name] != settings[name]:
            raise ScriptError(
                f"--output_dir {output_dir} holds runs with {name} {json.dumps(recorded[name])}, not "
                f"{json.dumps(settings[name])}: name another folder, or delete this one"
            )
    write_json(path, recorded | settings)
