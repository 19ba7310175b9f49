"""Softmax attention."""

from functools import partial

import torch
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from ordnung.configuration.configuration_backbone import BackboneConfig
from ordnung.modeling.mixers.mixer import Mixer, linear_flops
from ordnung.modeling.mixers.projections import Projections, angles_of


class Attention(Projections, Mixer):
    """Softmax attention (Vaswani et al. 2017, section 3.2), causal or bidirectional.

    head = softmax(Q K^T / sqrt(d)) V. Training and prefill O(N^2), decoding O(N) a token, state 2 N rows of G d.
    """

    layer_type = "full_attention"

    def __init__(self, config: BackboneConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = config.is_decoder
        self.add_projections(config)

    def forward(
        self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, rows=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states, position_embeddings)
        if rows is not None and rows.packed and attention_mask is None:
            output = rows.mix(partial(self.attend_rows, **kwargs), *(x.transpose(1, 2) for x in (query, key, value)))
            weights = None
        else:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.merge_heads(output), weights

    def attend_rows(self, query, key, value, lengths, **kwargs) -> torch.Tensor:
        """(R, M, H, d) of documents (R, M, heads, d): causal attention does not reach the padding after them."""
        mask = None
        if self.is_causal and self.config._attn_implementation == "flex_attention":  # which reads the mask alone
            mask = create_causal_mask(self.config, key, None, None)
        elif lengths is not None and not self.is_causal:
            real = torch.arange(key.shape[1], device=key.device) < lengths[:, None]
            mask = create_bidirectional_mask(self.config, key, real)
        return self.attend(*(x.transpose(1, 2) for x in (query, key, value)), mask, **kwargs)[0]

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, H, N, d), keys and values (B, G, N, d) of `hidden_states` (B, N, D)."""
        angles = angles_of(position_embeddings)
        query, key = self.queries(hidden_states, angles), self.keys(hidden_states, angles)
        return tuple(x.transpose(1, 2) for x in (query, key, self.values(hidden_states)))

    @staticmethod
    def make_mask(config, inputs_embeds, attention_mask, past_key_values=None, rows=None, **kwargs):
        return make_attention_mask(config, inputs_embeds, attention_mask, past_key_values, rows, config.is_decoder)

    def flops(self, seq_len: int) -> int:
        pairs = seq_len * (seq_len + 1) // 2 if self.is_causal else seq_len**2
        return linear_flops(self) * seq_len + 4 * pairs * self.config.num_attention_heads * self.head_dim

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        return 2 * seq_len * self.config.num_key_value_heads * self.head_dim * itemsize


def make_attention_mask(config, inputs_embeds, attention_mask, past_key_values, rows, causal) -> torch.Tensor | None:
    """The mask that the configured attention takes; None too where it goes over packed rows one by one."""
    if rows is not None and rows.packed:
        if config._attn_implementation != "eager":
            return None
        # eager attention gives the weights of all pairs of tokens, so it needs a mask of all of them
        zero = torch.zeros((), dtype=inputs_embeds.dtype, device=inputs_embeds.device)
        return zero.where(rows.visible(causal), torch.finfo(zero.dtype).min)
    if causal:
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values)
    return create_bidirectional_mask(config, inputs_embeds, attention_mask)


__all__ = ["Attention", "make_attention_mask"]
