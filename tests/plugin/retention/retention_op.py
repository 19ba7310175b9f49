"""Retention with a decay that the tokens choose.

Legend: R rows, N tokens, H heads, d size of queries, keys and values, C tokens of a chunk.

    out[i] = S[i]^T q[i],   S[i] = g[i] S[i - 1] + (1 - g[i]) k[i] v[i]^T,   0 < g < 1

that is, out[i] = sum over j <= i of g[j + 1] ... g[i] (1 - g[j]) (q[i] . k[j]) v[j]. No exponent is above 0.
"""

import torch

from ordnung.modeling.ops.chunks import is_graph


def retention_naive(query, key, value, log_decay):
    """The recurrence, of one head of one row: query, key, value (N, d), log_decay (N,) log g; gives (N, d)."""
    state, outputs = torch.zeros(key.shape[1], value.shape[1], dtype=value.dtype), []
    for q, k, v, g in zip(query, key, value, log_decay.exp()):
        state = g * state + (1 - g) * torch.outer(k, v)
        outputs.append(state.T @ q)
    return torch.stack(outputs)


def retention(query, key, value, log_decay, state, lengths=None, chunk_size=64):
    """The same of all heads, a chunk after the other; in an exported graph, whose length is open, in one.

    query, key and value (R, N, H, d); log_decay (R, N, H) and state (R, H, d, d), float32 at least; lengths (R,) real
    tokens of each row, which come first, or None if all are. Gives (R, N, H, d) and the state after the real tokens.
    """
    key = key.to(state.dtype) * -torch.expm1(log_decay)[..., None]
    if lengths is not None:  # padding adds nothing and forgets nothing
        real = (torch.arange(key.shape[1], device=key.device) < lengths[:, None])[..., None]
        key, log_decay = key * real[..., None], log_decay * real
    inputs = [x.to(state.dtype).transpose(1, 2) for x in (query, key, value, log_decay[..., None])]  # (R, H, N, .)
    outputs = []
    for q, k, v, decay in [inputs] if is_graph() else zip(*(x.split(chunk_size, dim=2) for x in inputs)):
        total = decay.cumsum(2)  # (R, H, C, 1)
        outputs.append(weigh(q, k, total) @ v + total.exp() * q @ state)
        last = decay.sum(2, keepdim=True)
        state = last.exp() * state + ((last - total).exp() * k).transpose(2, 3) @ v
    return torch.cat(outputs, 2).transpose(1, 2).to(value.dtype), state


def weigh(query, key, total):
    """(R, H, C, C), how much of each value enters each output: the sums `total` (R, H, C, 1) of log decays so far."""
    return (query @ key.transpose(2, 3) * (total - total.transpose(2, 3)).tril().exp()).tril()
