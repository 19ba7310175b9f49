import json
from pathlib import Path

import pytest
import torch

import ordnung
from ordnung.modeling.ops import chunks
from ordnung.modeling.ops.causal_conv import causal_conv, causal_conv_naive, faster

# B, N, H, P, K, dilation, tokens of state
SHAPES = [
    (2, 1, 2, 3, 5, 1, 0),
    (2, 63, 2, 3, 5, 1, 4),
    (2, 100, 4, 1, 64, 1, 0),
    (1, 100, 2, 2, 1, 1, 0),
    (3, 63, 2, 3, 7, 3, 0),
    (3, 63, 2, 3, 7, 3, 11),
    (3, 64, 2, 3, 7, 2, 30),
    (2, 1, 2, 2, 7, 3, 5),
    (2, 1, 2, 2, 7, 3, 40),
    (2, 300, 2, 2, 130, 1, 129),
    (1, 5, 2, 2, 512, 1, 100),
    (2, 128, 1, 6, 300, 1, 0),
]


@pytest.mark.parametrize("implementation", ["auto", "toeplitz", "conv1d", "fft"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_equal_the_formula(shape, implementation):
    B, N, H, P, K, dilation, past = shape
    v = torch.randn(B, N, H * P, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(H, K, dtype=torch.float64, requires_grad=True)
    state = torch.randn(B, past, H * P, dtype=torch.float64, requires_grad=True) if past else None
    inputs = [v, kernel, *([state] if past else [])]
    expected = causal_conv_naive(v, kernel, dilation, state)
    got = causal_conv(v, kernel, dilation, state, implementation)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    seed = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("implementation", ["toeplitz", "conv1d"])
@pytest.mark.parametrize("rows", [1, 40, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_pieces_equal_the_formula(shape, rows, implementation, monkeypatch):
    B, N, H, P, K, dilation, past = shape
    v = torch.randn(B, N, H * P, dtype=torch.float64)
    kernel = torch.randn(H, K, dtype=torch.float64)
    state = torch.randn(B, past, H * P, dtype=torch.float64) if past else None
    monkeypatch.setattr(chunks, "ELEMENTS", rows * H * P)
    got = causal_conv(v, kernel, dilation, state, implementation)
    torch.testing.assert_close(got, causal_conv_naive(v, kernel, dilation, state), rtol=0, atol=1e-11)


def test_naive_is_the_formula():
    v, kernel = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    y = causal_conv_naive(v, kernel, dilation=2)
    for n in range(6):
        for d in range(4):
            terms = [kernel[d // 2, k] * v[0, n - 2 * k, d] for k in range(3) if n - 2 * k >= 0]
            torch.testing.assert_close(y[0, n, d], sum(terms))


@pytest.mark.parametrize("implementation", ["toeplitz", "conv1d"])
def test_exact_implementations_leak_nothing(implementation):
    v, kernel = torch.randn(2, 97, 8), torch.randn(4, 20)
    other = v.clone()
    other[:, 50:] *= 1e6
    first, second = (causal_conv(x, kernel, implementation=implementation) for x in (v, other))
    assert torch.equal(first[:, :50], second[:, :50])


def test_half_precision_fft_of_any_length():
    v, kernel = torch.randn(1, 77, 8).bfloat16(), torch.rand(2, 9).softmax(-1).bfloat16()
    got = causal_conv(v, kernel, implementation="fft")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, causal_conv(v, kernel), rtol=2e-2, atol=2e-2)


def test_the_implementation_chosen_is_the_faster_one_measured():
    """By the committed table: within a quarter of the better one's time at each size."""
    results = Path(ordnung.__file__).parent / "model_cards/results/conv_implementations.json"
    cases = json.loads(results.read_text())["cases"]
    assert len(cases) == 2 * 7 * 5 * 2
    for case in cases:
        kernels = {"head": 8, "channel": 256}[case["kernel_sharing"]]
        v = torch.empty(case["rows"], case["tokens"], 256)
        with torch.set_grad_enabled(case["task"] != "forward"):
            chosen = faster(v, torch.empty(kernels, min(case["kernel_size"], case["tokens"])))
        assert chosen == case["auto"]
        assert case["fastest"][chosen] <= 1.25 * min(case["fastest"].values()), case
