"""Causal attention to a window of blocks, to the first tokens, and to k slots that hold the projection of all others.

Legend: B batch, N new tokens, H heads (those of keys and values, in them and all that is made of them, may be fewer and
each serve as many heads of queries), D head dimension, C tokens of a block, W blocks that a token sees before its
own, R = (W + 1) C tokens of the window at most, S sinks, k slots, n positions of the table, T blocks of a slab,
L = R + S + k keys. P of a weight or mass is (2 or 1, H or 1): keys and values, and the heads, each with their own
weights or not.

A token t in block b = t // C attends, in one softmax, to the tokens of blocks b - W to b up to itself, to the sinks,
which are the first S tokens, and to slots:

    slot i holds    sum of E[s, i] k[s] / mass_i  and  sum of F[s, i] v[s] / sum of F[s, i],   S <= s < (b - W) C
    with the logit  q . slot / sqrt(D) + log(mass_i),   mass_i = sum of E[s, i]

so every token is in exactly one of the three. Weights are positive, and those of "linear" sum to one over the slots of
a token, so that mass_i is the number of tokens that slot i averages. A slot without mass has the logit -inf. Position s
has the weights of s % n: beyond the table slots are used again. Literal running projections (each token in its slots at
once) stay near bigrams, and a triangular mask on the (N, k) map of the bidirectional form leaks the future. Sinks take
what queries give to no token (Xiao et al. 2023, arXiv 2309.17453): in an average with others they are lost.

`causal_linformer_slots` has the weights, `causal_linformer_blocks` computes many tokens at once, and
`causal_linformer_state` one at a time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.causal_linformer_blocks import Blocks, attend_blocks
from ordnung.modeling.ops.causal_linformer_slots import Slots
from ordnung.modeling.ops.causal_linformer_state import (
    CausalState,
    advance,
    attend_token,
    empty_state,
    sinks_after,
    windows_after,
)
from ordnung.modeling.ops.chunks import is_graph
from ordnung.modeling.ops.layout import last_tokens, select, take


def causal_linformer_naive(query, key, value, table, block_size, blocks_back, sinks=0):
    """The formula, query by query, for one row.

    Args:
        query, key, value: (N, H, D).
        table: (2, H, positions, k), weights of the positions for keys and values; position N - 1 at least is in it.
        block_size, blocks_back, sinks: C, W and S.

    Returns:
        (N, H, D).
    """
    N, H, D = query.shape
    output = torch.zeros_like(query)
    for t in range(N):
        start = max(0, (t // block_size - blocks_back) * block_size)
        first = min(sinks, start)  # of these the window has none
        exact = [*range(first), *range(start, t + 1)]
        for h in range(H):
            keys, values, bias = [key[exact, h]], [value[exact, h]], [key.new_zeros(len(exact))]
            if start > first:
                e, f = table[0, h, first:start], table[1, h, first:start]  # (start - first, k)
                used = e.sum(0) > 0
                e, f = e[:, used], f[:, used]
                keys.append(e.T @ key[first:start, h] / e.sum(0)[:, None])
                values.append(f.T @ value[first:start, h] / f.sum(0)[:, None])
                bias.append(e.sum(0).log())
            logits = torch.cat(keys) @ query[t, h] / D**0.5 + torch.cat(bias)
            output[t, h] = logits.softmax(0) @ torch.cat(values)
    return output


class Carry(NamedTuple):
    """What blocks have to know of those before them, the same number for all rows."""

    key: torch.Tensor  # (B, W C, H, D), the last tokens
    value: torch.Tensor
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # k_sums, v_sums and mass, of what is older
    sinks: tuple[torch.Tensor, torch.Tensor]
    blocks: int


def fused_attention(query, key, value, bias):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2), None


class CausalLinformer(Slots):
    """The operator with one layer's weights.

    Its methods take `attend`, a function of query (X, H, Q, D), key and value (X, heads, L, D) and bias
    (X, 1 or H, Q, L) that returns (X, Q, H, D) and, or None, the weights (X, H, Q, L); they return (B, N, H, D) and, or
    None, the weights (B, H, N, L): those of the tokens of the window, oldest first, of the sinks, and of the slots.
    """

    __slots__ = ()

    def forward(self, query, key, value, attend=fused_attention):
        """All rows, from their beginning: (B, N, H, D) each."""
        return self._from_start(query, key, value, empty_state(self, key), None, attend)[:2]

    def before_first(self, key) -> Carry:
        """What the first blocks know of those before them, for keys like `key` (B, N, H, D)."""
        state, past = empty_state(self, key), key.new_zeros(key.shape[0], self.W * self.C, *key.shape[2:])
        return Carry(past, past, (*state[:2], state.mass[:1]), (state.k_sinks, state.v_sinks), 0)

    def forward_part(self, query, key, value, carry: Carry, attend=fused_attention):
        """`forward` in parts, of N tokens each that are a multiple of C in all but the last; and the next `Carry`."""
        begin = carry.blocks * self.C
        sinks = [  # the part's own as well: what may not be seen yet is hidden
            torch.cat([old[:, :begin], x[:, : max(self.S - begin, 0)]], dim=1) if begin < self.S else old
            for old, x in zip(carry.sinks, (key, value))
        ]
        sinks = [F.pad(x, (0, 0, 0, 0, 0, self.S - x.shape[1])) for x in sinks]
        key, value = torch.cat([carry.key, key], dim=1), torch.cat([carry.value, value], dim=1)
        first = torch.full((1,), carry.blocks - self.W, device=query.device)
        blocks = Blocks(first, -(-query.shape[1] // self.C))
        output, weights, sums = attend_blocks(self, query, key, value, sinks, carry.sums, blocks, attend)
        last = (last_tokens(None, x, self.W * self.C) for x in (key, value))
        return output, weights, Carry(*last, sums, sinks, carry.blocks + blocks.count)

    def _from_start(self, query, key, value, empty: CausalState, folds, attend):
        # a graph for any length has to be sure of more than one block
        even = 2 if is_graph() else 1
        count = even * ((query.shape[1] + even * self.C - 1) // (even * self.C))
        first = torch.full((1,), -self.W, device=query.device)
        sums = (empty.k_sums, empty.v_sums, empty.mass[:1])  # rows are alike in mass until their lengths differ
        sinks = [F.pad(x, (0, 0, 0, 0, 0, self.S))[:, : self.S] if self.S else x[:, :0] for x in (key, value)]
        blocks = Blocks(first, count, folds, self.W * self.C)
        return attend_blocks(self, query, key, value, sinks, sums, blocks, attend)

    def step(self, query, key, value, state: CausalState | None = None, lengths=None, attend=fused_attention):
        """N more tokens of each row: as `forward`, and the new state.

        Args:
            query, key, value: (B, N, H, D).
            state: where to continue from, None at the beginning. It is left as it is.
            lengths: (B,) real tokens of each row, which come first; None if all are.
        """
        fresh, state = state is None, empty_state(self, key) if state is None else state
        B, N = query.shape[:2]
        if N == 1:
            return attend_token(self, query, key, value, state, lengths, attend)
        after = state.count + (N if lengths is None else lengths)
        block = state.count // self.C
        folds = after // self.C - block
        sinks = sinks_after(self, key, value, state, after)
        if fresh:
            folds = folds[:1] if lengths is None else folds
            output, weights, sums = self._from_start(query, key, value, state, folds, attend)
        else:
            # Lay each row out from the first block of its window on, so that blocks are the same for all.
            past = self.W * self.C
            within = state.count % self.C
            count = (self.C - 1 + N + self.C - 1) // self.C
            place = torch.arange((self.W + count) * self.C, device=query.device)
            new = place - past - within[:, None]  # (B, places), below 0 where the token is in the state
            old = (place + (block * self.C - past)[:, None]) % self.R
            chosen, new = new >= 0, new.clamp(0, N - 1)
            keys = select(chosen, take(key, new), take(state.k_window.to(key.dtype), old))
            values = select(chosen, take(value, new), take(state.v_window.to(key.dtype), old))
            queries = take(query, new[:, past:])
            blocks = Blocks(block - self.W, count, folds)
            now = [x.to(key.dtype) for x in sinks]
            output, weights, sums = attend_blocks(self, queries, keys, values, now, state[:3], blocks, attend)
            back = within[:, None] + torch.arange(N, device=query.device)
            output = take(output, back)
            weights = None if weights is None else take(weights.transpose(1, 2), back).transpose(1, 2)
        k_sums, v_sums, mass = sums
        mass = mass.expand(B, -1, -1, -1).clone()  # a view would keep the sums of all blocks
        windows = windows_after(self, key, value, state, after)
        return output, weights, CausalState(k_sums, v_sums, mass, *windows, after, *sinks)

    def replay(self, state, key, value, lengths) -> CausalState:
        """The state after each row's first `lengths` (B,) tokens of key and value (B, N, H, D)."""
        state = CausalState(*state)
        for i in range(key.shape[1]):
            state = advance(self, key[:, i : i + 1], value[:, i : i + 1], state, (lengths > i).long())
        return state
