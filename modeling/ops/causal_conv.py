"""Causal convolution of a sequence with short learned kernels, one per head.

Legend: B batch, N tokens, D channels, H heads (D = H * P), P channels a head, K taps, C block of tokens, L dilation,
A taps ahead of the token: none here, `ops.centred_conv` has them.

    y[b, n, (h, p)] = sum over k of kernel[h, k] * v[b, n - k * L, (h, p)],   v before the first token: `state` or 0

`kernel[:, 0]` weighs the current token. Every implementation computes this; they differ in speed only.
"""

import torch
import torch.nn.functional as F

from ordnung.modeling.ops.chunks import is_graph, piece_tokens, pieces_pay


def causal_conv_naive(v, kernel, dilation=1, state=None):
    """The formula, tap by tap, in the dtype of its arguments.

    Args:
        v: (B, N, D).
        kernel: (H, K), D a multiple of H.
        dilation: tokens between taps.
        state: (B, S, D), the S tokens before `v`, or None.

    Returns:
        (B, N, D).
    """
    if state is not None:
        return causal_conv_naive(torch.cat([state, v], dim=1), kernel, dilation)[:, state.shape[1] :]
    weight = kernel.repeat_interleave(v.shape[2] // kernel.shape[0], dim=0)  # (D, K)
    y = torch.zeros_like(v)
    for k in range(kernel.shape[1]):
        lag = k * dilation
        y[:, lag:] += weight[:, k] * v[:, : max(0, v.shape[1] - lag)]
    return y


def causal_conv(v, kernel, dilation=1, state=None, implementation="auto"):
    """Causal convolution by the implementation asked for.

    Args:
        v: (B, N, D).
        kernel: (H, K), D a multiple of H, in the dtype of `v`.
        dilation: tokens between taps.
        state: (B, S, D), the S tokens before `v`, or None for zeros.
        implementation: "toeplitz", "conv1d", "fft", or "auto", one of the first two: see `faster`.

    Returns:
        (B, N, D).
    """
    N = v.shape[1]
    history = (kernel.shape[1] - 1) * dilation
    if state is not None:
        v = torch.cat([state[:, max(0, state.shape[1] - history) :], v], dim=1)
    if N == 1:
        return last_output(v, kernel, dilation)
    y = convolve(v, kernel, dilation, implementation, N)
    return y.narrow(1, y.shape[1] - N, N)


def convolve(v, kernel, dilation, implementation, tokens, ahead=0):
    """The convolution with `ahead` taps before the one that weighs the current token; at least its last outputs.

    Args:
        v: (B, M, D).
        kernel: (H, K); column k weighs the token k - A taps back.
        tokens: how many of the last outputs are wanted.

    Returns:
        (B, M or `tokens`, D).
    """
    if is_graph():
        implementation = "conv1d"  # the others depend on the length; other runtimes want the standard operator too
    elif implementation == "auto":
        implementation = faster(v, kernel)
    conv = IMPLEMENTATIONS[implementation]
    if implementation != "fft" and pieces_pay(v):  # it rounds with the length
        return conv_pieces(conv, v, kernel, dilation, tokens, ahead)
    return conv(v, kernel, dilation, ahead)


def faster(v, kernel) -> str:
    """The implementation that `auto` takes, by what `scripts/bench_conv.py` measured on a CPU."""
    (B, N, D), (H, K) = v.shape, kernel.shape
    if H == D:
        return "conv1d"  # a product for each channel has nothing to share its matrix with: 1.3 to 13 times as long
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or v.device.type != "cpu":
        return "toeplitz"  # whose gradients are products too: up to 6 times as fast
    # between sequences the product computes blocks that it drops: many for long kernels and for short sequences
    drops = K > 128 if pieces_pay(v) else K < 8 or K >= 64 or N <= 64
    return "conv1d" if B > 1 and drops else "toeplitz"


def conv_pieces(conv, v, kernel, dilation, tokens, ahead):
    """The last `tokens` outputs of `conv`, a piece at a time, each with the tokens that it looks at."""
    B, M, D = v.shape
    after = ahead * dilation
    before = (kernel.shape[1] - 1) * dilation - after
    y = v.new_empty(B, tokens, D)
    size = piece_tokens(v)
    sequences = max(1, size // tokens)
    for v_part, y_part in zip(v.split(sequences), y.split(sequences)):
        start = M - tokens
        for part in y_part.split(max(size, before + after), dim=1):
            end, first = start + part.shape[1], max(0, start - before)
            mixed = conv(v_part[:, first : end + after], kernel, dilation, ahead)
            part.copy_(mixed[:, start - first : end - first])
            start = end
    return y


def last_output(v, kernel, dilation):
    """The output at the last token of `v` (B, M, D) alone: (B, 1, D)."""
    B, M, D = v.shape
    H, K = kernel.shape
    taps = v[:, (M - 1) % dilation :: dilation][:, -K:]  # (B, <=K, D), oldest first
    weight = kernel[:, : taps.shape[1]].flip(1)  # (H, <=K)
    return torch.einsum("bkhp,hk->bhp", taps.view(B, -1, H, D // H), weight).reshape(B, 1, D)


def toeplitz_blocks(kernel, block):
    """The banded Toeplitz matrix of `kernel` (H, K) cut in blocks: (H, J, C, C).

    Block j takes the tokens of the block that lies j blocks back to the outputs of the current one:
    entry (i, c) is the weight of lag j C + i - c.
    """
    H, K = kernel.shape
    back = (K - 1 + block - 1) // block + 1  # J
    padded = F.pad(kernel, (block - 1, back * block - K))  # entry n is the weight of lag n - (C - 1)
    return padded.unfold(1, block, 1).flip(2).view(H, back, block, block)


def by_phase(conv):
    """Gives a convolution of neighbours a dilation: tokens of different phase never meet, so each phase is a row."""

    def dilated(v, kernel, dilation, ahead):
        if dilation == 1:
            return conv(v, kernel, ahead)
        B, N, D = v.shape
        steps = (N + dilation - 1) // dilation
        v = F.pad(v, (0, 0, 0, steps * dilation - N))
        v = v.view(B, steps, dilation, D).transpose(1, 2).reshape(B * dilation, steps, D)
        y = conv(v, kernel, ahead).view(B, dilation, steps, D).transpose(1, 2)
        return y.reshape(B, steps * dilation, D)[:, :N]

    return dilated


@by_phase
def toeplitz_conv(v, kernel, ahead):
    """As a product with the banded Toeplitz matrix of the kernel, in blocks of tokens, all heads in one batch.

    `v` is laid out once as (H, C, columns), a column a (block, channel) pair, so that the j-th block diagonal of the
    matrix meets the same columns j blocks earlier: J products of (C, C) with (C, columns), no copy per tap, exact
    zeros above the diagonal. 2 C J FLOPs a channel and token, where C J is K rounded up to blocks plus one block. Taps
    ahead are those of the causal convolution of a sequence that begins so many tokens earlier.
    """
    B, N, D = v.shape
    H, K = kernel.shape
    # half the kernel: small enough to waste little on the triangle, large enough for the matrix units
    block = min(128, max(16, 1 << (K - 1).bit_length() >> 1))
    matrix = toeplitz_blocks(kernel, block)
    J, P = matrix.shape[1], D // H
    blocks = (N + block - 1) // block
    padded = F.pad(v, (0, 0, (J - 1) * block - ahead, blocks * block - N + ahead))
    columns = padded.view(B, blocks + J - 1, block, H, P)
    columns = columns.permute(3, 2, 0, 1, 4).reshape(H, block, B * (blocks + J - 1) * P)
    # sequences lie one after the other with J - 1 blocks of zeros between, whose outputs are dropped below
    width = (B * (blocks + J - 1) - (J - 1)) * P
    y = torch.bmm(matrix[:, 0], columns.narrow(2, (J - 1) * P, width))
    for j in range(1, J):
        y.baddbmm_(matrix[:, j], columns.narrow(2, (J - 1 - j) * P, width))
    if B > 1:
        y = F.pad(y, (0, (J - 1) * P)).view(H, block, B, blocks + J - 1, P).narrow(3, 0, blocks)
    else:
        y = y.view(H, block, 1, blocks, P)
    return y.permute(2, 3, 1, 0, 4).reshape(B, blocks * block, D).narrow(1, 0, N)


def conv1d_conv(v, kernel, dilation, ahead):
    """With torch's depthwise convolution."""
    weight = kernel.flip(1).repeat_interleave(v.shape[2] // kernel.shape[0], dim=0).unsqueeze(1)  # (D, 1, K)
    after = ahead * dilation
    v = F.pad(v.transpose(1, 2), ((kernel.shape[1] - 1) * dilation - after, after))  # (B, D, N + history)
    return F.conv1d(v, weight, dilation=dilation, groups=v.shape[1]).transpose(1, 2)


@by_phase
def fft_conv(v, kernel, ahead):
    """With the fast Fourier transform, O(N log N) for any K; rounding lets outputs see later tokens at about 1e-6.

    Computed in float32 at least: half precision has no FFT on a CPU, and only powers of two on a GPU.
    """
    B, N, D = v.shape
    size = 1 << (N + kernel.shape[1] - 2).bit_length()
    dtype = torch.promote_types(v.dtype, torch.float32)
    spectrum = torch.fft.rfft(kernel.to(dtype), n=size).t()  # (F, H)
    heads = torch.fft.rfft(v.to(dtype).view(B, N, kernel.shape[0], -1), n=size, dim=1)  # (B, F, H, P)
    y = torch.fft.irfft(heads * spectrum[:, :, None], n=size, dim=1)[:, ahead : ahead + N]
    return y.reshape(B, N, D).to(v.dtype)


IMPLEMENTATIONS = {"toeplitz": toeplitz_conv, "conv1d": conv1d_conv, "fft": fft_conv}
