"""Projection of a sequence to a fixed number of rows, for bidirectional attention in linear time.

Legend: B batch, N tokens, F features, H heads, D head dimension, n positions of the table, k projected rows, s = n / k
tokens of a segment, M rows that are returned (k, or the segments that N tokens reach).

Every kind but "max_pool" is a matrix E applied along the sequence: row i = sum over positions p of E[i, p] * x[p].

    linear               E is learned; `weight[p, i]` = E[i, p]
    mean_pool, max_pool  mean or maximum over the tokens p of a row with p // s == i
    conv                 sum over those tokens with learned weights, `weight[p % s]`: kernel = stride = s
    adaptive_mean_pool   mean over the tokens with p * k // length == i; up to k tokens, the tokens themselves

A row's tokens come first and its padding after them. Slots without a token get a bias of -inf, and the slots of
"adaptive_mean_pool" the logarithm of their number of tokens: softmax then counts a mean as often as its tokens.
"""

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.chunks import is_graph

LEARNED = ("linear", "conv")
# kinds whose weights sum to one, so that a projection's bias passes through them unchanged
MEANS = ("mean_pool", "adaptive_mean_pool")


def project_naive(x, kind, weight, k, n):
    """One row's projection, straight from the definition.

    Args:
        x: (N, F), real tokens only.
        kind: see the top of the file.
        weight: (n, k) for "linear", (s,) for "conv", otherwise None.
        k: rows to project to.
        n: positions of the table.

    Returns:
        (M, F), and the (M,) bias of the logits.
    """
    N, s = len(x), n // k
    if kind == "linear":
        return sum(weight[p][:, None] * x[p] for p in range(N)), x.new_zeros(k)
    slots = [[] for _ in range(k)]
    for p in range(N):
        adaptive = p * k // N if N > k else p
        slots[adaptive if kind == "adaptive_mean_pool" else p // s].append(p)
    slots = [slot for slot in slots if slot]
    if kind == "conv":
        rows = [sum(weight[p % s] * x[p] for p in slot) for slot in slots]
    elif kind == "max_pool":
        rows = [x[slot].amax(0) for slot in slots]
    else:
        rows = [x[slot].mean(0) for slot in slots]
    tokens = torch.tensor([len(slot) if kind == "adaptive_mean_pool" else 1 for slot in slots])
    return torch.stack(rows), tokens.to(x).log()


def linformer_naive(query, key, value, kind, weights, k, n):
    """softmax(Q (E K)^T / sqrt(D)) F V of one row and one head (Wang et al. 2020, arXiv 2006.04768, equation 7).

    Args:
        query, key, value: (N, D), real tokens only.
        weights: those of E and of F, as `project_naive` takes them.

    Returns:
        (N, D).
    """
    rows, bias = project_naive(key, kind, weights[0], k, n)
    values, _ = project_naive(value, kind, weights[1], k, n)
    return (query @ rows.T / query.shape[1] ** 0.5 + bias).softmax(-1) @ values


def project_rows(x, kind, weight, k, n, lengths=None):
    """Projects all rows and heads at once.

    Args:
        x: (B, N, H, D), N at most n; H is 1 where heads share the projection, D then holds all features. Zeros from
            each row's length on.
        kind: see the top of the file.
        weight: (H, n, k) for "linear", (H, s) for "conv", otherwise None.
        k: rows to project to.
        n: positions of the table.
        lengths: (B,) tokens of each row, or None for N each.

    Returns:
        (B, M, H, D).
    """
    B, N, H, D = x.shape
    if kind == "linear":
        weight = weight.narrow(1, 0, N).mT
        if H == 1:
            return torch.matmul(weight, x.squeeze(2)).unsqueeze(2)
        return torch.matmul(weight, x.transpose(1, 2)).transpose(1, 2)  # of (B, H, k, D)
    tokens = slot_tokens(kind, N, k, n, lengths, x.device)  # (B or 1, M)
    if kind == "adaptive_mean_pool":
        if N <= k and not is_graph():
            return x
        index = adaptive_slots(N, k, lengths, x.device) + k * torch.arange(B, device=x.device)[:, None]  # (B, N)
        sums = x.new_zeros(B * k, H, D).index_add(0, index.flatten(), x.reshape(B * N, H, D)).view(B, k, H, D)
        return sums / tokens.clamp(min=1).to(x.dtype)[..., None, None]
    s = n // k
    if kind == "max_pool" and lengths is not None:
        padding = torch.arange(N, device=x.device) >= lengths[:, None]
        x = x.masked_fill(padding[..., None, None], -torch.inf)
    missing = (N + s - 1) // s * s - N
    if is_graph() or missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing), value=-torch.inf if kind == "max_pool" else 0.0)
    segments = x.reshape(B, -1, s, H, D)  # (B, M, s, H, D)
    if kind == "conv" and is_graph():  # whose einsum onnxruntime does not run
        return (weight.t()[:, :, None] * segments).sum(2)
    if kind == "conv":
        return torch.einsum("hs,bmshd->bmhd", weight, segments)
    if kind == "max_pool":
        return segments.amax(2).masked_fill((tokens == 0)[..., None, None], 0)
    return segments.sum(2) / tokens.clamp(min=1).to(x.dtype)[..., None, None]


def adaptive_slots(N, k, lengths, device):
    """(B or 1, N): the slot of each token; padding is sent to the last one, to which it adds zeros."""
    length = torch.full((1, 1), N, device=device) if lengths is None else lengths[:, None]
    position = torch.arange(N, device=device)
    return torch.where(length > k, position * k // length.clamp(min=1), position).clamp(max=k - 1)


def slot_tokens(kind, N, k, n, lengths, device):
    """(B or 1, M): number of tokens in each slot; B only where rows differ."""
    length = torch.full((1, 1), N, device=device) if lengths is None else lengths[:, None]
    if kind == "adaptive_mean_pool":
        slot = torch.arange(k if is_graph() else min(N, k), device=device)
        # slot i holds the positions from ceil(i length / k) up to ceil((i + 1) length / k)
        fitted = ((slot + 1) * length + k - 1) // k - (slot * length + k - 1) // k
        return torch.where(length > k, fitted, (slot < length).long())
    s = n // k
    slot = torch.arange((N + s - 1) // s, device=device)
    return (length - slot * s).clamp(0, s)


def slot_bias(kind, N, k, n, lengths, dtype, device):
    """(B or 1, M), to be added to the logits of each slot, or None where that changes nothing."""
    if kind == "linear" or (lengths is None and (kind != "adaptive_mean_pool" or (N <= k and not is_graph()))):
        return None
    tokens = slot_tokens(kind, N, k, n, lengths, device)
    weight = tokens if kind == "adaptive_mean_pool" else tokens > 0
    return weight.to(dtype).log()


def weight_sums(kind, weight, N, lengths=None):
    """(B or 1, M, H): the sum of each row of E over a row's tokens, which a projection's bias is multiplied by.

    Takes `weight` as `project_rows` does, of a learned kind.
    """
    ones = weight.new_ones(1, N, 1, 1)
    if lengths is not None:
        ones = (torch.arange(N, device=weight.device) < lengths[:, None]).to(weight.dtype)[..., None, None]
    H = weight.shape[0]
    if kind == "linear":
        return project_rows(ones.expand(-1, -1, H, -1), kind, weight, weight.shape[2], weight.shape[1])[..., 0]
    return project_rows(ones.expand(-1, -1, H, -1), kind, weight, 1, weight.shape[1])[..., 0]
