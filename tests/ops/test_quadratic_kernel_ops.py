import math

import pytest
import torch

from ordnung.modeling.ops import quadratic_kernel as ops
from ordnung.modeling.ops import quadratic_sweep
from ordnung.modeling.ops.quadratic_kernel import Kernel, centre, quadratic_kernel, quadratic_kernel_naive
from ordnung.modeling.ops.sliding_window import last_tokens, sliding_window_attention
from ordnung.modeling.ops.symmetric_square import counted, counted_vjp, features, features_vjp, num_features

KERNELS = {
    "shifted": Kernel(0.5, 1.0),
    "odd": Kernel(-0.7, 0.3),
    "taylor": Kernel(2**-0.5, 2**-0.5, 0.5),
    "square": Kernel(1.0, 0.0),
}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_inputs(R=2, N=203, H=2, d=4, dv=5, gate=True):
    """query, key, value, log decay, alpha, beta."""
    decay = torch.nn.functional.logsigmoid(random(R, N, H) + 1).detach().requires_grad_() if gate else None
    return [random(R, N, H, d), random(R, N, H, d), random(R, N, H, dv), decay, random(H), random(H)]


def naive(query, key, value, decay, alpha, beta, gamma=0.0, centering=None):
    """(R, N, H, dv), head by head."""
    rows = []
    for r in range(len(query)):
        heads = []
        for h in range(query.shape[2]):
            kernel = Kernel(alpha[h], beta[h], gamma)
            gate = None if decay is None else decay[r, :, h]
            parts = (x[r, :, h] for x in (query, key, value))
            heads.append(quadratic_kernel_naive(*parts, kernel, gate, centering)[0])
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


def assert_close(got, expected, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("p", [1, 2, 3, 6, 17])
def test_features_are_the_square(p):
    x, y = random(2, p, 7), random(2, p, 7)
    mapped = features(x)
    assert mapped.shape[1] == num_features(p) == p * (p + 1) // 2 + (p % 2 == 0) * p // 2
    assert_close((mapped * counted(y)).sum(1), (x * y).sum(1).square(), 1e-12)
    assert torch.equal(mapped[:, :p], x.square())
    seed = torch.randn_like(mapped)
    for function, vjp in ((features, features_vjp), (counted, counted_vjp)):
        assert_close(vjp(x.detach(), seed.clone()), torch.autograd.grad(function(x), x, seed)[0], 1e-12)


def test_features_are_exact_in_every_dtype():
    """A whole number stays one: the factor 2 is on one side, where sqrt(2) on both is rounded."""
    x = torch.randint(-4, 5, (1, 17, 9))
    expected = (x * x).sum(1).square()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        terms = features(x.to(dtype)).double() * counted(x.to(dtype)).double()
        assert torch.equal(terms.sum(1).long(), expected)


def test_naive_is_the_formula():
    query, key, value, decay, *_ = make_inputs(1, 7, 1, 3, 2)
    query, key, value, decay = (x[0, :, 0] for x in (query, key, value, decay))
    output, weights = quadratic_kernel_naive(query, key, value, Kernel(0.6, -0.4, 0.2), decay)
    for i in range(7):
        each = []
        for j in range(i + 1):
            z = sum(query[i, c] * key[j, c] for c in range(3)) / math.sqrt(3)
            each.append(((0.6 * z - 0.4) ** 2 + 0.2 + ops.EPS) * torch.exp(decay[j + 1 : i + 1].sum()))
        assert_close(weights[i, : i + 1], torch.stack(each) / sum(each), 1e-14)
        assert_close(output[i], sum(w * v for w, v in zip(each, value)) / sum(each), 1e-14)
    assert not weights.triu(1).any()


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 202, 500, None])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("d", [3, 4, 16])
def test_chunks_and_all_gradients_equal_the_formula(d, gate, chunk_size):
    inputs = make_inputs(d=d, gate=gate)
    given = [x for x in inputs if x is not None]
    query, key, value, decay, alpha, beta = inputs
    got, _ = quadratic_kernel(query, key, value, Kernel(alpha, beta, 0.3), decay, chunk_size=chunk_size)
    expected = naive(*inputs, gamma=0.3)
    assert_close(got, expected)
    seed = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, given, seed), torch.autograd.grad(expected, given, seed), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("kernel", list(KERNELS))
@torch.no_grad()
def test_without_gradients_too(kernel, gate):
    query, key, value, decay, alpha, beta = make_inputs(gate=gate)
    kernel = KERNELS[kernel]
    expected = naive(query, key, value, decay, alpha * 0 + kernel.alpha, alpha * 0 + kernel.beta, kernel.gamma)
    for chunk_size in (1, 64, 500, None):
        assert_close(quadratic_kernel(query, key, value, kernel, decay, chunk_size=chunk_size)[0], expected)


def parts_of(inputs, start, stop):
    return [None if x is None else x[:, start:stop] for x in inputs]


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize(
    "split, d, chunk_size",
    [
        ([1] * 41, 4, 8),
        ([20, 21], 4, 8),
        ([1, 30, 1, 9], 4, 8),
        ([17, 1, 1, 1, 21], 4, 8),
        ([150, 1, 150], 14, None),  # each in blocks that see all of the call as pairs, and a state
        ([50, 1, 250], 4, None),
    ],
    ids=str,
)
def test_steps_and_their_gradients_equal_one_pass(split, d, chunk_size, gate):
    """The state is handed on with its gradient, and to calls of any length."""
    inputs = make_inputs(N=sum(split), d=d, gate=gate)
    given = [x for x in inputs if x is not None]
    *tokens, alpha, beta = inputs
    state, outputs, done = None, [], 0
    for n in split:
        query, key, value, decay = parts_of(tokens, done, done + n)
        output, state = quadratic_kernel(
            query, key, value, Kernel(alpha, beta), decay, state, chunk_size=chunk_size, return_state=True
        )
        outputs.append(output)
        done += n
    expected, whole = quadratic_kernel(*tokens[:3], Kernel(alpha, beta), tokens[3], chunk_size=500, return_state=True)
    got = torch.cat(outputs, 1)
    assert_close(got, naive(*inputs))
    assert_close(state, whole)
    seeds = [torch.randn_like(got), torch.randn_like(state)]
    pairs = zip(
        torch.autograd.grad([got, state], given, seeds),
        torch.autograd.grad([expected, whole], given, seeds),
        strict=True,
    )
    for a, b in pairs:
        assert_close(a, b, 1e-9 * b.abs().max().item())


def test_gradient_of_the_state_is_its_derivative():
    query, key, value, decay, alpha, beta = make_inputs(1, 5, 2, 3, 2)
    state = torch.rand(1, 2, 3, num_features(4), dtype=torch.float64).requires_grad_()

    def function(query, key, value, decay, alpha, beta, state):
        kernel = Kernel(alpha, beta, 2.0)
        return quadratic_kernel(query, key, value, kernel, decay, state, None, 2, return_state=True)

    assert torch.autograd.gradcheck(function, (query, key, value, decay, alpha, beta, state))


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@torch.no_grad()
def test_rows_of_different_lengths(gate):
    """Padding at the end of a part: not counted, whatever it holds; then single tokens and more parts."""
    *tokens, alpha, beta = make_inputs(R=3, N=60, gate=gate)
    expected = naive(*tokens, alpha, beta)
    seen, state = torch.zeros(3, dtype=torch.long), None
    for lengths in ([17, 3, 0], [1, 1, 1], [1, 0, 1], [0, 20, 9], [20, 12, 30]):
        lengths = torch.tensor(lengths)
        size = int(lengths.max()) + 2
        index = (seen[:, None] + torch.arange(size)).clamp(max=59)
        real = torch.arange(size) < lengths[:, None]
        garbage = 1e3 * torch.randn(3, size, dtype=torch.float64)
        parts = []
        for x in tokens:
            part = None if x is None else x[torch.arange(3)[:, None], index]
            if part is not None:
                dims = (1,) * (part.ndim - 2)
                part = torch.where(real.view(3, size, *dims), part, -garbage.abs().view(3, size, *dims))
            parts.append(part)
        query, key, value, decay = parts
        output, state = quadratic_kernel(
            query, key, value, Kernel(alpha, beta), decay, state, lengths, chunk_size=8, return_state=True
        )
        assert output.isfinite().all()
        for r in range(3):
            assert_close(output[r, : lengths[r]], expected[r, seen[r] : seen[r] + lengths[r]])
        seen += lengths
    for r in range(3):
        whole = parts_of(tokens, 0, seen[r])
        kept = [None if x is None else x[r : r + 1] for x in whole]
        _, alone = quadratic_kernel(*kept[:3], Kernel(alpha, beta), kept[3], return_state=True)
        assert_close(state[r], alone[0])


@pytest.mark.parametrize("mode", ["prefix", "exclusive"])
def test_centring_equals_the_formula_in_parts_and_under_padding(mode):
    query, key, value, decay, alpha, beta = inputs = make_inputs(R=3, N=30)
    expected = naive(*inputs, centering=mode)
    total, start, centred = torch.zeros(2, 3, 2, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.long), []
    for size, lengths in ((11, None), (1, None), (12, torch.tensor([12, 5, 0]))):
        index = start[:, None] + torch.arange(size)
        parts = [x[torch.arange(3)[:, None], index] for x in (query, key)]
        both = [centre(x, mode, t, start, lengths) for x, t in zip(parts, total)]
        centred.append([x for x, _ in both])
        total = torch.stack([t for _, t in both])
        start = start + (size if lengths is None else lengths)
    for r, length in enumerate((24, 17, 12)):
        assert_close(total[:, r], torch.stack([query[r, :length].sum(0), key[r, :length].sum(0)]))
    query, key = (torch.cat(x, 1) for x in zip(*centred))
    got, _ = quadratic_kernel(query, key, value[:, :24], Kernel(alpha, beta), decay[:, :24], chunk_size=8)
    for r, length in enumerate((24, 17, 12)):
        assert_close(got[r, :length], expected[r, :length])
    given = [x for x in inputs if x is not None]
    seed = torch.randn_like(expected[:1, :12])
    pairs = zip(
        torch.autograd.grad(got[:1, :12], given, seed),
        torch.autograd.grad(expected[:1, :12], given, seed),
        strict=True,
    )
    for a, b in pairs:
        assert_close(a, b)


@pytest.mark.parametrize("gate", [None, 4.0, 0.0], ids=str)
@pytest.mark.parametrize("kernel", list(KERNELS))
@torch.no_grad()
def test_float32_does_not_drift(kernel, gate):
    """Tokens of 8192 against the formula in float64: the last ones, and the first ones of every block.

    Also where a gate leaves few tokens and theirs are near a zero of the kernel: those are pairs with the block before.
    """
    kernel, decay, N = KERNELS[kernel], None, 8192
    seen = torch.cat([torch.arange(64, N, 64), torch.arange(N - 256, N)])
    query, key = (torch.nn.functional.rms_norm(torch.randn(1, N, 1, 16), (16,)) for _ in range(2))
    value = torch.randn(1, N, 1, 16)
    if gate is not None:
        decay = torch.nn.functional.logsigmoid(3 * torch.randn(1, N, 1) + gate)
    got = quadratic_kernel(query, key, value, kernel, decay)[0][0, seen, 0].double()
    query, key, value = (x[0, :, 0].double() for x in (query, key, value))
    weights = (kernel.alpha * query[seen] @ key.T / 4 + kernel.beta).square() + kernel.gamma + ops.EPS
    if gate is not None:
        total = decay[0, :, 0].double().cumsum(0)
        weights *= (total[seen, None] - total).clamp(max=0).exp()
    weights *= torch.arange(N) <= seen[:, None]
    expected = weights @ value / weights.sum(1, keepdim=True)
    assert (got - expected).norm() / expected.norm() < 1e-6
    assert_close(got, expected, 1e-6)


@torch.no_grad()
def test_half_precision_is_computed_in_float32():
    tokens = [x.detach().bfloat16() for x in make_inputs()[:4]]
    expected, whole = quadratic_kernel(*(x.float() for x in tokens[:3]), KERNELS["odd"], tokens[3], return_state=True)
    got, state = quadratic_kernel(*tokens[:3], KERNELS["odd"], tokens[3], return_state=True)
    assert got.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(got, expected.bfloat16()) and torch.equal(state, whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = quadratic_kernel(*(x.float() for x in tokens[:3]), KERNELS["odd"], tokens[3], return_state=True)
    assert torch.equal(got, expected) and torch.equal(state, whole)


@torch.no_grad()
def test_the_future_changes_nothing_at_all():
    inputs = [x.detach().float() for x in make_inputs()[:4]]
    for t in (1, 8, 20, 202):
        other = [x.clone() for x in inputs]
        for x in other:
            x[:, t:] *= 1e6
        first, second = (quadratic_kernel(*x[:3], KERNELS["odd"], x[3], chunk_size=16)[0] for x in (inputs, other))
        assert torch.equal(first[:, :t], second[:, :t])


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_no_denominator_vanishes(kernel):
    """Where all weights are zero, and where a gate forgets everything: means of values, and finite gradients."""
    kernel, N = KERNELS[kernel], 40
    value = torch.randn(1, N, 1, 3)
    for size, shift in ((0.0, 0.0), (1.0, None), (1e4, 0.0)):
        query = torch.full((1, N, 1, 2), size)
        key = torch.tensor([size, -size]).expand(1, N, 1, 2).clone()  # at right angles to the queries
        if shift is None and kernel.alpha:
            key = torch.full((1, N, 1, 2), -kernel.beta / kernel.alpha / 2**0.5)  # alpha z + beta = 0
        for gate in (None, torch.full((1, N, 1), -1e4), torch.full((1, N, 1), -torch.inf)):
            inputs = [x.clone().requires_grad_() for x in (query, key, value)]
            output, state = quadratic_kernel(*inputs, kernel, gate, chunk_size=8, return_state=True)
            assert output.isfinite().all() and state.isfinite().all()
            assert output.abs().max() <= value.abs().max() * (1 + 1e-5)
            for grad in torch.autograd.grad(output.sum(), inputs):
                assert grad.isfinite().all()


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_scores_cannot_overflow(kernel):
    """What is beyond 2^16 counts as that: in pairs, through the state, in steps, and with finite gradients."""
    tokens = [random(1, 40, 2, 4).detach().float() for _ in range(3)]
    large = [x * 1e30 for x in tokens[:2]]
    inputs = [x.clone().requires_grad_() for x in (*large, tokens[2])]
    output, state = quadratic_kernel(*inputs, KERNELS[kernel], chunk_size=8, return_state=True)
    bounded = [x.clamp(-(2.0**16), 2.0**16) for x in large]
    assert_close(output, quadratic_kernel(*bounded, tokens[2], KERNELS[kernel])[0], 1e-4)
    assert state.isfinite().all() and output.abs().max() <= tokens[2].abs().max() * (1 + 1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), inputs))
    step, after = quadratic_kernel(*(x[:, :1] for x in inputs), KERNELS[kernel], None, state, return_state=True)
    assert step.isfinite().all() and after.isfinite().all()


@pytest.mark.parametrize("sums", [0.0, -1e-9])
@torch.no_grad()
def test_rounding_cannot_make_a_denominator_vanish(sums, monkeypatch):
    monkeypatch.setattr(ops, "sweep", lambda q, k, v, *_: (torch.full_like(v, sums), None))
    output, _ = quadratic_kernel(*make_inputs()[:3], KERNELS["square"])
    assert output.isfinite().all() and (output * sums >= 0).all()


def test_compiled_equals_eager():
    query, key, value, decay, alpha, beta = inputs = make_inputs(N=40)

    def run(query, key, value, decay, alpha, beta):
        return quadratic_kernel(query, key, value, Kernel(alpha, beta), decay, None, None, 16, return_state=True)

    torch._dynamo.reset()
    expected, got = run(*inputs), torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    seeds = [torch.randn_like(x) for x in expected]
    for a, b in zip(got, expected):
        assert_close(a, b)
    for a, b in zip(torch.autograd.grad(got, inputs, seeds), torch.autograd.grad(expected, inputs, seeds)):
        assert_close(a, b)


def windowed(query, key, value, window):
    """Softmax attention (R, N, H, dv) of every token to the last `window` tokens."""
    scores = torch.einsum("rihc,rjhc->rhij", query, key) / math.sqrt(query.shape[-1])
    lag = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    weights = scores.masked_fill((lag < 0) | (lag >= window), -torch.inf).softmax(-1)
    return torch.einsum("rhij,rjhc->rihc", weights, value)


@pytest.mark.parametrize("N", [1, 7, 30])
@pytest.mark.parametrize("window", [1, 2, 8, 29, 64])
def test_window_and_its_gradients_equal_the_formula(window, N):
    inputs = [random(2, N, 3, 4), random(2, N, 3, 4), random(2, N, 3, 5)]
    got, expected = sliding_window_attention(*inputs, window), windowed(*inputs, window)
    assert_close(got, expected)
    seed = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, inputs, seed), torch.autograd.grad(expected, inputs, seed)):
        assert_close(a, b)


@pytest.mark.parametrize("window", [1, 4, 9, 64])
@torch.no_grad()
def test_window_in_parts_of_different_lengths(window):
    inputs = [random(3, 40, 2, 4), random(3, 40, 2, 4), random(3, 40, 2, 5)]
    expected = windowed(*inputs, window)
    seen = torch.zeros(3, dtype=torch.long)
    past = [x.new_zeros(3, window - 1, *x.shape[2:]) for x in inputs[1:]]
    for lengths in ([11, 0, 3], [1, 1, 0], [9, 9, 2], [1, 1, 1]):
        lengths = torch.tensor(lengths)
        size = int(lengths.max()) + 1
        index = (seen[:, None] + torch.arange(size)).clamp(max=39)
        parts = [x[torch.arange(3)[:, None], index] for x in inputs]
        output = sliding_window_attention(*parts, window, (*past, seen))
        assert output.isfinite().all()
        for r in range(3):
            assert_close(output[r, : lengths[r]], expected[r, seen[r] : seen[r] + lengths[r]])
        past = [last_tokens(before, x, lengths) for before, x in zip(past, parts[1:])]
        seen = seen + lengths
    for r in range(3):
        kept = min(window - 1, int(seen[r]))
        assert torch.equal(past[0][r, window - 1 - kept :], inputs[1][r, seen[r] - kept : seen[r]])


@pytest.mark.parametrize("chunk_size", [5, 20])
def test_score_excess_counts_pairs(chunk_size):
    query, key = random(2, 11, 3, 4), random(2, 11, 3, 4)
    lengths = torch.tensor([11, 7])
    total, pairs = ops.score_excess(query, key, 0.5, chunk_size, lengths)
    expected, count = 0.0, 0
    for r in range(2):
        for i in range(lengths[r]):
            for j in range(i // chunk_size * chunk_size, i + 1):
                scores = (query[r, i] * key[r, j]).sum(-1) / 2  # of each head
                expected = expected + (scores.abs() - 0.5).clamp(min=0).square().sum()
                count += 3
    assert_close(total, expected)
    assert pairs == count


@pytest.mark.parametrize("d, chunk_size, needed", [(14, None, False), (12, None, True), (14, 192, True)])
def test_short_rows_need_no_features_unless_a_chunk_size_is_stated(d, chunk_size, needed, monkeypatch):
    """203 tokens are pairs alone for queries of 14 (up to 204), not of 12 (up to 154)."""
    made = []
    monkeypatch.setattr(quadratic_sweep, "features", lambda x: made.append(x.shape) or features(x))
    query, key, value, decay, *_ = make_inputs(d=d)
    quadratic_kernel(query, key, value, KERNELS["odd"], decay, chunk_size=chunk_size)
    assert bool(made) == needed


def test_an_empty_batch_is_one():
    query = torch.randn(0, 5, 2, 4)
    output, state = quadratic_kernel(query, query, query, KERNELS["odd"], chunk_size=2, return_state=True)
    assert output.shape == (0, 5, 2, 4) and state.shape == (0, 2, 5, num_features(5))


@torch.no_grad()
def test_a_row_of_least_weights_stays_near_a_mean_of_values():
    """Keys that are all alike and queries across them: their weights are small differences of large features.

    What rounding takes from the sum of the weights is bounded, since none is below the least; also after a state.
    """
    N, d = 1000, 16
    key = torch.nn.functional.normalize(torch.randn(d), dim=0)
    query = torch.randn(1, N, 1, d)
    query = 10 * torch.nn.functional.normalize(query - (query @ key)[..., None] * key, dim=-1)
    tokens = query, (10 * key).expand(1, N, 1, d), torch.randn(1, N, 1, 3)
    expected, _ = quadratic_kernel(*(x.double() for x in tokens), KERNELS["square"], chunk_size=2 * N)
    whole, _ = quadratic_kernel(*tokens, KERNELS["square"])
    _, state = quadratic_kernel(*(x[:, :400] for x in tokens), KERNELS["square"], return_state=True)
    parts, _ = quadratic_kernel(*(x[:, 400:] for x in tokens), KERNELS["square"], state=state)
    for output in (whole[:, 400:], parts):
        assert (output - expected[:, 400:]).abs().max() < 0.5
