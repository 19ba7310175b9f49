"""A family outside of the tree passes every test that a family in it passes."""

import pytest
import torch
from family_tester import MODERN, FamilyTester
from retention.retention_op import retention, retention_naive
from torch.nn.functional import logsigmoid


class TestRetentionLM(FamilyTester):
    model_type = "retention_lm"
    variants = {
        "default": {"chunk_size": 4},
        "learned-post": {"chunk_size": 8, "position_embedding_type": "learned", "norm_position": "post"},
        "hybrid": {"chunk_size": 5, "layer_types": ["retention", "full_attention", "retention"]},
        "modern": {**MODERN, "chunk_size": 4},
    }
    mixing_exponent = 1
    state_grows = False


@pytest.mark.parametrize("N", [1, 63, 100])
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_chunks_equal_the_recurrence(N, chunk_size):
    """Output and all gradients, with padding after the real tokens of the second row."""
    inputs = [torch.randn(2, N, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    logits = torch.randn(2, N, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([N, 1 + N // 2])
    state = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    got, after = retention(*inputs, logsigmoid(logits), state, lengths, chunk_size)
    expected = [
        torch.stack([retention_naive(*(x[r, :n, h] for x in (*inputs, logsigmoid(logits)))) for h in range(3)], 1)
        for r, n in enumerate(lengths)
    ]
    got = torch.cat([got[r, :n] for r, n in enumerate(lengths)])
    torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    gradients = [
        torch.autograd.grad((x * weight).sum(), (*inputs, logits), retain_graph=True)
        for x in (got, torch.cat(expected))
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
