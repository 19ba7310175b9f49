"""What a result was measured on: written into every results file so that numbers can be compared and repeated."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ordnung
from ordnung.scripts.common.errors import ScriptError

TOKEN_OPTIONS = ("--hub-token", "--token")  # results files and cards are for others to see


def _processor() -> str:
    """The processor's name, which on Linux neither psutil nor platform tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_command(argv: list[str]) -> bool:
    """Whether these words were given to the command `ordnung`, not to a program's file."""
    return Path(argv[0]).stem in ("ordnung", "cli") and len(argv) > 1


def command_line(argv: list[str]) -> str:
    """The command as a shell takes it, access tokens left out."""
    shown, secret = [], False
    for argument in argv:
        option, equals, _ = argument.partition("=")
        names_token = option.replace("_", "-") in TOKEN_OPTIONS  # options are taken with either
        if secret:
            argument = "..."
        elif names_token and equals:
            argument = f"{option}=..."
        shown.append(argument)
        secret = names_token and not equals and not secret
    return shlex.join(["ordnung", *shown[1:]] if is_command(argv) else [Path(sys.executable).name, *shown])


def how_to_go_on(several_processes: bool, *more: str) -> str:
    """What a stopped run tells its user: the command that goes on, with these further words."""
    if several_processes:  # how they were launched is not known here
        return "to go on, launch the same command again" + (f" with {' '.join(more)}" if more else "")
    return f"to go on: {command_line([*sys.argv, *more])}"


def commit() -> str | None:
    """The commit of the clone that runs, with "-dirty" behind it if tracked files differ; None of a package."""
    root = Path(ordnung.__file__).resolve().parent
    if not (root / ".git").exists():
        return None
    told = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_info(device: str | None = None) -> dict:
    """Describe the machine, the software and the running command.

    Args:
        device: "cpu" where a program was told to compute there: GPUs that the machine may have are left out then.

    Returns a JSON-serialisable dict; what the system does not tell is None. `memory_bytes` is installed main memory,
    `cores` the cores this process may use, `threads` those torch computes with now: set them before calling this.
    """
    import psutil
    import torch

    number = 0 if device == "cpu" else torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(number)]
    return {
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": package_version("transformers"),
        "accelerate": package_version("accelerate"),
        "datasets": package_version("datasets"),
        "ordnung": ordnung.__version__,
        "commit": commit(),
        "command": command_line(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_device(device: str):
    """
    Raises:
        ScriptError: "cuda", and torch sees no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ScriptError("--device cuda: torch sees no GPU here; use --device cpu")


def described(machine: dict) -> str:
    """What `machine_info` found, in a line for the head of a table."""
    vectors = f" ({machine['cpu_capability']})" if "cpu_capability" in machine else ""  # files from before have none
    cpu = f"{machine['cpu']}{vectors}, {machine['threads']} threads"
    device = ", ".join(gpu["name"] for gpu in machine["gpu"]) or cpu
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "ordnung"))
    return f"{device}, {versions}, {machine['date'][:10]}."
