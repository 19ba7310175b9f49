"""What is true of "attention is O(d^2)" (Lee 2026, "The d^2 Pullback Theorem", Zenodo 10.5281/zenodo.18842724).

d^2 counts the parameters that scores have, and with squared kernels the size of a state. It is no running time.
"""

import math

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ordnung.configuration.configuration_quadratic_kernel_lm import QuadraticKernelLMConfig
from ordnung.modeling.ops.quadratic_kernel import Kernel, quadratic_kernel_naive
from ordnung.modeling.ops.symmetric_square import num_features

SQUARE, SHIFTED, TAYLOR = Kernel(1.0, 0.0), Kernel(0.5, 1.0), Kernel(2**-0.5, 2**-0.5, 0.5)


def weights_of(kernel, query, key):
    """The causal weights (N, N) of a kernel exactly, or of softmax where it is None."""
    if kernel is None:
        scores = query @ key.T / math.sqrt(query.shape[1])
        return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
    return quadratic_kernel_naive(query, key, key, kernel, eps=0.0)[1]


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rank(matrix):
    """By a gap of ten thousand between the singular values that count and those that do not."""
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-9 * values[0]).sum())


@pytest.mark.parametrize("d", [3, 4, 6])
def test_weights_depend_on_as_many_directions_as_scores_have_parameters(d):
    """Scores x M y: softmax and the shifted kernel tell all d^2 entries of M; the square all but M's own size."""
    x, y, M = random(4 * d, d), random(4 * d, d), random(d, d)

    def ranks(kernel):
        return rank(jacobian(lambda M: weights_of(kernel, x @ M, y), M).flatten(0, 1).flatten(1))

    assert ranks(None) == ranks(SHIFTED) == ranks(TAYLOR) == d**2
    assert ranks(SQUARE) == d**2 - 1


@pytest.mark.parametrize(("D", "d"), [(6, 2), (7, 3)])
def test_a_narrow_head_has_fewer(D, d):
    """M = A B^T of rank d < D has d (2 D - d) directions."""
    x, y, A, B = random(5 * D, D), random(5 * D, D), random(D, d), random(D, d)
    for kernel, less in ((None, 0), (SHIFTED, 0), (SQUARE, 1)):
        parts = jacobian(lambda A, B: weights_of(kernel, x @ A, y @ B), (A, B))  # noqa: B023
        assert rank(torch.cat([part.flatten(0, 1).flatten(1) for part in parts], dim=1)) == d * (2 * D - d) - less


@pytest.mark.parametrize("d", [4, 8])
def test_rank_of_the_block_below_the_diagonal_is_bounded_by_the_features(d):
    """The weights of the first half's keys for the second half's queries. Softmax's rank grows with their number."""
    D = (d + 1) * (d + 2) // 2
    assert num_features(d + 1) == D
    for n in (32, 64, 128, 256):
        query, key = random(n, d), random(n, d)
        blocks = {kernel: weights_of(kernel, query, key)[n // 2 :, : n // 2] for kernel in (None, SQUARE, SHIFTED)}
        assert rank(blocks[SHIFTED]) == min(D, n // 2)
        assert rank(blocks[SQUARE]) == min(D - d - 1, n // 2)  # without the products with the constant entry
        assert rank(blocks[None]) > 0.8 * min(n // 2, 64)  # of more, some are lost in float64


@pytest.mark.parametrize("kernel", [None, SQUARE, SHIFTED], ids=["softmax", "square", "shifted"])
def test_rank_of_the_whole_matrix_tells_nothing(kernel):
    """A triangle is invertible if its diagonal has no zero: for the square just as for softmax."""
    weights = weights_of(kernel, random(64, 4), random(64, 4))
    assert torch.equal(weights, weights.tril()) and (weights.diagonal() > 0).all()


def test_only_the_square_does_not_see_the_size_of_scores():
    query, key = random(20, 4), random(20, 4)
    for kernel, same in ((SQUARE, True), (SHIFTED, False), (TAYLOR, False), (None, False)):
        first, second = weights_of(kernel, query, key), weights_of(kernel, 3 * query, key)
        assert torch.allclose(first, second, rtol=0, atol=1e-12) is same


def test_taylor_is_the_second_order_of_the_exponential():
    query, key = random(20, 4), random(20, 4)
    scores = query @ key.T / 2
    expected = (1 + scores + scores.square() / 2).tril()
    got = weights_of(TAYLOR, query, key)
    torch.testing.assert_close(got, expected / expected.sum(1, keepdim=True), rtol=0, atol=1e-14)
    errors = [(weights_of(TAYLOR, s * query, key) - weights_of(None, s * query, key)).abs().max() for s in (1e-2, 1e-3)]
    assert 900 < errors[0] / errors[1] < 1100  # what is left out is of third order


def build(d, **overrides):
    """One layer of two heads whose values are as wide as their queries, without gate, norm and convolution.

    Its chunks are stated, so that short rows take features too.
    """
    overrides = {"chunk_size": 128, **overrides}
    fields = {"hidden_size": 2 * d, "num_attention_heads": 2, "head_dim": d, "num_hidden_layers": 1, "vocab_size": 50}
    return AutoModelForCausalLM.from_config(QuadraticKernelLMConfig.csq_preset(**fields, **overrides)).eval()


def mixing_flops(d, n):
    """Counted FLOPs of mixing n tokens, without the projections."""
    mixer = build(d).model.layers[0].mixer
    # the counter does not know products that are added in place
    in_place = {torch.ops.aten.baddbmm_: lambda added, a, b, out_shape=None, **_: 2 * math.prod(a) * b[2]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        mixer(torch.randn(1, n, 2 * d))
    counts = counter.get_flop_counts()["Global"]
    counted = sum(flops for op, flops in counts.items() if "bmm" in str(op))
    assert counted == mixer.flops(n) - 4 * 2 * n * (2 * d) ** 2
    return counted


def test_cost_of_a_token_does_not_grow_with_the_length():
    each = [mixing_flops(16, n) / n for n in (256, 1024, 4096)]
    most = 2 * (4 * num_features(17) * 17 + 4 * 128 * 17)
    assert each == sorted(each) and each[-1] < most
    assert each[2] / each[1] < 1.1


def test_cost_of_a_token_grows_as_the_cube_of_the_head_size():
    """O(n d^3): what the state costs, which is all but the pairs inside of a block, half a chunk, and not O(d^2)."""
    sizes, n = (16, 32, 64), 2048
    state = [mixing_flops(d, n) - 2 * 2 * n * 64 * (2 * d + 2) for d in sizes]
    for a, b in zip(state, state[1:]):
        assert 2.6 < math.log2(b / a) < 3.0


@pytest.mark.parametrize("d", [16, 32])
def test_the_state_is_cheaper_than_pairs_from_about_d2_tokens_on(d):
    """And rows too short for it are taken as pairs, unless chunks are stated."""

    def against_pairs(n, chunk_size):
        made, pairs = (build(d, chunk_size=size).model.layers[0].mixer for size in (chunk_size, 2 * n))
        linear = 4 * 2 * n * (2 * d) ** 2
        return (made.flops(n) - linear) / (pairs.flops(n) - linear)

    assert against_pairs(d**2 // 4, 128) >= 1 > against_pairs(d**2, 128) > 0.5
    assert against_pairs(2 * d, None) == 1


def test_state_has_one_size():
    model = build(4, chunk_size=64)
    with torch.no_grad():
        for tokens in (1000, 8000):
            past = model(torch.randint(50, (1, tokens)), use_cache=True).past_key_values
            held = sum(x.numel() * x.element_size() for x in past.layers[0].state if x.is_floating_point())
            assert held == model.cache_bytes(tokens) == 4 * 2 * (15 * 5 + 2 * 4)
            assert past.get_seq_length() == tokens


def test_state_in_tokens_of_a_key_value_cache():
    """Both in float32, heads of one size: from there on the state is the smaller one."""
    for d, tokens in ((16, 81), (32, 289), (64, 1089)):
        mixer = build(d, centering=None).model.layers[0].mixer
        assert mixer.cache_bytes(10**6, 4) / (2 * 2 * d * 4) == pytest.approx(tokens, rel=0.01)
