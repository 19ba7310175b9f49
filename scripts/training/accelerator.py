"""The accelerator of a training process."""

import os

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ordnung.scripts.common.errors import ScriptError


def make_accelerator(options, compiled: bool = False) -> Accelerator:
    """The accelerator of this process.

    Args:
        options: `PretrainOptions` or others with report_to, use_cpu, mixed_precision and output_dir.
        compiled: compile the model with torch.compile.
    Raises:
        ScriptError: a tracker that is unknown or not installed; FSDP on a machine without an accelerator device.
    """
    for name in options.report_to or []:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ScriptError(
                f"--report_to {name}: unknown tracker; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
    # Without an accelerator device Accelerator() would run launched processes side by side, each on its own.
    cpu = options.use_cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=options.mixed_precision,
        dynamo_backend="inductor" if compiled else None,
        log_with=options.report_to,
        project_dir=options.output_dir,
    )
    missing = set(options.report_to or []) - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise ScriptError(f"--report_to {missing.pop()}: its package is not installed; pip install it")
    if cpu and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ScriptError("FSDP needs an accelerator device; on the CPU use configs/accelerate_cpu.yaml")
    return accelerator
