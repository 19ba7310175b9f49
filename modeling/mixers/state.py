"""Generation states that are recurrent: of a size of their own, and no keys and values of single tokens."""

from collections.abc import Callable

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer
from transformers.utils.import_utils import is_tracing


class BatchFirst:
    """What a cache layer does to each of its tensors, batch first, by its own `change`; inherited before the layer."""

    def change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        raise NotImplementedError(f"{type(self).__name__} must implement `change`.")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.change(lambda x: x[indices])

    def offload(self) -> None:
        self.change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.change(lambda x: x.to(self.device, non_blocking=True))


class RecurrentStateLayer(BatchFirst, LinearAttentionLayer, CacheLayerMixin):
    """Generation state of a mixer: a tuple of tensors, batch first, that each step of tokens replaces.

    A subclass names the `_layer_type` of its mixer, which enters it in transformers' tables. The tokens are counted
    here, so that a stack without any attention layer can generate. Gradients flow through the state.
    """

    is_croppable = True  # see `crop`
    is_sliding = True  # before 5.23, transformers takes the first layer that is not for the one to size masks by

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls._layer_type is not None:
            STATIC_LAYER_TYPE_MAPPING[cls._layer_type] = cls  # the same layer serves a static cache

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__()
        # In a static cache tensors keep their addresses. Elsewhere generate() would make the masks ahead, as a
        # dictionary, for compiled decoding, and clients such as PEFT's prompts want the mask itself.
        self.is_compileable = max_cache_len is not None
        self.keys = self.values = None  # read of every layer by transformers
        # a tensor: an int would have compiled decoding recompile at every token
        self.cumulative_length = torch.zeros((), dtype=torch.long)
        self.state: tuple[torch.Tensor, ...] | None = None
        # what `crop` goes back to: the state before each step, the step, and what it was given
        self.recorded: list[tuple[tuple[torch.Tensor, ...], Callable, tuple[torch.Tensor, ...]]] = []

    def update(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} has no keys and values of single tokens.")

    def get_seq_length(self) -> torch.Tensor:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[torch.Tensor, int]:
        return self.cumulative_length + query_length, 0

    def update_state(
        self,
        before: tuple[torch.Tensor, ...],
        after: tuple[torch.Tensor, ...],
        step: Callable,
        inputs: tuple[torch.Tensor, ...],
        real: torch.BoolTensor | None = None,
    ) -> None:
        """Takes the state after some tokens.

        Args:
            before, after: the states, batch first each.
            step: `step(before, *inputs, lengths)` gives `after`, with `lengths` (B,) real tokens of each row; `crop`
                calls it again for fewer tokens.
            inputs: (B, N, ...) each, what the N tokens added, each row's real tokens first.
            real: (B, N), which of the tokens were real in the order of the call, None for all.
        """
        N = inputs[0].shape[1]
        if self.record_past:
            if real is None:
                real = inputs[0].new_ones(inputs[0].shape[:2], dtype=torch.bool)
            self.recorded.append((before, step, (*inputs, real)))
        if self.state is None:
            self.dtype, self.device = after[0].dtype, after[0].device
            self.cumulative_length = self.cumulative_length.to(self.device)
            self.has_previous_state[0] = True
        fixed = (self.is_compileable or is_tracing(after[0])) and not torch.is_grad_enabled() and not self.record_past
        if fixed and self.state is not None:
            for old, new in zip(self.state, after):
                old.copy_(new)  # compiled decoding relies on the addresses
        else:
            self.state = tuple(after)
            if fixed and not is_tracing(after[0]):
                for x in (*self.state, self.cumulative_length):
                    torch._dynamo.mark_static_address(x)
        self.cumulative_length.add_(N)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length.zero_()
        self.recorded.clear()
        if not self.is_compileable:
            self.state = None
        elif self.state is not None:
            for x in self.state:
                x.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, and the recorded past.

        Steps cannot be undone, so the state before the removed tokens is taken, and those that stay of a step are
        added to it again.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if those tokens were not recorded: call `activate_past_recording` before they are added.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes minus the number of tokens to remove, got {tokens_to_remove}.")
        recorded = sum(inputs[0].shape[1] for _, _, inputs in self.recorded)
        missing = -tokens_to_remove
        if self.state is not None and missing > recorded:
            raise RuntimeError(
                f"Cannot remove {missing} tokens: {recorded} are recorded. Call `activate_past_recording` before the "
                "tokens are added."
            )
        while missing and self.recorded:
            self.state, step, (*inputs, real) = self.recorded.pop()
            tokens = real.shape[1]
            kept = max(0, tokens - missing)
            missing -= tokens - kept
            self.cumulative_length.sub_(tokens - kept)
            if kept:
                self.state = tuple(step(self.state, *(x[:, :kept] for x in inputs), real[:, :kept].sum(1)))
        self.recorded.clear()

    def change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies a function to each of the batch-first tensors."""
        if self.state is not None:
            self.state = tuple(map(function, self.state))
        self.recorded = [
            (tuple(map(function, before)), step, tuple(map(function, inputs))) for before, step, inputs in self.recorded
        ]


__all__ = ["BatchFirst", "RecurrentStateLayer"]
