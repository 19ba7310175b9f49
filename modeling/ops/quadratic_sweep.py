"""The sums of `ops.quadratic_kernel` over chunks of tokens, and their gradients.

Legend: X rows times heads, N tokens, p entries of q~ and k~, e value size + 1, C tokens of a chunk, D features.

    U[i] = sum over j <= i of ((q~[i] . k~[j])^2 + gamma) exp(G[i] - G[j]) v[j]

with the weights of pairs inside a chunk, and through the state S (X, D, e), the sum of features(k~) v, across chunks.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ordnung.modeling.ops.symmetric_square import features, features_vjp, multiplicity


def sweep(q, k, v, g, S, gamma, C, return_state):
    """Sums of weighted values and of weights (X, N, e); and the state after all, or None.

    Args:
        q, k: (X, p, N), q~ and k~.
        v: (X, N, e).
        g: (X, N) or None.
        S: (X, D, e) or None.
        gamma: what is added to a squared score.
        C: tokens of a chunk, or None for all.
        return_state: as `quadratic_kernel` takes it.
    """
    outputs, parts = [], list(zip(*in_chunks(C, q, k, v, g)))
    own = False  # whether the state is a tensor that may be changed
    for q_c, k_c, v_c, g_c in parts:
        decay = Decay.of(g_c)
        weights = (torch.bmm(q_c.mT, k_c).square() + gamma).tril()
        U = torch.bmm(weights if decay is None else weights * decay.within, v_c)
        if S is not None:
            past = read_state(S, q_c, gamma)
            U = U + (past if decay is None else past * decay.since_start)
        outputs.append(U)
        if return_state or len(outputs) < len(parts):
            S, own = add_to_state(S, k_c, v_c, decay, own), not torch.is_grad_enabled()
    return torch.cat(outputs, dim=1), S if return_state else None


def in_chunks(C, *tensors):
    """The parts of C tokens, or of all, of (X, p, N), (X, p, N), and (X, N, ...) or None."""
    if C is None:
        return [[x] for x in tensors]
    chunks = -(-tensors[0].shape[2] // C)
    return [[None] * chunks if x is None else x.split(C, dim=2 if i < 2 else 1) for i, x in enumerate(tensors)]


class Decay(NamedTuple):
    """What a chunk's gate leaves of a weight."""

    within: torch.Tensor  # (X, C, C): exp(G[i] - G[j]), 1 where j > i
    since_start: torch.Tensor  # (X, C, 1): of what came before the chunk, at each token
    to_end: torch.Tensor  # (X, C, 1): of each token, at the end of the chunk
    whole: torch.Tensor  # (X, 1, 1): of what came before the chunk, at its end

    @classmethod
    def of(cls, g):
        """For log decays (X, C); None of None."""
        if g is None:
            return None
        # A weight nearby depends on a small difference of sums that may be large. MPS has no float64.
        G = g.to(g.dtype if g.device.type == "mps" else torch.float64).cumsum(1)
        within = (G[:, :, None] - G[:, None]).to(g.dtype).clamp(max=0).exp()
        since_start = G.to(g.dtype).exp()[..., None]
        return cls(within, since_start, within[:, -1, :, None], since_start[:, -1:])


def read_state(S, q, gamma):
    """Sums (X, C, e) of the past's weighted values, for queries q~ (X, p, C)."""
    p, mapped = q.shape[1], features(q)
    constant = gamma * S[:, p - 1, None]  # the last of the squares is that of the constant entries
    if q.shape[2] == 1:  # then the features are less to multiply than the state
        return torch.baddbmm(constant, (mapped * multiplicity(p, S)).mT, S)
    return torch.baddbmm(constant, mapped.mT, S * multiplicity(p, S))


def add_to_state(S, k, v, decay, own):
    """The state (X, D, e), or None, after a chunk; changed in place if `own`."""
    mapped = features(k)
    if decay is not None:
        v = v * decay.to_end
        if S is not None:
            S = S.mul_(decay.whole) if own else S * decay.whole
    if S is None:
        return torch.bmm(mapped, v)
    return S.baddbmm_(mapped, v) if own else torch.baddbmm(S, mapped, v)


class Sweep(torch.autograd.Function):
    """`sweep`, with a backward pass that makes features and states again instead of keeping them.

    One sweep over the chunks makes the gradients that need the state before a chunk, and one from the end those that
    need the gradient of the state after it. The gate needs neither: exp(G[i]) multiplies what output i sums, and
    exp(-G[j]) value j, so the gradient of G is dU . U - dv . v at each token.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, S, gamma, C, return_state):
        U, after = sweep(q, k, v, g, S, gamma, C, return_state)
        gated = (U, after) if g is not None else (None, None)
        ctx.save_for_backward(q, k, v, g, S, *gated)
        ctx.gamma, ctx.C = gamma, C
        return U, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dU, dS):
        q, k, v, g, S, U, after = ctx.saved_tensors
        gamma, first, end = ctx.gamma, S, dS
        p, own = q.shape[1], False
        twice = multiplicity(p, q)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        parts = list(zip(*in_chunks(ctx.C, q, k, v, g, dU, dv), *in_chunks(ctx.C, dq, dk)))
        for i, (q_c, k_c, v_c, g_c, dU_c, dv_c, dq_c, dk_c) in enumerate(parts):
            decay = Decay.of(g_c)
            scores = torch.bmm(q_c.mT, k_c)
            weights = scores.square().add_(gamma).tril_()
            d_scores = torch.bmm(dU_c, v_c.mT).mul_(scores.mul_(2)).tril_()
            if decay is not None:
                weights, d_scores = weights.mul_(decay.within), d_scores.mul_(decay.within)
            dv_c.copy_(torch.bmm(weights.mT, dU_c))
            dk_c.copy_(torch.bmm(q_c, d_scores))
            dq_c.copy_(torch.bmm(k_c, d_scores.mT))
            if S is not None:
                seen = dU_c if decay is None else dU_c * decay.since_start
                dq_c.add_(features_vjp(q_c, torch.bmm(S * twice, seen.mT)))
            if i + 1 < len(parts):
                S, own = add_to_state(S, k_c, v_c, decay, own), True
        for i, (q_c, k_c, v_c, g_c, dU_c, dv_c, _, dk_c) in reversed(list(enumerate(parts))):
            decay = Decay.of(g_c)
            if dS is not None:
                added = torch.bmm(features(k_c).mT, dS)
                dv_c.add_(added if decay is None else added * decay.to_end)
                left = v_c if decay is None else v_c * decay.to_end
                dk_c.add_(features_vjp(k_c, torch.bmm(dS, left.mT)))
            if i > 0 or first is not None:
                seen = dU_c if decay is None else dU_c * decay.since_start
                before = torch.bmm(features(q_c), seen).mul_(twice)
                before[:, p - 1].add_(seen.sum(1), alpha=gamma)
                if dS is not None:
                    before.add_(dS if decay is None else dS * decay.whole)
                dS = before
        dg = None
        if g is not None:
            dG = (dU * U).sum(2) - (dv * v).sum(2)
            if end is not None:
                dG[:, -1] += (end * after).sum((1, 2))
            dg = dG.flip(1).cumsum(1).flip(1)
        return dq, dk, dv, dg, dS if first is not None else None, None, None, None
