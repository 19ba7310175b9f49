"""Causal attention with a squared kernel, in linear time through the symmetric square of queries and keys.

Legend: R rows, N tokens, H heads, d size of queries and keys, p = d + 1, e = value size + 1, C tokens of a chunk,
X = R H, D = (d + 1)(d + 2) / 2 features.

    out[i] = sum over j <= i of w[i, j] v[j] / sum over j <= i of w[i, j]
    w[i, j] = ((alpha z + beta)^2 + gamma + EPS) exp(G[i] - G[j]),   z = q[i] . k[j] / sqrt(d)

G is the running sum of the logarithms of a decay gate, so no exponent is ever above 0. The kernel is that of CSQ
(Lee 2026, Zenodo 10.5281/zenodo.18842724) with gamma 0, and 1 + z + z^2 / 2 of Based (Arora et al. 2024, arXiv
2402.18668, section 4.1) with alpha = beta = 1 / sqrt(2) and gamma = 1 / 2.

With q~ = [alpha q / sqrt(d), beta] and k~ = [k, 1], alpha z + beta = q~ . k~, and its square is a dot product of
features (`ops.symmetric_square`). So the past is a state of e x D numbers a head, whatever its length; e has a column
of ones more than the value, for the denominator. 4 D e FLOPs a token and head: O(d^3), and O(N d^3) for a row. The d^2
features count what a state can hold and what scores can express; they are no running time.
"""

import math
from typing import NamedTuple

import torch

from ordnung.modeling.ops.chunks import is_graph
from ordnung.modeling.ops.quadratic_sweep import CHUNK_SIZE, Split, Sweep, sweep

# The least weight, before its decay: rows sum to one with it, no denominator vanishes, and gradients near a zero of the
# kernel stay below alpha / sqrt(EPS) of the values. Much more would drown the scores of "square" while they are small.
EPS = 1e-4
# Entries of queries and keys that are larger in size count as this: no score, and no sum of a million, overflows.
LARGEST = 2.0**16


class Kernel(NamedTuple):
    """(alpha z + beta)^2 + gamma; alpha and beta are numbers or (H,), gamma is a number >= 0."""

    alpha: torch.Tensor | float
    beta: torch.Tensor | float
    gamma: float = 0.0


def quadratic_kernel_naive(query, key, value, kernel, log_decay=None, centering=None, eps=EPS):
    """The formula with all N x N weights, of one head of one row.

    Args:
        query, key: (N, d).
        value: (N, dv).
        kernel: a `Kernel` of numbers.
        log_decay: (N,) logarithm of what each token leaves of the weights of all before it, <= 0; None for 0.
        centering: as `centre` takes it.
        eps: least weight.

    Returns:
        (N, dv) and the weights (N, N), whose rows sum to one.
    """
    N, d = query.shape
    seen = torch.ones(N, N, dtype=query.dtype, device=query.device).tril()
    if centering is not None:
        of = seen if centering == "prefix" else seen.tril(-1)
        mean = of / of.sum(1, keepdim=True).clamp(min=1)
        query, key = query - mean @ query, key - mean @ key
    scores = kernel.alpha * (query @ key.T) / math.sqrt(d) + kernel.beta
    weights = (scores.square() + kernel.gamma + eps) * seen
    if log_decay is not None:
        total = log_decay.cumsum(0)
        weights = weights * (total[:, None] - total).clamp(max=0).exp()
    weights = weights / weights.sum(1, keepdim=True)
    return weights @ value, weights


def centre(x, mode, total, count, lengths=None):
    """x less the mean of its prefix.

    Args:
        x: (R, N, H, d).
        mode: "prefix" (the mean of all up to the token) or "exclusive" (of those before it; 0 for the first).
        total: (R, H, d), sum of the tokens before these.
        count: (R,) how many those are.
        lengths: (R,) real tokens of each row, which come first; None if all are.

    Returns:
        (R, N, H, d), and `total` after the real tokens.
    """
    N = x.shape[1]
    sums = torch.cat([total[:, None], x.to(total.dtype)], dim=1).cumsum(1)  # (R, N + 1, H, d), after each count
    # a view would keep the sums of all tokens
    after = sums[:, -1].clone() if lengths is None else sums[torch.arange(x.shape[0], device=x.device), lengths]
    tokens = count[:, None] + torch.arange(N + 1, device=x.device)
    chosen = slice(1, None) if mode == "prefix" else slice(None, N)
    return x - sums[:, chosen] / tokens[:, chosen, None, None].clamp(min=1), after


def quadratic_kernel(
    query, key, value, kernel, log_decay=None, state=None, lengths=None, chunk_size=None, return_state=False
):
    """The formula above in blocks: weights of pairs in a block and near it, a state of features for the rest.

    A row of one block without a state needs no features at all, and none of up to `most_pairs(d)` tokens, about d^2,
    if no `chunk_size` is given: pairs are cheaper there. Computed in float32 at least, under autocast too, and
    on a CPU the scores of pairs in float64.

    Args:
        query, key: (R, N, H, d).
        value: (R, N, H, dv).
        kernel: a `Kernel`.
        log_decay: (R, N, H), <= 0; None for 0.
        state: (R, H, dv + 1, D), what an earlier call returned; None at the beginning. It is left as it is.
        lengths: (R,) real tokens of each row, which come first; None if all are. The outputs of others are finite and
            mean nothing, and the state does not count them.
        chunk_size: two blocks. With a decay, a token sees at least half as many before it pair by pair, and at most as
            many; without one, at most half as many. If None, 192, and a short row all as pairs.
        return_state: whether to return the state after the real tokens.

    Returns:
        (R, N, H, dv) in the dtype of `value`; the state in float32 at least, or None.
    """
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):
            return quadratic_kernel(query, key, value, kernel, log_decay, state, lengths, chunk_size, return_state)
    R, N, H, d = query.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    # scores of pairs may be small differences of large products
    exact = torch.float64 if query.device.type == "cpu" and not is_graph() else dtype
    alpha, beta = (torch.as_tensor(x, dtype=exact, device=query.device).expand(H) for x in kernel[:2])
    factors = torch.cat([(alpha / math.sqrt(d))[:, None].expand(H, d), beta[:, None]], dim=1)[..., None]  # (H, p, 1)
    factors = factors.expand(R, H, d + 1, 1).flatten(0, 1)
    q, k, v = (x.to(dtype).permute(0, 2, 3, 1) for x in (query, key, value))
    q, k, v = (torch.cat([x, x.new_ones(R, H, 1, N)], dim=2).flatten(0, 1) for x in (q, k, v))  # (X, p or e, N)
    q, k = q.clamp_(-LARGEST, LARGEST), k.clamp_(-LARGEST, LARGEST)
    g = None
    if log_decay is not None:  # (X, N); exp(-100) is nothing beside the token's own weight, and differences stay finite
        g = log_decay.to(dtype).clamp(min=-100).transpose(1, 2).flatten(0, 1)
    if lengths is not None:  # also without a state to return: what stands at padding is then the same
        padding = (torch.arange(N, device=q.device) >= lengths[:, None]).repeat_interleave(H, dim=0)  # (X, N)
        k = k.masked_fill(padding[:, None], 0)
        g = None if g is None else g.masked_fill(padding, 0)
    # a graph for any length has no loop over blocks
    split = None if is_graph() else Split.of(N, d, chunk_size, g is not None)
    S = None if state is None else state.to(dtype).flatten(0, 1)
    # Only rounding could bring the sum of the weights below this: the least of its own, and without a gate of all.
    least = torch.full((), EPS, dtype=dtype, device=q.device)
    if g is None:
        before = 0 if S is None else S[:, -1:, d : d + 1]  # the sum of the ones of the tokens before
        least = (kernel.gamma + EPS) * (before + torch.arange(1, N + 1, dtype=dtype, device=q.device))
    arguments = q, k, v, g, S, factors, kernel.gamma + EPS, split, return_state
    traced = torch.compiler.is_compiling() or is_graph()
    U, S = Sweep.apply(*arguments) if torch.is_grad_enabled() and not traced else sweep(*arguments)
    out = U[:, :-1] / torch.maximum(U[:, -1:], least)
    return out.unflatten(0, (R, H)).permute(0, 3, 1, 2).to(value.dtype), None if S is None else S.unflatten(0, (R, H))


def score_excess(query, key, bound, chunk_size=None, lengths=None):
    """How far scores z go beyond a bound, over the pairs j <= i of tokens in the same chunk.

    Args:
        query, key: (R, N, H, d).
        bound: of |z|.
        chunk_size: C, or 192 if None. A row of one chunk has all its pairs; of a longer one these are the nearest.
        lengths: (R,) real tokens of each row, which come first; None if all are.

    Returns:
        the sum of max(|z| - bound, 0)^2 over rows, heads and pairs, and how many these are.
    """
    R, N, H, d = query.shape
    real = torch.ones(R, N, dtype=torch.bool, device=query.device)
    if lengths is not None:
        real = torch.arange(N, device=query.device) < lengths[:, None]
    total = pairs = torch.zeros((), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for q, k, own in zip(*(x.split(chunk_size or CHUNK_SIZE, dim=1) for x in (query, key, real))):
        q, k = (x.to(total.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k))  # (R H, C, d)
        scores = torch.bmm(q, k.mT).unflatten(0, (R, H)) / math.sqrt(d)
        # a real token's earlier ones are real
        counted = own[:, None, :, None].expand_as(scores).tril()
        total = total + ((scores.abs() - bound).clamp(min=0).square() * counted).sum()
        pairs = pairs + counted.sum()
    return total, pairs
