"""Causal attention to a window of blocks and to k slots that hold the projection of everything older.

Legend: B batch, N new tokens, H heads (those of keys and values, in them and all that is made of them, may be fewer and
each serve as many heads of queries), D head dimension, C tokens of a block, W blocks that a token sees before its
own, R = (W + 1) C tokens of the window at most, k slots, n positions of the table, T blocks of a slab, L = R + k keys.
P of a weight or mass is (2 or 1, H or 1): keys and values, and the heads, each with their own weights or not.

A token t in block b = t // C attends, in one softmax, to the tokens of blocks b - W to b up to itself, and to slots:

    slot i holds    sum of E[s, i] k[s] / mass_i  and  sum of F[s, i] v[s] / sum of F[s, i],   s < (b - W) C
    with the logit  q . slot / sqrt(D) + log(mass_i),   mass_i = sum of E[s, i]

so every token is in exactly one of the two. Weights are positive, and those of "linear" sum to one over the slots of a
token, so that mass_i is the number of tokens that slot i averages. A slot without mass has the logit -inf. Position s
has the weights of s % n: beyond the table slots are used again. Literal running projections (each token in its slots at
once) stay near bigrams, and a triangular mask on the (N, k) map of the bidirectional form leaks the future.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ordnung.modeling.ops.chunks import is_graph
from ordnung.modeling.ops.grouped import per_query_head

# Elements of the keys that are laid out at once, tokens of all rows times width: few stay in a processor's cache, a GPU
# wants more work.
SLAB_ELEMENTS = {"cpu": 256 * 768, "other": 8192 * 768}


def positive_weights(kind, weight, blocks, block_size, k, n):
    """Weights of the tokens of some blocks.

    Args:
        kind: "linear", "mean_pool" or "conv".
        weight: logits, (*P, n, k) for "linear" and (*P, n / k) for "conv"; None for "mean_pool".
        blocks: integer tensor of any shape (...), numbers of blocks; negative ones weigh nothing.
        block_size: C, which divides n.
        k: slots.
        n: positions of the table.

    Returns:
        (..., *P, C, k), P being (1, 1) for "mean_pool".
    """
    table_blocks = blocks % (n // block_size)
    if kind == "linear":
        table = weight.unflatten(2, (n // block_size, block_size)).movedim(2, 0)  # (blocks, *P, C, k)
        table = table[table_blocks].softmax(-1, dtype=torch.promote_types(weight.dtype, torch.float32))
    else:
        position = table_blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)
        segment = n // k
        slot = F.one_hot(position // segment, k)[..., None, None, :, :]  # (..., 1, 1, C, k)
        if kind == "conv":
            taps = weight.exp().movedim(2, 0)[position % segment]  # (..., C, *P)
            slot = slot * taps.movedim(-3, -1)[..., None]
        table = slot
    return table * (blocks >= 0)[..., None, None, None, None]


def causal_linformer_naive(query, key, value, table, block_size, blocks_back):
    """The formula, query by query, for one row.

    Args:
        query, key, value: (N, H, D).
        table: (2, H, positions, k), weights of the positions for keys and values; position N - 1 at least is in it.
        block_size, blocks_back: C and W.

    Returns:
        (N, H, D).
    """
    N, H, D = query.shape
    output = torch.zeros_like(query)
    for t in range(N):
        start = max(0, (t // block_size - blocks_back) * block_size)
        for h in range(H):
            keys, values, bias = [key[start : t + 1, h]], [value[start : t + 1, h]], [key.new_zeros(t + 1 - start)]
            if start:
                e, f = table[0, h, :start], table[1, h, :start]  # (start, k)
                used = e.sum(0) > 0
                e, f = e[:, used], f[:, used]
                keys.append(e.T @ key[:start, h] / e.sum(0)[:, None])
                values.append(f.T @ value[:start, h] / f.sum(0)[:, None])
                bias.append(e.sum(0).log())
            logits = torch.cat(keys) @ query[t, h] / D**0.5 + torch.cat(bias)
            output[t, h] = logits.softmax(0) @ torch.cat(values)
    return output


class CausalState(NamedTuple):
    """What generation continues from; everything batch first, sums in float32 at least.

    After `count` tokens, the sums are over all blocks before block count // C - W, and the token at position p is entry
    p % R of the window.
    """

    k_sums: torch.Tensor  # (B, k, H, D), not divided by their mass
    v_sums: torch.Tensor
    mass: torch.Tensor  # (B, *P, k)
    k_window: torch.Tensor  # (B, R, H, D)
    v_window: torch.Tensor
    count: torch.Tensor  # (B,)


class Carry(NamedTuple):
    """What blocks have to know of those before them, the same number for all rows."""

    key: torch.Tensor  # (B, W C, H, D), the last tokens
    value: torch.Tensor
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # k_sums, v_sums and mass, of what is older
    blocks: int


def fused_attention(query, key, value, bias):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2), None


class CausalLinformer(NamedTuple):
    """The operator with one layer's weights: `kind`, `weight`, `k` and `n` as `positive_weights` takes them, C and W.

    Its methods take `attend`, a function of query (X, H, Q, D), key and value (X, heads, L, D) and bias
    (X, 1 or H, Q, L) that returns (X, Q, H, D) and, or None, the weights (X, H, Q, L); they return (B, N, H, D) and, or
    None, the weights (B, H, N, L): those of the tokens of the window, oldest first, then those of the slots.
    """

    kind: str
    weight: torch.Tensor | None
    k: int
    n: int
    C: int
    W: int

    @property
    def R(self) -> int:
        return (self.W + 1) * self.C

    def weights(self, blocks):
        if not self.k:
            return torch.zeros(*blocks.shape, 1, 1, self.C, 0, device=blocks.device)
        return positive_weights(self.kind, self.weight, blocks, self.C, self.k, self.n)

    def empty_state(self, key) -> CausalState:
        """The state before the first token, for keys like `key` (B, N, H, D)."""
        B, _, H, D = key.shape
        parts = (1, 1) if self.weight is None else self.weight.shape[:2]
        dtype = torch.promote_types(key.dtype, torch.float32)
        sums, window = (B, self.k, H, D), (B, self.R, H, D)
        return CausalState(
            key.new_zeros(sums, dtype=dtype),
            key.new_zeros(sums, dtype=dtype),
            key.new_zeros((B, *parts, self.k), dtype=dtype),
            key.new_zeros(window),
            key.new_zeros(window),
            key.new_zeros(B, dtype=torch.long),
        )

    def forward(self, query, key, value, attend=fused_attention):
        """All rows, from their beginning: (B, N, H, D) each."""
        return self.from_start(query, key, value, self.empty_state(key), None, attend)[:2]

    def before_first(self, key) -> Carry:
        """What the first blocks know of those before them, for keys like `key` (B, N, H, D)."""
        state, past = self.empty_state(key), key.new_zeros(key.shape[0], self.W * self.C, *key.shape[2:])
        return Carry(past, past, (state.k_sums, state.v_sums, state.mass[:1]), 0)

    def go_on(self, query, key, value, carry: Carry, attend=fused_attention):
        """`forward` in parts, of N tokens each that are a multiple of C in all but the last; and the next `Carry`."""
        key, value = torch.cat([carry.key, key], dim=1), torch.cat([carry.value, value], dim=1)
        blocks, past = -(-query.shape[1] // self.C), self.W * self.C
        first = torch.full((1,), carry.blocks - self.W, device=query.device)
        output, weights, sums = self.run(query, key, value, carry.sums, first, None, blocks, 0, attend)
        last = (last_tokens(None, x, past) for x in (key, value))
        return output, weights, Carry(*last, sums, carry.blocks + blocks)

    def from_start(self, query, key, value, empty, folds, attend):
        # a graph for any length has to be sure of more than one block
        even = 2 if is_graph() else 1
        blocks = even * ((query.shape[1] + even * self.C - 1) // (even * self.C))
        first = torch.full((1,), -self.W, device=query.device)
        sums = (empty.k_sums, empty.v_sums, empty.mass[:1])  # rows are alike in mass until their lengths differ
        return self.run(query, key, value, sums, first, folds, blocks, self.W * self.C, attend)

    def step(self, query, key, value, state=None, lengths=None, attend=fused_attention):
        """N more tokens of each row: as `forward`, and the new state.

        Args:
            query, key, value: (B, N, H, D).
            state: where to continue from, None at the beginning. It is left as it is.
            lengths: (B,) real tokens of each row, which come first; None if all are.
        """
        fresh, state = state is None, self.empty_state(key) if state is None else state
        B, N = query.shape[:2]
        if N == 1:
            return self.one_token(query, key, value, state, lengths, attend)
        after = state.count + (N if lengths is None else lengths)
        block = state.count // self.C
        folds = after // self.C - block
        if fresh:
            folds = folds[:1] if lengths is None else folds
            output, weights, sums = self.from_start(query, key, value, state, folds, attend)
        else:
            # Lay each row out from the first block of its window on, so that blocks are the same for all.
            past = self.W * self.C
            within = state.count % self.C
            blocks = (self.C - 1 + N + self.C - 1) // self.C
            place = torch.arange((self.W + blocks) * self.C, device=query.device)
            new = place - past - within[:, None]  # (B, places), below 0 where the token is in the state
            old = (place + (block * self.C - past)[:, None]) % self.R
            chosen, new = new >= 0, new.clamp(0, N - 1)
            keys = select(chosen, take(key, new), take(state.k_window.to(key.dtype), old))
            values = select(chosen, take(value, new), take(state.v_window.to(key.dtype), old))
            queries = take(query, new[:, past:])
            output, weights, sums = self.run(queries, keys, values, state[:3], block - self.W, folds, blocks, 0, attend)
            back = within[:, None] + torch.arange(N, device=query.device)
            output = take(output, back)
            weights = None if weights is None else take(weights.transpose(1, 2), back).transpose(1, 2)
        k_sums, v_sums, mass = sums
        mass = mass.expand(B, -1, -1, -1).clone()  # a view would keep the sums of all blocks
        return output, weights, CausalState(k_sums, v_sums, mass, *self.windows(key, value, state, after), after)

    def run(self, query, key, value, sums, first, folds, blocks, shift, attend):
        """Attention of `blocks` blocks of queries, in slabs.

        Args:
            query: (B, <= blocks C, H, D).
            key, value: (B, tokens, H, D): the window of query block m begins at token m C - shift, zeros outside.
            sums: k_sums, v_sums and mass of everything before that of block 0.
            first: (B or 1,) number of the first block of the window of query block 0.
            folds: (B,) how many blocks to add to `sums`, or None for all.

        Returns:
            the output (B, blocks C or the tokens of `query`, H, D); the weights or None; the new sums.
        """
        N = query.shape[1]
        elements = SLAB_ELEMENTS["cpu" if query.device.type == "cpu" else "other"]
        slab = max(1, elements // (self.C * query.shape[0] * query.shape[2] * query.shape[3]))
        if is_graph() or blocks <= slab:  # a graph for any length has no loop over it
            query = section(query, 0, blocks * self.C)
            key, value = (section(x, -shift, (self.W + blocks) * self.C) for x in (key, value))
            numbers, folded = self.numbers(first, 0, blocks, folds)
            output, weights, *sums = self.slab(query, key, value, *sums, numbers, folded, attend)
            return first_tokens(output, N, 1), None if weights is None else first_tokens(weights, N, 2), sums

        if not torch.is_grad_enabled():
            return self.slabs(query, key, value, sums, first, folds, blocks, shift, slab, attend)
        # Once more around the slabs, which are checkpointed one by one: the many small tensors between them are then
        # kept for one layer at a time, and do not lie scattered among all that the other layers keep.
        inputs = (query, key, value, sums, first, folds, blocks, shift, slab, attend)
        return checkpoint(self.slabs, *inputs, use_reentrant=False)

    def slabs(self, query, key, value, sums, first, folds, blocks, shift, slab, attend):
        """`run` for `slab` blocks at a time."""
        N, past = query.shape[1], self.W * self.C
        # split and not sliced, as the gradient of each slice is as long as the whole
        if shift:
            tails = [x.new_zeros(x.shape[0], past, *x.shape[2:]) for x in (key, value)]
        else:
            (k_tail, key), (v_tail, value) = (x.split([past, x.shape[1] - past], dim=1) for x in (key, value))
            tails = [k_tail, v_tail]
        outputs, all_weights = [], []
        for i, parts in enumerate(zip(*(x.split(slab * self.C, dim=1) for x in (query, key, value)))):
            count = min(slab, blocks - i * slab)
            parts = [section(x, 0, count * self.C) for x in parts]
            inputs = (*parts, *tails, *sums, *self.numbers(first, i * slab, count, folds), attend)
            if torch.is_grad_enabled():
                # the laid-out keys are (W + 1) C + k rows a block: kept for all slabs they would outweigh the model
                output, weights, *sums = checkpoint(self.next_slab, *inputs, use_reentrant=False)
            else:
                output, weights, *sums = self.next_slab(*inputs)
            tails = [last_tokens(tail, part, past) for tail, part in zip(tails, parts[1:])]
            outputs.append(output)
            all_weights.append(weights)
        weights = None if all_weights[0] is None else torch.cat(all_weights, dim=2).narrow(2, 0, N)
        return torch.cat(outputs, dim=1).narrow(1, 0, N), weights, sums

    def numbers(self, first, start, count, folds):
        """Numbers (B or 1, count) of the first blocks in the windows of blocks from `start` on, and which to fold."""
        numbers = first[:, None] + start + torch.arange(count, device=first.device)
        folded = numbers >= 0
        return numbers, folded if folds is None else folded & (numbers < (first + folds)[:, None])

    def next_slab(self, query, key, value, k_tail, v_tail, *rest):
        """`slab` with keys and values that begin after the window's older blocks, which are the tails."""
        return self.slab(query, torch.cat([k_tail, key], dim=1), torch.cat([v_tail, value], dim=1), *rest)

    def slab(self, query, key, value, k_sums, v_sums, mass, numbers, folded, attend):
        """`run` for T blocks. key and value are (B, (W + T) C, H, D), numbers and folded (B or 1, T)."""
        B, _, H, D = query.shape
        T = numbers.shape[1]
        weights = self.weights(numbers.masked_fill(~folded, -1)).to(mass.dtype)  # (B or 1, T, *P, C, k)
        k_added = fold(weights[:, :, 0], key.narrow(1, 0, T * self.C), T)  # (B, T, k, H, D)
        v_added = fold(weights[:, :, -1], value.narrow(1, 0, T * self.C), T)
        mass, mass_next = prefix(mass, weights.sum(-2))  # (B or 1, T, *P, k)
        lay_out = lay_out_any_length if is_graph() else lay_out_blocks
        keys, k_next = lay_out(key, k_sums, k_added, mass[:, :, 0], self.C, self.W)  # (B, T L, H, D)
        values, v_next = lay_out(value, v_sums, v_added, mass[:, :, -1], self.C, self.W)
        # a window's first blocks may lie before the first token
        exists = numbers[:, :, None] + torch.arange(self.W + 1, device=query.device) >= 0
        exists = exists.repeat_interleave(self.C, dim=2)[:, :, None, None]  # (B or 1, T, 1, 1, R)
        place = torch.arange(self.R, device=query.device)
        seen = (place <= place[self.W * self.C :, None]) & exists  # (B or 1, T, 1, C, R)
        local = torch.zeros((), dtype=query.dtype, device=query.device).where(seen, -torch.inf)
        slots = log_mass(mass[:, :, 0]).to(query.dtype)[:, :, :, None]  # (B or 1, T, heads or 1, 1, k)
        slots = for_queries(slots, 2, key, query)
        shape = (B, T, slots.shape[2], self.C)
        bias = torch.cat([local.expand(*shape, self.R), slots.expand(*shape, self.k)], dim=-1)

        output, probabilities = attend(
            reshape(query, B * T, self.C, H, D).transpose(1, 2),
            reshape(keys, B * T, self.R + self.k, key.shape[2], D).transpose(1, 2),
            reshape(values, B * T, self.R + self.k, key.shape[2], D).transpose(1, 2),
            reshape(bias, B * T, slots.shape[2], self.C, self.R + self.k),
        )
        if probabilities is not None:  # (B T, H, C, L) to (B, H, T C, L)
            probabilities = reshape(probabilities, B, T, H, self.C, self.R + self.k).transpose(1, 2)
            probabilities = reshape(probabilities, B, H, T * self.C, self.R + self.k)
        return reshape(output, B, T * self.C, H, D), probabilities, k_next, v_next, mass_next

    def one_token(self, query, key, value, state, lengths, attend):
        """`step` for a single token, which needs no layout: softmax does not mind the order of the window."""
        after = self.advance(key, value, state, lengths)
        keys = torch.cat([after.k_window, mean(state.k_sums, state.mass[:, 0]).to(key.dtype)], dim=1)
        values = torch.cat([after.v_window, mean(state.v_sums, state.mass[:, -1]).to(key.dtype)], dim=1)
        start = (state.count // self.C - self.W).clamp(min=0) * self.C
        seen = self.positions(state.count + 1) >= start[:, None]  # (B, R)
        local = torch.zeros((), dtype=query.dtype, device=query.device).where(seen, -torch.inf)[:, None, None]
        slots = log_mass(state.mass[:, 0]).to(query.dtype)[:, :, None]  # (B, heads or 1, 1, k)
        slots = for_queries(slots, 1, key, query)
        bias = torch.cat([local.expand(-1, slots.shape[1], -1, -1), slots], dim=-1)
        output, weights = attend(*(x.transpose(1, 2) for x in (query, keys, values)), bias)
        return output, weights, after

    def advance(self, key, value, state, lengths=None):
        """The state after one more token, key and value (B, 1, H, D), of the rows whose `lengths` are not 0."""
        after = state.count + 1
        k_window, v_window = self.windows(key, value, state, after)
        number = after // self.C - 1 - self.W  # of the block that the next token's window leaves behind
        leaves = (after % self.C == 0) & (number >= 0)
        sums = state[:3]
        if torch.compiler.is_compiling() or bool(leaves.any()):
            weights = self.weights(number.masked_fill(~leaves, -1)[:, None]).to(state.mass.dtype)  # (B, 1, *P, C, k)
            entry = (number * self.C)[:, None] % self.R + torch.arange(self.C, device=key.device)
            sums = (
                state.k_sums + fold(weights[:, :, 0], take(k_window, entry), 1)[:, 0],
                state.v_sums + fold(weights[:, :, -1], take(v_window, entry), 1)[:, 0],
                state.mass + weights[:, 0].sum(-2),
            )
        new = CausalState(*sums, k_window, v_window, after)
        if lengths is None:
            return new
        return CausalState(*(select(lengths > 0, now, before) for now, before in zip(new, state)))

    def replay(self, state, key, value, lengths):
        """The state after each row's first `lengths` (B,) tokens of key and value (B, N, H, D)."""
        state = CausalState(*state)
        for i in range(key.shape[1]):
            state = self.advance(key[:, i : i + 1], value[:, i : i + 1], state, (lengths > i).long())
        return state

    def positions(self, count):
        """(B, R): the position of the token that each entry of the window holds after `count` tokens, or below 0."""
        last = count[:, None] - 1
        return last - (last - torch.arange(self.R, device=count.device)) % self.R

    def windows(self, key, value, state, count):
        """The windows after `count` (B,) tokens."""
        new = self.positions(count) - state.count[:, None]  # (B, R), below 0 where the entry stays
        return (
            select(new >= 0, take(x, new.clamp(0, x.shape[1] - 1)).to(window.dtype), window)
            for x, window in ((key, state.k_window), (value, state.v_window))
        )


def for_queries(x, dim, key, query):
    """`x` with 1 or the heads of `key` in `dim` as 1 or the heads of `query`; both (B, N, heads, D)."""
    return x if x.shape[dim] == 1 else per_query_head(x, query.shape[2] // key.shape[2], dim)


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


def fold(weights, x, blocks):
    """Sums over the tokens of each block: weights (B or 1, T, H or 1, C, k), x (B, T C, H, D) to (B, T, k, H, D)."""
    B, _, H, D = x.shape
    own, C, k = weights.shape[2:]
    weights = reshape(weights.to(x.dtype).expand(B, blocks, own, C, k), B * blocks * own, C, k).mT
    if own == 1:
        return reshape(torch.bmm(weights, reshape(x, B * blocks, C, H * D)), B, blocks, k, H, D)
    x = reshape(reshape(x, B, blocks, C, H, D).transpose(2, 3), B * blocks * H, C, D)
    return reshape(torch.bmm(weights, x), B, blocks, H, k, D).transpose(2, 3)


def prefix(start, added):
    """Sums before each block, from `start` (B or 1, ...) on, with `added` (B or 1, T, ...); and the sum after all.

    A shift, as subtracting a block's own part from an inclusive sum would leak its rounding.
    """
    B = added.shape[0] if start.shape[0] == 1 else start.shape[0]
    terms = [x.expand(B, *x.shape[1:]) for x in (start[:, None], added.to(start.dtype))]
    sums = torch.cat(terms, dim=1).cumsum(1)
    return sums[:, :-1], sums[:, -1]


def mean(sums, mass):
    """sums (..., k, H, D) over mass (..., H or 1, k), zero where there is none."""
    return sums / torch.where(mass > 0, mass, 1).mT[..., None]


def lay_out_blocks(x, sums, added, mass, C, W):
    """For each block its window, then its slots: (B, T L, H, D); and the sums after all.

    Args:
        x: (B, (W + T) C, H, D).
        sums: (B, k, H, D), of everything before the first block's window.
        added: (B, T, k, H, D), what each block adds.
        mass: (B or 1, T, H or 1, k), that of the sums before each block.
    """
    parts = []
    for t in range(added.shape[1]):  # one at a time stays in the processor's cache: cumsum takes ten times as long
        parts += [x[:, t * C : (t + W + 1) * C], mean(sums, mass[:, t]).to(x.dtype)]
        sums = sums + added[:, t]
    return torch.cat(parts, dim=1), sums


def lay_out_any_length(x, sums, added, mass, C, W):
    """`lay_out_blocks` for a graph, which has no loop over a number of blocks that it does not know."""
    B, T, k, H, D = added.shape
    sums, after = prefix(sums, added)
    blocks = reshape(x, B, W + T, C, H, D)
    windows = [blocks[:, i : i + T] for i in range(W + 1)]
    parts = torch.cat([*windows, mean(sums, mass).to(x.dtype)], dim=2)
    return reshape(parts, B, T * ((W + 1) * C + k), H, D), after


def log_mass(mass):
    return torch.where(mass > 0, mass, 1).log().masked_fill(mass <= 0, -torch.inf)
