"""Sparse attention by blocks of gathered keys against its definition."""

import pytest
import torch

from ordnung.modeling.ops.sparse_attention import sparse_attention, weighted_attention
from ordnung.modeling.ops.sparse_pattern import Pattern, mask_naive, sparse_attention_naive
from ordnung.modeling.ops.sparse_state import first_state, step

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
        output, state = step(pattern, state, query[:, place], key[:, place], value[:, place])
        torch.testing.assert_close(output, expected[:, place], rtol=0, atol=1e-12)
        done += tokens
    assert state.count.tolist() == [60, 60]
