"""RetentionLM: each head keeps a matrix of keys times values, and tokens choose how fast it fades."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin

from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel
from ordnung.modeling.heads import ForCausalLM, ForQuestionAnswering, ForSequenceClassification, ForTokenClassification
from ordnung.modeling.mixers.mixer import Mixer, linear_flops
from ordnung.modeling.mixers.projections import Projections, angles_of
from ordnung.modeling.mixers.rows import over_rows
from ordnung.modeling.mixers.state import RecurrentStateLayer
from retention.configuration_retention_lm import RetentionLMConfig
from retention.retention_op import retention, weigh


class RetentionCacheLayer(RecurrentStateLayer):
    """Generation state: S (B, H, d, d), in float32 at least, as it sums over all tokens."""

    _layer_type = "retention"


def advance(state, key, value, log_decay, lengths=None):
    """The state, one tensor (B, H, d, d), after more tokens."""
    return (retention(key, key, value, log_decay, *state, lengths)[1],)


class GatedRetention(Projections, Mixer):
    """Retention (Sun et al. 2023, arXiv 2307.08621) with the gated decay of YOCO (2024, arXiv 2405.05254, section 3.2).

        S[i] = g[i] S[i - 1] + (1 - g[i]) k[i] v[i]^T,   y[i] = out_proj(S[i]^T q[i] / sqrt(d))

    for each head, with g = sigmoid(decay_proj(x) + decay_logits). Training and prefill O(N (C + d)) for chunks of C
    tokens, decoding O(d) a token and channel, state d rows of D whatever the length.
    """

    layer_type = "retention"
    cache_layer = RetentionCacheLayer

    def __init__(self, config: RetentionLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_projections(config)
        self.decay_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
        self.decay_logits = nn.Parameter(torch.empty(config.num_attention_heads))

    def init_weights(self, std: float) -> None:
        """`std` is not used: head h starts with g = 1 - 2^-(5 + h), as in retention without a gate."""
        heads = torch.arange(len(self.decay_logits), dtype=torch.float32, device=self.decay_logits.device)
        init.copy_(self.decay_logits, (2 ** (5 + heads) - 1).log())

    def project(self, hidden_states, position_embeddings):
        """Queries, keys and values (B, N, H, d) and log decays (B, N, H) of `hidden_states` (B, N, D)."""
        angles, groups = angles_of(position_embeddings), self.num_key_value_groups
        query = self.queries(hidden_states, angles) * self.scaling
        key, value = self.keys(hidden_states, angles), self.values(hidden_states)
        logits = self.decay_proj(hidden_states) + self.decay_logits
        log_decay = nn.functional.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return query, key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2), log_decay

    def forward(
        self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, rows=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        layer = None if past_key_values is None else self.state_of(past_key_values)

        def mix(query, key, value, log_decay, lengths):
            R, _, H, d = key.shape
            before = getattr(layer, "state", None) or (log_decay.new_zeros(R, H, d, d),)
            mixed, after = retention(query, key, value, log_decay, *before, lengths, self.config.chunk_size)
            if layer is not None:
                layer.update_state(before, (after,), advance, (key, value, log_decay), getattr(rows, "real", None))
            return mixed

        return self.out_proj(over_rows(rows, mix, *self.project(hidden_states, position_embeddings)).flatten(2)), None

    def mixing_weights(self, hidden_states, position_embeddings=None, rows=None, **kwargs) -> torch.Tensor:
        """(B, H, N, N) weights of the values."""
        query, key, _, log_decay = self.project(hidden_states, position_embeddings)
        key = key * -torch.expm1(log_decay)[..., None]
        if rows is not None and rows.real is not None:
            real = rows.real[..., None]
            query, key, log_decay = query * real[..., None], key * real[..., None], log_decay * real
        weights = weigh(*(x.transpose(1, 2) for x in (query, key, log_decay.cumsum(1)[..., None])))
        return weights if rows is None or not rows.packed else weights * rows.visible(causal=True)

    def flops(self, seq_len: int) -> int:
        C, heads = self.config.chunk_size, self.config.num_attention_heads
        pairs = (seq_len // C) * C**2 + (seq_len % C) ** 2  # of tokens in a chunk, later ones too
        return linear_flops(self) * seq_len + 4 * heads * self.head_dim * (pairs + seq_len * self.head_dim)

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        return self.config.num_attention_heads * self.head_dim**2 * max(itemsize, 4)


class RetentionLMPreTrainedModel(BackbonePreTrainedModel):
    config: RetentionLMConfig
    _no_weight_decay = ("decay_logits",)


class RetentionLMModel(RetentionLMPreTrainedModel, BackboneModel):
    """The stack without a head."""


class RetentionLMForCausalLM(RetentionLMPreTrainedModel, ForCausalLM, GenerationMixin):
    model_class = RetentionLMModel


class RetentionLMForSequenceClassification(RetentionLMPreTrainedModel, ForSequenceClassification):
    model_class = RetentionLMModel


class RetentionLMForTokenClassification(RetentionLMPreTrainedModel, ForTokenClassification):
    model_class = RetentionLMModel


class RetentionLMForQuestionAnswering(RetentionLMPreTrainedModel, ForQuestionAnswering):
    model_class = RetentionLMModel
