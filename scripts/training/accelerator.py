"""The accelerator of a training process."""

import logging
import os

import datasets
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import is_bf16_available
from transformers.utils import logging as transformers_logging

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.training.options import LoopOptions

logger = logging.getLogger("ordnung.training")


def computes_in_bf16(cpu: bool) -> bool:
    """Whether the device has instructions for bf16. Without them a processor is slower in it than in float32."""
    if cpu:
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_bf16_available()


def make_accelerator(options: LoopOptions) -> Accelerator:
    """The accelerator of this process, of which only the main one says how it gets on.

    `options.mixed_precision` "auto" becomes what it comes to here, so that this is what the run records.

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
    chosen = options.mixed_precision == "auto"
    if chosen:
        options.mixed_precision = "bf16" if computes_in_bf16(cpu) else "no"
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=options.mixed_precision,
        dynamo_backend="inductor" if options.torch_compile else None,
        log_with=options.report_to,
        project_dir=options.output_dir,
    )
    missing = set(options.report_to or []) - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise ScriptError(f"--report_to {missing.pop()}: its package is not installed; pip install it")
    if cpu and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ScriptError("FSDP needs an accelerator device; on the CPU use configs/accelerate_cpu.yaml")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ordnung").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if chosen:
        device = "processor" if cpu else "accelerator"
        has = "computes" if options.mixed_precision == "bf16" else "does not compute"
        logger.info(f"--mixed_precision auto: {options.mixed_precision}, as the {device} {has} in bf16")
    transformers_logging.disable_progress_bar()
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    return accelerator


def summed(accelerator: Accelerator, values: torch.Tensor) -> list[float]:
    """A vector's numbers, each summed over processes."""
    several = accelerator.num_processes > 1
    return (accelerator.reduce(values.to(accelerator.device).double(), "sum") if several else values).tolist()
