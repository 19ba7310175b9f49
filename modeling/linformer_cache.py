"""The generation state of causal LinformerLM."""

import torch
from transformers.utils.import_utils import is_tracing

from ordnung.modeling.constant_state import ConstantStateLayer
from ordnung.modeling.ops.causal_linformer import CausalLinformer, CausalState


class LinformerCacheLayer(ConstantStateLayer):
    """Generation state of the causal mixer: a `CausalState`, of a constant size, with its own count for each row."""

    _layer_type = "causal_linformer_attention"

    def __init__(self, **kwargs):
        super().__init__()
        self.state: CausalState | None = None
        # what `crop` goes back to: the state before each step, and what is needed to repeat a part of it
        self.recorded: list[tuple[CausalState | None, CausalLinformer, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def update_state(self, state, operator, key, value, real=None) -> None:
        """Takes the state after a step.

        Args:
            state: the new `CausalState`.
            operator: the `CausalLinformer` that made it.
            key, value: (B, N, H, D), what the step added, each row's real tokens first.
            real: (B, N) which of the N tokens were real in their original order, or None if all.
        """
        state = CausalState(*(x.detach() for x in state))
        if self.record_past:
            if real is None:
                real = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
            before = operator.empty_state(key) if self.state is None else self.state
            weight = None if operator.weight is None else operator.weight.detach()
            step = operator._replace(weight=weight), key.detach(), value.detach(), real
            self.recorded.append((CausalState(*(x.detach() for x in before)), *step))
        if self.state is not None and is_tracing(key):
            for old, new in zip(self.state, state):
                old.copy_(new)  # in place: addresses stay
        else:
            self.state = state
        if not self.has_previous_state[0]:
            self.dtype, self.device = key.dtype, key.device
            self.cumulative_length = self.cumulative_length.to(key.device)
            self.has_previous_state[0] = True
        self.cumulative_length.add_(key.shape[1])

    def reset(self) -> None:
        super().reset()
        self.recorded.clear()
        self.change(torch.zeros_like)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, and the recorded past.

        Sums cannot be undone, so the state before the removed tokens is taken and those that stay of a step are added
        to it again.

        Raises:
            ValueError, RuntimeError: as `removed`.
        """
        held = None if self.state is None else sum(step[-1].shape[1] for step in self.recorded)
        missing = self.removed(tokens_to_remove, held)
        while missing and self.recorded:
            self.state, operator, key, value, real = self.recorded.pop()
            kept = max(0, real.shape[1] - missing)
            missing -= real.shape[1] - kept
            self.cumulative_length.sub_(real.shape[1] - kept)
            self.state = operator.replay(key[:, :kept], value[:, :kept], self.state, real[:, :kept].sum(1))
        self.recorded.clear()

    def change(self, function) -> None:
        """Applies a function to each of the batch-first tensors."""
        if self.state is not None:
            self.state = CausalState(*map(function, self.state))
        self.recorded = [
            (CausalState(*map(function, before)), operator, *map(function, step))
            for before, operator, *step in self.recorded
        ]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.change(lambda x: x[indices])
