"""What layers share whose generation state has a constant size."""

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer


class ConstantStateLayer(LinearAttentionLayer, CacheLayerMixin):
    """A cache layer that keeps no keys and values of single tokens, but counts the tokens.

    So a stack without any attention layer can generate.
    """

    is_croppable = True  # see `removed`
    is_sliding = True  # before 5.23, transformers takes the first layer that is not for the one to size masks by

    def __init__(self, **kwargs):
        super().__init__()
        self.keys = self.values = None  # read of every layer by transformers
        # a tensor: an int would have compiled decoding recompile at every token
        self.cumulative_length = torch.zeros((), dtype=torch.long)

    def update(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} has no keys and values of single tokens.")

    def get_seq_length(self) -> torch.Tensor:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[torch.Tensor, int]:
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.cumulative_length.zero_()

    @staticmethod
    def removed(tokens_to_remove: int, recorded: int | None) -> int:
        """The number of tokens that `crop` takes off the end.

        Args:
            tokens_to_remove: minus that number, as `crop` takes it.
            recorded: of how many tokens the layer can go back to the state before them; None if it has had none yet.
        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if those tokens were not recorded: call `activate_past_recording` before they are added.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes minus the number of tokens to remove, got {tokens_to_remove}.")
        if recorded is None:
            return 0
        if -tokens_to_remove > recorded:
            raise RuntimeError(
                f"Cannot remove {-tokens_to_remove} tokens: {recorded} are recorded. Call `activate_past_recording` "
                "before the tokens are added."
            )
        return -tokens_to_remove
