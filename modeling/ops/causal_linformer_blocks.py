"""The causal Linformer of many tokens: blocks of queries, each with the keys that it sees. Legend: `causal_linformer`.

All blocks of a row at once would copy its keys W + 1 times, so a slab of T blocks is laid out at a time. What a slab
has to know of the blocks before it are the sums of the slots, the tokens that reach into its windows, and the sinks.
"""

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from ordnung.modeling.ops.causal_linformer_slots import Slots, add_up, for_queries, hidden_where, log_mass, mean
from ordnung.modeling.ops.chunks import is_graph
from ordnung.modeling.ops.layout import first_tokens, last_tokens, prefix, reshape, section

# Elements of the keys that are laid out at once, tokens of all rows times width: few stay in a processor's cache, a GPU
# wants more work.
SLAB_ELEMENTS = {"cpu": 256 * 768, "other": 8192 * 768}


class Blocks(NamedTuple):
    """Which blocks of queries are computed, and what their keys begin with.

    `first` (B or 1,) is the number of the first block in the window of query block 0, `count` how many blocks there
    are, `folds` (B,) how many blocks are added to the slots, None for all. The window of query block m begins at token
    m C - `shift` of the keys, with zeros outside of them.
    """

    first: torch.Tensor
    count: int
    folds: torch.Tensor | None = None
    shift: int = 0


def attend_blocks(slots: Slots, query, key, value, sinks, sums, blocks: Blocks, attend):
    """Attention of blocks of queries to their windows, to the sinks and to the slots.

    Args:
        query: (B, <= count C, H, D).
        key, value: (B, tokens, H, D).
        sinks: keys and values (B, S, H, D) of the first tokens, as far as there are any.
        sums: k_sums, v_sums and mass of everything before the window of block 0.

    Returns:
        the output (B, count C or the tokens of `query`, H, D); the weights or None; the new sums.
    """
    N, past = query.shape[1], slots.W * slots.C
    elements = SLAB_ELEMENTS["cpu" if query.device.type == "cpu" else "other"]
    slab = max(1, elements // (slots.C * query.shape[0] * query.shape[2] * query.shape[3]))
    if is_graph() or blocks.count <= slab:  # a graph for any length has no loop over it
        query = section(query, 0, blocks.count * slots.C)
        key, value = (section(x, -blocks.shift, past + blocks.count * slots.C) for x in (key, value))
        which = window_starts(blocks, 0, blocks.count)
        output, weights, *sums = attend_slab(slots, query, key, value, *sinks, *sums, *which, attend)
        return first_tokens(output, N, 1), None if weights is None else first_tokens(weights, N, 2), sums
    inputs = (slots, query, key, value, sinks, sums, blocks, slab, attend)
    if not torch.is_grad_enabled():
        return attend_slabs(*inputs)
    # Once more around the slabs, which are checkpointed one by one: the many small tensors between them are then
    # kept for one layer at a time, and do not lie scattered among all that the other layers keep.
    return checkpoint(attend_slabs, *inputs, use_reentrant=False)


def attend_slabs(slots: Slots, query, key, value, sinks, sums, blocks: Blocks, slab, attend):
    """`attend_blocks` for `slab` blocks at a time."""
    N, past = query.shape[1], slots.W * slots.C
    # split and not sliced, as the gradient of each slice is as long as the whole
    if blocks.shift:
        tails = [x.new_zeros(x.shape[0], past, *x.shape[2:]) for x in (key, value)]
    else:
        (k_tail, key), (v_tail, value) = (x.split([past, x.shape[1] - past], dim=1) for x in (key, value))
        tails = [k_tail, v_tail]
    outputs, all_weights = [], []
    for i, parts in enumerate(zip(*(x.split(slab * slots.C, dim=1) for x in (query, key, value)))):
        count = min(slab, blocks.count - i * slab)
        parts = [section(x, 0, count * slots.C) for x in parts]
        inputs = (slots, *parts, *tails, *sinks, *sums, *window_starts(blocks, i * slab, count), attend)
        if torch.is_grad_enabled():
            # the laid-out keys are (W + 1) C + S + k rows a block: kept for all slabs they would outweigh the model
            output, weights, *sums = checkpoint(attend_next_slab, *inputs, use_reentrant=False)
        else:
            output, weights, *sums = attend_next_slab(*inputs)
        tails = [last_tokens(tail, part, past) for tail, part in zip(tails, parts[1:])]
        outputs.append(output)
        all_weights.append(weights)
    weights = None if all_weights[0] is None else torch.cat(all_weights, dim=2).narrow(2, 0, N)
    return torch.cat(outputs, dim=1).narrow(1, 0, N), weights, sums


def window_starts(blocks: Blocks, begin, count):
    """For blocks from `begin` on, (B or 1, count): the first block of each one's window, and whether to add it up."""
    numbers = blocks.first[:, None] + begin + torch.arange(count, device=blocks.first.device)
    folded = numbers >= 0
    return numbers, folded if blocks.folds is None else folded & (numbers < (blocks.first + blocks.folds)[:, None])


def attend_next_slab(slots: Slots, query, key, value, k_tail, v_tail, *rest):
    """`attend_slab` with keys and values that begin after the window's older blocks, which are the tails."""
    return attend_slab(slots, query, torch.cat([k_tail, key], dim=1), torch.cat([v_tail, value], dim=1), *rest)


def attend_slab(slots: Slots, query, key, value, k_sinks, v_sinks, k_sums, v_sums, mass, numbers, folded, attend):
    """`attend_blocks` for T blocks. key and value are (B, (W + T) C, H, D), numbers and folded (B or 1, T)."""
    B, _, H, D = query.shape
    T, C, W = numbers.shape[1], slots.C, slots.W
    weights = slots.weights(numbers.masked_fill(~folded, -1)).to(mass.dtype)  # (B or 1, T, *P, C, k)
    k_added = add_up(weights[:, :, 0], key.narrow(1, 0, T * C), T)  # (B, T, k, H, D)
    v_added = add_up(weights[:, :, -1], value.narrow(1, 0, T * C), T)
    mass, mass_next = prefix(mass, weights.sum(-2))  # (B or 1, T, *P, k)
    lay_out = lay_out_any_length if is_graph() else lay_out_blocks
    keys, k_next = lay_out(key, k_sinks, k_sums, k_added, mass[:, :, 0], C, W)  # (B, T L, H, D)
    values, v_next = lay_out(value, v_sinks, v_sums, v_added, mass[:, :, -1], C, W)
    # a window's first blocks may lie before the first token
    exists = numbers[:, :, None] + torch.arange(W + 1, device=query.device) >= 0
    exists = exists.repeat_interleave(C, dim=2)[:, :, None, None]  # (B or 1, T, 1, 1, R)
    place = torch.arange(slots.R, device=query.device)
    local = hidden_where((place <= place[W * C :, None]) & exists, query)  # (B or 1, T, 1, C, R)
    bias_of_slots = for_queries(log_mass(mass[:, :, 0]).to(query.dtype)[:, :, :, None], 2, key, query)
    shape = (B, T, bias_of_slots.shape[2], C)
    parts = [local.expand(*shape, -1)]
    if slots.S:  # those that the window has not are seen here
        older = torch.arange(slots.S, device=query.device) < (numbers * C)[:, :, None, None, None]
        parts.append(hidden_where(older, query).expand(*shape, -1))
    bias = torch.cat([*parts, bias_of_slots.expand(*shape, -1)], dim=-1)

    output, probabilities = attend(
        reshape(query, B * T, C, H, D).transpose(1, 2),
        reshape(keys, B * T, slots.keys, key.shape[2], D).transpose(1, 2),
        reshape(values, B * T, slots.keys, key.shape[2], D).transpose(1, 2),
        reshape(bias, B * T, shape[2], C, slots.keys),
    )
    if probabilities is not None:  # (B T, H, C, L) to (B, H, T C, L)
        probabilities = reshape(probabilities, B, T, H, C, slots.keys).transpose(1, 2)
        probabilities = reshape(probabilities, B, H, T * C, slots.keys)
    return reshape(output, B, T * C, H, D), probabilities, k_next, v_next, mass_next


def lay_out_blocks(x, sinks, sums, added, mass, C, W):
    """For each block its window, the sinks, then its slots: (B, T L, H, D); and the sums after all.

    Args:
        x: (B, (W + T) C, H, D).
        sinks: (B, S, H, D).
        sums: (B, k, H, D), of everything before the first block's window.
        added: (B, T, k, H, D), what each block adds.
        mass: (B or 1, T, H or 1, k), that of the sums before each block.
    """
    parts = []
    for t in range(added.shape[1]):  # one at a time stays in the processor's cache: cumsum takes ten times as long
        parts += [x[:, t * C : (t + W + 1) * C], sinks, mean(sums, mass[:, t]).to(x.dtype)]
        sums = sums + added[:, t]
    return torch.cat(parts, dim=1), sums


def lay_out_any_length(x, sinks, sums, added, mass, C, W):
    """`lay_out_blocks` for a graph, which has no loop over a number of blocks that it does not know."""
    B, T, k, H, D = added.shape
    S = sinks.shape[1]
    sums, after = prefix(sums, added)
    blocks = reshape(x, B, W + T, C, H, D)
    windows = [blocks[:, i : i + T] for i in range(W + 1)]
    if S:
        windows.append(sinks[:, None].expand(B, T, S, H, D))
    parts = torch.cat([*windows, mean(sums, mass).to(x.dtype)], dim=2)
    return reshape(parts, B, T * ((W + 1) * C + S + k), H, D), after
