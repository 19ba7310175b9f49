"""The slots of the causal Linformer: what each token weighs in them, and their sums. Legend: `causal_linformer`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.grouped import per_query_head
from ordnung.modeling.ops.layout import reshape


def positive_weights(kind, weight, blocks, block_size, k, n, sinks=0):
    """Weights of the tokens of some blocks.

    Args:
        kind: "linear", "mean_pool" or "conv".
        weight: logits, (*P, n, k) for "linear" and (*P, n / k) for "conv"; None for "mean_pool".
        blocks: integer tensor of any shape (...), numbers of blocks; negative ones weigh nothing.
        block_size: C, which divides n.
        k: slots.
        n: positions of the table.
        sinks: S, the first tokens, which weigh nothing either.

    Returns:
        (..., *P, C, k), P being (1, 1) for "mean_pool".
    """
    within = torch.arange(block_size, device=blocks.device)
    table_blocks = blocks % (n // block_size)
    if kind == "linear":
        table = weight.unflatten(2, (n // block_size, block_size)).movedim(2, 0)  # (blocks, *P, C, k)
        table = table[table_blocks].softmax(-1, dtype=torch.promote_types(weight.dtype, torch.float32))
    else:
        position = table_blocks[..., None] * block_size + within
        segment = n // k
        slot = F.one_hot(position // segment, k)[..., None, None, :, :]  # (..., 1, 1, C, k)
        if kind == "conv":
            taps = weight.exp().movedim(2, 0)[position % segment]  # (..., C, *P)
            slot = slot * taps.movedim(-3, -1)[..., None]
        table = slot
    counted = blocks[..., None] * block_size + within >= sinks  # (..., C)
    return table * counted[..., None, None, :, None]


class Slots(NamedTuple):
    """The sizes of one layer's operator, and the weights of its slots: fields as `positive_weights` takes them."""

    kind: str
    weight: torch.Tensor | None
    k: int
    n: int
    C: int
    W: int
    S: int = 0

    @property
    def R(self) -> int:
        """Tokens of the window at most."""
        return (self.W + 1) * self.C

    @property
    def keys(self) -> int:
        """Keys that a block of queries is given: of the window, the sinks and the slots."""
        return self.R + self.S + self.k

    def weights(self, blocks):
        """(..., *P, C, k) of the tokens of `blocks` (...)."""
        if not self.k:
            return torch.zeros(*blocks.shape, 1, 1, self.C, 0, device=blocks.device)
        return positive_weights(self.kind, self.weight, blocks, self.C, self.k, self.n, self.S)


def add_up(weights, x, blocks):
    """Sums over the tokens of each block: weights (B or 1, T, H or 1, C, k), x (B, T C, H, D) to (B, T, k, H, D)."""
    B, _, H, D = x.shape
    own, C, k = weights.shape[2:]
    weights = reshape(weights.to(x.dtype).expand(B, blocks, own, C, k), B * blocks * own, C, k).mT
    if own == 1:
        return reshape(torch.bmm(weights, reshape(x, B * blocks, C, H * D)), B, blocks, k, H, D)
    x = reshape(reshape(x, B, blocks, C, H, D).transpose(2, 3), B * blocks * H, C, D)
    return reshape(torch.bmm(weights, x), B, blocks, H, k, D).transpose(2, 3)


def mean(sums, mass):
    """sums (..., k, H, D) over mass (..., H or 1, k), zero where there is none."""
    return sums / torch.where(mass > 0, mass, 1).mT[..., None]


def log_mass(mass):
    """What the logits of slots are raised by; -inf for empty ones."""
    return torch.where(mass > 0, mass, 1).log().masked_fill(mass <= 0, -torch.inf)


def hidden_where(seen, like):
    """A bias for logits of the dtype of `like`: 0 where `seen`, elsewhere -inf."""
    return torch.zeros((), dtype=like.dtype, device=like.device).where(seen, -torch.inf)


def for_queries(x, dim, key, query):
    """`x` with 1 or the heads of `key` in `dim` as 1 or the heads of `query`; both (B, N, heads, D)."""
    return x if x.shape[dim] == 1 else per_query_head(x, query.shape[2] // key.shape[2], dim)
