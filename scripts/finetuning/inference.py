"""What a model says of examples, in batches of like lengths, on every process."""

import math
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator

from ordnung.scripts.finetuning.data import Examples


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
