"""Attention over every prefix of a sequence, sharing what prefixes have in common.

Legend: B rows, N tokens, D width, H heads, P channels a head (D = H P), s stride, G passes computed together, T tokens
of the longest of them, K keys, S outputs read of each pass.

A next token is predicted from its prefix alone: by a pass over it in which the first `end` tokens are fully connected
and the others see all before them, read at its last token (s = 1: ENTP, Ewer et al. 2024, arXiv 2410.01600),

    end(t) = s floor((t + 1) / s)        query i sees key j of the pass of t  <=>  j < end(t) or j <= i

Tokens with the same `end` share one pass: N / s passes instead of N.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.grouped import per_query_head


def prefix_states_naive(
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    real: torch.Tensor,
    stride: int | None,
) -> torch.Tensor:
    """The definition: for every token one pass over the tokens up to it, alone in its row, read at its last one.

    Args:
        encode: takes states (1, n, D) and which key (last) each query sees (n, n), returns the encoder's (1, n, D).
        hidden_states: (B, N, D).
        real: (B, N), False for padding, wherever it lies.
        stride: s, or None for no fully connected tokens.

    Returns:
        (B, N, D), zeros at padding.
    """
    states = torch.zeros_like(hidden_states)
    for row, row_real in enumerate(real):
        slots = row_real.nonzero()[:, 0]
        for t in range(len(slots)):
            i = torch.arange(t + 1, device=real.device)
            end = 0 if stride is None else stride * ((t + 1) // stride)
            visible = (i < end) | (i <= i[:, None])
            states[row, slots[t]] = encode(hidden_states[row, slots[: t + 1]][None], visible)[0, t]
    return states


def prefix_ends(real: torch.Tensor, stride: int | None) -> torch.Tensor:
    """(B, N): for each token the place where the fully connected part of its pass ends.

    `real` (B, N) is False for padding; a row's `end` counts its real tokens, the place returned counts all.
    """
    if stride is None:
        return torch.zeros_like(real, dtype=torch.long)
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    if stride > 1:
        places = torch.where(real & (real.cumsum(1) % stride == 0), places, 0).cummax(1).values
    return places.expand(real.shape)


@dataclass
class Group:
    """Passes that are computed together.

    `rows` and `ends` (G,) name them. `reads` (G, S) are the tokens whose outputs are wanted; where `wanted` (G, S) is
    False it repeats one. Keys before `start` belong to all of them in full; none has a key from `stop` on.
    """

    rows: torch.Tensor
    ends: torch.Tensor
    reads: torch.Tensor
    wanted: torch.Tensor
    start: int
    stop: int

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The wanted of `x` (G, S, ...), one after the other."""
        return x[:, 0] if x.shape[1] == 1 else x[self.wanted]


def plan_passes(ends: torch.Tensor, read: torch.Tensor, span: int, budget: int) -> list[Group]:
    """The passes that give the tokens wanted, in groups of neighbours that differ little in length.

    Args:
        ends: (B, N), from `prefix_ends`.
        read: (B, N), True for the tokens whose outputs are wanted.
        span: tokens between the ends of passes in one group, fewer than that: more cost padding and keys inside the
            group, fewer leave the machine idle.
        budget: most tokens of a group; a single pass may exceed it.

    Returns:
        groups, by rising `start`.
    """
    B, device = ends.shape[0], ends.device
    ends, read = ends.cpu(), read.cpu()
    rows, places = read.nonzero(as_tuple=True)
    passes = ends[rows, places] * B + rows
    passes, order = passes.sort(stable=True)
    places = places[order]
    passes, counts = passes.unique_consecutive(return_counts=True)
    rows, ends, last = passes % B, passes // B, counts.cumsum(0)
    stops = (places[last - 1] + 1).cummax(0).values
    groups, first = [], 0
    while first < len(passes):
        start = int(ends[first])
        size = int(torch.searchsorted(ends, start + span)) - first
        size = max(1, min(size, budget // int(stops[first + size - 1])))
        chosen = slice(first, first + size)
        index = torch.arange(int(counts[chosen].max()), device=counts.device)
        wanted = index < counts[chosen, None]
        index = (last[chosen] - counts[chosen])[:, None] + torch.where(wanted, index, 0)
        moved = (x.to(device) for x in (rows[chosen], ends[chosen], places[index], wanted))
        groups.append(Group(*moved, start, int(stops[first + size - 1])))
        first += size
    return groups


def last_passes(ends: torch.Tensor) -> list[Group]:
    """The plan for the last token of every row where it ends a fully connected pass, as with stride 1 it does."""
    B, N = ends.shape
    reads = torch.full((B, 1), N - 1, device=ends.device)
    rows = torch.arange(B, device=ends.device)
    return [Group(rows, ends[:, -1], reads, torch.ones_like(reads, dtype=torch.bool), N, N)]


def all_passes(ends: torch.Tensor) -> list[Group]:
    """A plan that depends on shapes alone, for graphs: one pass for each token, all in one group."""
    B, N = ends.shape
    reads = torch.arange(N, device=ends.device).repeat(B)[:, None]
    rows = torch.arange(B, device=ends.device).repeat_interleave(N)
    return [Group(rows, ends.reshape(-1), reads, torch.ones_like(reads, dtype=torch.bool), 0, N)]


def sees(ends: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(G, queries, keys): which key each query of each pass sees, padding apart.

    `keys` and `queries` are places; those of the queries may differ from pass to pass, (G, queries).
    """
    return (keys < ends[:, None, None]) | (keys <= queries[..., None])


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x[rows]`, without a copy where there is a single row."""
    return x.expand(rows.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x.index_select(0, rows)


def join_scores(
    scores: torch.Tensor, visible: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Scores (..., N, K) of keys, of which `visible` (..., N, K) are seen, in float32 at least.

    Where `past` gives output and log-sum-exp of the same queries over earlier keys, all those come first as one key,
    (..., N, 1 + K). A query that sees no key gets equal and finite scores, which any key that it sees later outweighs.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # finite, so that a query without keys, as padding can be, makes no nan
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores if past is None else torch.cat([past[1][..., None], scores], dim=-1)


def mix(
    scores: torch.Tensor,
    values: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention (..., N, P) with the scores of `join_scores`, continuing what it gave for earlier keys.

    `values` (..., K, P) are those of the new keys, `dropout` is of their weights. In the dtype of `scores`.
    """
    weights = scores.softmax(-1)
    if past is None:
        return (F.dropout(weights, dropout).to(values.dtype) @ values).to(scores.dtype)
    new = F.dropout(weights[..., 1:], dropout).to(values.dtype) @ values
    return torch.addcmul(new.to(scores.dtype), weights[..., :1], past[0])


@dataclass(frozen=True)
class FirstLayer:
    """What all passes over `T` tokens share: their states before the first layer, and its projections of them."""

    hidden_states: torch.Tensor  # (B, T, D)
    query: torch.Tensor  # (B, H, T, P), scaled
    key: torch.Tensor
    value: torch.Tensor
    real: torch.Tensor  # (B, T), False for padding
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    dropout: float

    def only(self, rows: slice) -> "FirstLayer":
        """That of some rows."""
        names = ("hidden_states", "query", "key", "value", "real")
        rope = self.position_embeddings
        if rope is not None and rope[0].shape[0] > 1:
            rope = tuple(x[rows] for x in rope)
        return replace(self, position_embeddings=rope, **{name: getattr(self, name)[rows] for name in names})

    def attend(self, queries: slice, keys: slice, past=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of `queries` over `keys`, continuing those of all queries over earlier keys."""
        past = None if past is None else tuple(x[:, :, queries] for x in past)
        scores = self.query[:, :, queries] @ self.key[:, :, keys].transpose(2, 3)
        scores = join_scores(scores, self.real[:, None, None, keys], past)
        return mix(scores, self.value[:, :, keys], past, self.dropout), scores.logsumexp(-1)

    def add_token(self, past) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of all queries over all keys, from those without the last token, as query and key."""
        key, value = self.key[:, :, -1:], self.value[:, :, -1:]
        scores = (self.query[:, :, :-1] @ key.transpose(2, 3))[..., 0].to(past[1].dtype)
        scores = scores.masked_fill(~self.real[:, None, -1:], torch.finfo(scores.dtype).min)
        total = torch.logaddexp(past[1], scores)
        output = torch.lerp(past[0], value.to(past[0].dtype), (scores - total).exp()[..., None])
        new = self.attend(slice(-1, None), slice(None))
        return torch.cat([output, new[0]], dim=2), torch.cat([total, new[1]], dim=2)

    def attend_passes(self, group: Group, past) -> torch.Tensor:
        """Mixed values (G, T, D) of the tokens in each pass of `group`, continuing `past` over the keys before it."""
        past = None if past is None else tuple(take(x[:, :, : group.stop], group.rows) for x in past)
        if group.start == group.stop:
            mixed = past[0]
        else:
            tokens, keys = slice(group.stop), slice(group.start, group.stop)
            places = torch.arange(group.stop, device=self.real.device)
            visible = take(self.real, group.rows)[:, None, keys] & sees(group.ends, places, places[keys])
            # once for all passes of a row
            scores = take(self.query[:, :, tokens] @ self.key[:, :, keys].transpose(2, 3), group.rows)
            values = take(self.value[:, :, keys], group.rows)
            mixed = mix(join_scores(scores, visible[:, None], past), values, past, self.dropout)
        return mixed.to(self.value.dtype).transpose(1, 2).flatten(2)


def fold_keys(
    query: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Scores (G, H, S, T) of queries (G, H, S, P) with the keys `states @ weight.T + bias`, which are never made.

    q (W x + b) = (W^T q) x + q b: a product with `weight` for each of the S queries instead of the T states.
    """
    G, H, S, P = query.shape
    heads = weight.unflatten(0, (-1, P))  # fewer than H where each serves several heads of queries
    groups = H // len(heads)
    heads = per_query_head(heads, groups, 0)
    scores = torch.matmul(query, heads).view(G, H * S, -1) @ states.transpose(1, 2)
    scores = scores.view(G, H, S, -1)
    return scores if bias is None else scores + query @ per_query_head(bias.view(-1, P, 1), groups, 0)


def fold_values(
    weights: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 1
) -> torch.Tensor:
    """Outputs (G, H, S, P) of attention weights (G, H, S, T) on the values `states @ weight.T + bias`, never made.

    Each head of values serves `groups` of the H heads.
    """
    G, H, S, T = weights.shape
    heads = per_query_head(weight.view(H // groups, -1, weight.shape[1]), groups, 0).transpose(1, 2)  # (H, D, P)
    mixed = (weights.reshape(G, H * S, T) @ states).view(G, H, S, -1) @ heads
    return (
        mixed
        if bias is None
        else mixed + per_query_head(bias.view(H // groups, 1, -1), groups, 0) * weights.sum(-1, keepdim=True)
    )
