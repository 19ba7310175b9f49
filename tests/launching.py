"""Programs on two processes, started by `accelerate launch` with the shipped configs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import ordnung
from ordnung.scripts.training.runs import LOCK

SCRIPTS = Path(ordnung.__file__).parent / "scripts"

# accelerate shards models on accelerator devices only. This makes it take the CPU for one, so that the shipped FSDP2
# config runs everywhere: devices, collectives (gloo) and sharding are real. A test adds the program itself, with `end`
# as its last call: sharded parameters keep the process group and its gloo threads alive after it is destroyed, and a
# thread that releases a tensor while the interpreter is torn down aborts the process (pytorch pull request 179291).
FSDP_ON_CPU = """
import os
import sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
torch.accelerator.is_available = lambda *args: True
PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)

def check_sharded(run):
    parameters = list(run.model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    assert sum(p.to_local().numel() for p in parameters) < 0.75 * sum(p.numel() for p in parameters)

def end(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire(timeout=0)
print("held", flush=True)
sys.stdin.read()
"""


def holding(folder: Path) -> subprocess.Popen:
    """A process that writes to the folder, as far as others can see; it ends where somebody else does."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / LOCK)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch(config: str, script: Path, arguments: list, **environment: str) -> str:
    """What the processes print to stdout.

    Args:
        config: a file of scripts/configs.
        environment: further variables.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SCRIPTS / "configs" / config]
    command += ["--main_process_port", port, script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-20000:]
    return done.stdout


def launch_sharded(program: str, folder: Path, arguments: list, **environment: str) -> str:
    """The same with the FSDP2 config on the CPU.

    Args:
        program: Python code after `FSDP_ON_CPU`.
        folder: where to write it.
    """
    script = folder / "fsdp_on_cpu.py"
    script.write_text(FSDP_ON_CPU + program)
    return launch("accelerate_fsdp2.yaml", script, arguments, ACCELERATE_TORCH_DEVICE="cpu", **environment)
