"""Which keys each block of queries gathers in sparse attention.

Legend: R rows, N tokens, C queries of a block, n blocks, K keys that a block gathers; w, g, s, r as in
`ops.sparse_pattern`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ordnung.modeling.ops.sparse_blocks import BLOCK, WIDE, Plan, is_exporting, spare
from ordnung.modeling.ops.sparse_pattern import Pattern, priority

NEVER = 2**62
KEPT = 2048  # slabs of causal models of which `kept_spans` stay: 16 bytes for each of some hundred keys


def is_fixed(pattern: Pattern, position: torch.Tensor) -> torch.Tensor:
    """Whether the keys at these positions are global or strided ones."""
    fixed = position < pattern.num_global
    if pattern.stride:
        fixed = fixed | (position % pattern.stride == pattern.stride - 1)
    return fixed


def ordered(pattern: Pattern, *blocks: torch.Tensor) -> torch.Tensor:
    """Numbers that sort blocks by priority and name them: block = number % 2**31."""
    return priority(pattern.seed, *blocks) * 2**31 + blocks[-1]


def reservoir(pattern: Pattern, rows: int, device) -> torch.Tensor:
    """(rows, R) numbers (see `ordered`) of the blocks that the queries of each block see; NEVER where there are fewer.

    Causal: the R lowest of the blocks before. The lowest so far is a running minimum; what it displaces goes on to the
    next place.
    """

    def after(x):
        return torch.cat([x.new_full((1,), NEVER), x[:-1]])

    stream, places = after(ordered(pattern, torch.arange(rows, device=device))), []
    for _ in range(pattern.num_random):
        places.append(stream.cummin(0).values)
        stream = torch.maximum(stream, after(places[-1]))
    return torch.stack(places, 1)


def deaths(pattern: Pattern, N: int, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N,) the first query of a causal model that sees each key no more; and `reservoir`, where it is used."""
    position = torch.arange(N, device=device)
    death, drawn = position + pattern.window, None
    if pattern.num_random:
        r = pattern.random_block
        drawn = reservoir(pattern, (N - 1) // r + 1 + spare(), device)
        block = torch.where(drawn < NEVER, drawn % 2**31, -1) + 1  # 0 where there is none
        end = ((torch.arange(drawn.shape[0], device=device) + 1) * r)[:, None].expand_as(drawn)
        last = end.new_zeros(drawn.shape[0] + 1).scatter_reduce(0, block.flatten(), end.flatten(), "amax")
        death = torch.maximum(death, last[position // r + 1])
    return death.masked_fill_(is_fixed(pattern, position), NEVER), drawn


def fixed_positions(pattern: Pattern, end, device) -> torch.Tensor:
    """The positions of the global tokens and of the strided ones before `end`, each once; some are no tokens'."""
    positions = torch.arange(pattern.num_global, device=device)
    if pattern.stride:
        count = end // pattern.stride + spare()
        strided = torch.arange(count, device=device) * pattern.stride + pattern.stride - 1
        positions = torch.cat([positions, strided.masked_fill(strided < pattern.num_global, NEVER)])
    return positions


def positions_of(pattern: Pattern, blocks: torch.Tensor) -> torch.Tensor:
    """The positions (..., R r) of the tokens of blocks (..., R), given by their numbers (see `ordered`)."""
    token = torch.arange(pattern.random_block, device=blocks.device)
    return ((blocks % 2**31)[..., None] * pattern.random_block + token).flatten(-2)


def causal_spans(pattern: Pattern, N, start, size: int, death, drawn, end: int | None, beyond: bool = False):
    """What blocks of queries gather, and which queries see it.

    Args:
        start: (n,) the first queries of the blocks, of `size` queries each.
        death, drawn: as `deaths` gives them.
        end: leave out what none of these queries sees, and no strided token from here on is seen; or None: how many
            keys there are then depends on the lengths alone.
        beyond: those beyond the windows alone: see `Plan.beyond`.

    Returns:
        (n, K) positions, within the row; the first query that sees each; and the first one after it that does not.
    """
    w, device = pattern.window, death.device
    start = start[:, None]
    # the keys of the windows; or those that leave one while others of these queries still have them in theirs
    near = start + torch.arange(-w, size - w if beyond else size, device=device)
    # before that window, each key once
    far = fixed_positions(pattern, N if end is None else end, device).expand(start.shape[0], -1)
    born, dead = [near, far], [death[near.clamp(0, N - 1)] * (near >= 0), NEVER * (far < start - w)]
    early = [near + w if beyond else near, far]
    if pattern.num_random:
        chosen = drawn[start[:, 0] // pattern.random_block]  # (n, R)
        far = positions_of(pattern, chosen)
        seen = (chosen < NEVER).repeat_interleave(pattern.random_block, -1)
        seen = seen & (far < start - w) & ~is_fixed(pattern, far)
        born.append(far)
        dead.append(death[far.clamp(0, N - 1)] * seen)
        early.append(far)
    born, early, dead = (torch.cat(x, 1) for x in (born, early, dead))
    if end is not None:
        used = ((dead > start) & (dead > early)).any(0)
        born, early, dead = born[:, used], early[:, used], dead[:, used]
    return born.clamp(0, N - 1), early.int(), dead.clamp(max=2**31 - 1).int()  # half as many bytes to compare


@lru_cache(KEPT)
def kept_spans(pattern: Pattern, N: int, first: int, number: int, size: int, end: int, beyond: bool):
    """`causal_spans` on the CPU, of so many blocks from the query `first` on: layers and calls share them."""
    start = block_starts(N, first, number, size, "cpu")
    return causal_spans(pattern, N, start, size, *kept_deaths(pattern, N), end, beyond)


@lru_cache(1)
def kept_deaths(pattern: Pattern, N: int):
    """`deaths` on the CPU, of the last length alone."""
    return deaths(pattern, N, "cpu")


def block_starts(N, first, number, size: int, device) -> torch.Tensor:
    """(number,) the first queries of blocks from the query `first` on; of blocks beyond the row, those of its last."""
    return (first + size * torch.arange(number, device=device)).clamp(max=(N - 1) // BLOCK * BLOCK)


class Landmarks(NamedTuple):
    """The keys of a bidirectional model that all queries of a row see; rows differ where there is padding or a mask."""

    tokens: torch.Tensor  # (R or 1, g) the positions of the global tokens, which see all too
    positions: torch.Tensor  # (R or 1, L) those and the strided ones
    seen: torch.Tensor  # (R or 1, L) which of these are there, and not padding
    taken: torch.Tensor  # (R or 1, N) whether each key is one of them
    looking: torch.Tensor  # (R or 1, N) whether each token is a global one

    @classmethod
    def of(cls, pattern: Pattern, N, length: torch.Tensor, is_global: torch.Tensor | None) -> "Landmarks":
        """`length` is (R or 1, 1), `is_global` as `sparse_attention` takes it."""
        position = torch.arange(N, device=length.device)[None]
        if is_global is None:
            positions = fixed_positions(pattern, N, length.device).expand(length.shape[0], -1)
            tokens = positions[:, : pattern.num_global]
            taken, looking = is_fixed(pattern, position), position < pattern.num_global
            return cls(
                tokens, positions, positions < length, *(x.expand(length.shape[0], -1) for x in (taken, looking))
            )
        pattern = pattern._replace(num_global=0)
        is_global = is_global & (position < length)
        counts = is_global.sum(1, keepdim=True)
        tokens = (~is_global).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
        strided = fixed_positions(pattern, N, length.device).expand(tokens.shape[0], -1)
        seen = torch.arange(tokens.shape[1], device=length.device) < counts
        seen = torch.cat([seen, (strided < length) & ~is_global.gather(1, strided.clamp(max=N - 1))], 1)
        taken = is_global | is_fixed(pattern, position)
        return cls(tokens, torch.cat([tokens, strided], 1), seen, taken, is_global)


def bidirectional_keys(pattern: Pattern, N, start, size: int, length, landmarks: Landmarks, beyond: bool = False):
    """What `Plan.keys` gives of blocks from `start` (n,) on, of `size` queries: `BLOCK` where there are random blocks.

    Args:
        length: (R or 1, 1).
        beyond: see `Plan.beyond`.
    """
    w, device = pattern.window, length.device
    rows, bound = landmarks.taken.shape[0], length[..., None]
    row = torch.arange(rows, device=device)[:, None, None]
    start, blocks = start[None, :, None], len(start)
    query = torch.minimum(start + torch.arange(size, device=device), bound - 1)  # (R, n, C); beyond the row: its last

    def free(key):
        """Whether keys (R or 1, n, K) are there, and no landmarks."""
        return (key >= 0) & (key < bound) & ~landmarks.taken[row, key.clamp(0, N - 1)]

    keys, masks = [landmarks.positions[:, None]], [landmarks.seen[:, None, None]]
    if beyond:
        masks[0] = masks[0] & ((query[..., None] - keys[0][:, :, None]).abs() > w)
    else:
        near = start + torch.arange(-w, size + w, device=device)  # (1, n, C + 2 w)
        keys.append(near)
        masks.append(free(near)[:, :, None] & ((query[..., None] - near[:, :, None]).abs() <= w))
    if pattern.num_random:
        r = pattern.random_block
        touched = BLOCK // r if BLOCK % r == 0 else 1 if r % BLOCK == 0 else (BLOCK - 2) // r + 2
        own = start // r + torch.arange(touched, device=device)  # (1, n, S) the blocks of these queries
        block = torch.arange((N - 1) // r + 1 + spare(), device=device)
        order = ordered(pattern, own[..., None], block)  # (1, n, S, blocks)
        order = torch.where(block * r < bound[..., None], order, NEVER)
        order = torch.cat([order, order.new_full((*order.shape[:3], pattern.num_random), NEVER)], -1)
        order = order.topk(pattern.num_random, largest=False).values  # (R or 1, n, S, blocks drawn)
        far = positions_of(pattern, order).flatten(2)  # (R or 1, n, K)
        seen = free(far) & (order < NEVER).repeat_interleave(r, -1).flatten(2)
        own = own.repeat_interleave(pattern.num_random * r, -1)
        seen = seen[:, :, None] & (query[..., None] // r == own[:, :, None])
        keys.append(far)
        masks.append(seen & ((query[..., None] - far[:, :, None]).abs() > w))
    keys = torch.cat([x.expand(rows, blocks, -1) for x in keys], -1)
    return keys.clamp(0, N - 1), torch.cat([x.expand(rows, blocks, size, -1) for x in masks], -1)


def make_plan(pattern: Pattern, N, device, lengths=None, is_global=None) -> tuple[Plan, Landmarks | None]:
    """Which keys the blocks of queries of rows of N tokens gather; and of a bidirectional model its landmarks.

    Args:
        lengths, is_global: as `sparse_attention` takes them.
    """
    if pattern.causal:

        def keys_of(first, number, size, end, beyond=False):
            start = block_starts(N, first, number, size, device)
            # where a mode looks at each operation, its tensors may be others than those that are kept
            if end is None or is_in_torch_dispatch_mode():
                born, early, dead = causal_spans(pattern, N, start, size, *deaths(pattern, N, device), end, beyond)
            else:
                born, early, dead = kept_spans(pattern, N, first, number, size, end, beyond)
            # beyond the row: what sees at least itself
            query = (start[:, None] + torch.arange(size, device=device)).clamp(max=N - 1).int()[..., None]
            return born[None], ((early[:, None] <= query) & (query < dead[:, None]))[None]

        def causal(row, first, last):
            end = None if row is None else min(N, last * BLOCK)  # slabs, which are computed on a CPU and in no graph
            return keys_of(first * BLOCK, last - first, BLOCK, end)

        def beyond(row, start, number, size):
            return keys_of(start, number, size, max(0, start + number * size - pattern.window), beyond=True)

        inner = inner_blocks(pattern, N, device, None if pattern.local else beyond)
        return Plan(causal, True, pattern.window // BLOCK, *inner), None

    rows = 1 if lengths is None and is_global is None else (is_global if lengths is None else lengths).shape[0]
    length = torch.full((rows, 1), N, device=device) if lengths is None else lengths[:, None].clamp(min=1)
    landmarks = Landmarks.of(pattern, N, length, is_global)

    def bidirectional(row, first, last):
        some = slice(None) if row is None or rows == 1 else slice(row, row + 1)
        here = Landmarks(*(x[some] for x in landmarks))
        start = block_starts(N, first * BLOCK, last - first, BLOCK, device)
        return bidirectional_keys(pattern, N, start, BLOCK, length[some], here)

    def both_beyond(row, start, number, size):
        start = block_starts(N, start, number, size, device)
        return bidirectional_keys(pattern, N, start, size, length, landmarks, beyond=True)

    beyond = None if pattern.local and is_global is None else both_beyond
    inner = inner_blocks(pattern, N, device, beyond) if rows == 1 and lengths is None else ()
    return Plan(bidirectional, rows == 1, 0, *inner), landmarks


def inner_blocks(pattern: Pattern, N, device, beyond) -> tuple:
    """What `Plan` says of the blocks of a row of N tokens that see their whole windows; empty if there are none."""
    w, causal = pattern.window, pattern.causal
    edge = (w + BLOCK - 1) // BLOCK
    blocks = () if is_exporting() else range(edge, N // BLOCK - (0 if causal else edge))
    if not blocks:
        return ()
    reach = w, 0 if causal else w
    mask = torch.ones(BLOCK, BLOCK + sum(reach), dtype=torch.bool, device=device)
    mask = mask.tril_(sum(reach)).triu_(1 if causal else 0)
    # each block of queries of an encoder has its own random blocks
    return blocks, reach, mask, beyond, 1 if pattern.num_random and not causal else WIDE


def pairs_seen(pattern: Pattern, N: int) -> int:
    """How many pairs of a query and a key of one row of N tokens there are.

    Exact for a causal model; for a bidirectional one the random blocks are taken to hold no key that is seen anyway.
    """
    if pattern.causal:
        return int((deaths(pattern, N, "cpu")[0].clamp(max=N) - torch.arange(N, device="cpu")).sum())
    position = torch.arange(N, device="cpu")
    first, last = (position - pattern.window).clamp(min=0), (position + pattern.window).clamp(max=N - 1)
    fixed = is_fixed(pattern, position).long()
    before = torch.cat([fixed.new_zeros(1), fixed.cumsum(0)])  # those before each position
    near = last - first + 1
    seen = near + before[-1] - (before[last + 1] - before[first]) + pattern.num_random * pattern.random_block
    return int(seen.clamp(max=N).masked_fill(position < pattern.num_global, N).sum())
