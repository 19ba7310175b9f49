"""The part of a layer that moves information between tokens: what all of them have in common.

Mixers enter themselves in the table `MIXERS` under their `layer_type`, and `config.layer_types` says which one each
layer of a stack uses.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import configuration_utils
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.utils.import_utils import is_tracing

from ordnung.configuration.configuration_backbone import BackboneConfig
from ordnung.modeling.mixers.rows import Rows
from ordnung.modeling.mixers.state import RecurrentStateLayer

MIXERS: dict[str, type["Mixer"]] = {}


class Mixer(nn.Module):
    """Base class of the token mixers.

    A subclass sets `layer_type`, implements `forward`, `flops` and `cache_bytes`, and, where it has parameters of its
    own outside of linear layers, `init_weights`. Where it generates from a recurrent state it names the class of that
    state in `cache_layer`. Where `forward` never returns mixing weights, it implements `mixing_weights`.
    """

    layer_type: ClassVar[str | None] = None
    cache_layer: ClassVar[type[RecurrentStateLayer] | None] = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.layer_type is None:
            return
        MIXERS[cls.layer_type] = cls
        # A Trainer that resumes reads config.json as a base config, which takes no other layer types than these.
        allowed = configuration_utils.ALLOWED_ATTN_LAYER_TYPES
        configuration_utils.ALLOWED_ATTN_LAYER_TYPES = tuple(dict.fromkeys((*allowed, cls.layer_type)))
        if cls.layer_type != "full_attention":  # generate() makes masks ahead for caches that can be compiled
            LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[cls.layer_type] = cls.make_mask

    def __init__(self, config: BackboneConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, N, D)
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        rows: Rows | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the mixed states (B, N, D) and, where there are any, the mixing weights (B, H, N, keys).

        `rows` says which tokens are real and which belong together: see `mixers.rows`. `attention_mask` is what
        `make_mask` made; only attention needs it.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `forward`.")

    def state_of(self, past_key_values: Cache) -> RecurrentStateLayer:
        """This layer's generation state in a cache.

        Raises:
            ValueError: the cache was made for another model.
        """
        layer = past_key_values.layers[self.layer_idx] if self.layer_idx < len(past_key_values.layers) else None
        # by name, as a stand-alone folder has its own copy of the class
        if getattr(layer, "_layer_type", None) != self.layer_type:
            raise wrong_state(self.layer_type, self.layer_idx)
        return layer

    def mixing_weights(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """(B, H, N, keys) how much of each key's value enters each output, for the arguments of `forward`.

        Attention says so with `attn_implementation="eager"`.
        """
        weights = self(hidden_states, **kwargs)[1]
        if weights is None:
            raise ValueError(
                f"{type(self).__name__} gave no mixing weights with attn_implementation="
                f"{self.config._attn_implementation!r}: set 'eager'."
            )
        return weights

    @staticmethod
    def make_mask(config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, **kwargs):
        """The mask that this type of layer takes, made once per model call.

        Args:
            attention_mask: (B, tokens so far) with 1 for real tokens, or None.

        Returns:
            here (B, N), True for the real tokens of this call, or None if all are.
        """
        N = inputs_embeds.shape[1]
        if attention_mask is None or N == 0 or (is_tracing(attention_mask) and N == 1):
            return None  # a graph cannot look; a single token in it is a generated one
        real = attention_mask[:, -N:] != 0
        return None if not is_tracing(attention_mask) and bool(real.all()) else real

    def init_weights(self, std: float) -> None:
        """Initialise the parameters that belong to this module itself."""

    def init_converted(self) -> None:
        """Set what is new so that weights which `convert` has copied have an effect; called without gradients."""

    def flops(self, seq_len: int) -> int:
        """FLOPs of a forward pass over one sequence, two per multiply-add."""
        raise NotImplementedError(f"{type(self).__name__} must implement `flops`.")

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        """Bytes of the generation state of one sequence after `seq_len` tokens, `itemsize` bytes an element."""
        raise NotImplementedError(f"{type(self).__name__} must implement `cache_bytes`.")


def wrong_state(layer_type: str, layer_idx: int) -> ValueError:
    """The error for a cache that was not made for the model."""
    return ValueError(
        f"`past_key_values` has no state of {layer_type} for layer {layer_idx}: make it with "
        "`DynamicCache(config=model.config)`. PEFT's prefix tuning gives keys and values of attention, which these "
        "layers cannot continue: use prompt tuning, P-tuning or an adapter such as LoRA."
    )


def linear_flops(module: nn.Module) -> int:
    """FLOPs per token of the linear layers in `module`, also of what quantisation puts in their place."""
    return sum(2 * m.in_features * m.out_features for m in module.modules() if hasattr(m, "in_features"))


__all__ = ["MIXERS", "Mixer", "linear_flops", "wrong_state"]
