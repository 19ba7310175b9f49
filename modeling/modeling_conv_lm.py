"""ConvLM: tokens are mixed by a learned causal convolution."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from ordnung.configuration.configuration_conv_lm import ConvLMConfig
from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel, Mixer, linear_flops
from ordnung.modeling.constant_state import ConstantStateLayer
from ordnung.modeling.heads import (
    ForCausalLM,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from ordnung.modeling.ops.causal_conv import causal_conv

logger = logging.get_logger(__name__)


class CausalConvCacheLayer(ConstantStateLayer):
    """Generation state of a convolution: the values of each row's last (K - 1) * dilation real tokens.

    `conv_states[0]` is (B, rows, D), oldest first, zeros where a row has had fewer tokens. The token count comes on top
    of transformers' convolution state, so that a stack without any attention layer can generate.
    """

    _layer_type = "causal_conv"

    def update_conv_state(self, values, state_idx=0, *, rows, lengths=None) -> None:
        """Appends tokens.

        Args:
            values: (B, N, D), each row's real tokens first.
            state_idx: always 0.
            rows: number of tokens to keep.
            lengths: (B,) number of real tokens of each row in `values`, or None if all are.
        """
        B, N, D = values.shape
        if not self.is_conv_states_initialized[0]:
            self.dtype, self.device = values.dtype, values.device
            self.conv_kernel_size[0] = rows
            self.conv_states[0] = values.new_zeros(B, rows, D)
            self.cumulative_length = self.cumulative_length.to(values.device)
            self.is_conv_states_initialized[0] = True
            if not is_tracing(values):
                torch._dynamo.mark_static_address(self.conv_states[0])
                torch._dynamo.mark_static_address(self.cumulative_length)
        state = torch.cat([self.conv_states[0], values.detach()], dim=1)
        if lengths is not None:
            # push each row's padding out to the front, so that its last real token comes last
            source = torch.arange(state.shape[1], device=state.device) - (N - lengths)[:, None]  # (B, rows + N)
            real = (source >= 0)[..., None]
            state = state.gather(1, source.clamp(min=0)[..., None].expand_as(state)) * real
        if self.record_past:
            self.conv_states[0] = state
        else:
            self.conv_states[0].copy_(state[:, state.shape[1] - rows :])  # in place: its address stays
        self.cumulative_length.add_(N)
        self.has_previous_state[0] = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, and the recorded past that is no longer needed.

        Raises:
            ValueError, RuntimeError: as `removed`.
        """
        if not self.is_conv_states_initialized[0]:
            self.removed(tokens_to_remove, None)
            return
        rows, held = self.conv_kernel_size[0], self.conv_states[0].shape[1]
        end = held - self.removed(tokens_to_remove, held - rows)
        self.conv_states[0] = self.conv_states[0][:, end - rows : end]
        self.cumulative_length.add_(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_conv_states_initialized[0]:
            self.conv_states[0] = self.conv_states[0].repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_conv_states_initialized[0]:
            self.conv_states[0] = self.conv_states[0][indices]


class CausalConvolution(Mixer):
    """Learned causal convolution in place of attention (MikeyBeez, DifferentialLR, zenodo.org/records/18498944).

    y[n] = out_proj(sum over k < K of softmax(kernel_logits[h])[k] * v[n - k * dilation]),   v = v_proj(x)

    for the channels of head h; this is LightConv (Wu et al. 2019, arXiv 1901.10430) without its gate. With
    `gate="input_output"`, y = out_proj(C * conv(B * v)) as in LFM2. Training and prefill O(N K), decoding O(K) a token,
    state (K - 1) * dilation rows whatever the length.
    """

    layer_type = "causal_conv"

    def __init__(self, config: ConvLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kernel_size = config.per_layer("kernel_size")[layer_idx]
        self.dilation = config.per_layer("dilation")[layer_idx]
        kernels = config.num_attention_heads if config.kernel_sharing == "head" else config.hidden_size
        # lag-major: column 0 weighs the current token
        self.kernel_logits = nn.Parameter(torch.empty(kernels, self.kernel_size))
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if config.gate == "input_output":
            self.gate_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def init_weights(self, std: float) -> None:
        """`std` is not used: kernels start as weighted means of the past, wider from head to head."""
        logits = torch.zeros_like(self.kernel_logits, dtype=torch.float32)
        if self.config.kernel_init == "decay":
            widest = max(1.5, self.kernel_size / 1.5)
            tau = torch.logspace(math.log10(1.5), math.log10(widest), len(logits), device=logits.device)
            logits = logits - torch.arange(self.kernel_size, device=logits.device) / tau[:, None]
        init.copy_(self.kernel_logits, logits if self.config.kernel_normalization == "softmax" else logits.softmax(-1))

    def kernel(self) -> torch.Tensor:
        """(H, K) weights by lag; H is D if every channel has its own."""
        if self.config.kernel_normalization == "none":
            return self.kernel_logits
        # a softmax in bfloat16 costs 1e-2 at K = 512
        return self.kernel_logits.softmax(-1, dtype=torch.promote_types(self.kernel_logits.dtype, torch.float32))

    def forward(
        self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        self.warn_if_blind(hidden_states)
        values = self.v_proj(hidden_states)  # (B, N, D)
        if self.config.gate == "input_output":
            input_gate, output_gate = self.gate_proj(hidden_states).chunk(2, dim=-1)
            values = input_gate * values

        lengths = None
        if attention_mask is not None:
            # Close the gaps: real tokens first, zeros after. Values are masked and not inputs, as v_proj has a bias.
            real = attention_mask.bool()  # (B, N)
            lengths = real.sum(1)
            order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(values)
            values = values.masked_fill(~real[..., None], 0).gather(1, order)
        kernel = self.kernel().to(values.dtype)
        if past_key_values is None:
            mixed = causal_conv(values, kernel, self.dilation, implementation=self.config.conv_implementation)
        else:
            # FFT rounds with the length of its input, and prefill should equal decoding
            exact = "auto" if self.config.conv_implementation == "fft" else self.config.conv_implementation
            state = self.read_state(past_key_values)
            mixed = causal_conv(values, kernel, self.dilation, state, exact)
            rows = (self.kernel_size - 1) * self.dilation
            past_key_values.update_conv_state(values, self.layer_idx, rows=rows, lengths=lengths)
        if attention_mask is not None:
            mixed = mixed.gather(1, order.argsort(dim=1))
        if self.config.gate == "input_output":
            mixed = output_gate * mixed
        return self.out_proj(mixed), None

    def mixing_weights(self, hidden_states, attention_mask=None, **kwargs) -> torch.Tensor:
        """(B, H, N, N) Toeplitz matrices of the kernels, a head's channels averaged, gates left out."""
        if attention_mask is None:
            attention_mask = torch.ones_like(hidden_states[..., 0])
        real = attention_mask.bool()  # (B, N)
        position = real.cumsum(1)
        lag = position[:, :, None] - position[:, None, :]  # (B, N, N)
        tap = lag // self.dilation
        seen = (lag >= 0) & (lag % self.dilation == 0) & (tap < self.kernel_size) & real[:, :, None] & real[:, None, :]
        kernel = self.kernel().view(self.config.num_attention_heads, -1, self.kernel_size).mean(1)
        return (kernel[:, tap.clamp(0, self.kernel_size - 1)] * seen).transpose(0, 1)

    def read_state(self, past_key_values) -> torch.Tensor | None:
        layers = past_key_values.layers
        if self.layer_idx >= len(layers) or not hasattr(layers[self.layer_idx], "update_conv_state"):
            raise ValueError(
                f"`past_key_values` has no convolution state for layer {self.layer_idx}: make it with "
                "`DynamicCache(config=model.config)`."
            )
        return layers[self.layer_idx].conv_states[0]

    def warn_if_blind(self, hidden_states: torch.Tensor) -> None:
        if not self.training or self.layer_idx > 0 or is_tracing(hidden_states):
            return
        field = self.config.receptive_field
        if field is not None and field < hidden_states.shape[1]:
            logger.warning_once(
                f"Training on {hidden_states.shape[1]} tokens, but no output of this stack sees more than {field}: "
                "raise `kernel_size`, `dilation` or `num_hidden_layers`, or add a 'full_attention' layer."
            )

    @staticmethod
    def make_mask(config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, **kwargs):
        """(B, N) for the tokens of this call, or None if all of them are real."""
        N = inputs_embeds.shape[1]
        if attention_mask is None:
            return None
        if is_tracing(attention_mask):
            # a graph cannot look; a single token in it is a generated one
            return attention_mask[:, -N:] if N > 1 else None
        recent = attention_mask[:, -N:]
        return None if bool((recent != 0).all()) else recent.contiguous()

    def flops(self, seq_len: int) -> int:
        return (linear_flops(self) + 2 * self.kernel_size * self.config.hidden_size) * seq_len

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        return (self.kernel_size - 1) * self.dilation * self.config.hidden_size * itemsize


# the same layer serves a static cache, and generate() makes masks ahead for caches that can be compiled
STATIC_LAYER_TYPE_MAPPING["causal_conv"] = CausalConvCacheLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["causal_conv"] = CausalConvolution.make_mask


class ConvLMPreTrainedModel(BackbonePreTrainedModel):
    config: ConvLMConfig
    _no_weight_decay = ("kernel_logits",)


class ConvLMModel(ConvLMPreTrainedModel, BackboneModel):
    """The stack without a head."""


class ConvLMForCausalLM(ConvLMPreTrainedModel, ForCausalLM):
    model_class = ConvLMModel


class ConvLMForSequenceClassification(ConvLMPreTrainedModel, ForSequenceClassification):
    model_class = ConvLMModel


class ConvLMForTokenClassification(ConvLMPreTrainedModel, ForTokenClassification):
    model_class = ConvLMModel


class ConvLMForQuestionAnswering(ConvLMPreTrainedModel, ForQuestionAnswering):
    model_class = ConvLMModel


__all__ = [
    "ConvLMForCausalLM",
    "ConvLMForQuestionAnswering",
    "ConvLMForSequenceClassification",
    "ConvLMForTokenClassification",
    "ConvLMModel",
    "ConvLMPreTrainedModel",
]
