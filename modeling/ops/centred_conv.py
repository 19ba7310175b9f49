"""Convolution of a sequence with short learned kernels that look as far ahead as back, one per head.

Legend: B batch, N tokens, D channels, H heads (D = H * P), P channels a head, K taps, an odd number, L dilation,
A = (K - 1) / 2 taps on each side of the token.

    y[b, n, (h, p)] = sum over k of kernel[h, k] * v[b, n - (k - A) * L, (h, p)],   v outside of the sequence: 0

`kernel[:, A]` weighs the current token, columns before it those to come. The implementations are those of
`ops.causal_conv`: with A taps less of the future this is the causal convolution.
"""

import torch

from ordnung.modeling.ops.causal_conv import convolve


def centred_conv_naive(v, kernel, dilation=1):
    """The formula, token by token and tap by tap, in the dtype of its arguments.

    Args:
        v: (B, N, D).
        kernel: (H, K), D a multiple of H and K odd.
        dilation: tokens between taps.

    Returns:
        (B, N, D).
    """
    N, K = v.shape[1], kernel.shape[1]
    weight = kernel.repeat_interleave(v.shape[2] // kernel.shape[0], dim=0)  # (D, K)
    y = torch.zeros_like(v)
    for n in range(N):
        for k in range(K):
            m = n - (k - K // 2) * dilation
            if 0 <= m < N:
                y[:, n] += weight[:, k] * v[:, m]
    return y


def centred_conv(v, kernel, dilation=1, lengths=None, implementation="auto"):
    """Centred convolution by the implementation asked for.

    Args:
        v: (B, N, D).
        kernel: (H, K), D a multiple of H and K odd, in the dtype of `v`.
        dilation: tokens between taps.
        lengths: (B,) tokens of each row, which come first; None if all have N. What the others hold is not read.
        implementation: "toeplitz", "conv1d", "fft", or "auto": as `causal_conv` takes it.

    Returns:
        (B, N, D).
    """
    N = v.shape[1]
    if lengths is not None:
        padding = torch.arange(N, device=v.device) >= lengths[:, None]
        v = v.masked_fill(padding[..., None], 0)
    return convolve(v, kernel, dilation, implementation, N, kernel.shape[1] // 2)
