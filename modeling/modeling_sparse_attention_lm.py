"""SparseAttentionLM: softmax attention to a window, the first tokens, every s-th token and random blocks."""

from functools import wraps
from inspect import Parameter, signature

import torch
import torch.nn.functional as F
from transformers.generation import GenerationMixin
from transformers.utils.import_utils import is_tracing

from ordnung.configuration.configuration_sparse_attention_lm import SparseAttentionLMConfig
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
from ordnung.modeling.mixers.projections import Projections, angles_of, in_float32, input_projection, rotate
from ordnung.modeling.mixers.rows import Rows, over_rows
from ordnung.modeling.mixers.state import RecurrentStateLayer
from ordnung.modeling.ops.sparse_attention import sparse_attention, weighted_attention
from ordnung.modeling.ops.sparse_keys import NEVER, pairs_seen
from ordnung.modeling.ops.sparse_pattern import Pattern
from ordnung.modeling.ops.sparse_state import (
    SparseState,
    empty_state,
    first_state,
    step,
    strided_places,
    window_start,
)


class SparseCacheLayer(RecurrentStateLayer):
    """Generation state of sparse attention: a `SparseState`. It has a constant size but for strided tokens."""

    _layer_type = "sparse_attention"

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__(max_cache_len, **kwargs)
        self.max_cache_len = max_cache_len
        # (B, tokens so far), which were real: kept for eager attention, to say whose the weights of a step are
        self.real: torch.BoolTensor | None = None

    def remember(self, real: torch.BoolTensor) -> None:
        self.real = real if self.real is None else torch.cat([self.real, real], 1)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.real is not None:
            self.real = self.real[:, : self.real.shape[1] + tokens_to_remove]

    def change(self, function) -> None:
        super().change(function)
        if self.real is not None:
            self.real = function(self.real)

    def reset(self) -> None:
        super().reset()
        self.real = None
        if self.state is not None:
            SparseState(*self.state).drawn.fill_(NEVER)


class SparseAttention(Projections, Mixer):
    """Softmax attention to a window, the first tokens, every s-th token and random blocks of the row.

    Sparse Transformer (Child et al. 2019, arXiv 1904.10509), Longformer (Beltagy et al. 2020, arXiv 2004.05150),
    BigBird (Zaheer et al. 2020, arXiv 2007.14062) and attention sinks (Xiao et al. 2023, arXiv 2309.17453); which keys
    a query sees stands in `ops.sparse_pattern`. With K = w + g + R r for a window of w, g first tokens and R random
    blocks of r: training and prefill O(N K), decoding O(K) a token, state 2 K rows; every s-th token makes K grow by
    N / s.
    """

    layer_type = "sparse_attention"
    cache_layer = SparseCacheLayer

    def __init__(self, config: SparseAttentionLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        window, tokens, stride, blocks = (
            config.per_layer(name)[layer_idx]
            for name in ("sliding_window", "num_global_tokens", "global_stride", "num_random_blocks")
        )
        seed = config.random_seed + layer_idx
        self.pattern = Pattern(window, tokens, stride, blocks, config.random_block_size, seed, config.is_decoder)
        self.add_projections(config)
        if config.global_projections == "separate":
            self.q_global_proj = input_projection(config, self.q_proj.out_features)
            self.k_global_proj = input_projection(config, self.k_proj.out_features)
            self.v_global_proj = input_projection(config, self.v_proj.out_features)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        rows=None,
        global_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Mixer.forward`.

        Args:
            global_attention_mask: (B, N), 1 for the tokens that see all and are seen by all, in place of the first ones
                of each row; in bidirectional models.
        """
        self.check_global(hidden_states, global_attention_mask)
        angles = angles_of(position_embeddings)
        inputs = [self.queries(hidden_states, angles), self.keys(hidden_states, angles), self.values(hidden_states)]
        if self.config.global_projections == "separate":
            inputs += self.project_global(hidden_states, angles)
        if global_attention_mask is not None:
            inputs.append(global_attention_mask != 0)
        given, N = global_attention_mask is not None, hidden_states.shape[1]
        options = {"dropout": self.config.attention_dropout if self.training else 0.0, "scale": self.scaling}

        def mix(query, key, value, *rest):
            *rest, lengths = rest
            if past_key_values is not None:
                layer = self.state_of(past_key_values)
                output, weights = self.go_on(layer, query, key, value, lengths, rows, options)
            else:
                is_global = rest.pop() if given else None
                inputs = query, key, value, self.pattern, lengths, is_global, rest or None
                output, weights = self.attend(inputs, N, options)
            return output, weights if rows is None or weights is None else weights.transpose(1, 2)

        if past_key_values is None and self.attends_in_float32(inputs[0]):
            with torch.autocast("cpu", enabled=False):
                output, weights = over_rows(rows, mix, *in_float32(*inputs))
            output = output.to(hidden_states.dtype)
        else:
            output, weights = over_rows(rows, mix, *inputs)
        if weights is not None:
            real = None if past_key_values is None else self.state_of(past_key_values).real
            weights = of_batch(weights, rows, real)
        return self.merge_heads(output), weights

    def check_global(self, hidden_states, mask) -> None:
        if mask is None:
            return
        if self.config.is_decoder:
            raise ValueError(
                "`global_attention_mask` is for bidirectional models: with a generation state the global tokens are "
                f"the first ones of each row, `num_global_tokens` ({self.pattern.num_global}). Leave the mask out, or "
                "set is_decoder=False."
            )
        if mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"`global_attention_mask` has shape {tuple(mask.shape)}, but the tokens have "
                f"{tuple(hidden_states.shape[:2])}: 1 for each token that sees all and is seen by all, else 0."
            )

    def project_global(self, hidden_states, angles) -> list[torch.Tensor]:
        """Queries, keys and values by which global tokens see all: (B, N, heads, d) each."""
        query = self.q_norm(self.heads(self.q_global_proj(hidden_states)))
        key = self.k_norm(self.heads(self.k_global_proj(hidden_states)))
        if angles:
            query, key = rotate(query, *angles), rotate(key, *angles)
        return [query, key, self.heads(self.v_global_proj(hidden_states))]

    def attend(self, inputs, N, options) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`sparse_attention` of `inputs`; with eager attention its weights too, (R, H, M, N)."""
        if self.config._attn_implementation != "eager":
            return sparse_attention(*inputs, **options), None
        output, weights = weighted_attention(*inputs, **options)
        return output, widened(weights, N)

    def go_on(self, layer: SparseCacheLayer, query, key, value, lengths, rows: Rows | None, options):
        """Attention of more tokens, which enter the layer's generation state; in a graph no weights after the first."""
        if self.pattern.stride and is_tracing(key) and layer.max_cache_len is None:
            raise ValueError(
                "`global_stride` has the generation state grow, which a graph cannot do: compile with a static cache, "
                "`StaticCache(config=model.config, max_cache_len=...)` or cache_implementation='static'."
            )
        weigh = self.config._attn_implementation == "eager" and not is_tracing(key)
        if weigh:
            made = None if rows is None else rows.real
            layer.remember(key.new_ones(key.shape[:2], dtype=torch.bool) if made is None else made)
        if layer.state is None:
            before = empty_state(key, self.pattern, layer.max_cache_len or 0)
            output, weights = self.attend((query, key, value, self.pattern, lengths), key.shape[1], options)
            after = first_state(self.pattern, key, value, lengths, layer.max_cache_len or 0)
        else:
            before = SparseState(*layer.state)
            in_place = not (layer.record_past or torch.is_grad_enabled() or before.pairs.requires_grad)
            inputs = query, key, value, lengths, in_place, weigh
            output, weights, after = step(self.pattern, before, *inputs, **options)
        layer.update_state(before, after, self.add_to_state, (key, value), None if rows is None else rows.real)
        return output, weights

    def add_to_state(self, before, key, value, lengths) -> SparseState:
        return step(self.pattern, SparseState(*before), None, key, value, lengths)[2]

    def flops(self, seq_len: int) -> int:
        return linear_flops(self) * seq_len + 4 * pairs_seen(self.pattern, seq_len) * self.q_proj.out_features

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        """0 for a bidirectional model, which does not generate."""
        if not self.config.is_decoder:
            return 0
        places = window_start(self.pattern) + self.pattern.window + strided_places(self.pattern, seq_len)
        return places * (self.k_proj.out_features + self.v_proj.out_features) * itemsize


def widened(weights: torch.Tensor, keys: int) -> torch.Tensor:
    """Weights (..., K) with zeros for the other keys; themselves if there are none, so that gradients come to them."""
    return F.pad(weights, (0, keys - weights.shape[-1])) if weights.shape[-1] < keys else weights


def of_batch(weights: torch.Tensor, rows: Rows | None, real: torch.BoolTensor | None) -> torch.Tensor:
    """Weights of keys counted from the first of their row as (B, H, N, tokens), of those of the batch.

    Args:
        weights: (B, H, N, keys) without `rows`, otherwise (B, N, H, keys).
        real: (B, tokens), which of all tokens so far are no padding, where these are more than those of `rows`.
    """
    if rows is None:
        rows = Rows([])
    else:
        weights = weights.transpose(1, 2)
    if rows.packed:
        position, document = rows.positions, rows.documents
        together = (document[:, :, None] == document[:, None]) & (document >= 0)[:, None]
        return weights.gather(3, position[:, None, None].expand(weights.shape)) * together[:, None]
    real = rows.real if real is None else real
    if real is None or (rows.real is None and bool(real.all())):
        return weights if real is None else widened(weights, real.shape[1])
    position = (real.long().cumsum(1) - 1).clamp(min=0)[:, None, None]
    weights = widened(weights, real.shape[1])
    weights = weights.gather(3, position.expand(weights.shape)) * real[:, None, None]
    return weights if rows.real is None else weights * rows.real[:, None, :, None]


def names_global_mask(head: type) -> type:
    """Has a head's `forward` name `global_attention_mask`: Trainer keeps those columns of a data set that it names."""
    forward = head.forward

    @wraps(forward)
    def naming(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    known = signature(forward)
    *parameters, rest = known.parameters.values()
    mask = Parameter("global_attention_mask", Parameter.KEYWORD_ONLY, default=None)
    naming.__signature__ = known.replace(parameters=[*parameters, mask, rest])
    head.forward = naming
    return head


class SparseAttentionLMPreTrainedModel(BackbonePreTrainedModel):
    config: SparseAttentionLMConfig
    _supports_flash_attn = False  # gathered keys are neither of these
    _supports_flex_attn = False


class SparseAttentionLMModel(SparseAttentionLMPreTrainedModel, BackboneModel):
    """The stack without a head.

    Bidirectional models and heads also take `global_attention_mask` (B, N), 1 for the tokens that see all and are seen
    by all, such as those of a question; without it these are the first `num_global_tokens` of each row.
    """


class SparseAttentionLMForCausalLM(SparseAttentionLMPreTrainedModel, ForCausalLM, GenerationMixin):
    model_class = SparseAttentionLMModel


@names_global_mask
class SparseAttentionLMForMaskedLM(SparseAttentionLMPreTrainedModel, ForMaskedLM):
    model_class = SparseAttentionLMModel


@names_global_mask
class SparseAttentionLMForSequenceClassification(SparseAttentionLMPreTrainedModel, ForSequenceClassification):
    model_class = SparseAttentionLMModel


@names_global_mask
class SparseAttentionLMForMultipleChoice(SparseAttentionLMPreTrainedModel, ForMultipleChoice):
    """As `ForMultipleChoice`; `global_attention_mask` is (B, choices, N) too."""

    model_class = SparseAttentionLMModel

    @wraps(ForMultipleChoice.forward)
    def forward(self, *args, global_attention_mask: torch.Tensor | None = None, **kwargs):
        if global_attention_mask is not None:
            kwargs["global_attention_mask"] = global_attention_mask.flatten(0, -2)
        return super().forward(*args, **kwargs)


@names_global_mask
class SparseAttentionLMForTokenClassification(SparseAttentionLMPreTrainedModel, ForTokenClassification):
    model_class = SparseAttentionLMModel


@names_global_mask
class SparseAttentionLMForQuestionAnswering(SparseAttentionLMPreTrainedModel, ForQuestionAnswering):
    model_class = SparseAttentionLMModel


__all__ = [
    "SparseAttentionLMForCausalLM",
    "SparseAttentionLMForMaskedLM",
    "SparseAttentionLMForMultipleChoice",
    "SparseAttentionLMForQuestionAnswering",
    "SparseAttentionLMForSequenceClassification",
    "SparseAttentionLMForTokenClassification",
    "SparseAttentionLMModel",
    "SparseAttentionLMPreTrainedModel",
]
