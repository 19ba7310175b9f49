"""ConvLM: tokens are mixed by a learned convolution, causal, or centred in a bidirectional model."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from ordnung.configuration.configuration_conv_lm import ConvLMConfig
from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel
from ordnung.modeling.heads import (
    ForCausalLM,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from ordnung.modeling.mixers.mixer import Mixer, linear_flops
from ordnung.modeling.mixers.projections import input_projection, output_projection
from ordnung.modeling.mixers.rows import over_rows
from ordnung.modeling.mixers.state import RecurrentStateLayer
from ordnung.modeling.ops.causal_conv import causal_conv
from ordnung.modeling.ops.centred_conv import centred_conv

logger = logging.get_logger(__name__)


class CausalConvCacheLayer(RecurrentStateLayer):
    """Generation state of a convolution: the values (B, (K - 1) * dilation, D) of each row's last real tokens.

    Oldest first, zeros where a row has had fewer tokens.
    """

    _layer_type = "causal_conv"


def push(state, values, lengths=None):
    """The state, one tensor (B, S, D), after values (B, N, D), of which each row's first `lengths` (B,) are real."""
    S = state[0].shape[1]
    joined = torch.cat([state[0], values.to(state[0].dtype)], dim=1)
    if lengths is None:
        return (joined[:, joined.shape[1] - S :].clone(),)  # a view would keep all of it
    last = lengths[:, None] + torch.arange(S, device=joined.device)  # (B, S)
    return (joined.gather(1, last[..., None].expand(-1, -1, joined.shape[2])),)


class Convolution(Mixer):
    """What the causal and the centred mixer share: kernels, projections and gates."""

    # whether the taps lie on both sides of the token
    centred = False

    def __init__(self, config: ConvLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kernel_size = config.per_layer("kernel_size")[layer_idx]
        self.dilation = config.per_layer("dilation")[layer_idx]
        kernels = config.num_attention_heads if config.kernel_sharing == "head" else config.hidden_size
        # lag-major: column `ahead` weighs the current token, those before it later ones, those after it earlier ones
        self.kernel_logits = nn.Parameter(torch.empty(kernels, self.kernel_size))
        self.v_proj = input_projection(config, config.hidden_size)
        if config.gate == "input_output":
            self.gate_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)  # see `init_converted` for its bias
        self.out_proj = output_projection(config, config.hidden_size)

    @property
    def ahead(self) -> int:
        """Taps ahead of the current token."""
        return self.kernel_size // 2 if self.centred else 0

    @property
    def history(self) -> int:
        """Tokens before its own that an output depends on."""
        return (self.kernel_size - 1 - self.ahead) * self.dilation

    def init_weights(self, std: float) -> None:
        """`std` is not used: kernels start as weighted means of what they see, wider from head to head."""
        lags = (torch.arange(self.kernel_size, device=self.kernel_logits.device) - self.ahead).abs()
        logits = torch.zeros_like(self.kernel_logits, dtype=torch.float32)
        if self.config.kernel_init == "decay":
            widest = max(1.5, (self.kernel_size - self.ahead) / 1.5)
            tau = torch.logspace(math.log10(1.5), math.log10(widest), len(logits), device=logits.device)
            logits = logits - lags / tau[:, None]
        init.copy_(self.kernel_logits, logits if self.config.kernel_normalization == "softmax" else logits.softmax(-1))

    def init_converted(self) -> None:
        # with gates near 0 as they start, values that are another model's would not get through
        if self.config.gate == "input_output":
            self.gate_proj.bias.fill_(1)

    def kernel(self) -> torch.Tensor:
        """(H, K) weights by lag; H is D if every channel has its own."""
        if self.config.kernel_normalization == "none":
            return self.kernel_logits
        # a softmax in bfloat16 costs 1e-2 at K = 512
        return self.kernel_logits.softmax(-1, dtype=torch.promote_types(self.kernel_logits.dtype, torch.float32))

    def taps_within(self, kernel: torch.Tensor, tokens: int) -> torch.Tensor:
        """The columns of `kernel` (H, K) that reach another token in a row of `tokens`."""
        if is_tracing(kernel):
            return kernel
        reach = max(tokens - 1, 0) // self.dilation
        return kernel[:, max(self.ahead - reach, 0) : self.ahead + reach + 1]

    def forward(
        self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, rows=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        self.warn_if_blind(hidden_states, rows)
        values = self.v_proj(hidden_states)  # (B, N, D)
        if self.config.gate == "input_output":
            input_gate, output_gate = self.gate_proj(hidden_states).chunk(2, dim=-1)
            values = input_gate * values
        mixed = self.convolve(values, self.kernel().to(values.dtype), past_key_values, rows)
        if self.config.gate == "input_output":
            mixed = output_gate * mixed
        return self.out_proj(mixed), None

    def convolve(self, values, kernel, past_key_values, rows) -> torch.Tensor:
        """The convolution of values (B, N, D) with `kernel` (H, K)."""
        raise NotImplementedError(f"{type(self).__name__} must implement `convolve`.")

    def mixing_weights(self, hidden_states, rows=None, **kwargs) -> torch.Tensor:
        """(B, H, N, N) Toeplitz matrices of the kernels, a head's channels averaged, gates left out."""
        real = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)  # (B, N)
        if rows is not None and rows.real is not None:
            real = rows.real
        position = real.cumsum(1)
        lag = position[:, :, None] - position[:, None, :]  # (B, N, N)
        tap = lag // self.dilation + self.ahead
        seen = (lag % self.dilation == 0) & (tap >= 0) & (tap < self.kernel_size)
        seen = seen & real[:, :, None] & real[:, None, :]
        if rows is not None and rows.packed:
            seen = seen & (rows.documents[:, :, None] == rows.documents[:, None])
        kernel = self.kernel().view(self.config.num_attention_heads, -1, self.kernel_size).mean(1)
        return (kernel[:, tap.clamp(0, self.kernel_size - 1)] * seen).transpose(0, 1)

    def warn_if_blind(self, hidden_states: torch.Tensor, rows=None) -> None:
        if not self.training or self.layer_idx > 0 or is_tracing(hidden_states):
            return
        field, length = self.config.receptive_field, hidden_states.shape[1]
        if field is None or length <= field:
            return
        if rows is not None and rows.packed:  # by its longest document
            length = int(rows.positions.max()) + 1
        if field < length:
            logger.warning_once(
                f"Training on {length} tokens, but no output of this stack sees more than {field}: "
                "raise `kernel_size`, `dilation` or `num_hidden_layers`, or add a 'full_attention' layer."
            )

    def flops(self, seq_len: int) -> int:
        return (linear_flops(self) + 2 * self.kernel_size * self.config.hidden_size) * seq_len


class CausalConvolution(Convolution):
    """Learned causal convolution in place of attention (MikeyBeez, DifferentialLR, zenodo.org/records/18498944).

    y[n] = out_proj(sum over k < K of softmax(kernel_logits[h])[k] * v[n - k * dilation]),   v = v_proj(x)

    for the channels of head h; this is LightConv (Wu et al. 2019, arXiv 1901.10430) without its gate. With
    `gate="input_output"`, y = out_proj(C * conv(B * v)) as in LFM2. Training and prefill O(N K), decoding O(K) a token,
    state (K - 1) * dilation rows whatever the length.
    """

    layer_type = "causal_conv"
    cache_layer = CausalConvCacheLayer

    def convolve(self, values, kernel, past_key_values, rows):
        implementation, state = self.config.conv_implementation, None
        if past_key_values is not None:
            layer = self.state_of(past_key_values)
            state = layer.state
            # FFT rounds with the length of its input, and prefill should equal decoding
            implementation = "auto" if implementation == "fft" else implementation

        def core(values, lengths):
            taps = kernel if state is not None else self.taps_within(kernel, values.shape[1])
            mixed = causal_conv(values, taps, self.dilation, None if state is None else state[0], implementation)
            if past_key_values is not None:
                before = (values.new_zeros(values.shape[0], self.history, values.shape[2]),) if state is None else state
                after = push(before, values, lengths)
                layer.update_state(before, after, push, (values,), None if rows is None else rows.real)
            return mixed

        return over_rows(rows, core, values)

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        return self.history * self.config.hidden_size * itemsize


class CentredConvolution(Convolution):
    """Learned convolution with as many taps after a token as before it, for bidirectional models: an odd K.

    y[n] = out_proj(sum over k < K of softmax(kernel_logits[h])[k] * v[n - (k - (K - 1) / 2) * dilation]), v = v_proj(x)

    for the channels of head h, v being 0 outside of a row; otherwise as `CausalConvolution`, and as LightConv's encoder
    (Wu et al. 2019, arXiv 1901.10430). O(N K).
    """

    layer_type = "centred_conv"
    centred = True

    def convolve(self, values, kernel, past_key_values, rows):
        def core(values, lengths):
            taps = self.taps_within(kernel, values.shape[1])
            return centred_conv(values, taps, self.dilation, lengths, self.config.conv_implementation)

        return over_rows(rows, core, values)

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        """None: a bidirectional model does not generate."""
        return 0


class ConvLMPreTrainedModel(BackbonePreTrainedModel):
    config: ConvLMConfig
    _no_weight_decay = ("kernel_logits",)


class ConvLMModel(ConvLMPreTrainedModel, BackboneModel):
    """The stack without a head."""


class ConvLMForCausalLM(ConvLMPreTrainedModel, ForCausalLM, GenerationMixin):
    model_class = ConvLMModel


class ConvLMForMaskedLM(ConvLMPreTrainedModel, ForMaskedLM):
    model_class = ConvLMModel


class ConvLMForSequenceClassification(ConvLMPreTrainedModel, ForSequenceClassification):
    model_class = ConvLMModel


class ConvLMForMultipleChoice(ConvLMPreTrainedModel, ForMultipleChoice):
    model_class = ConvLMModel


class ConvLMForTokenClassification(ConvLMPreTrainedModel, ForTokenClassification):
    model_class = ConvLMModel


class ConvLMForQuestionAnswering(ConvLMPreTrainedModel, ForQuestionAnswering):
    model_class = ConvLMModel


__all__ = [
    "ConvLMForCausalLM",
    "ConvLMForMaskedLM",
    "ConvLMForMultipleChoice",
    "ConvLMForQuestionAnswering",
    "ConvLMForSequenceClassification",
    "ConvLMForTokenClassification",
    "ConvLMModel",
    "ConvLMPreTrainedModel",
]
