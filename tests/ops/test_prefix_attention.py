import pytest
import torch

from ordnung.modeling.ops.prefix_attention import (
    fold_keys,
    fold_values,
    join_scores,
    mix,
    plan_passes,
    prefix_ends,
    prefix_states_naive,
    sees,
)


def attention(q, k, v, visible):
    """softmax over the visible keys, query by query."""
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        out[i] = torch.softmax(k[visible[i]] @ q[i], 0) @ v[visible[i]]
    return out


def test_attention_in_parts_equals_the_formula():
    q, k, v = (torch.randn(9, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    visible = torch.rand(9, 9) < 0.6
    visible[:, 8] = True  # the part that ends there is the only one that some queries see
    visible[2, :8] = False
    past = None
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        scores = join_scores(q @ k[part].t(), visible[:, part], past)
        past = mix(scores, v[part], past), scores.logsumexp(-1)
    expected = attention(q, k, v, visible)
    torch.testing.assert_close(past[0], expected, rtol=0, atol=1e-13)
    total = (q @ k.t()).masked_fill(~visible, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(past[1], total, rtol=0, atol=1e-13)
    target = torch.randn_like(expected)
    got = torch.autograd.grad((past[0] * target).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((expected * target).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_queries_without_keys_stay_finite():
    q = torch.randn(3, 5, 4, requires_grad=True)
    visible = torch.ones(3, 5, 6, dtype=torch.bool)
    visible[:, 1] = False
    past = None
    for _ in range(2):
        scores = join_scores(q @ torch.randn(4, 6), visible, past)
        past = mix(scores, torch.randn(3, 6, 4), past), scores.logsumexp(-1)
    output, total = past
    (output.sum() + total[:, [0, 2, 3, 4]].sum()).backward()
    assert output.isfinite().all() and q.grad.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_folded_projections_equal_the_projections(bias):
    k_proj, v_proj = (torch.nn.Linear(12, 12, bias=bias).double() for _ in range(2))
    states, query = torch.randn(5, 7, 12).double(), torch.randn(5, 3, 2, 4).double()
    weights = torch.rand(5, 3, 2, 7).double()  # rows that do not sum to one, as after dropout

    def heads(x):
        return x.view(5, 7, 3, 4).transpose(1, 2)

    scores = fold_keys(query, states, k_proj.weight, k_proj.bias)
    torch.testing.assert_close(scores, query @ heads(k_proj(states)).transpose(2, 3), rtol=0, atol=1e-13)
    mixed = fold_values(weights, states, v_proj.weight, v_proj.bias)
    torch.testing.assert_close(mixed, weights @ heads(v_proj(states)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 11, 12, 30, None])
def test_ends_are_those_of_the_definition(stride):
    real = torch.rand(4, 23) < 0.7
    real[0], real[1, :9] = True, False
    ends = prefix_ends(real, stride)
    for row in range(4):
        for t in torch.nonzero(real[row])[:, 0].tolist():
            count = int(real[row, : t + 1].sum())
            connected = 0 if stride is None else stride * (count // stride)
            assert int(real[row, : ends[row, t]].sum()) == connected


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("budget", [1, 50, 300, 100000])
def test_plan_covers_what_is_wanted_once(stride, budget):
    real = torch.ones(3, 90, dtype=torch.bool)
    real[0, :20], real[1, 70:] = False, False
    read = real & (torch.rand(3, 90) < 0.5)
    ends = prefix_ends(real, stride)
    seen = torch.zeros_like(read, dtype=torch.long)
    for group in plan_passes(ends, read, 16, budget):
        assert len(group.rows) == 1 or len(group.rows) * group.stop <= budget
        assert group.ends.max() - group.ends.min() < 16
        assert group.start == group.ends.min() and group.stop > group.pick(group.reads).max()
        assert group.stop >= group.ends.max() or not group.wanted.any()
        rows = group.pick(group.rows[:, None].expand_as(group.reads))
        places = group.pick(group.reads)
        assert torch.equal(ends[rows, places], group.pick(group.ends[:, None].expand_as(group.reads)))
        seen.index_put_((rows, places), torch.ones_like(rows), accumulate=True)
    assert torch.equal(seen, read.long())


def test_queries_see_their_pass():
    ends = torch.tensor([3, 6])
    visible = sees(ends, torch.arange(5), torch.arange(6))
    for g, end in enumerate([3, 6]):
        for i in range(5):
            assert visible[g, i].tolist() == [j < end or j <= i for j in range(6)]
    chosen = torch.tensor([[2, 4], [5, 5]])
    assert torch.equal(sees(ends, chosen, torch.arange(6))[0], visible[0, [2, 4]])


def test_naive_reads_each_prefix_once():
    """On an encoder that counts what it sees: B(t) tokens connected, the others causally."""

    def encode(states, visible):
        return visible.sum(1).double()[None, :, None] + 100 * states[:, -1:]

    real = torch.tensor([[False, True, True, True, False, True]])
    states = torch.arange(6.0).double()[None, :, None]
    got = prefix_states_naive(encode, states, real, 3)[0, :, 0]
    assert got.tolist() == [0, 101, 202, 303, 0, 504]
