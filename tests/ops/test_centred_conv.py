import pytest
import torch

from ordnung.modeling.ops import chunks
from ordnung.modeling.ops.causal_conv import causal_conv_naive
from ordnung.modeling.ops.centred_conv import centred_conv, centred_conv_naive

# B, N, H, P, K, dilation
SHAPES = [
    (2, 1, 2, 3, 5, 1),
    (2, 63, 2, 3, 5, 1),
    (2, 100, 4, 1, 63, 1),
    (1, 100, 2, 2, 1, 1),
    (3, 63, 2, 3, 7, 3),
    (3, 64, 2, 3, 7, 2),
    (2, 3, 2, 2, 7, 3),
    (2, 150, 2, 2, 129, 1),
    (1, 5, 2, 2, 255, 1),
]


@pytest.mark.parametrize("implementation", ["auto", "toeplitz", "conv1d", "fft"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_equal_the_formula(shape, implementation):
    B, N, H, P, K, dilation = shape
    v = torch.randn(B, N, H * P, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(H, K, dtype=torch.float64, requires_grad=True)
    expected = centred_conv_naive(v, kernel, dilation)
    got = centred_conv(v, kernel, dilation, None, implementation)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    seed = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(got, (v, kernel), seed), torch.autograd.grad(expected, (v, kernel), seed))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("implementation", ["toeplitz", "conv1d", "fft"])
def test_rows_of_some_length_equal_shorter_rows(implementation):
    v, kernel = torch.randn(3, 40, 8, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    lengths = torch.tensor([40, 13, 1])
    got = centred_conv(v, kernel, 2, lengths, implementation)
    for row, length in enumerate(lengths.tolist()):
        expected = centred_conv_naive(v[row : row + 1, :length], kernel, 2)[0]
        torch.testing.assert_close(got[row, :length], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("implementation", ["toeplitz", "conv1d"])
@pytest.mark.parametrize("rows", [1, 40, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_pieces_equal_the_formula(shape, rows, implementation, monkeypatch):
    B, N, H, P, K, dilation = shape
    v, kernel = torch.randn(B, N, H * P, dtype=torch.float64), torch.randn(H, K, dtype=torch.float64)
    monkeypatch.setattr(chunks, "ELEMENTS", rows * H * P)
    got = centred_conv(v, kernel, dilation, None, implementation)
    torch.testing.assert_close(got, centred_conv_naive(v, kernel, dilation), rtol=0, atol=1e-11)


def test_past_and_future_taps_are_two_causal_convolutions():
    v, kernel = torch.randn(2, 20, 6, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    past = causal_conv_naive(v, kernel[:, 3:], 2)
    future = causal_conv_naive(v.flip(1), kernel[:, :4].flip(1), 2).flip(1)
    current = kernel[:, 3].repeat_interleave(3) * v
    torch.testing.assert_close(centred_conv_naive(v, kernel, 2), past + future - current)
