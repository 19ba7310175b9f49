"""What the causal Linformer generates from, and a single step of it. Legend: `causal_linformer`."""

from typing import NamedTuple

import torch

from ordnung.modeling.ops.causal_linformer_slots import Slots, add_up, for_queries, hidden_where, log_mass, mean
from ordnung.modeling.ops.layout import select, take


class CausalState(NamedTuple):
    """What generation continues from; everything batch first, sums in float32 at least.

    After `count` tokens, the sums are over all blocks before block count // C - W but for the sinks, and the token at
    position p is entry p % R of the window; a sink's entry is 0 until there is one.
    """

    k_sums: torch.Tensor  # (B, k, H, D), not divided by their mass
    v_sums: torch.Tensor
    mass: torch.Tensor  # (B, *P, k)
    k_window: torch.Tensor  # (B, R, H, D)
    v_window: torch.Tensor
    count: torch.Tensor  # (B,)
    k_sinks: torch.Tensor  # (B, S, H, D)
    v_sinks: torch.Tensor


def empty_state(slots: Slots, key) -> CausalState:
    """The state before the first token, for keys like `key` (B, N, H, D)."""
    B, _, H, D = key.shape
    parts = (1, 1) if slots.weight is None else slots.weight.shape[:2]
    dtype = torch.promote_types(key.dtype, torch.float32)
    sums, window, sinks = (B, slots.k, H, D), (B, slots.R, H, D), (B, slots.S, H, D)
    return CausalState(
        key.new_zeros(sums, dtype=dtype),
        key.new_zeros(sums, dtype=dtype),
        key.new_zeros((B, *parts, slots.k), dtype=dtype),
        key.new_zeros(window),
        key.new_zeros(window),
        key.new_zeros(B, dtype=torch.long),
        key.new_zeros(sinks),
        key.new_zeros(sinks),
    )


def window_positions(slots: Slots, count):
    """(B, R): the position of the token that each entry of the window holds after `count` tokens, or below 0."""
    last = count[:, None] - 1
    return last - (last - torch.arange(slots.R, device=count.device)) % slots.R


def windows_after(slots: Slots, key, value, state: CausalState, count):
    """The windows (k_window, v_window) after `count` (B,) tokens, the last of which are key and value (B, N, H, D)."""
    new = window_positions(slots, count) - state.count[:, None]  # (B, R), below 0 where the entry stays
    return [
        select(new >= 0, take(x, new.clamp(0, x.shape[1] - 1)).to(window.dtype), window)
        for x, window in ((key, state.k_window), (value, state.v_window))
    ]


def sinks_after(slots: Slots, key, value, state: CausalState, count):
    """The sinks (k_sinks, v_sinks) after `count` (B,) tokens, the last of which are key and value (B, N, H, D)."""
    if not slots.S:
        return [state.k_sinks, state.v_sinks]
    position = torch.arange(slots.S, device=key.device)
    new = position - state.count[:, None]  # (B, S)
    arrives = (new >= 0) & (position < count[:, None])
    return [
        select(arrives, take(x, new.clamp(0, x.shape[1] - 1)).to(sinks.dtype), sinks)
        for x, sinks in ((key, state.k_sinks), (value, state.v_sinks))
    ]


def attend_token(slots: Slots, query, key, value, state: CausalState, lengths, attend):
    """A single token of each row, which needs no layout: softmax does not mind the order of the window."""
    after = advance(slots, key, value, state, lengths)
    mass_k, mass_v = state.mass[:, 0], state.mass[:, -1]
    keys = torch.cat([after.k_window, after.k_sinks, mean(state.k_sums, mass_k).to(key.dtype)], dim=1)
    values = torch.cat([after.v_window, after.v_sinks, mean(state.v_sums, mass_v).to(key.dtype)], dim=1)
    start = ((state.count // slots.C - slots.W).clamp(min=0) * slots.C)[:, None]  # of the window
    seen = window_positions(slots, state.count + 1) >= start  # (B, R)
    if slots.S:
        seen = torch.cat([seen, torch.arange(slots.S, device=key.device) < start], dim=1)
    exact = hidden_where(seen, query)[:, None, None]
    bias_of_slots = for_queries(log_mass(mass_k).to(query.dtype)[:, :, None], 1, key, query)  # (B, heads or 1, 1, k)
    bias = torch.cat([exact.expand(-1, bias_of_slots.shape[1], -1, -1), bias_of_slots], dim=-1)
    output, weights = attend(*(x.transpose(1, 2) for x in (query, keys, values)), bias)
    return output, weights, after


def advance(slots: Slots, key, value, state: CausalState, lengths=None) -> CausalState:
    """The state after one more token, key and value (B, 1, H, D), of the rows whose `lengths` are not 0."""
    after = state.count + 1
    k_window, v_window = windows_after(slots, key, value, state, after)
    number = after // slots.C - 1 - slots.W  # of the block that the next token's window leaves behind
    leaves = (after % slots.C == 0) & (number >= 0)
    sums = state[:3]
    if torch.compiler.is_compiling() or bool(leaves.any()):
        weights = slots.weights(number.masked_fill(~leaves, -1)[:, None]).to(state.mass.dtype)  # (B, 1, *P, C, k)
        entry = (number * slots.C)[:, None] % slots.R + torch.arange(slots.C, device=key.device)
        sums = (
            state.k_sums + add_up(weights[:, :, 0], take(k_window, entry), 1)[:, 0],
            state.v_sums + add_up(weights[:, :, -1], take(v_window, entry), 1)[:, 0],
            state.mass + weights[:, 0].sum(-2),
        )
    new = CausalState(*sums, k_window, v_window, after, *sinks_after(slots, key, value, state, after))
    if lengths is None:
        return new
    return CausalState(*(select(lengths > 0, now, before) for now, before in zip(new, state)))
