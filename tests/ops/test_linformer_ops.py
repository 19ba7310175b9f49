import pytest
import torch

from ordnung.modeling.ops import causal_linformer_blocks
from ordnung.modeling.ops.causal_linformer import CausalLinformer, causal_linformer_naive
from ordnung.modeling.ops.causal_linformer_state import advance, empty_state
from ordnung.modeling.ops.layout import take
from ordnung.modeling.ops.linformer import LEARNED, project_naive, project_rows, slot_bias, weight_sums

KINDS = ("linear", "mean_pool", "max_pool", "conv", "adaptive_mean_pool")
k, n = 6, 24


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_weight(kind, *parts):
    return random(*parts, *((n, k) if kind == "linear" else (n // k,))) if kind in LEARNED else None


@pytest.mark.parametrize("N", [1, 5, 6, 13, 24])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_projection_equals_the_definition(kind, heads, N):
    x, weight = random(3, N, heads, 4), make_weight(kind, heads)
    inputs = [x] if weight is None else [x, weight]
    for lengths in (None, torch.tensor([N, max(1, N // 2), 1])):
        padding = torch.zeros(3, N, dtype=torch.bool)
        if lengths is not None:
            padding = torch.arange(N) >= lengths[:, None]
        rows = project_rows(x.masked_fill(padding[..., None, None], 0), kind, weight, k, n, lengths)
        bias = slot_bias(kind, N, k, n, lengths, x.dtype, x.device)
        bias = torch.zeros(3, rows.shape[1], dtype=x.dtype) if bias is None else bias.expand(3, -1)
        for b in range(3):
            length = N if lengths is None else int(lengths[b])
            for h in range(heads):
                own = None if weight is None else weight[h]
                expected, expected_bias = project_naive(x[b, :length, h], kind, own, k, n)
                got = rows[b, :, h]
                slots = len(expected)
                torch.testing.assert_close(got[:slots], expected, rtol=0, atol=1e-12)
                torch.testing.assert_close(bias[b, :slots], expected_bias, rtol=0, atol=1e-12)
                assert (bias[b, slots:] == -torch.inf).all() and not got[slots:].any()
                seed = torch.randn_like(expected)
                pairs = zip(
                    torch.autograd.grad(got[:slots], inputs, seed, retain_graph=True),
                    torch.autograd.grad(expected, inputs, seed, retain_graph=True),
                )
                for a, c in pairs:
                    torch.testing.assert_close(a, c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNED)
def test_weight_sums_are_the_projection_of_ones(kind):
    weight = make_weight(kind, 2)
    for lengths in ([13, 13], [13, 7]):
        sums = weight_sums(kind, weight, 13, None if lengths == [13, 13] else torch.tensor(lengths)).expand(2, -1, -1)
        for b, length in enumerate(lengths):
            for h in range(2):
                expected, _ = project_naive(torch.ones(length, 1, dtype=torch.float64), kind, weight[h], k, n)
                torch.testing.assert_close(sums[b, : len(expected), h], expected[:, 0])


PARTS = [(1, 1), (2, 1), (2, 2)]  # key and value, heads: shared or not


def operator(kind, parts, block_size=4, blocks_back=1, sinks=0):
    return CausalLinformer(kind, make_weight(kind, *parts), k, n, block_size, blocks_back, sinks)


def reference(op, query, key, value):
    blocks = torch.arange(-(-query.shape[1] // op.C))
    table = op._replace(S=0).weights(blocks).permute(1, 2, 0, 3, 4).flatten(2, 3).to(query.dtype)  # (*P, positions, k)
    table = table.expand(2, query.shape[2], -1, -1)
    return torch.stack([causal_linformer_naive(*row, table, op.C, op.W, op.S) for row in zip(query, key, value)])


@pytest.fixture(params=[2048, 16], ids=["one-slab", "slabs"])
def slab_tokens(request, monkeypatch):
    elements = request.param * 2 * 3  # heads and their width, in what follows
    elements = dict.fromkeys(causal_linformer_blocks.SLAB_ELEMENTS, elements)
    monkeypatch.setattr(causal_linformer_blocks, "SLAB_ELEMENTS", elements)


@pytest.mark.parametrize("N", [1, 7, 12, 41])  # 41 is beyond the table of 24 positions
@pytest.mark.parametrize("blocks", [(4, 1), (3, 0), (2, 2), (8, 1), (4, 1, 2), (4, 0, 7), (2, 1, 30)], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "mean_pool", "conv"])
def test_causal_forward_and_gradients_equal_the_formula(kind, parts, blocks, N, slab_tokens):
    op = operator(kind, parts, *blocks)
    inputs = [random(2, N, 2, 3) for _ in range(3)]
    got, expected = op.forward(*inputs)[0], reference(op, *inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    older = (-(-N // op.C) - 1 - op.W) * op.C > op.S  # a query sees slots
    inputs += [op.weight] if op.weight is not None and older else []
    seed = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@torch.no_grad()
def test_without_slots_only_the_window_is_seen():
    op = CausalLinformer("linear", None, 0, n, 4, 1)
    inputs = [random(2, 30, 2, 3) for _ in range(3)]
    output, _, state = op.step(*inputs)
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    mask &= torch.arange(30) >= (torch.arange(30)[:, None] // 4 - 1) * 4
    query, key, value = (x.transpose(1, 2) for x in inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert state.k_sums.numel() == state.mass.numel() == 0


@pytest.mark.parametrize("first", [1, 2, 3, 4, 7, 8, 13, 30])
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("kind, sinks", [("linear", 0), ("linear", 5), ("mean_pool", 0), ("conv", 0), ("conv", 9)])
@torch.no_grad()
def test_steps_equal_the_formula(kind, sinks, parts, first, slab_tokens):
    """A prefill of rows of different lengths, then single tokens, then all splits of the rest."""
    op, N = operator(kind, parts, sinks=sinks), 41
    query, key, value = (random(3, N, 2, 3) for _ in range(3))
    expected = reference(op, query, key, value)

    def part(lengths, size):
        """The next `size` tokens of each row, which has had `lengths`; beyond its last one garbage."""
        index = (lengths[:, None] + torch.arange(size)).clamp(max=N - 1)
        return [take(x, index) for x in (query, key, value)]

    def check(state, lengths, size, real):
        output, _, state = op.step(*part(lengths, size), state, real)
        for b in range(3):
            new = size if real is None else int(real[b])
            torch.testing.assert_close(output[b, :new], expected[b, lengths[b] : lengths[b] + new], rtol=0, atol=1e-12)
        assert output.isfinite().all()
        return state, lengths + (size if real is None else real)

    zero = torch.zeros(3, dtype=torch.long)
    start, lengths = check(None, zero, first, torch.tensor([first, first // 2, 0]))
    start, lengths = check(start, lengths, 1, None)
    start, lengths = check(start, lengths, 1, torch.tensor([1, 0, 1]))
    rest = N - int(lengths.max())
    for size in range(1, rest + 1):
        state, seen = check(start, lengths, size, None)
        assert torch.equal(state.count, seen)
        if size < rest:
            check(state, seen, rest - size, None)


@pytest.mark.parametrize("kind", ["linear", "mean_pool", "conv"])
@torch.no_grad()
def test_the_future_changes_nothing_at_all(kind, slab_tokens):
    op = operator(kind, (1, 1))
    op = op._replace(weight=None if op.weight is None else op.weight.float())
    inputs = [torch.randn(2, 41, 2, 3) for _ in range(3)]
    for t in (1, 8, 20, 40):
        other = [x.clone() for x in inputs]
        for x in other:
            x[:, t:] *= 1e6
        assert torch.equal(op.forward(*inputs)[0][:, :t], op.forward(*other)[0][:, :t])


@pytest.mark.parametrize("sinks", [0, 3, 10])
@pytest.mark.parametrize("tokens", [4, 12])
@torch.no_grad()
def test_parts_equal_the_whole(tokens, sinks):
    op = operator("linear", (2, 2), sinks=sinks)
    inputs = [random(2, 41, 2, 3) for _ in range(3)]
    carry, outputs = op.before_first(inputs[1]), []
    for parts in zip(*(x.split(tokens, dim=1) for x in inputs)):
        output, _, carry = op.forward_part(*parts, carry)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), reference(op, *inputs), rtol=0, atol=1e-12)


@torch.no_grad()
def test_state_does_not_drift_in_bfloat16():
    op = CausalLinformer("mean_pool", None, 4, 4096, 16, 1)
    key, value = (torch.randn(1, 2048, 1, 8).bfloat16() for _ in range(2))
    state = empty_state(op, key)
    for t in range(2048):
        state = advance(op, key[:, t : t + 1], value[:, t : t + 1], state)
    expected = key[0, :2032, 0].double().sum(0)  # the last block is in the window
    assert state.mass.sum() == 2032
    assert (state.k_sums[0, :, 0].double().sum(0) - expected).norm() < 0.01 * expected.norm()


def test_slots_count_as_often_as_their_tokens():
    """Equal keys: every past token then weighs the same, in the window or in a slot."""
    op = CausalLinformer("linear", random(1, 1, n, k), k, n, 4, 1)
    key, value = torch.ones(1, 22, 1, 3, dtype=torch.float64), random(1, 22, 1, 3)
    output = op.forward(random(1, 22, 1, 3), key, value)[0]
    expected = value.cumsum(1) / torch.arange(1, 23)[:, None, None]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
