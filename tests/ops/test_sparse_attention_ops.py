"""Sparse attention by blocks of gathered keys against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ordnung.modeling.ops.sparse_attention import sparse_attention, weighted_attention
from ordnung.modeling.ops.sparse_keys import NEVER, deaths, kept_spans, pairs_seen, reservoir
from ordnung.modeling.ops.sparse_pattern import PRIME, Pattern, mask_naive, priority, sparse_attention_naive
from ordnung.modeling.ops.sparse_state import empty_state, first_state, step

PATTERNS = {
    "local": {"window": 5},
    "global": {"window": 5, "num_global": 3},
    "strided": {"window": 5, "stride": 4},
    "random": {"window": 5, "num_random": 2, "random_block": 4},
    "all": {"window": 9, "num_global": 2, "stride": 7, "num_random": 3, "random_block": 8, "seed": 3},
    "wide": {"window": 400, "num_global": 2, "stride": 7},
}
CASES = [
    pytest.param(Pattern(**fields, causal=causal), id=f"{name}-{'causal' if causal else 'bidirectional'}")
    for name, fields in PATTERNS.items()
    for causal in (True, False)
]


def inputs(N, rows=2, heads=2):
    torch.manual_seed(N)
    return [torch.randn(rows, N, heads, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def naive(query, key, value, pattern):
    """(R, N, H, D) row by row and head by head."""
    rows = [
        torch.stack(
            [sparse_attention_naive(*(x[row, :, head] for x in (query, key, value)), pattern) for head in range(2)], 1
        )
        for row in range(len(query))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("pattern", CASES)
@pytest.mark.parametrize("N", [1, 63, 300])
def test_blocks_equal_the_definition_with_gradients(pattern, N):
    tensors = inputs(N, rows=1)
    expected = naive(*tensors, pattern)
    got = sparse_attention(*tensors, pattern)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), tensors), torch.autograd.grad((expected * weight).sum(), tensors)
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


LONG = [
    Pattern(window, 3 * (window == 70), stride, blocks, size, causal=causal)
    for window, stride, blocks, size in ((70, None, 0, 1), (64, 9, 0, 1), (64, None, 2, 64), (96, 50, 2, 24))
    for causal in (True, False)
]


@pytest.mark.parametrize("pattern", LONG, ids=str)
def test_long_rows_equal_the_definition_with_grouped_keys(pattern):
    """Whole windows apart from what is seen beyond them, which many blocks share, and some do not have."""
    N = 500
    query = torch.randn(2, N, 4, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, N, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = sparse_attention(query, key, value, pattern)
    repeated = [x.repeat_interleave(2, 2) for x in (key, value)]
    scores = torch.einsum("rnhd,rmhd->rhnm", query, repeated[0]) / 2
    weights = scores.masked_fill(~mask_naive(pattern, N), -torch.inf).softmax(-1)
    expected = torch.einsum("rhnm,rmhd->rnhd", weights, repeated[1])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad(x, (query, key, value), grad) for x in (got, expected)))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", [Pattern(64, causal=False), *LONG], ids=str)
def test_a_padded_row_alone_equals_the_row(pattern):
    tensors = [x.detach() for x in inputs(400, rows=1)]
    got = sparse_attention(*tensors, pattern, torch.tensor([230]))
    expected = sparse_attention(*(x[:, :230] for x in tensors), pattern)
    torch.testing.assert_close(got[:, :230], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", CASES)
def test_rows_of_other_lengths_equal_rows_alone(pattern):
    tensors = [x.detach() for x in inputs(150)]
    lengths = torch.tensor([150, 61])
    got = sparse_attention(*tensors, pattern, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = naive(*(x[row : row + 1, :length] for x in tensors), pattern)[0]
        torch.testing.assert_close(got[row, :length], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", [case for case in CASES if "causal" in case.id])
def test_weights_are_those_of_the_mask(pattern):
    query, key, value = (x.detach() for x in inputs(70, rows=1))
    mixed, weights = weighted_attention(query, key, value, pattern)
    assert torch.equal(weights[0, 0] > 0, mask_naive(pattern, 70))
    torch.testing.assert_close(mixed, torch.einsum("rhnm,rmhd->rnhd", weights, value), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed, naive(query, key, value, pattern), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "wide"])
def test_a_key_that_is_unseen_stays_unseen(name):
    """So that a small generation state suffices."""
    mask = mask_naive(Pattern(**{**PATTERNS[name], "window": 9}), 200)
    for key in range(200):
        seen = mask[key:, key].long()
        assert (seen[1:] <= seen[:-1]).all()


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "wide"])
@pytest.mark.parametrize("split", [(40, 1, 1, 9, 1, 8), (3, 5) + (1,) * 52])
def test_steps_from_a_state_equal_the_definition(name, split):
    pattern = Pattern(**{**PATTERNS[name], "window": 9})
    query, key, value = (x.detach() for x in inputs(60))
    expected = naive(query, key, value, pattern)
    done = split[0]
    state = first_state(pattern, key[:, :done], value[:, :done])
    for tokens in split[1:]:
        place = slice(done, done + tokens)
        output, _, state = step(pattern, state, query[:, place], key[:, place], value[:, place])
        torch.testing.assert_close(output, expected[:, place], rtol=0, atol=1e-12)
        done += tokens
    assert state.count.tolist() == [60, 60]


@pytest.mark.parametrize("pattern", [case for case in CASES if "causal" in case.id])
@pytest.mark.parametrize("in_place", [False, True])
def test_steps_of_rows_of_other_lengths(pattern, in_place):
    """Token by token and in parts, from nothing, with padding after each row's tokens."""
    pattern = pattern._replace(window=max(pattern.window, 8))
    query, key, value = (x.detach() for x in inputs(90))
    lengths = torch.tensor([90, 41])
    expected = naive(query, key, value, pattern)
    for split in ([1] * 90, [30, 1, 1, 20, 1, 37], [1, 2, 87]):
        state, done = empty_state(key, pattern), 0
        for tokens in split:
            place = slice(done, done + tokens)
            now = (lengths - done).clamp(0, tokens)
            output, _, state = step(pattern, state, query[:, place], key[:, place], value[:, place], now, in_place)
            assert output.isfinite().all()
            for row, length in enumerate(now.tolist()):
                torch.testing.assert_close(output[row, :length], expected[row, place][:length], rtol=0, atol=1e-12)
            done += tokens
        assert torch.equal(state.count, lengths)


def test_only_strided_tokens_make_the_state_grow():
    for fields, grows in ((PATTERNS["all"], True), ({**PATTERNS["all"], "stride": None}, False)):
        pattern, (_, key, value) = Pattern(**fields), (x.detach() for x in inputs(200))
        sizes = [first_state(pattern, key[:, :N], value[:, :N]).pairs.shape[1] for N in (40, 120, 200)]
        assert (sizes[0] < sizes[1] < sizes[2]) if grows else (sizes[0] == sizes[1] == sizes[2])


def test_a_mask_gives_a_long_row_its_only_global_tokens():
    pattern, tensors = Pattern(64, causal=False), inputs(400, rows=1)
    is_global = torch.arange(400)[None] == 333
    got = sparse_attention(*tensors, pattern, None, is_global)
    alone = [x[0, :, 1] for x in tensors]
    expected = sparse_attention_naive(*alone, pattern, is_global[0].tolist())
    torch.testing.assert_close(got[0, :, 1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", [case for case in CASES if "bidirectional" in case.id])
def test_a_mask_says_which_tokens_are_global(pattern):
    tensors, lengths = inputs(150), torch.tensor([150, 61])
    is_global = torch.rand(2, 150) < 0.05
    is_global[1] = False
    got = sparse_attention(*tensors, pattern, lengths, is_global)
    total = 0.0
    for row, length in enumerate(lengths.tolist()):
        for head in range(2):
            alone = [x[row, :length, head] for x in tensors]
            expected = sparse_attention_naive(*alone, pattern, is_global[row, :length].tolist())
            torch.testing.assert_close(got[row, :length, head], expected, rtol=0, atol=1e-12)
            total = total + expected.square().sum()
    real = torch.arange(150) < lengths[:, None]
    for a, b in zip(
        torch.autograd.grad(got[real].square().sum(), tensors), torch.autograd.grad(total, tensors), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("N", [2, 30, 150])
def test_global_tokens_see_all_through_projections_of_their_own(N):
    pattern = Pattern(40, num_global=3, causal=False)
    tensors, others = ([x.detach() for x in inputs(n)[:3]] for n in (N, N + 1))
    others = [x[:, :N] for x in others]
    lengths = torch.tensor([N, max(1, N - 9)])
    got = sparse_attention(*tensors, pattern, lengths, None, others)
    mixed, _ = weighted_attention(*tensors, pattern, lengths, None, others)
    for row, length in enumerate(lengths.tolist()):
        expected = naive(*(x[row : row + 1, :length] for x in tensors), pattern)[0]
        query, key, value = (x[row, :length] for x in others)
        scores = torch.einsum("nhd,mhd->hnm", query, key) / 2
        expected[:3] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), value)[:3]
        torch.testing.assert_close(got[row, :length], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(mixed[row, :length], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", CASES)
def test_the_way_of_graphs_and_other_devices_is_equal(pattern):
    """All blocks at once, where torch's fused CPU kernel may not be used."""
    tensors, lengths = inputs(150), torch.tensor([150, 61])
    real = torch.arange(150) < lengths[:, None]
    expected = sparse_attention(*tensors, pattern, lengths)[real]
    with sdpa_kernel(SDPBackend.MATH):
        got = sparse_attention(*tensors, pattern, lengths)[real]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        gradients = torch.autograd.grad(got.square().sum(), tensors)
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_kept_keys_serve_every_later_call():
    """Of inference mode, other types, lengths and patterns."""
    kept_spans.cache_clear()
    first = Pattern(70, 3, 9, 2, 16)
    others = [{"window": 66}, {"stride": 7}, {"seed": 1}]
    tensors = inputs(330, rows=1)
    with torch.inference_mode():
        sparse_attention(*tensors, first)
    sparse_attention(*(x.bfloat16() for x in tensors), first).sum().backward()
    made = kept_spans.cache_info().misses
    for changed, N in ({}, 330), *((other, 330) for other in others), ({}, 340), ({}, 330):
        pattern, tensors = first._replace(**changed), inputs(N, rows=1)
        got = sparse_attention(*tensors, pattern)
        gradients = torch.autograd.grad(got.square().sum(), tensors)
        with sdpa_kernel(SDPBackend.MATH):  # keeps nothing
            expected = sparse_attention(*tensors, pattern)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert kept_spans.cache_info().misses == (len(others) + 2) * made  # each once


def test_tensors_of_a_mode_are_not_kept_and_meet_none_that_are():
    """Fake ones, or those that a tracer watches."""
    tensors = inputs(330, rows=1)
    before = kept_spans.cache_info()
    with Largest():
        sparse_attention(*tensors, Pattern(70, 3, 9)).sum().backward()
    assert kept_spans.cache_info() == before


@pytest.mark.parametrize("pattern", CASES)
def test_heads_may_share_keys(pattern):
    query, key, value = (x.detach() for x in inputs(150, heads=4))
    key, value = key[:, :, :2], value[:, :, :2]
    repeated = [x.repeat_interleave(2, 2) for x in (key, value)]
    expected = sparse_attention(query, *repeated, pattern)
    torch.testing.assert_close(sparse_attention(query, key, value, pattern), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weighted_attention(query, key, value, pattern)[0], expected, rtol=0, atol=1e-12)


def test_within_the_window_it_is_attention_itself():
    tensors = [x.detach().float() for x in inputs(40)]
    plain = [x.transpose(1, 2) for x in tensors]
    causal = F.scaled_dot_product_attention(*plain, is_causal=True).transpose(1, 2)
    assert torch.equal(sparse_attention(*tensors, Pattern(40, 3, 7)), causal)
    whole = F.scaled_dot_product_attention(*plain).transpose(1, 2)
    assert torch.equal(sparse_attention(*tensors, Pattern(39, 3, 7, causal=False)), whole)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_no_pair_of_all_tokens_is_stored(causal):
    pattern, N = Pattern(32, 4, 64, 2, 16, causal=causal), 2048
    query, key, value = (torch.randn(1, N, 1, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        sparse_attention(query, key, value, pattern).sum().backward()
    assert largest.elements < N**2 / 16


def test_a_key_of_many_blocks_learns_in_half_precision():
    """Every block adds to the gradient of the first token."""
    pattern = Pattern(32, 1)
    tensors = [torch.randn(1, 4096, 1, 8, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(sparse_attention(*tensors, pattern).sum(), tensors)[2][0, 0]
    half = [x.detach().bfloat16().requires_grad_() for x in tensors]
    for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):
        with sdpa_kernel(backends):
            got = torch.autograd.grad(sparse_attention(*half, pattern).sum(), half)[2][0, 0].float()
        assert ((got - expected).norm() / expected.norm()) < 0.02


def test_priorities_are_one_to_one_and_differ_by_seed():
    blocks = torch.arange(20_000)
    numbers = priority(3, blocks)
    assert numbers.unique().numel() == len(blocks) and int(numbers.min()) >= 0 and int(numbers.max()) < PRIME
    assert numbers[:50].tolist() == [priority(3, block) for block in range(50)]
    assert not torch.equal(numbers, priority(4, blocks))
    # any half of the range comes first about half of the time
    assert abs((numbers[:-1] < numbers[1:]).double().mean() - 0.5) < 0.02
    assert abs(numbers.double().mean() / PRIME - 0.5) < 0.01


def test_the_reservoir_holds_the_lowest_blocks_so_far():
    pattern = Pattern(8, num_random=3, random_block=4, seed=7)
    for row, drawn in enumerate(reservoir(pattern, 40, "cpu")):
        lowest = sorted(range(row), key=lambda block: priority(7, block))[:3]
        assert [int(number) % 2**31 for number in drawn if number < NEVER] == lowest


@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_are_counted_as_the_mask_has_them(name):
    causal = Pattern(**{**PATTERNS[name], "window": 9})
    for N in (1, 20, 130):
        assert pairs_seen(causal, N) == int(mask_naive(causal, N).sum())
        fixed = causal._replace(causal=False, num_random=0)
        assert pairs_seen(fixed, N) == int(mask_naive(fixed, N).sum())
        mask = torch.zeros(N, N, dtype=torch.bool)
        for key, death in enumerate(deaths(causal, N, "cpu")[0].tolist()):
            mask[key:death, key] = True
        assert torch.equal(mask, mask_naive(causal, N))
