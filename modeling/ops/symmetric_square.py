"""The features of a squared dot product: (q . k)^2 = sum over f of counted(q)[f] features(k)[f].

Legend: X rows, p entries of a vector, C vectors of a row, s shift, S = p // 2 + 1 shifts, F = S p features.

Feature (s, a) is the product of the entries a and a + s mod p. So each shift is one product of whole vectors, the
shifts are one overlapping view of the vectors written twice, and the features are one elementwise product: a tenth of
the time of gathering pairs. For an odd p every pair of entries is there once, F = p (p + 1) / 2; for an even p those
of the last shift are there twice. A pair of two different entries counts twice: a 2, and on one side only, as a
sqrt(2) on both would be rounded.
"""

import torch


def num_features(p):
    """F: p (p + 1) / 2, and p / 2 more if p is even."""
    return p * (p // 2 + 1)


def shifted(x):
    """The view (X, S, p, C) of x (X, p, C) whose entry (s, a) is x[a + s mod p]."""
    p = x.shape[1]
    return torch.cat([x, x], dim=1).unfold(1, p, 1)[:, : p // 2 + 1].movedim(-1, 2)


def features(x):
    """(X, p, C) to (X, F, C). Feature a < p is the square of entry a."""
    return (x[:, None] * shifted(x)).flatten(1, 2)


def counted(x):
    """`features(x)`, each times how often it counts: 2 for the products of different entries."""
    return once((2 * x[:, None] * shifted(x)).flatten(1, 2), x.shape[1])


def once(products, p):
    """Products (X, F, C) that were all taken twice, in place: half of those that count once."""
    products[:, :p] *= 0.5
    if p % 2 == 0:
        products[:, -p:] *= 0.5
    return products


def counted_vjp(x, grad):
    """The gradient of x (X, p, C), from that of `counted(x)`, (X, F, C), which is changed."""
    return features_vjp(2 * x, once(grad, x.shape[1]))


def features_vjp(x, grad):
    """The gradient of x (X, p, C), from that of `features(x)`, (X, F, C)."""
    X, p, C = x.shape
    grad = grad.unflatten(1, (-1, p))
    S = grad.shape[1]
    first = (grad * shifted(x)).sum(1)
    # the other factor is s entries further on: each shift is laid out that far, so that one sum adds them up
    spread = x.new_zeros(X, S, p + S - 1, C)
    stride = spread.stride()
    torch.mul(grad, x[:, None], out=spread.as_strided(grad.shape, (stride[0], stride[1] + C, *stride[2:])))
    second = spread.sum(1)  # (X, p + S - 1, C)
    first += second[:, :p]
    first[:, : S - 1] += second[:, p:]
    return first
