"""Softmax attention to a few keys of each row: a window, the first tokens, every s-th token and random blocks.

Legend: N tokens, D head dimension.

Which keys j a query i sees, both counted from the row's first token; in a causal model j <= i besides:

    window   i - j < w; bidirectional: |i - j| <= w
    global   j < g; bidirectional: also i < g, or a mask that says which tokens are global
    strided  j % s == s - 1 ("fixed" of Child et al. 2019, arXiv 1904.10509)
    random   block j // r is one of the R blocks of lowest priority. Causal: of those complete before the query's own
             block i // r, by a priority drawn for each block: a reservoir sample. Bidirectional: of all blocks of the
             row, by a priority drawn for each pair of blocks (BigBird: Zaheer et al. 2020, arXiv 2007.14062).

With w >= r a key of a causal model is seen by one interval of queries (`sparse_keys.deaths`): what is unseen once stays
unseen. That is why a small generation state suffices (`ops.sparse_state`).
"""

from typing import NamedTuple

import torch

PRIME = 2**31 - 1


class Pattern(NamedTuple):
    """Which keys a query sees; see the top of the file."""

    window: int
    num_global: int = 0
    stride: int | None = None
    num_random: int = 0
    random_block: int = 64
    seed: int = 0
    causal: bool = True

    @property
    def local(self) -> bool:
        """Whether there is nothing but the window."""
        return not (self.num_global or self.stride or self.num_random)


def scramble(x):
    """A permutation of the numbers below `PRIME`, as good as random; of a number or a tensor of int64."""
    for _ in range(3):
        square = x * x % PRIME
        x = (square * square % PRIME * x + 1013904223) % PRIME  # x -> x^5 + c is one to one
    return x


def priority(seed, *blocks):
    """The priority of a block, or of a pair of blocks: numbers or tensors of int64."""
    x = scramble(seed % PRIME)
    for block in blocks:
        x = scramble((x + block) % PRIME)
    return x


def mask_naive(pattern: Pattern, N: int, is_global=None) -> torch.Tensor:
    """(N, N) which keys the queries of one row see, straight from the definition at the top of the file.

    Args:
        is_global: N truth values in place of the first `num_global` tokens (bidirectional).
    """
    w, g, s, R, r, seed, causal = pattern
    is_global = [j < g for j in range(N)] if is_global is None else list(is_global)
    mask = torch.zeros(N, N, dtype=torch.bool)
    for i in range(N):
        if causal:
            drawn = sorted(range(i // r), key=lambda b: priority(seed, b))[:R]
        else:
            drawn = sorted(range(-(-N // r)), key=lambda b, i=i: priority(seed, i // r, b))[:R]
        for j in range(i + 1 if causal else N):
            near = i - j < w if causal else abs(i - j) <= w
            strided = s is not None and j % s == s - 1
            looks_at_all = is_global[i] and not causal
            mask[i, j] = near or is_global[j] or strided or looks_at_all or j // r in drawn
    return mask


def sparse_attention_naive(query, key, value, pattern: Pattern, is_global=None):
    """softmax(Q K^T / sqrt(D)) V of one row and one head, over the keys that each query sees.

    Args:
        query, key, value: (N, D).

    Returns:
        (N, D).
    """
    mask = mask_naive(pattern, len(query), is_global)
    scores = (query @ key.T / query.shape[1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value
