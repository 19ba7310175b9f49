"""Softmax attention to a few keys of each row, as `ops.sparse_pattern` defines it.

Legend: R rows, N tokens, H heads, G key and value heads (H is a multiple), D head dimension.
"""

import torch

from ordnung.modeling.ops.sparse_blocks import BLOCK, attend, attend_weighted, blocks_of, by_blocks, is_exporting
from ordnung.modeling.ops.sparse_keys import make_plan
from ordnung.modeling.ops.sparse_pattern import Pattern


def sparse_attention(
    query, key, value, pattern: Pattern, lengths=None, is_global=None, global_inputs=None, dropout=0.0, scale=None
):
    """Softmax attention to the keys that the pattern shows each query.

    Args:
        query: (R, N, H, D), each row's tokens first and padding, which may hold anything finite, after them.
        key, value: (R, N, G, D).
        pattern: see the top of the file.
        lengths: (R,) tokens of each row, or None for N each. A causal model does not need them.
        is_global: (R, N) which tokens are global, in place of the first ones (bidirectional).
        global_inputs: query, key and value by which the global tokens see all, in place of these (bidirectional).
        dropout: rate of dropout on the weights.
        scale: what scores are multiplied by, 1 / sqrt(D) if None.

    Returns:
        (R, N, H, D). At padding something finite.
    """
    N, options = query.shape[1], {"dropout": dropout, "scale": scale}
    query, key, value = same_type(query, key, value)
    whole = not is_exporting() and N <= pattern.window + (not pattern.causal)
    if pattern.causal and whole:
        return attend(query, key, value, causal=True, **options)
    plan, landmarks = make_plan(pattern, N, query.device, lengths, is_global)
    if pattern.causal:
        return by_blocks(query, key, value, plan, **options)
    # (R, 1, 1, N)
    real = (
        None
        if lengths is None
        else (torch.arange(N, device=query.device) < lengths.clamp(min=1)[:, None])[:, None, None]
    )
    output = attend(query, key, value, real, **options) if whole else by_blocks(query, key, value, plan, **options)
    if (whole and global_inputs is None) or not landmarks.tokens.shape[1]:
        return output
    if global_inputs is not None:
        query, key, value = same_type(*global_inputs)
    tokens = landmarks.tokens.clamp(max=N - 1)[..., None, None].expand(query.shape[0], -1, *query.shape[2:])
    seeing = attend(query.gather(1, tokens), key, value, real, **options)
    looking = landmarks.looking[..., None, None]
    place = (looking.long().cumsum(1) - 1).clamp(min=0).expand_as(output)
    return torch.where(looking, seeing.gather(1, place), output)


def weighted_attention(
    query, key, value, pattern: Pattern, lengths=None, is_global=None, global_inputs=None, dropout=0.0, scale=None
):
    """`sparse_attention` by the weights of all pairs of tokens, most of them 0, which it returns too: (R, H, N, N)."""
    N = query.shape[1]
    plan, landmarks = make_plan(pattern, N, query.device, lengths, is_global)
    keys, seen = plan.keys(None, 0, blocks_of(N))  # (R or 1, n, K) and (R or 1, n, C, K)
    mask = torch.zeros(keys.shape[0], keys.shape[1] * BLOCK, N, dtype=torch.uint8, device=query.device)
    keys = keys[:, :, None].expand(seen.shape).flatten(1, 2)
    mask = mask.scatter_add(2, keys, seen.flatten(1, 2).to(torch.uint8))[:, None, :N] > 0  # (R or 1, 1, N, N)
    looking = None
    if landmarks is not None:
        looking = landmarks.looking[:, None, :, None]
        real = True if lengths is None else (torch.arange(N, device=query.device) < lengths[:, None])[:, None, None]
        mask = mask | (looking & real)

    output, weights = attend_weighted(query, key, value, mask, dropout, scale)
    if global_inputs is not None:
        others = attend_weighted(*global_inputs, mask, dropout, scale)
        output = torch.where(looking.transpose(1, 2), others[0], output)
        weights = torch.where(looking, others[1], weights)
    return output, weights


def same_type(*tensors):
    """In one dtype, as fused attention casts them under autocast: rotary embeddings leave keys in single precision."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind) and tensors[0].dtype != torch.float64:
        return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    return tensors
