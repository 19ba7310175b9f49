"""The generation state of causal sparse attention: the keys and values that later queries may see, each held once.

Legend: B rows, M tokens of a step, S places, G key and value heads, D head dimension; w, g, r, R, s as in
`ops.sparse_pattern`.

The places are [g first tokens | R random blocks of r tokens | window of w tokens | strided tokens]. A token enters the
window at place (position % w). When the token w later comes it leaves: to its own place among the others if it is one
that stays visible, or for good. Only the strided tokens grow in number. Rows count their tokens each for itself.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.sparse_blocks import attend, attend_weighted, is_graph
from ordnung.modeling.ops.sparse_keys import NEVER, is_fixed, ordered, positions_of, reservoir
from ordnung.modeling.ops.sparse_pattern import Pattern

STEP = 64  # tokens that are added at a time to a state that is not empty


class SparseState(NamedTuple):
    """What is held."""

    pairs: torch.Tensor  # (B, S, 2, G, D) keys and values
    there: torch.Tensor  # (B, S) whether a place holds a token, one that the next token sees or is about to push out
    count: torch.Tensor  # (B,) tokens so far
    drawn: torch.Tensor  # (B, R) numbers of the random blocks (see `ordered`) that the last token sees


def window_start(pattern: Pattern) -> int:
    """The first place of the window."""
    return pattern.num_global + pattern.num_random * pattern.random_block


def strided_places(pattern: Pattern, tokens: int) -> int:
    """Places for the strided tokens that have left the window, of rows of so many tokens."""
    if not pattern.stride:
        return 0
    return max(0, (tokens - pattern.window) // pattern.stride - pattern.num_global // pattern.stride)


def empty_state(key: torch.Tensor, pattern: Pattern, tokens: int = 0) -> SparseState:
    """A state for keys (B, M, G, D); `tokens` is the length that strided tokens get places for at once."""
    B, _, G, D = key.shape
    places = window_start(pattern) + pattern.window + strided_places(pattern, tokens)
    drawn = torch.full((B, pattern.num_random), NEVER, device=key.device)
    pairs = key.new_zeros(B, places, 2, G, D)
    return SparseState(pairs, torch.zeros(B, places, dtype=torch.bool, device=key.device), drawn.new_zeros(B), drawn)


def held(pattern: Pattern, S, count, drawn):
    """Which tokens are held after `count` (B,) of them: positions (B, S), and (B, S) whether there is one."""
    device, w, last = count.device, pattern.window, count[:, None] - 1
    position = [torch.arange(pattern.num_global, device=device).expand(count.shape[0], -1)]
    there = [position[0] <= last - w]
    if pattern.num_random:
        position.append(positions_of(pattern, drawn))
        there.append((drawn < NEVER).repeat_interleave(pattern.random_block, 1) & (position[-1] <= last - w))
        there[-1] = there[-1] & ~is_fixed(pattern, position[-1])
    position.append(last - (last - torch.arange(w, device=device)) % w)
    there.append(position[-1] >= 0)
    if pattern.stride:
        number = torch.arange(S - window_start(pattern) - w, device=device) + pattern.num_global // pattern.stride
        position.append((number * pattern.stride + pattern.stride - 1).expand(count.shape[0], -1))
        there.append(position[-1] <= last - w)
    return torch.cat(position, 1), torch.cat(there, 1)


def own_place(pattern: Pattern, position, drawn):
    """(B,) the place outside of the window for tokens at `position` (B,), and (B,) whether they have one."""
    start, w = window_start(pattern), pattern.window
    place, known = position, position < pattern.num_global
    if pattern.stride:
        number = position // pattern.stride - pattern.num_global // pattern.stride
        strided = ~known & (position % pattern.stride == pattern.stride - 1)
        place, known = torch.where(strided, start + w + number, place), known | strided
    if pattern.num_random:
        r = pattern.random_block
        match = (drawn < NEVER) & (drawn % 2**31 == (position // r)[:, None])  # (B, R)
        inside = pattern.num_global + match.to(torch.uint8).argmax(1) * r + position % r
        chosen = ~known & match.any(1)
        place, known = torch.where(chosen, inside, place), known | chosen
    return place, known & (position >= 0)


def redrawn(pattern: Pattern, count, drawn):
    """The random blocks of the next block of queries, (B, R), and its first query (B,), after `count` (B,) tokens."""
    block = (count - 1) // pattern.random_block  # complete by then; before the first token: none
    number = torch.where(block >= 0, ordered(pattern, block.clamp(min=0)), NEVER)
    worst, place = drawn.max(1, keepdim=True)
    return drawn.scatter(1, place, torch.minimum(worst, number[:, None])), (block + 1) * pattern.random_block


def take_rows(x, index):
    """x (B, S, ...) at index (B, K): (B, K, ...)."""
    offset = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).unflatten(0, index.shape)


def grown(pattern: Pattern, state: SparseState, count) -> SparseState:
    """With places for the strided tokens of rows of `count` (B,) tokens; a graph cannot look how many these are."""
    if not pattern.stride or is_graph():
        return state
    missing = strided_places(pattern, int(count.max())) - (
        state.pairs.shape[1] - window_start(pattern) - pattern.window
    )
    if missing <= 0:
        return state
    more = [x.new_zeros(x.shape[0], missing, *x.shape[2:]) for x in state[:2]]
    pairs, there = (torch.cat(pair, 1) for pair in zip(state[:2], more))
    return state._replace(pairs=pairs, there=there)


def moved(pattern: Pattern, state: SparseState, pairs, count, drawn) -> SparseState:
    """The state after `pairs` (B, M, 2, G, D) came, so that there are `count` tokens."""
    S, before = state.pairs.shape[1], state.count[:, None]
    position, there = held(pattern, S, count, drawn)
    own = torch.arange(S, device=pairs.device)
    source = torch.where(position >= before - pattern.window, window_start(pattern) + position % pattern.window, own)
    source = torch.where(position >= before, S + position - before, source)
    pairs = take_rows(torch.cat([state.pairs, pairs], 1), torch.where(there, source, own))
    return SparseState(pairs, there, count, drawn)


def move_one(pattern: Pattern, state: SparseState, pairs, real, count, drawn, leaves: bool) -> SparseState:
    """`moved` for one token a row, where `real` (B,) says so, in place; `leaves` if one may go to its own place."""
    if drawn is not state.drawn:
        start, replaced = pattern.num_global, (drawn != state.drawn).repeat_interleave(pattern.random_block, 1)
        state.there[:, start : start + replaced.shape[1]] &= ~replaced
        state.drawn.copy_(drawn)
    kept, there = state.pairs.flatten(0, 1), state.there.flatten()
    row = state.pairs.shape[1] * torch.arange(count.shape[0], device=count.device) if count.shape[0] > 1 else 0
    # the place of the token, and of the one that it pushes out
    window = row + window_start(pattern) + state.count % pattern.window
    pairs = pairs[:, 0]
    if leaves:
        place, known = own_place(pattern, state.count - pattern.window, drawn)
        known = known if real is None else known & real
        place = torch.where(known, row + place, window)
        kept.index_copy_(0, place, kept.index_select(0, window))
        there.index_fill_(0, place, True)
    if real is None:
        there.index_fill_(0, window, True)
    else:
        pairs = torch.where(real[:, None, None, None], pairs, kept.index_select(0, window))
        there.index_copy_(0, window, real | there.index_select(0, window))
    kept.index_copy_(0, window, pairs)
    state.count.copy_(count)
    return state


def visible(pattern: Pattern, query, key, drawn, redrawn, turn):
    """(B, M, K) which keys at positions (B, K) the queries at positions (B, M) see."""
    query, key = query[:, :, None], key[:, None]
    seen = (query - key < pattern.window) | is_fixed(pattern, key)
    if turn is not None:
        block = (key // pattern.random_block)[..., None]  # (B, 1, K, 1)
        early, late = (
            ((block == (x % 2**31)[:, None, None]) & (x < NEVER)[:, None, None]).any(-1) for x in (drawn, redrawn)
        )
        seen = seen | torch.where(query >= turn[:, None, None], late, early)
    return seen & (key <= query)


def add(pattern: Pattern, state: SparseState, query, pairs, lengths, in_place, weigh, **options):
    """`step` for so few tokens that the random blocks change once at most."""
    M = pairs.shape[1]
    count = state.count + (M if lengths is None else lengths)
    state = grown(pattern, state, count)
    turns, leaves = what_happens(pattern, state, 2 if weigh else M)
    drawn, late, turn = state.drawn, state.drawn, None
    if turns:
        late, turn = redrawn(pattern, state.count, drawn)
        drawn = torch.where((count > turn)[:, None], late, drawn)
    output = weights = None
    if (M > 1 or weigh) and query is not None:
        position, there = held(pattern, state.pairs.shape[1], state.count, state.drawn)
        new = state.count[:, None] + torch.arange(M, device=count.device)  # (B, M)
        keys = torch.cat([position, new], 1)
        mask = visible(pattern, new.minimum(count[:, None] - 1), keys, state.drawn, late, turn)
        mask = mask & torch.cat([there, new < count[:, None]], 1)[:, None]
        joined = torch.cat([state.pairs, pairs], 1)
        output, weights = look(query, joined, mask, count, lengths, options, weigh)
        if weigh:  # by the keys' positions, of all tokens so far
            kept, tokens = weights, int(count.max())
            weights = kept.new_zeros(*kept.shape[:3], tokens)
            weights.scatter_add_(3, keys.clamp(0, tokens - 1)[:, None, None].expand(kept.shape), kept)
    if M == 1 and in_place:
        state = move_one(pattern, state, pairs, None if lengths is None else lengths > 0, count, drawn, leaves)
    else:
        state = moved(pattern, state, pairs, count, drawn)
    if output is None and query is not None:  # a single token sees just what is held after it came
        output, _ = look(query, state.pairs, state.there[:, None], count, lengths, options)
    return output, weights, state


def what_happens(pattern: Pattern, state: SparseState, M: int) -> tuple[bool, bool]:
    """Whether the random blocks change with the next M tokens, and whether a token may go to a place of its own.

    Most tokens change neither. Where that cannot be looked at cheaply, both are taken for granted.
    """
    w, g, s, R, r, *_ = pattern
    if M > 1 or is_graph() or state.count.device.type != "cpu":
        return R > 0, not pattern.local
    counts = state.count.tolist()
    if R and any(count % r == 0 for count in counts):
        return True, True
    rows = zip(counts, state.drawn.tolist())
    leaving = ((count - w, {number % 2**31 for number in drawn if number < NEVER}) for count, drawn in rows)
    return False, any(p >= 0 and (p < g or (s and p % s == s - 1) or p // r in blocks) for p, blocks in leaving)


def look(query, pairs, mask, count, lengths, options, weigh=False):
    """Attention (B, M, H, D) to pairs (B, K, 2, G, D) under a mask (B, M, K), and its weights (B, H, M, K) or None."""
    if lengths is not None:
        mask = mask | (count == 0)[:, None, None]  # a row of nothing but padding so far: anything but NaN
    inputs = query, pairs[:, :, 0], pairs[:, :, 1], mask[:, None]
    return attend_weighted(*inputs, **options) if weigh else (attend(*inputs, **options), None)


def step(pattern: Pattern, state: SparseState, query, key, value, lengths=None, in_place=False, weigh=False, **options):
    """Attention of M more tokens, to what is held and to each other.

    Args:
        query: (B, M, H, D), or None for the state alone.
        key, value: (B, M, G, D).
        lengths: (B,) how many of each row's M tokens are real, these first; None for all.
        in_place: whether a step of one token may write into the state; its memory then stays where it is.
        weigh: whether to return the weights of all tokens so far.
        options: `dropout` and `scale`, as `attend` takes them.

    Returns:
        (B, M, H, D) or None, the weights (B, H, M, tokens) or None, and the state after these tokens.
    """
    pairs = torch.stack([key, value.to(key.dtype)], 2).to(state.pairs.dtype)
    size = min(STEP, pattern.random_block) if pattern.num_random else STEP
    outputs, seen = [], []
    for first in range(0, pairs.shape[1], size):
        part, some = pairs[:, first : first + size], query if query is None else query[:, first : first + size]
        fewer = None if lengths is None else (lengths - first).clamp(0, part.shape[1])
        output, weights, state = add(pattern, state, some, part, fewer, in_place, weigh, **options)
        outputs.append(output)
        seen.append(weights)
    if query is None:
        return None, None, state
    tokens = seen[-1].shape[-1] if weigh else 0
    weights = torch.cat([F.pad(x, (0, tokens - x.shape[-1])) for x in seen], 2) if weigh else None
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], weights, state


def first_state(pattern: Pattern, key, value, lengths=None, tokens: int = 0) -> SparseState:
    """The state after M tokens of rows that had none: `step` from `empty_state`, at once.

    Args:
        key, value, lengths: as `step` takes them.
        tokens: as `empty_state` takes it.
    """
    state, M = empty_state(key, pattern, tokens), key.shape[1]
    count = state.count + (M if lengths is None else lengths)
    state, drawn = grown(pattern, state, count), state.drawn
    if pattern.num_random:
        r = pattern.random_block
        drawn = reservoir(pattern, (M - 1) // r + 1, key.device)[(count - 1).clamp(min=0) // r]
    return moved(pattern, state, torch.stack([key, value], 2), count, drawn)
