"""Every parameter gets an initial value, whichever way a model is made."""

from contextlib import contextmanager

import pytest
import torch
from transformers.models.auto import modeling_auto

from family.base import FamilyBase


@contextmanager
def memory_of_nans():
    """Memory that nobody wrote to holds NaN, in whole numbers the highest: else it may happen to look fine."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


class Parameters(FamilyBase):
    @pytest.mark.parametrize("head", ["AutoModelForCausalLM", "AutoModelForTokenClassification"])
    def test_every_parameter_is_initialised(self, variant, head):
        """New, and where a checkpoint lacks them: they come from the meta device then, and `init_weights` alone ran."""
        own = {"tie_word_embeddings": False, "lm_head_bias": True, "lm_head_transform": True}
        config = self.config(variant, **own if head == "AutoModelForCausalLM" else {})
        with memory_of_nans():
            new = getattr(modeling_auto, head).from_config(config)
            filled = type(new).from_pretrained(None, config=config, state_dict={})
        for kind in ("named_parameters", "named_buffers"):
            first, second = (dict(getattr(model, kind)()) for model in (new, filled))
            assert first.keys() == second.keys()
            for name, a in first.items():
                b = second[name]
                assert a.isfinite().all() and b.isfinite().all(), name
                if kind == "named_parameters" and a.ndim > 1 and not torch.equal(a, b):
                    assert 0.5 < a.std() / b.std() < 2, name  # drawn, and alike
                else:
                    assert torch.equal(a, b), name
