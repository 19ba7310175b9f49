"""Tokens taken, shifted, padded and reshaped, also in a graph for any length."""

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.chunks import is_graph


def take(x, index):
    """The tokens `index` (B, M) of x (B, N, ...): (B, M, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def select(condition, new, old):
    """torch.where with a condition that has fewer dimensions than the values."""
    return torch.where(condition.reshape(condition.shape + (1,) * (new.ndim - condition.ndim)), new, old)


def section(x, begin, size):
    """`size` tokens of x (B, N, ...) from token `begin` on, zeros where there are none: before 0, and from N on."""
    left = max(-begin, 0)
    part = x[:, max(begin, 0) :]
    right = size - left - part.shape[1]
    return F.pad(part, (0, 0, 0, 0, left, right)) if left or is_graph() or right else part


def last_tokens(before, x, count):
    """The last `count` tokens of x (B, N, ...), and of `before` where there are too few."""
    if x.shape[1] < count:
        x = torch.cat([before, x], dim=1)
    return x[:, x.shape[1] - count :]


def reshape(x, *shape):
    """x.reshape(shape), also in a graph for any length, where torch cannot prove that a number of blocks divides."""
    if not is_graph():
        return x.reshape(shape)
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    # a copy, as the graph's idea of the layout of an indexed tensor is not always that of the tensor
    return x.clone(memory_format=torch.contiguous_format).as_strided(shape, strides)


def first_tokens(x, N, dim):
    """A slice, and in a graph for any length, where torch cannot prove that there are N, a selection."""
    if is_graph():
        return x.index_select(dim, torch.arange(N, device=x.device))
    return x.narrow(dim, 0, N)


def prefix(start, added):
    """Sums before each block, from `start` (B or 1, ...) on, with `added` (B or 1, T, ...); and the sum after all.

    A shift, as subtracting a block's own part from an inclusive sum would leak its rounding.
    """
    B = added.shape[0] if start.shape[0] == 1 else start.shape[0]
    terms = [x.expand(B, *x.shape[1:]) for x in (start[:, None], added.to(start.dtype))]
    sums = torch.cat(terms, dim=1).cumsum(1)
    return sums[:, :-1], sums[:, -1]
