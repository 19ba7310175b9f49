"""Softmax attention by any of `scores.SCORES`, and linear attention, with a short convolution and a decay gate.

Controls of experiments: what QuadraticKernelLM's kernel gives and what the extras beside it do, and whether the dot
product is special. Importing it makes `model_type: control_attention_lm` known to the Auto classes of this process.
"""

import math
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init
from transformers.generation import GenerationMixin

from ordnung.configuration.configuration_backbone import BackboneConfig
from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel
from ordnung.modeling.heads import ForCausalLM
from ordnung.modeling.mixers.mixer import Mixer, linear_flops
from ordnung.modeling.mixers.projections import Projections, angles_of, rotate
from ordnung.modeling.ops.causal_conv import causal_conv
from ordnung.modeling.ops.grouped import per_query_head
from ordnung.scripts.experiments.scores import SCORES


@strict
class ControlAttentionConfig(BackboneConfig):
    """Configuration of `ControlAttention`. Adds to the fields of `BackboneConfig`:

    Args:
        weights: "softmax" of scores, or "elu": products of elu + 1 of queries and keys, divided by their sum.
        score: what softmax is taken of, one of `scores.SCORES`.
        short_conv_kernel, decay_gate: as in `QuadraticKernelLMConfig`.
        use_cache: there is none.
    """

    model_type = "control_attention_lm"
    mixer_types = ("control_attention",)

    weights: Literal["softmax", "elu"] = "softmax"
    score: Literal["dot", "additive", "bilinear", "distance", "mlp", "position"] = "dot"
    short_conv_kernel: int = 0
    decay_gate: bool = False
    use_cache: bool = False

    def validate_score(self):
        if self.weights == "elu" and self.score != "dot":
            raise ValueError(f"`score` ({self.score!r}) is for softmax: with `weights` 'elu' set 'dot'.")


class ControlAttention(Projections, Mixer):
    """head[i] = sum over j <= i of w v[j] / sum of w, with w = exp(score) or phi(q) . phi(k), phi = elu + 1.

    The latter is linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, section 3.2), with phi after rotary
    positions, so that weights stay positive. A gate multiplies w by exp(G[i] - G[j]), G the sum of log decays. Computed
    by the formula with all N x N weights, for short rows of one document without padding. `cache_bytes` is what each
    would hold to generate: softmax 2 N rows (N where no content is scored), elu d rows of d + 1 a head in float32, and
    the last rows of a convolution.
    """

    layer_type = "control_attention"

    def __init__(self, config: ControlAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_projections(config)
        self.score = SCORES[config.score](config.num_attention_heads, self.head_dim, config.max_position_embeddings)
        if not self.score.reads_content:
            del self.q_proj, self.k_proj
        self.projections = ("q_proj", "k_proj", "v_proj") if self.score.reads_content else ("v_proj",)
        self.sizes = [getattr(self, name).out_features for name in self.projections]
        if config.short_conv_kernel:
            self.conv_kernel = nn.Parameter(torch.empty(sum(self.sizes), config.short_conv_kernel))
        if config.decay_gate:
            self.decay_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
            self.decay_bias = nn.Parameter(torch.empty(config.num_attention_heads))

    def init_weights(self, std: float) -> None:
        """As those of `QuadraticKernelAttention`, and of the score."""
        self.score.init_weights()
        if self.config.short_conv_kernel:
            taps = std * torch.randn_like(self.conv_kernel)
            taps[:, 0] += 1
            init.copy_(self.conv_kernel, taps)
        if self.config.decay_gate:
            longest = max(16, self.config.max_position_embeddings)
            tau = torch.logspace(math.log10(16), math.log10(longest), self.config.num_attention_heads)
            init.copy_(self.decay_bias, -torch.expm1(1 / tau).log())

    def forward(
        self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, rows=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if past_key_values is not None or rows is not None:
            raise ValueError("ControlAttention takes whole rows of one document: give no padding, and use_cache=False.")
        joined = torch.cat([getattr(self, name)(hidden_states) for name in self.projections], dim=-1)
        if self.config.short_conv_kernel:
            joined = causal_conv(joined, self.conv_kernel, implementation="conv1d")
        *content, value = map(self.heads, joined.split(self.sizes, dim=-1))
        angles = angles_of(position_embeddings)
        content = [norm(x) for norm, x in zip((self.q_norm, self.k_norm), content)]
        if angles:
            content = [rotate(x, *angles) for x in content]
        query, key = content or (value, value)  # of which only the length is read
        key, value = (per_query_head(x, self.num_key_value_groups, dim=2) for x in (key, value))
        if self.config.weights == "elu":
            query, key = nn.functional.elu(query) + 1, nn.functional.elu(key) + 1
            scores = torch.einsum("bihc,bjhc->bhij", query, key).log()
        else:
            scores = self.score(query, key)
        if self.config.decay_gate:
            total = nn.functional.logsigmoid(self.decay_proj(hidden_states) + self.decay_bias).cumsum(1).mT  # (B, H, N)
            scores = scores + total[..., None] - total[:, :, None]
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.out_proj(torch.einsum("bhij,bjhc->bihc", weights, value).flatten(2)), weights

    def flops(self, seq_len: int) -> int:
        pairs = seq_len**2 * self.config.num_attention_heads * (self.score.pair_flops() + 2 * self.head_dim)
        each = linear_flops(self) + 2 * self.config.short_conv_kernel * sum(self.sizes) + self.score.token_flops()
        return each * seq_len + pairs

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        heads = self.config.num_key_value_heads
        tail = max(0, self.config.short_conv_kernel - 1) * sum(self.sizes) * itemsize
        if self.config.weights == "elu":
            return tail + 4 * heads * self.head_dim * (self.head_dim + 1)
        kept = 2 if self.score.reads_content else 1  # keys and values, or values alone
        return tail + kept * seq_len * heads * self.head_dim * itemsize


class ControlAttentionLMPreTrainedModel(BackbonePreTrainedModel):
    config: ControlAttentionConfig


class ControlAttentionLMModel(ControlAttentionLMPreTrainedModel, BackboneModel):
    """The stack without a head."""


class ControlAttentionLMForCausalLM(ControlAttentionLMPreTrainedModel, ForCausalLM, GenerationMixin):
    model_class = ControlAttentionLMModel


AutoConfig.register(ControlAttentionConfig.model_type, ControlAttentionConfig)
AutoModelForCausalLM.register(ControlAttentionConfig, ControlAttentionLMForCausalLM)
