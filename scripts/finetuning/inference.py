"""What a model says of examples, in batches of like lengths, on every process."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ordnung.scripts.finetuning.data import Batches, Examples


def scores_of(outputs, mask: torch.Tensor) -> torch.Tensor:
    """A model's scores of rows, (rows, labels), or of their real tokens one after the other, (tokens, labels).

    Args:
        mask: (rows, longest), 0 for padding.
    """
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)[mask.bool()]
    return outputs.logits if outputs.logits.ndim == 2 else outputs.logits[mask.bool()]


@torch.no_grad()
def predict(
    accelerator: Accelerator,
    run: Callable[[dict[str, torch.Tensor]], Any],
    make_batch: Batches,
    examples: Examples,
    batch_size: int,
) -> np.ndarray:
    """Scores of every row, in the order of the rows, on every process.

    Args:
        run: gives the model's outputs for a batch.
    Returns:
        (n, labels), or (tokens of all rows, labels) of a model that labels tokens.
    """
    order, parts = np.argsort(-examples.lengths, kind="stable"), []
    stride, processes = batch_size * accelerator.num_processes, accelerator.num_processes
    for start in range(0, len(order), stride):
        rows = order[start : start + stride]
        share = math.ceil(len(rows) / processes)
        # processes' batches must be equal in size: some rows are predicted twice and dropped
        shares = np.resize(rows, share * processes).reshape(-1, share)
        batch = make_batch(examples, shares[accelerator.process_index])
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        outputs = run(batch)
        scores = scores_of(outputs, batch["attention_mask"])
        by_token = "start_logits" in outputs or outputs.logits.ndim > 2
        counts = examples.lengths if by_token else np.ones_like(examples.lengths)
        gathered = accelerator.gather(accelerator.pad_across_processes(scores, dim=0))
        gathered = gathered.view(processes, -1, scores.shape[1])
        real = [some[:count] for some, count in zip(gathered, counts[shares].sum(1))]
        parts.append(torch.cat(real)[: counts[rows].sum()])
    scores = torch.cat(parts).float().cpu().numpy()
    if by_token:
        order = np.concatenate([np.arange(examples.starts[row], examples.starts[row + 1]) for row in order])
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

    def __call__(self, examples: Examples) -> np.ndarray:
        """As `predict`."""
        run = partial(self.model, **self.constants)
        return predict(self.accelerator, lambda batch: run(**batch), self.make_batch, examples, self.batch_size)
