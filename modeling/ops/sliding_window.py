"""Causal softmax attention inside a sliding window, block by block, and the tokens that it has to remember.

Legend: R rows, N tokens, H heads, d size of queries and keys, W tokens of a window, C tokens of a block, T blocks.
"""

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.chunks import is_graph


def last_tokens(before, x, lengths=None):
    """The last tokens of each row, as many as `before` (R, S, ...) has.

    Args:
        before: the last S tokens before these.
        x: (R, N, ...).
        lengths: (R,) real tokens of each row in `x`, which come first; None if all are.
    """
    S, joined = before.shape[1], torch.cat([before, x.to(before.dtype)], dim=1)
    if lengths is None:
        return joined[:, joined.shape[1] - S :].clone()  # a view would keep all of it
    index = lengths[:, None] + torch.arange(S, device=x.device)
    return joined.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def sliding_window_attention(query, key, value, window, past=None, dropout=0.0):
    """softmax(q . k / sqrt(d)) over the `window` tokens up to each one, itself included.

    O(N W): blocks of W queries meet the 2 W - 1 keys that one of them sees.

    Args:
        query, key: (R, N, H, d).
        value: (R, N, H, dv).
        window: W.
        past: keys and values (R, W - 1, H, .) of the tokens before these, and how many of them there are (R,), those
            being the last; None for none.
        dropout: rate at which weights are dropped.

    Returns:
        (R, N, H, dv).
    """
    R, N, H, _ = query.shape
    S = window - 1
    if past is None:
        count = torch.zeros(1, dtype=torch.long, device=query.device)
        past = (F.pad(x[:, :0], (0, 0, 0, 0, S, 0)) for x in (key, value))
    else:
        count, past = past[2], (x.to(key.dtype) for x in past[:2])
    # a graph for any length has no number of blocks that depends on it
    C = N if is_graph() else min(window, N)
    T = 1 if is_graph() else -(-N // C)
    blocks = [F.pad(query, (0, 0, 0, 0, 0, T * C - N)).unflatten(1, (T, C)).transpose(2, 3)]  # (R, T, H, C, d)
    for before, x in zip(past, (key, value)):
        x = torch.cat([before, F.pad(x, (0, 0, 0, 0, 0, T * C - N))], dim=1)  # (R, S + T C, H, .)
        x = x[:, None] if T == 1 else x.unfold(1, S + C, C).movedim(-1, 2)  # (R, T, S + C, H, .)
        blocks.append(x.transpose(2, 3))
    place, token = torch.arange(S + C, device=query.device), torch.arange(C, device=query.device)[:, None]
    near = (place >= token) & (place <= token + S)  # (C, S + C)
    start = C * torch.arange(T, device=query.device)[:, None]
    exists = start + place - S + count[:, None, None] >= 0  # (R or 1, T, S + C)
    seen = (near & exists[:, :, None]).expand(R, T, C, S + C).flatten(0, 1)[:, None]
    output = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in blocks), attn_mask=seen, dropout_p=dropout)
    return output.unflatten(0, (R, T)).transpose(2, 3).flatten(1, 2)[:, :N]
