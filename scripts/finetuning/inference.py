"""What a model says of examples, in batches of like lengths, on every process."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ordnung.scripts.finetuning.data import Batches, Examples


@torch.no_grad()
def predict(
    accelerator: Accelerator,
    outputs_of: Callable[[Examples, np.ndarray], torch.Tensor],
    examples: Examples,
    batch_size: int,
) -> np.ndarray:
    """Scores of every row, in the order of the rows, on every process.

    Args:
        outputs_of: gives the model's scores of some rows, (rows, labels), or (their tokens, labels) of all real tokens
            one after the other.
    Returns:
        (n, labels), or (tokens of all rows, labels) of a model that labels tokens.
    """
    order, parts = np.argsort(-examples.lengths, kind="stable"), []
    stride, processes = batch_size * accelerator.num_processes, accelerator.num_processes
    for start in range(0, len(order), stride):
        rows = order[start : start + stride]
        share = math.ceil(len(rows) / processes)
        # processes' batches must be equal in size: some rows are predicted twice and dropped
        own = np.resize(rows, share * processes).reshape(-1, share)[accelerator.process_index]
        parts.append(accelerator.gather(outputs_of(examples, own))[: len(rows)])
    scores = torch.cat(parts).float().cpu().numpy()
    logits = np.empty_like(scores)
    logits[order] = scores
    return logits


class Runner:
    """A model on its device that scores examples."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, options):
        self.accelerator = Accelerator(cpu=options.use_cpu or not torch.accelerator.is_available())
        self.model, self.batch_size = model.to(self.accelerator.device).eval(), options.per_device_eval_batch_size
        names = set(inspect.signature(model.forward).parameters)
        self.constants = {"use_cache": False} if "use_cache" in names else {}
        self.make_batch = Batches(tokenizer, False, names)

    def _logits(self, examples: Examples, rows: np.ndarray) -> torch.Tensor:
        batch = {name: value.to(self.accelerator.device) for name, value in self.make_batch(examples, rows).items()}
        return self.model(**batch, **self.constants).logits

    def __call__(self, examples: Examples) -> np.ndarray:
        """As `predict`."""
        return predict(self.accelerator, self._logits, examples, self.batch_size)
