"""Queries, keys, values and output of a mixer: biases, heads, groups, norm of queries and keys, and rotary positions.

Legend: B rows, N tokens, D width, H query heads, G key heads, d channels a head. H is a multiple of G, and key head g
serves the query heads from g H / G on (grouped queries, Ainslie et al. 2023, arXiv 2305.13245); G = H is one for each.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from ordnung.configuration.configuration_backbone import BackboneConfig
from ordnung.modeling.mixers.norms import RMSNorm


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of queries or keys (B, N, heads, d), cos and sin (B or 1, N, 1, d)."""
    return states * cos + rotate_half(states) * sin


def angles_of(position_embeddings: tuple[torch.Tensor, torch.Tensor] | None) -> list[torch.Tensor]:
    """Cosines and sines (B or 1, N, d) as `rotate` takes them, (B or 1, N, 1, d), or none."""
    return [x[:, :, None] for x in position_embeddings or ()]


def in_float32(*inputs: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Those that hold numbers in float32, masks as they are."""
    return [x.float() if x is not None and x.is_floating_point() else x for x in inputs]


def input_projection(config: BackboneConfig, size: int) -> nn.Linear:
    """A projection of the layer's input, D to `size`."""
    return nn.Linear(config.hidden_size, size, bias=config.attention_bias is not False)


def output_projection(config: BackboneConfig, size: int) -> nn.Linear:
    """The projection of what a mixer mixed, `size` to D."""
    return nn.Linear(size, config.hidden_size, bias=config.attention_bias is True)


class Projections:
    """What a mixer with queries and keys inherits beside `Mixer`; its `__init__` calls `add_projections`.

    The mixer sees queries (B, N, H, d), keys and values (B, N, G, d), and gives (B, N, H, d) to `out_proj`, flattened.
    """

    def add_projections(self, config: BackboneConfig) -> None:
        H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = d
        self.scaling = d**-0.5
        self.num_key_value_groups = H // G  # read by the attention functions
        self.q_proj = input_projection(config, H * d)
        self.k_proj = input_projection(config, G * d)
        self.v_proj = input_projection(config, G * d)
        self.out_proj = output_projection(config, H * d)
        # over the channels of a head (Qwen3; Henry et al. 2020, arXiv 2010.04245)
        self.q_norm = RMSNorm(d, config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.layer_norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, N, heads d) to (B, N, heads, d)."""
        return states.unflatten(-1, (-1, self.head_dim))

    def queries(self, states: torch.Tensor, angles=()) -> torch.Tensor:
        """(B, N, H, d) of states (B, N, D), turned by `angles_of` their positions."""
        query = self.q_norm(self.heads(self.q_proj(states)))
        return rotate(query, *angles) if angles else query

    def keys(self, states: torch.Tensor, angles=()) -> torch.Tensor:
        """(B, N, G, d) of states (B, N, D), turned by `angles_of` their positions."""
        key = self.k_norm(self.heads(self.k_proj(states)))
        return rotate(key, *angles) if angles else key

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """(B, N, G, d) of states (B, N, D)."""
        return self.heads(self.v_proj(states))

    def attend(self, query, key, value, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The configured implementation of attention (B, heads, ., d): (B, N, H, d), and weights or None."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        kwargs |= {"dropout": dropout, "scaling": self.scaling}
        if not self.attends_in_float32(query):
            return interface(self, query, key, value, mask, **kwargs)
        with torch.autocast("cpu", enabled=False):
            mixed, weights = interface(self, *in_float32(query, key, value, mask), **kwargs)
        return mixed.to(query.dtype), weights

    def attends_in_float32(self, query) -> bool:
        """Whether attention is computed in float32, whatever the model's type: torch derives its fused attention more
        slowly in bfloat16 where a CPU computes small heads."""
        if not self.training or self.config.attention_dropout or self.config._attn_implementation != "sdpa":
            return False
        if query.device.type != "cpu" or query.shape[-1] > 32:
            return False
        return (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype) == torch.bfloat16

    def merge_heads(self, mixed: torch.Tensor) -> torch.Tensor:
        """The states (B, N, D) that `out_proj` makes of all heads (B, N, H, d)."""
        return self.out_proj(mixed.flatten(2).contiguous())  # as sharded weights take it, others would copy it

    @property
    def keys_are_linear(self) -> bool:
        """Whether keys are `k_proj` of the states and nothing else, so that sums may be taken before it."""
        return not self.config.qk_norm and self.config.position_embedding_type != "rope"


__all__ = ["Projections", "angles_of", "in_float32", "input_projection", "output_projection", "rotate"]
