"""Losses of a causal language model token by token, and by position."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F


@torch.no_grad()
def token_losses(model: torch.nn.Module, blocks: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Losses of blocks (n, N) of tokens, a batch at a time.

    Yields:
        (batch, N - 1) nats: entry i is the loss of token i + 1, which is predicted from i + 1 tokens.
    """
    model.eval()
    for tokens in torch.from_numpy(blocks.astype(np.int64)).to(model.device).split(batch_size):
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        yield F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").cpu().numpy()


def position_losses(model: torch.nn.Module, blocks: np.ndarray, batch_size: int) -> np.ndarray:
    """Mean loss at each position of blocks (n, N) of tokens: (N - 1,) nats per token, see `token_losses`."""
    return np.concatenate([*token_losses(model, blocks, batch_size)]).mean(0, dtype=np.float64)


def position_buckets(block_size: int) -> list[tuple[int, int]]:
    """First and last position of each bucket: 1 to 15 (token 0 is not predicted), 16 to 31, 32 to 63 and so on."""
    edges = [1, *(16 * 2**i for i in range(block_size.bit_length()) if 16 * 2**i < block_size), block_size]
    return [(first, end - 1) for first, end in zip(edges, edges[1:])]
