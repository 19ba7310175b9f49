"""The divergence in pieces, held against the formula."""

import pytest
import torch

from ordnung.scripts.linearizing import divergence as module
from ordnung.scripts.linearizing.divergence import divergence


def formula(logits, wanted, real, T):
    p, q = (wanted / T).softmax(-1), (logits / T).softmax(-1)
    return T**2 * ((p * (p.log() - q.log())).sum(-1) * real).sum()


@pytest.fixture
def predictions(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 20)  # three tokens, and two that are left over
    torch.manual_seed(0)
    logits, wanted = 3 * torch.randn(2, 2, 4, 6, dtype=torch.float64)
    return logits.requires_grad_(), wanted, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]) != 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_formula(predictions, temperature):
    logits, wanted, real = predictions
    found = [f(logits, wanted, real, temperature) for f in (divergence, formula)]
    torch.testing.assert_close(*found)
    gradients = [torch.autograd.grad(0.25 * value, logits)[0] for value in found]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][~real].any() and gradients[0][real].all()


def test_small_gradients_survive_half_precision():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 4096).half()
    wanted, real = (logits + 1e-2 * torch.randn(1, 2, 4096)).half(), torch.ones(1, 2, dtype=torch.bool)
    gradients = []
    for f, x in ((divergence, logits.clone()), (formula, logits.double())):
        value = f(x.requires_grad_(), wanted.to(x.dtype), real, 1.0)
        gradients.append(torch.autograd.grad(value, x, torch.tensor(1e4, dtype=value.dtype))[0])  # as a loss is scaled
    assert gradients[0].dtype == torch.half
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=5e-3, atol=1e-5)
