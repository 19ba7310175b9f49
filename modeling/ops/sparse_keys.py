"""Which keys each block of queries gathers in sparse attention.

Legend: R rows, N tokens, C queries of a block, n blocks, K keys that a block gathers; w, g, s, r as in
`ops.sparse_pattern`.
"""

from typing import NamedTuple

import torch

from ordnung.modeling.ops.sparse_blocks import BLOCK, Plan, is_exporting, spare
from ordnung.modeling.ops.sparse_pattern import Pattern, priority

NEVER = 2**62


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
    return death.masked_fill(is_fixed(pattern, position), NEVER), drawn


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


def causal_keys(pattern: Pattern, N, first, last, death, drawn, tight: bool):
    """What the queries of the blocks from `first` on, before `last`, gather: see `Plan.keys`.

    Args:
        death, drawn: as `deaths` gives them.
        tight: leave out what none of these queries sees; that many keys depend on more than the lengths.

    Returns:
        (1, n, K) positions, within the row, and (1, n, C, K) which of them each query sees.
    """
    w, device = pattern.window, death.device
    start = torch.arange(first, last, device=device).clamp(max=(N - 1) // BLOCK)[:, None] * BLOCK  # (n, 1)
    query = (start + torch.arange(BLOCK, device=device)).clamp(max=N - 1)  # beyond the row: what sees at least itself
    near = start + torch.arange(-w, BLOCK, device=device)  # (n, w + C)
    # before that window, each key once
    far = fixed_positions(pattern, min(N, last * BLOCK) if tight else N, device).expand(start.shape[0], -1)
    born, dead = [near, far], [death[near.clamp(0, N - 1)] * (near >= 0), NEVER * (far < start - w)]
    if pattern.num_random:
        chosen = drawn[start[:, 0] // pattern.random_block]  # (n, R)
        far = positions_of(pattern, chosen)
        seen = (chosen < NEVER).repeat_interleave(pattern.random_block, -1)
        seen = seen & (far < start - w) & ~is_fixed(pattern, far)
        born.append(far)
        dead.append(death[far.clamp(0, N - 1)] * seen)
    born, dead = torch.cat(born, 1), torch.cat(dead, 1)
    if tight:
        used = (dead > start).any(0)
        born, dead = born[:, used], dead[:, used]
    early, dead, query = born.int(), dead.clamp(max=2**31 - 1).int(), query.int()  # half as many bytes to compare
    mask = (early[:, None] <= query[..., None]) & (query[..., None] < dead[:, None])
    return born.clamp(0, N - 1)[None], mask[None]


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


def bidirectional_keys(pattern: Pattern, N, first, last, length: torch.Tensor, landmarks: Landmarks):
    """As `causal_keys`, for R or 1 rows; `length` is (R or 1, 1)."""
    w, device = pattern.window, length.device
    rows, bound = landmarks.taken.shape[0], length[..., None]
    row = torch.arange(rows, device=device)[:, None, None]
    start = torch.arange(first, last, device=device).clamp(max=(N - 1) // BLOCK)[None, :, None] * BLOCK  # (1, n, 1)
    query = torch.minimum(start + torch.arange(BLOCK, device=device), bound - 1)  # (R, n, C); beyond the row: its last

    def free(key):
        """Whether keys (R or 1, n, K) are there, and no landmarks."""
        return (key >= 0) & (key < bound) & ~landmarks.taken[row, key.clamp(0, N - 1)]

    near = start + torch.arange(-w, BLOCK + w, device=device)  # (1, n, C + 2 w)
    keys, masks = [near], [free(near)[:, :, None] & ((query[..., None] - near[:, :, None]).abs() <= w)]
    keys.append(landmarks.positions[:, None])
    masks.append(landmarks.seen[:, None, None])
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
    keys = torch.cat([x.expand(rows, last - first, -1) for x in keys], -1)
    return keys.clamp(0, N - 1), torch.cat([x.expand(rows, last - first, BLOCK, -1) for x in masks], -1)


def make_plan(pattern: Pattern, N, device, lengths=None, is_global=None) -> tuple[Plan, Landmarks | None]:
    """Which keys the blocks of queries of rows of N tokens gather; and of a bidirectional model its landmarks.

    Args:
        lengths, is_global: as `sparse_attention` takes them.
    """
    if pattern.causal:
        tables = deaths(pattern, N, device)

        def causal(row, first, last):
            return causal_keys(pattern, N, first, last, *tables, tight=row is not None)

        return Plan(causal, True, *inner_blocks(pattern, N, device)), None

    rows = 1 if lengths is None and is_global is None else (is_global if lengths is None else lengths).shape[0]
    length = torch.full((rows, 1), N, device=device) if lengths is None else lengths[:, None].clamp(min=1)
    landmarks = Landmarks.of(pattern, N, length, is_global)

    def bidirectional(row, first, last):
        some = slice(None) if row is None or rows == 1 else slice(row, row + 1)
        return bidirectional_keys(pattern, N, first, last, length[some], Landmarks(*(x[some] for x in landmarks)))

    return Plan(bidirectional, rows == 1, *(inner_blocks(pattern, N, device) if rows == 1 else ())), landmarks


def inner_blocks(pattern: Pattern, N, device) -> tuple:
    """What `Plan` says of the blocks of a row of N tokens that see their whole window alone; empty if none do."""
    w, causal = pattern.window, pattern.causal
    edge = (w + BLOCK - 1) // BLOCK
    blocks = range(edge, N // BLOCK - (0 if causal else edge)) if pattern.local and not is_exporting() else ()
    if not blocks:
        return ()
    reach = w, 0 if causal else w
    distance = torch.arange(BLOCK, device=device)[:, None] - torch.arange(-w, BLOCK + reach[1], device=device)
    return blocks, reach, (distance < w) & (distance >= 0) if causal else distance.abs() <= w


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
