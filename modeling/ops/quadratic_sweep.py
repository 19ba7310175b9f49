"""The sums of `ops.quadratic_kernel` over blocks of tokens, and their gradients.

Legend: X rows times heads, N tokens, p entries of q~ and k~, e value size + 1, C tokens of a block, K tokens of it and
those before it that it sees pair by pair, F features, n blocks that are computed together.

    U[i] = sum over j <= i of ((q~[i] . k~[j])^2 + gamma) exp(G[i] - G[j]) v[j]

with the weights of pairs in a block and, if gated, some tokens before it, and for older ones through the state S
(X, e, F), the sum of v features(k~). Where a gate leaves few tokens, they are near ones; a weight near a zero of the
kernel would be a small difference of large features, and is none as a pair. Without a gate all tokens count, and an
error in one weight is small beside their sum, unless nearly all of them are near a zero of the kernel.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ordnung.modeling.ops.symmetric_square import counted, counted_vjp, features, features_vjp, num_features

CHUNK_SIZE = 192  # the fastest of 96 to 320 on a CPU, at 256 to 16,384 tokens and queries of 16 to 64
AT_ONCE = 2**19  # scores, features or numbers of states of the blocks computed together: what a CPU's cache holds


class Split(NamedTuple):
    """How tokens are taken: `size` queries at a time, which see so many tokens before them (`reach`) pair by pair."""

    size: int
    reach: int

    @classmethod
    def of(cls, N, d, chunk_size=None, gated=True):
        """For N tokens with queries of size d; see `quadratic_kernel`."""
        size = -(-(chunk_size or CHUNK_SIZE) // 2)
        if chunk_size is None and N <= most_pairs(d):
            return cls(size, N)
        return cls(size, size if gated else 0)


def most_pairs(d):
    """Tokens of a row up to which pairs are cheaper than features: 260, 953 and 3,646 for queries of 16, 32 and 64.

    A token takes p + e products for each of N / 2 others as pairs, and 2 e for each of p (p + 1) / 2 features to enter
    and read the state, so that with e = p they meet at N = p (p + 1); on a CPU, scores in float64 cost somewhat more.
    """
    return int(0.85 * (d + 1) * (d + 2))


class Block(NamedTuple):
    """Queries from `start` on, before `stop`, and the first token `near` that they see pair by pair."""

    near: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.near, self.stop)


def steps(N, split, return_state):
    """What to do, in order: (tokens that enter the state, or None; then a block to compute, or None)."""
    size, reach = split or (N, N)
    done = 0
    for start in range(0, N, size) if split else [0]:
        near = max(0, start - reach)
        yield slice(done, near) if near > done else None, Block(near, start, min(start + size, N))
        done = near
    if return_state:
        for start in range(done, N, size) if split else [0]:
            yield slice(start, min(start + size, N)), None


def together(order, most):
    """Lists of up to `most` of the steps in order, in which blocks are of one form and as many tokens enter."""

    def form(entering, block):
        enters = entering and entering.stop - entering.start
        return (enters, block.start - block.near, block.size) if enters and block else None

    group = []
    for step in order:
        if group and (len(group) >= most or form(*step) is None or form(*step) != form(*group[0])):
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def sweep(q, k, v, g, S, factors, gamma, split, return_state):
    """Sums of weighted values and of weights (X, e, N); and the state after all, or None.

    Args:
        q, k: (X, p, N), queries and keys with an entry of 1 after theirs; k is k~.
        v: (X, e, N).
        g: (X, N) or None.
        S: (X, e, F) or None.
        factors: (X, p, 1); q~ is q times these, and scores of pairs are summed in their dtype.
        gamma: what is added to a squared score.
        split: a `Split`, or None for one block.
        return_state: as `quadratic_kernel` takes it.
    """
    X, p, N = q.shape
    most = 1
    if split and not torch.compiler.is_compiling():
        F = num_features(p)
        most = AT_ONCE // max(1, X * max(split.size * max(split.size + split.reach, F), v.shape[1] * F))
    outputs, own = [], False  # own: whether the state is a tensor that may be changed
    for group in together(steps(N, split, return_state), most):
        (entering, block), n = group[0], len(group)
        if n > 1:
            states = add_blocks(S, k, v, g, entering, n)
            S, own = states[-1], not torch.is_grad_enabled()
        elif entering is not None:
            S, own = add_to_state(S, k, v, g, entering, own), not torch.is_grad_enabled()
        if block is None:
            continue
        before = S if n == 1 else torch.stack(states, 1).flatten(0, 1)
        q_c = blocks_of(q, block.queries, n) * factors.repeat_interleave(n, 0)
        k_c, v_c, g_c = (x if x is None else blocks_of(x, block.keys, n, block.size) for x in (k, v, g))
        weights, decay = weights_of(scores_of(q_c, k_c), gamma, v.dtype), Decay.of(g_c, block.size)
        U = torch.bmm(v_c, weights if decay is None else weights * decay.within)
        if before is not None:
            past = read_state(before, q_c, gamma)
            U = U + (past if decay is None else past * decay.since)
        outputs.append(U if n == 1 else U.unflatten(0, (X, n)).transpose(1, 2).flatten(2))
    return torch.cat(outputs, dim=2), S if return_state else None


def blocks_of(x, tokens, n, step=None):
    """Some tokens of x (X, ..., N) and n - 1 further slices as long, each begun `step` after the one before: (X n, ...,
    length). `step` is the length if None.
    """
    length = tokens.stop - tokens.start
    if n == 1:
        return x[..., tokens]
    step = step or length
    return x[..., tokens.start : tokens.stop + (n - 1) * step].unfold(-1, length, step).movedim(-2, 1).flatten(0, 1)


def scores_of(q, k):
    """(X, K, C) q~ . k~ of queries (X, p, C) and keys (X, p, K)."""
    return torch.bmm(k.to(q.dtype).mT, q)


def weights_of(scores, gamma, dtype):
    """Weights (X, K, C) before their decay, where the last C keys are the queries' own; scores are changed without
    gradients."""
    K, C = scores.shape[1:]
    if torch.is_grad_enabled():
        return (scores.square().to(dtype) + gamma).triu(C - K)
    weights = scores.to(dtype).square_().add_(gamma)
    weights[:, K - C :].triu_()
    return weights


def sums_of(g):
    """Running sums of log decays (X, C): a weight nearby depends on a small difference of sums that may be large."""
    return g.to(g.dtype if g.device.type == "mps" else torch.float64).cumsum(1)  # MPS has no float64


class Decay(NamedTuple):
    """What the gate leaves of the weights of a block."""

    within: torch.Tensor  # (X, K, C): exp(G[i] - G[j]), 1 where j > i
    since: torch.Tensor  # (X, 1, C): of what is in the state

    @classmethod
    def of(cls, g, C):
        """For log decays (X, K), of which the last C are the queries'; None of None."""
        if g is None:
            return None
        G = sums_of(g)[:, None]
        own = G[..., -C:]
        return cls((own - G.mT).to(g.dtype).clamp(max=0).exp(), own.to(g.dtype).exp())


def decay_of(g, block):
    return None if g is None else Decay.of(g[:, block.keys], block.size)


def leaving(g):
    """What a gate (X, C) leaves at the end: of the value of each token (X, 1, C), of all before them (X, 1, 1)."""
    G = sums_of(g)
    return (G[:, -1:] - G).to(g.dtype).exp()[:, None], G[:, -1:].to(g.dtype).exp()[..., None]


def read_state(S, q, gamma):
    """Sums (X, e, C) of the past's weighted values, for queries q~ (X, p, C)."""
    return torch.bmm(S, mapped_queries(q.to(S.dtype), gamma))


def mapped_queries(q, gamma):
    """`counted(q)`, and gamma with the last of the squares, that of the constant entries."""
    mapped = counted(q)
    mapped[:, q.shape[1] - 1] += gamma
    return mapped


def add_to_state(S, k, v, g, tokens, own):
    """The state (X, e, F), or None, after more tokens; changed in place if `own`."""
    k, v = k[..., tokens], v[..., tokens]
    if g is not None:
        to_end, whole = leaving(g[:, tokens])
        v = v * to_end
        if S is not None:
            S = S.mul_(whole) if own else S * whole
    mapped = features(k).mT
    if S is None:
        return torch.bmm(v, mapped)
    return S.baddbmm_(v, mapped) if own else torch.baddbmm(S, v, mapped)


def add_blocks(S, k, v, g, tokens, n):
    """The states (X, e, F) after some tokens, after as many more, and so on: n of them, from S or None."""
    k, v, g = (x if x is None else blocks_of(x, tokens, n) for x in (k, v, g))
    if g is not None:
        to_end, whole = (x.unflatten(0, (-1, n)) for x in leaving(g))
        v = v * to_end.flatten(0, 1)
    added, states = torch.bmm(v, features(k).mT).unflatten(0, (-1, n)).unbind(1), []
    for i, more in enumerate(added):
        if S is not None:
            more = more + S if g is None else torch.addcmul(more, S, whole[:, i])
        states.append(more)
        S = more
    return states


class Sweep(torch.autograd.Function):
    """`sweep`, with a backward pass that makes features and states again instead of keeping them.

    One sweep over the blocks makes the gradients that need the state before a block, and one from the end those that
    need the gradient of the state after it. The gate needs neither: exp(G[i]) multiplies what output i sums, and
    exp(-G[j]) value j, so the gradient of G is dU . U - dv . v at each token.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, S, factors, gamma, split, return_state):
        U, after = sweep(q, k, v, g, S, factors, gamma, split, return_state)
        gated = (U, after) if g is not None else (None, None)
        ctx.save_for_backward(q, k, v, g, S, factors, *gated)
        ctx.gamma, ctx.split = gamma, split
        return U, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dU, dS):
        q, k, v, g, S, factors, U, after = ctx.saved_tensors
        gamma, first, end, own = ctx.gamma, S, dS, False
        order = list(steps(q.shape[2], ctx.split, dS is not None))
        dq, dk, dv, d_factors = torch.empty_like(q), *(torch.zeros_like(x) for x in (k, v, factors))
        for entering, block in order:
            if block is None:
                continue
            if entering is not None:
                S, own = add_to_state(S, k, v, g, entering, own), True
            queries, keys, decay = block.queries, block.keys, decay_of(g, block)
            q_c, dU_c = q[..., queries] * factors, dU[..., queries]
            scores = scores_of(q_c, k[..., keys])
            d_scores = torch.bmm(v[..., keys].mT, dU_c).mul_(2 * scores.to(v.dtype))
            weights = weights_of(scores, gamma, v.dtype)
            d_scores.triu_(block.near - block.start)
            if decay is not None:
                weights, d_scores = weights.mul_(decay.within), d_scores.mul_(decay.within)
            dv[..., keys] += torch.bmm(dU_c, weights.mT)
            dk[..., keys] += torch.bmm(q_c.to(k.dtype), d_scores.mT)
            dq_c = torch.bmm(k[..., keys], d_scores)
            if S is not None:
                seen = dU_c if decay is None else dU_c * decay.since
                dq_c += counted_vjp(q_c.to(k.dtype), torch.bmm(S.mT, seen))
            dq[..., queries] = dq_c * factors
            d_factors += (dq_c * q[..., queries]).sum(2, keepdim=True)
        for entering, block in reversed(order):
            if block is not None and (first is not None or block.near > 0):  # it has read a state
                decay = decay_of(g, block)
                seen = dU[..., block.queries] if decay is None else dU[..., block.queries] * decay.since
                read = torch.bmm(seen, mapped_queries((q[..., block.queries] * factors).to(k.dtype), gamma).mT)
                dS = read if dS is None else dS + read
            if entering is not None and dS is not None:
                k_c, v_c, whole = k[..., entering], v[..., entering], None
                added = torch.bmm(dS, features(k_c))
                if g is not None:
                    to_end, whole = leaving(g[:, entering])
                    v_c, added = v_c * to_end, added * to_end
                dv[..., entering] += added
                dk[..., entering] += features_vjp(k_c, torch.bmm(dS.mT, v_c))
                dS = dS if whole is None else dS * whole
        dg = None
        if g is not None:
            dG = (dU * U).sum(1) - (dv * v).sum(1)
            if end is not None:
                dG[:, -1] += (end * after).sum((1, 2))
            dg = dG.flip(1).cumsum(1).flip(1)
        return dq, dk, dv, dg, dS if first is not None else None, d_factors, None, None, None
