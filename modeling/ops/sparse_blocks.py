"""Softmax attention of blocks of queries, each to the keys that it gathers; how `ops.sparse_attention` is computed.

Legend: R rows, N tokens, H heads, G key and value heads (H is a multiple), D head dimension, C queries of a block, n
blocks, K keys that a block gathers, B = R n.

One call of fused attention has the blocks as its batch. On a CPU a few blocks of one row are computed at a time: what
is copied for them stays in the caches, its memory serves the next, and backward copies again instead of keeping all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 64  # C: more see fewer of the keys that they share, fewer copy more keys
SLAB = 4  # blocks computed at a time on a CPU
WIDE = 4  # blocks that are one where it is about what they see beyond their windows, which they share

# fused attention and its derivative, by which torch's own function is computed on a CPU
fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Plan(NamedTuple):
    """Which keys the blocks of queries see.

    `keys(row, first, last)` says it for the blocks from `first` on, before `last`, of one row, or of all where `row` is
    None: positions (R or 1, n, K) within the row, and (R or 1, n, C, K) which of them each query sees. Every query,
    beyond the row too, sees at least one.

    Queries of the blocks `inner` see, of the C + sum(reach) keys from `reach[0]` before their block on, those of
    `mask`. What they see besides is said by `beyond(row, start, number, size)` for so many blocks of `size` queries
    each, from the query `start` on; some may see nothing. None if none sees anything. `wide` blocks are best taken as
    one there.
    """

    keys: Callable
    alike: bool  # whether all rows see the same
    whole: int = 0  # so many first blocks see all that comes before each query
    inner: range = range(0)
    reach: tuple[int, int] = (0, 0)
    mask: torch.Tensor | None = None  # (C, C + sum(reach))
    beyond: Callable | None = None
    wide: int = 1


def is_graph() -> bool:
    """Whether a graph is being made: it cannot look at values, nor, if it serves every length, at lengths."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """Whether the graph that is made must serve every length."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def spare() -> int:
    """What a size needs to be more where a graph must serve every length: it takes 0 and 1 for constants."""
    return 2 if is_exporting() else 0


def blocks_of(N):
    """Blocks of queries of N tokens."""
    return (N + BLOCK - 1 + spare() * BLOCK) // BLOCK


def attend(query, key, value, mask=None, causal=False, dropout=0.0, scale=None):
    """Softmax attention.

    Args:
        query: (B, C, H, D).
        key, value: (B, K, G, D).
        mask: (B or 1, 1, C or 1, K), True where a query sees a key, or None.
        causal: query i sees the keys up to i; C is K.

    Returns:
        (B, C, H, D).
    """
    C, shared = query.shape[1], query.shape[2] // key.shape[2]
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if causal:
        query = query.transpose(1, 2)
        output = F.scaled_dot_product_attention(
            query, key, value, None, dropout, is_causal=True, scale=scale, enable_gqa=shared > 1
        )
        return output.transpose(1, 2)
    query, mask = fold(query, shared), fold_mask(mask, shared)
    return unfold(F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale), C)


def attend_weighted(query, key, value, mask, dropout=0.0, scale=None):
    """`attend` under a mask (B or 1, 1, C, K), and its weights (B, H, C, K) before dropout."""
    H, D = query.shape[2:]
    key, value = (x.repeat_interleave(H // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bchd,bkhd->bhck", query, key) * (D**-0.5 if scale is None else scale)
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=exact).to(query.dtype)
    return torch.einsum("bhck,bkhd->bchd", F.dropout(weights, dropout), value), weights


def fold(query, shared: int):
    """(B, C, H, D) to (B, G, C H / G, D): the heads that share keys and values are more queries of these."""
    if shared == 1:
        return query.transpose(1, 2)
    return query.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def fold_mask(mask, shared: int):
    """The mask (B or 1, 1, C or 1, K) for that."""
    return mask if mask is None or shared == 1 or mask.shape[2] == 1 else mask.repeat(1, 1, shared, 1)


def unfold(output, C: int):
    """Back from (B, G, C H / G, D) to (B, C, H, D)."""
    if output.shape[2] == C:
        return output.transpose(1, 2)
    return output.unflatten(2, (-1, C)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def by_blocks(query, key, value, plan: Plan, dropout=0.0, scale=None):
    """Attention of each block of queries to the keys of the plan: (R, N, H, D).

    Args:
        query: (R, N, H, D).
        key, value: (R, N, G, D).
    """
    if not is_graph() and not dropout and query.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled():
        if not torch.is_grad_enabled():
            return over_slabs(query, key, value, plan, scale)
        return BlockAttention.apply(query, key, value, plan, scale)
    (R, N), n = query.shape[:2], blocks_of(query.shape[1])
    keys, mask = plan.keys(None, 0, n)
    row, token = torch.arange(R, device=keys.device)[:, None, None], torch.arange(n * BLOCK, device=keys.device)
    keys = (N * row + keys).flatten(0, 1)  # (B, K)
    queries = (N * row + token.clamp(max=N - 1).view(n, BLOCK)).flatten(0, 1)  # (B, C)
    # a key gathers the gradients of many blocks: they are summed in single precision at least
    exact = torch.promote_types(query.dtype, torch.float32) if torch.is_grad_enabled() else query.dtype
    query = query.flatten(0, 1)[queries]
    key, value = (x.flatten(0, 1).to(exact)[keys].to(x.dtype) for x in (key, value))
    mask = mask.expand(R, -1, -1, -1).flatten(0, 1)[:, None]
    output = attend(query, key, value, mask, dropout=dropout, scale=scale)
    return output.flatten(0, 1)[n * BLOCK * row[:, 0] + torch.arange(N, device=keys.device)]


class Slab(NamedTuple):
    """Some blocks of one row, its queries from `start` on, before `stop`, and keys that they see."""

    row: int
    start: int
    stop: int
    size: int  # queries of a block
    keys: torch.Tensor | None  # (n, K), None where they are the window alone
    bias: torch.Tensor | None  # (n or 1, 1, C H / G, K), 0 or -inf; None where query i of a block sees its keys up to i
    reach: tuple[int, int]
    shared: int  # H / G, or 1 where `heads` are only one of each key's
    blind: torch.Tensor | None = None  # (n, 1, C H / G) which queries see none of these keys; None: there are none
    heads: slice = slice(None)

    @property
    def options(self) -> dict:
        """How fused attention masks."""
        return {"is_causal": True} if self.bias is None else {"attn_mask": self.bias}

    def inputs(self, query, key, value, room):
        """Queries (n, G, C H / G, D), keys and values (n, G, K, D) of these blocks; `room` are two tensors to fill."""
        return self.queries(query), self.gather(key, room[0]), self.gather(value, room[1])

    def place(self, x):
        """These queries' part of x (R, N, H, D)."""
        return x[self.row, self.start : self.stop, self.heads]

    def queries(self, x):
        """Of x (R, N, H, D): (n, G, C H / G, D)."""
        x = self.place(x)
        missing = self.stop - self.start - len(x)
        x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return fold(x.unflatten(0, (-1, self.size)), self.shared)

    def put(self, x, part) -> None:
        """Writes a part (n, G, C H / G, D) into x (R, N, H, D)."""
        place, part = self.place(x), unfold(part, self.size)
        if len(place) % self.size:
            place.copy_(part.flatten(0, 1)[: len(place)])
        else:
            place.unflatten(0, part.shape[:2]).copy_(part)

    def gather(self, x, room):
        """Of x (R, N, G, D): (n, G, K, D)."""
        if self.keys is not None:
            room.resize_(self.keys.numel(), *x.shape[2:])
            torch.index_select(x[self.row], 0, self.keys.flatten(), out=room)
            parts = room.unflatten(0, self.keys.shape)
        else:
            before, after = self.reach
            x = x[self.row, self.start - before : self.stop + after]
            parts = x.unfold(0, before + self.size + after, self.size).movedim(-1, 1)
        return parts.transpose(1, 2)

    def add(self, x, part) -> None:
        """Adds a part (n, G, K, D) to x (R, N, G, D)."""
        part = part.transpose(1, 2)
        if self.keys is not None:
            x[self.row].index_add_(0, self.keys.flatten(), part.flatten(0, 1).to(x.dtype))
            return
        before, after = self.reach
        for start, each in zip(range(self.start, self.stop, self.size), part):
            x[self.row, start - before : start + self.size + after] += each

    def attend(self, output, inputs, scale, before=None):
        """Writes softmax attention into `output` (R, N, H, D).

        Args:
            inputs: as `inputs` gives them.
            before: what this returned for other keys, whose output is there already and is joined.

        Returns:
            (C n, H, 1) logarithms of the sums of all weights.
        """
        part, total = fused(*inputs, scale=scale, **self.options)
        if self.blind is not None:
            part.masked_fill_(self.blind[..., None], 0)
            total.masked_fill_(self.blind, -torch.inf)
        if before is not None:
            before = fold(before.unflatten(0, (-1, self.size)), self.shared)[..., 0]
            # of all keys together the part's share is exp(total) / (exp(total) + exp(before))
            share = (total - before).sigmoid()[..., None]
            part = part.to(share.dtype)
            torch.lerp(self.queries(output).to(share.dtype), part, share, out=part)
            total = torch.logaddexp(before, total)
        self.put(output, part)
        return unfold(total[..., None], self.size).flatten(0, 1)


def slabs(plan: Plan, query, key):
    """The slabs that make up all rows; each is a list of one, or of two of the same queries with other keys."""
    n, shared = blocks_of(query.shape[1]), query.shape[2] // key.shape[2]

    zero, unseen = query.new_zeros(()), query.new_full((), -torch.inf)

    def bias(mask):
        return torch.where(fold_mask(mask, shared), zero, unseen)

    inner = None if plan.mask is None else bias(plan.mask[None, None])
    bounds = (plan.whole, plan.inner.start, plan.inner.stop, n) if plan.inner else (plan.whole, n)
    for first, last in zip(bounds, bounds[1:]):
        for stop in range(last, first, -SLAB):  # from the end, where most is seen: the memory for it is made once
            start, both, more = max(stop - SLAB, first), None, None
            if start in plan.inner:
                both, more = (None, inner), beyond(plan, start, stop, shared, bias)
            for row in range(len(query)):
                if both is None or not (plan.alike or start in plan.inner):
                    keys, mask = plan.keys(row, start, stop)
                    both = keys[0], bias(mask[0, :, None])
                place = row, start * BLOCK, stop * BLOCK
                found = [Slab(*place, BLOCK, *both, plan.reach, shared)]
                if more is not None:
                    found.append(Slab(*place, *more))
                yield found
    if plan.whole:
        stop = plan.whole * BLOCK
        for row in range(len(query)):
            for head in range(shared):
                heads = slice(head, None, shared)
                yield [Slab(row, 0, stop, stop, None, None, (0, 0), 1, heads=heads)]


def beyond(plan: Plan, start, stop, shared, bias) -> tuple | None:
    """What a slab has besides its place, of the keys beyond the windows of these blocks; None if none sees any."""
    if plan.beyond is None:
        return None
    size = BLOCK * (stop - start if plan.wide > 1 else 1)
    keys, mask = plan.beyond(0, start * BLOCK, (stop - start) * BLOCK // size, size)
    mask = mask[0, :, None]
    seeing = mask.view(torch.uint8).any(-1, keepdim=True) > 0  # on bytes it is faster
    if not seeing.any():
        return None
    blind = None if seeing.all() else ~fold_mask(seeing, shared)[..., 0]
    return size, keys[0], bias(mask), (0, 0), shared, blind


def over_slabs(query, key, value, plan: Plan, scale, sums=None):
    """Attention (R, N, H, D); logarithms of the sums of all weights go into `sums` (R, N, H, 1), if it is there."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    room = key.new_empty(0), value.new_empty(0)
    for found in slabs(plan, query, key):
        total = None
        for slab in found:
            total = slab.attend(output, slab.inputs(query, key, value, room), scale, total)
        if sums is not None:
            place = slab.place(sums)
            place.copy_(total[: len(place)])
    return output


class BlockAttention(torch.autograd.Function):
    """`by_blocks` on a CPU."""

    @staticmethod
    def forward(ctx, query, key, value, plan, scale):
        exact = torch.promote_types(query.dtype, torch.float32)
        sums = torch.empty(*query.shape[:3], 1, dtype=exact, device=query.device)
        output = over_slabs(query, key, value, plan, scale, sums)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, sums = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)  # many blocks add to a key
        of_query, of_key = torch.empty_like(query), torch.zeros_like(key, dtype=exact)
        of_value = torch.zeros_like(value, dtype=exact)

        room = key.new_empty(0), value.new_empty(0)
        for found in slabs(ctx.plan, query, key):
            for more, slab in enumerate(found):
                inputs, part = slab.inputs(query, key, value, room), slab.queries(output)
                options = {"scale": ctx.scale, "attn_mask": slab.bias}
                total = slab.queries(sums)[..., 0]  # of all keys: so each slab's weights are their parts of the whole
                causal = slab.bias is None
                grads = fused_backward(slab.queries(gradient), *inputs, part, total, 0.0, causal, **options)
                slab.put(of_query, slab.queries(of_query) + grads[0] if more else grads[0])
                slab.add(of_key, grads[1])
                slab.add(of_value, grads[2])
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None
