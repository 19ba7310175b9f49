"""CubicPrefixLM's mixer, its layer and its generation state."""

import torch
from torch import nn
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, DynamicLayer

from ordnung.configuration.configuration_cubic_prefix_lm import CubicPrefixLMConfig
from ordnung.modeling.backbone import BackboneLayer
from ordnung.modeling.mixers.attention import Attention, make_attention_mask
from ordnung.modeling.mixers.projections import angles_of
from ordnung.modeling.mixers.state import BatchFirst
from ordnung.modeling.ops.grouped import per_query_head
from ordnung.modeling.ops.prefix_attention import fold_keys, fold_values, join_scores


class PrefixCacheLayer(BatchFirst, DynamicLayer):
    """Generation state of one layer: keys and values, and in the first layer what later passes start from.

    `first` holds tensors, batch first: `hidden_states` (B, T, D) that the layer takes and their `position_ids` (B, T).
    With stride 1 also `query` (B, H, T, P), and what attention of each query over all T keys gives, `output` of that
    shape and the log-sum-exp `total` (B, H, T); the other layers are empty. With a larger stride `ends` (B,): the keys
    and values of all layers are those of the pass whose fully connected part ends there.
    """

    _layer_type = "cubic_prefix"

    def __init__(self, **kwargs):
        super().__init__()
        self.first: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        self.forget_pass()
        super().reset()
        self.first = {}

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized:  # with stride 1 the layers after the first hold nothing
            super().crop(tokens_to_remove)
        if not self.first or not tokens_to_remove:
            return
        T = self.get_seq_length()
        # sums over keys cannot be taken back: the next call makes them anew, as it does a pass that is cut
        kept = {name: self.first[name][:, :T] for name in ("hidden_states", "position_ids")}
        if "query" in self.first:
            kept["query"] = self.first["query"][:, :, :T]
        if "ends" in self.first:
            kept["ends"] = torch.where(self.first["ends"] > T, -1, self.first["ends"])
        self.first = kept

    def forget_pass(self) -> None:
        """Drops the keys and values, for those of another pass."""
        self.keys = self.values = None  # before transformers 5.23 its `reset` keeps zeros
        self.is_initialized = False

    def change(self, function) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
            self.first = {name: function(tensor) for name, tensor in self.first.items()}


# the same layer serves a static cache: passes over all tokens so far have no fixed shape to compile for
STATIC_LAYER_TYPE_MAPPING["cubic_prefix"] = PrefixCacheLayer


class PrefixAttention(Attention):
    """Fully connected softmax attention over every prefix: encoder-only next-token prediction.

    The distribution of token t + 1 comes from a bidirectional pass over tokens 0 to t, read at t (ENTP, Ewer et al.
    2024, arXiv 2410.01600). The first layer shares its attention between prefixes and the last computes one row, O(N^2)
    each; the layers between are O(N^3), the N^2 / 2 rows of MLPs and projections O(N^2 D). Prefill O(N^2), decoding
    O(N^2) a token, state 5 rows of D a token (those of keys and values G d wide). With stride s, training O(N^3 / s),
    decoding O(N^2 / s) on average.
    """

    layer_type = "cubic_prefix"

    def __init__(self, config: CubicPrefixLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    @staticmethod
    def make_mask(config, inputs_embeds, attention_mask, past_key_values=None, rows=None, **kwargs):
        return make_attention_mask(config, inputs_embeds, attention_mask, None, rows, causal=False)

    def read(
        self,
        states: torch.Tensor,
        chosen: torch.Tensor,
        visible: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """The mixed states (G, S, D) of the tokens `chosen` (G, S) alone, from `states` (G, T, D).

        `visible` (G, S, T) says which tokens each of them sees. `past_key_values` takes the keys and values of all T.
        """
        G, S = chosen.shape
        angles = position_embeddings or ()  # (G or 1, T, P) each
        at = [x.expand(G, -1, -1).gather(1, chosen[..., None].expand(-1, -1, self.head_dim)) for x in angles]
        read = states.gather(1, chosen[..., None].expand(-1, -1, states.shape[-1]))
        query = self.queries(read, angles_of(at)).transpose(1, 2)  # (G, H, S, P)
        keep, groups = past_key_values is not None, self.num_key_value_groups
        if not keep and self.keys_are_linear and self.folds(self.k_proj, S):
            scores = fold_keys(query, states, self.k_proj.weight, self.k_proj.bias)
        else:
            key = self.keys(states, angles_of(angles)).transpose(1, 2)
            scores = query @ per_query_head(key, groups).transpose(2, 3)
        weights = join_scores(scores * self.scaling, visible[:, None]).softmax(-1)
        weights = nn.functional.dropout(weights, self.dropout).to(states.dtype)
        if not keep and self.folds(self.v_proj, S):
            mixed = fold_values(weights, states, self.v_proj.weight, self.v_proj.bias, groups)
        else:
            value = self.values(states).transpose(1, 2)
            mixed = weights @ per_query_head(value, groups)
        if keep:
            past_key_values.update(key, value, self.layer_idx)
        return self.out_proj(mixed.transpose(1, 2).reshape(G, S, -1))

    @property
    def dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def folds(self, linear: nn.Module, reads: int) -> bool:
        """Whether to apply the weight of `linear` to the few reads instead of to all states.

        Only where the weight is all there is to it: no adapter, offloading or other hook, and a plain tensor, which a
        quantised or sharded one is not.
        """
        hooks = linear._forward_pre_hooks or linear._forward_hooks or hasattr(linear, "_hf_hook")
        plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not hooks
        width, inner = self.config.hidden_size, self.q_proj.out_features
        # folded, each read has a key's products with all heads' states; plain, each token has its key
        return plain and reads * (self.config.num_attention_heads * width - inner) < linear.out_features * width

    def read_flops(self, reads: int, tokens: int) -> int:
        """FLOPs of `read` for one pass of `tokens` tokens."""
        D, H = self.config.hidden_size, self.config.num_attention_heads
        inner, held = self.q_proj.out_features, self.k_proj.out_features
        folded = 2 * D * inner * reads + 2 * H * D * reads * tokens
        plain = 2 * D * held * tokens + 2 * inner * reads * tokens
        keys = plain
        if self.keys_are_linear and self.folds(self.k_proj, reads):
            keys = folded + (0 if self.k_proj.bias is None else 2 * inner * reads)
        return 4 * D * inner * reads + keys + (folded if self.folds(self.v_proj, reads) else plain)


class PrefixLayer(BackboneLayer):
    """A layer of which passes compute a part: the first shares its attention between them, the last reads few tokens.

    The parts are computed in `forward` as well, as all that hooks into the call of a layer (sharding, which gathers its
    weights there; offloading; recomputation) does not see calls of its modules.
    """

    def forward(self, hidden_states: torch.Tensor, *inputs, part: str | None = None, **kwargs):
        """The layer, or the part of it that the method called `part` computes."""
        if part is None:
            return super().forward(hidden_states, **kwargs)
        return {"project": self.project, "finish": self.finish, "read": self.read}[part](hidden_states, *inputs)

    def project(self, hidden_states, position_embeddings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, as `Attention.project`."""
        return self.mixer.project(self.before_mixer(hidden_states), position_embeddings)

    def finish(self, hidden_states, mixed) -> torch.Tensor:
        """The layer's output from its input and the mixed values (G, T, H d)."""
        return self.after_mixer(hidden_states, self.mixer.out_proj(mixed))

    def read(self, hidden_states, chosen, visible, position_embeddings, past_key_values=None) -> torch.Tensor:
        """The layer's output (G, S, D) at the tokens `chosen` (G, S), as `PrefixAttention.read`."""
        states = self.before_mixer(hidden_states)
        mixed = self.mixer.read(states, chosen, visible, position_embeddings, past_key_values)
        return self.after_mixer(hidden_states.gather(1, chosen[..., None].expand_as(mixed)), mixed)
