"""LinformerLM: attention to k projected rows, bidirectional as in the paper or causal with a constant state."""

import math
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.utils.import_utils import is_tracing

from ordnung.configuration.configuration_linformer_lm import LinformerLMConfig
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
from ordnung.modeling.mixers.projections import Projections, angles_of
from ordnung.modeling.mixers.rows import over_rows
from ordnung.modeling.mixers.state import RecurrentStateLayer
from ordnung.modeling.ops.causal_linformer import CausalLinformer
from ordnung.modeling.ops.causal_linformer_state import CausalState, empty_state
from ordnung.modeling.ops.chunks import WHOLE, is_graph, pieces
from ordnung.modeling.ops.linformer import LEARNED, MEANS, project_rows, slot_bias, weight_sums


class LinformerCacheLayer(RecurrentStateLayer):
    """Generation state of the causal mixer: a `CausalState`, of a constant size, with its own count for each row."""

    _layer_type = "causal_linformer_attention"


def of_batch(position_embeddings, hidden_states) -> list[torch.Tensor]:
    """Cosines and sines (B, N, d) for every row of the batch, or none."""
    return [x.expand(hidden_states.shape[0], -1, -1) for x in position_embeddings or ()]


def by_token(outputs):
    """Mixed states, and weights (B, N, H, keys) as (B, H, N, keys)."""
    mixed, weights = outputs
    return mixed, None if weights is None else weights.transpose(1, 2)


class SequenceProjection(nn.Module):
    """The weights of E and F, with a row for each position: (2 or 1, G or 1, n, k), or (2 or 1, G or 1, n / k) taps.

    A bidirectional model uses them as they are; a causal one needs positive weights and takes them for logarithms.
    """

    def __init__(self, config: LinformerLMConfig, k: int):
        super().__init__()
        self.config, self.k = config, k
        separate = config.projection_sharing in ("none", "headwise")
        heads = config.num_key_value_heads if config.projection_sharing == "none" else 1
        n = config.num_positions
        shape = (n, k) if config.projection_type == "linear" else (n // k,)
        self.weight = nn.Parameter(torch.empty(2 if separate else 1, heads, *shape))

    def forward(self) -> torch.Tensor:
        return self.weight

    def init_weights(self) -> None:
        """N(0, 1 / k) as in the paper, and segment means: exactly for taps, nine tenths of a causal token's weight."""
        n, k = self.config.num_positions, self.k
        if self.config.projection_type == "conv":
            init.constant_(self.weight, 0.0 if self.config.is_decoder else k / n)
        elif self.config.is_decoder:
            segment = torch.arange(n, device=self.weight.device) * k // n
            own = nn.functional.one_hot(segment, k) * math.log(9 * max(k - 1, 1))
            init.copy_(self.weight, own.expand_as(self.weight))
        else:
            init.normal_(self.weight, std=k**-0.5)


class LinformerMixer(Projections, Mixer):
    """What the bidirectional and the causal mixer share."""

    def __init__(self, config: LinformerLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.k = config.projected_sizes[layer_idx]
        self.is_causal = False  # read by the attention functions: the queries and the slots are no square
        self.add_projections(config)
        owns = config.learns_projection(layer_idx) and config.projection_sharing != "layerwise"
        self.projection = SequenceProjection(config, self.k) if owns else None

    def sequence_weights(self, shared: torch.Tensor | None) -> torch.Tensor | None:
        return shared if self.projection is None else self.projection()

    def in_pieces(self, mix, hidden_states, multiple=1):
        """The mixed states, and the weights or None, by `mix` of places as `pieces` gives them."""
        places = pieces(hidden_states, multiple)
        if len(places) == 1 or self.config._attn_implementation == "eager":  # which gives weights
            return mix(WHOLE)
        output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        for place in places:
            output[place] = mix(place)[0]
        return output, None


class LinformerAttention(LinformerMixer):
    """Bidirectional Linformer (Wang et al. 2020, arXiv 2006.04768, equation 7).

    head = softmax(Q (E K)^T / sqrt(d)) F V, with E and F projecting the N tokens of a row to k rows. Where heads share
    E, it is applied before the linear layers: E(x W + 1 b) = (E x) W + (E 1) b, so that keys and values are computed
    for k rows. Forward and training O(N k). Padding is left out of every sum, and the weights of E follow the number of
    real tokens before each token, so that a row gives the same wherever it is padded.
    """

    layer_type = "linformer_attention"

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        rows=None,
        sequence_projection: torch.Tensor | None = None,  # of projection_sharing="layerwise"
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.check_length(hidden_states, rows)
        weights, packed = self.sequence_weights(sequence_projection), rows is not None and rows.packed

        def mix_row(states, *rest):
            *angles, lengths = rest
            angles = angles_of(angles)
            key, value = self.keys_and_values(states, angles, weights, lengths)
            bias = self.slot_bias(states, lengths)

            def mix(place):
                part, which = states[place], place[0]
                query = self.queries(part, [x[place] for x in angles])  # (B, N, H, d)
                biased = None if bias is None else bias[which, :, place[1]]
                output, probabilities = self.attend(query.transpose(1, 2), key[which], value[which], biased, **kwargs)
                return self.merge_heads(output), probabilities

            # all else of the layer treats each token by itself
            output, probabilities = self.in_pieces(mix, states)
            if probabilities is not None:
                missing = self.k - probabilities.shape[-1] if packed else 0
                probabilities = nn.functional.pad(probabilities, (0, missing)).transpose(1, 2)
            return output, probabilities

        return by_token(over_rows(rows, mix_row, hidden_states, *of_batch(position_embeddings, hidden_states)))

    def keys_and_values(self, states, angles, weights, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected keys and values (B, G, M, d) of states (B, N, D)."""
        e, f = (None, None) if weights is None else (weights[0], weights[-1])
        rows = self.project(states, f, lengths) if self.projects_first(states.shape[1]) else None  # (B, M, D)
        sums = self.weight_sums(states, f, lengths)
        value = self.rows_of(self.v_proj, states, rows, f, lengths, sums)
        if not self.keys_are_linear:  # they are normed and turn before they are summed
            key = self.project(self.keys(states, angles).flatten(2), e, lengths)
        else:
            if rows is not None and weights is not None and len(weights) == 2:
                rows, sums = self.project(states, e, lengths), self.weight_sums(states, e, lengths)
            key = self.rows_of(self.k_proj, states, rows, e, lengths, sums)
        return tuple(self.heads(x).transpose(1, 2) for x in (key, value))

    def check_length(self, hidden_states, rows) -> None:
        longest, most = hidden_states.shape[1], self.config.num_positions
        if self.config.projection_type == "adaptive_mean_pool" or is_tracing(hidden_states) or longest <= most:
            return
        if rows is not None:
            # as many as the longest row of a group has; without lengths, all that are laid out
            lengths = [x.index.shape[1] if x.lengths is None else int(x.lengths.max()) for x in rows.groups]
            longest = max(lengths)
        if longest > most:
            raise ValueError(
                f"A row of {longest} tokens is longer than `max_position_embeddings` ({most}), the positions that the "
                "projection has weights for: shorten it, or make the model with more positions, or with "
                "projection_type='adaptive_mean_pool' and position_embedding_type='none' or 'rope'."
            )

    def projects_first(self, N: int) -> bool:
        """Whether E is applied to the layer's input, N tokens: it is the same for all heads, linear, and makes them
        fewer. A graph for any length has one order."""
        kind, k, _ = self.shape
        own = self.config.projection_sharing == "none" and kind in LEARNED
        return not own and kind != "max_pool" and (kind != "linear" or is_graph() or k < N)

    @property
    def shape(self) -> tuple[str, int, int]:
        """What describes the projection to the functions of `ops.linformer`: kind, k and n."""
        return self.config.projection_type, self.k, self.config.num_positions

    def span(self, N: int, lengths: torch.Tensor | None) -> int:
        """Places of a row to look at: those beyond E's weights are padding."""
        if lengths is None or self.config.projection_type == "adaptive_mean_pool":
            return N
        return min(N, self.config.num_positions)

    def project(self, states, weight, lengths: torch.Tensor | None):
        """(B, N, ...) to (B, M, ...), of states D wide or of all heads of keys or values."""
        kind, k, n = self.shape
        if lengths is not None:
            states = states[:, : self.span(states.shape[1], lengths)]
            padding = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
            states = states.masked_fill(padding[..., None], 0)
        heads = 1 if weight is None else weight.shape[0]
        return project_rows(states.unflatten(-1, (heads, -1)), kind, weight, k, n, lengths).flatten(2)

    def weight_sums(self, states, weight, lengths: torch.Tensor | None):
        """What the bias of a linear layer after the projection is multiplied by, (B or 1, M, 1), or None for 1."""
        kind = self.config.projection_type
        if not self.projects_first(states.shape[1]) or kind in MEANS:
            return None
        return weight_sums(kind, weight, self.span(states.shape[1], lengths), lengths)

    def rows_of(self, linear: nn.Module, states, rows, weight, lengths: torch.Tensor | None, sums):
        """The projected keys or values (B, M, G d): `linear` of the projected input `rows`, or the reverse."""
        if rows is None:
            return self.project(linear(states), weight, lengths)
        if sums is None:
            return linear(rows)
        # called with a row of zeros, for its bias: so whatever has taken the place of the linear layer works
        rows, bias = linear(nn.functional.pad(rows, (0, 0, 0, 1))).split([rows.shape[1], 1], dim=1)
        return rows + (sums - 1) * bias

    def slot_bias(self, states, lengths: torch.Tensor | None):
        kind, k, n = self.shape
        lengths = None if lengths is None else lengths.clamp(min=1)  # some slot counts in a row of padding too
        bias = slot_bias(kind, self.span(states.shape[1], lengths), k, n, lengths, states.dtype, states.device)
        return None if bias is None else bias[:, None, None].expand(states.shape[0], 1, states.shape[1], -1)

    def flops(self, seq_len: int) -> int:
        width, (kind, k, n), N = self.config.hidden_size, self.shape, seq_len
        inner, held = self.q_proj.out_features, self.k_proj.out_features  # widths of queries, and of keys and values
        separate = kind in LEARNED and self.config.projection_sharing in ("none", "headwise")
        linear = self.keys_are_linear
        if kind == "linear":
            rows, terms = k, N * k  # products of a weight and a token
        elif kind == "adaptive_mean_pool":
            rows, terms = min(N, k), 0
        else:
            rows = -(-N // (n // k))
            terms = rows * (n // k) if kind == "conv" else 0
        total = 2 * 2 * N * width * inner + 4 * N * rows * inner  # queries and output; attention
        projects_first = self.projects_first(N)
        for first in (projects_first and linear, projects_first):  # keys and values
            # after learned projections a row more, for the bias
            total += 2 * width * held * (rows + (kind in LEARNED) if first else N)
        if projects_first and kind in LEARNED:  # the sums that multiply the bias
            total += 2 * terms * (2 if separate and linear else 1)
        values = width if projects_first else held
        shared = projects_first and linear and not separate
        keys = 0 if shared else width if projects_first and linear else held
        return total + 2 * terms * (values + keys)

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        """None: a bidirectional model does not generate."""
        return 0


class CausalLinformerAttention(LinformerMixer):
    """Causal Linformer: exact attention to the last blocks and the first tokens, and to k slots, the projected others.

    Not in the paper, whose projection sees the whole row. Formula and reasons stand in `ops.causal_linformer`. Training
    and prefill O(N (C + S + k)), decoding O(C + S + k) a token, state 2 k rows of sums, 2 (W + 1) C rows of the last
    blocks and 2 S of the first tokens, for C = `local_block_size`, W = `local_blocks_back`, S = `num_global_tokens`.
    """

    layer_type = "causal_linformer_attention"
    cache_layer = LinformerCacheLayer

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        rows=None,
        sequence_projection: torch.Tensor | None = None,  # of projection_sharing="layerwise"
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        operator = CausalLinformer(
            self.config.projection_type,
            self.sequence_weights(sequence_projection),
            self.k,
            self.config.num_positions,
            self.config.local_block_size,
            self.config.local_blocks_back,
            self.config.num_global_tokens,
        )
        attend = partial(self.attend, **kwargs)

        def project(states, angles):
            return self.queries(states, angles), self.keys(states, angles), self.values(states)

        def mix_row(states, *rest):
            *angles, lengths = rest
            angles = angles_of(angles)
            carry = None

            def mix(place):
                nonlocal carry
                inputs = project(states[place], [x[place] for x in angles])
                if place == WHOLE:
                    output, probabilities = operator.forward(*inputs, attend)
                else:
                    if place[1].start == 0:
                        carry = operator.before_first(inputs[1])
                    output, probabilities, carry = operator.forward_part(*inputs, carry, attend)
                return self.merge_heads(output), probabilities

            if past_key_values is None:
                output, probabilities = self.in_pieces(mix, states, self.config.local_block_size)
            else:
                query, key, value = project(states, angles)
                layer = self.state_of(past_key_values)
                before = None if layer.state is None else CausalState(*layer.state)
                output, probabilities, after = operator.step(query, key, value, before, lengths, attend)
                before = empty_state(operator, key) if before is None else before
                layer.update_state(before, after, operator.replay, (key, value), None if rows is None else rows.real)
                output = self.merge_heads(output)
            return output, None if probabilities is None else probabilities.transpose(1, 2)

        def mix_document(query, key, value, lengths):
            if query.shape[1] <= operator.R and self.config._attn_implementation == "sdpa":
                # all within the window: exact causal attention, without blocks to fill up
                return attend(*(x.transpose(1, 2) for x in (query, key, value)), None, is_causal=True)
            output, probabilities = operator.forward(query, key, value, attend)
            return output, None if probabilities is None else probabilities.transpose(1, 2)

        angles = of_batch(position_embeddings, hidden_states)
        if rows is None or not rows.packed:
            return by_token(over_rows(rows, mix_row, hidden_states, *angles))
        output, probabilities = rows.mix(mix_document, *project(hidden_states, angles_of(angles)))
        return by_token((self.merge_heads(output), probabilities))

    def flops(self, seq_len: int) -> int:
        # what a whole block costs, shared out to its tokens: so the difference of two lengths is the cost of decoding
        window = (self.config.local_blocks_back + 1) * self.config.local_block_size
        attention = 4 * seq_len * (window + self.config.num_global_tokens + self.k) * self.q_proj.out_features
        adding = 4 * seq_len * self.k * self.k_proj.out_features  # to the slots
        return linear_flops(self) * seq_len + attention + adding

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        exact = (self.config.local_blocks_back + 1) * self.config.local_block_size + self.config.num_global_tokens
        sharing, width = self.config.projection_sharing, self.k_proj.out_features
        parts = {"none": 2 * self.config.num_key_value_heads, "headwise": 2}.get(sharing, 1)
        if not self.config.learns_projection(self.layer_idx):
            parts = 1
        return 2 * exact * width * itemsize + self.k * (2 * width + parts) * max(itemsize, 4)


class LinformerLMPreTrainedModel(BackbonePreTrainedModel):
    config: LinformerLMConfig
    _supports_flash_attn = False  # neither takes the bias of the slots
    _supports_flex_attn = False
    _no_weight_decay = ("projection.weight",)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SequenceProjection):
            module.init_weights()


class LinformerLMModel(LinformerLMPreTrainedModel, BackboneModel):
    """The stack without a head. With projection_sharing="layerwise" it owns the one projection of all layers."""

    def __init__(self, config: LinformerLMConfig):
        super().__init__(config)
        owns = config.learns_projection(0) and config.projection_sharing == "layerwise"
        self.projection = SequenceProjection(config, config.projected_sizes[0]) if owns else None
        self.post_init()

    def shared_inputs(self, layer_type):
        if self.projection is None or layer_type == "full_attention":
            return {}
        return {"sequence_projection": self.projection()}


class LinformerLMForCausalLM(LinformerLMPreTrainedModel, ForCausalLM, GenerationMixin):
    model_class = LinformerLMModel


class LinformerLMForMaskedLM(LinformerLMPreTrainedModel, ForMaskedLM):
    model_class = LinformerLMModel


class LinformerLMForSequenceClassification(LinformerLMPreTrainedModel, ForSequenceClassification):
    model_class = LinformerLMModel


class LinformerLMForMultipleChoice(LinformerLMPreTrainedModel, ForMultipleChoice):
    model_class = LinformerLMModel


class LinformerLMForTokenClassification(LinformerLMPreTrainedModel, ForTokenClassification):
    model_class = LinformerLMModel


class LinformerLMForQuestionAnswering(LinformerLMPreTrainedModel, ForQuestionAnswering):
    model_class = LinformerLMModel


__all__ = [
    "LinformerLMForCausalLM",
    "LinformerLMForMaskedLM",
    "LinformerLMForMultipleChoice",
    "LinformerLMForQuestionAnswering",
    "LinformerLMForSequenceClassification",
    "LinformerLMForTokenClassification",
    "LinformerLMModel",
    "LinformerLMPreTrainedModel",
]
