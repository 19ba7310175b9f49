"""What every ordnung family shares: embeddings, norm, MLP, layer and the base model.

A family adds a `Mixer` (`mixers.mixer`): the part of a layer that moves information between tokens.
"""

import copy
from typing import ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from ordnung.configuration.configuration_backbone import BackboneConfig
from ordnung.modeling.mixers.attention import Attention
from ordnung.modeling.mixers.mixer import MIXERS, Mixer, linear_flops
from ordnung.modeling.mixers.norms import make_norm
from ordnung.modeling.mixers.rows import Rows, begins_of
from ordnung.modeling.ops.chunks import in_pieces, is_graph


@torch.compiler.disable  # how many documents there are, and how long, is in the data
def find_documents(shape, mask, position_ids, marks) -> Rows | None:
    """See `BackboneModel.packed_rows`; `mask` (B, >= N) or None."""
    real = Mixer.make_mask(None, torch.empty(*shape, 0), mask)
    begins = begins_of(shape, real, position_ids, **marks)
    return None if begins is None else Rows.of_documents(begins, real)


def is_here(layer: nn.Module) -> bool:
    """Whether a layer is one, and not what transformers' pipelines put in the place of those of another stage."""
    return hasattr(layer, "mixer")


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.chunk_size:
            # bounds the widest activation of the model; any length, unlike transformers' apply_chunking_to_forward
            return torch.cat([self.transform(part) for part in hidden_states.split(self.chunk_size, dim=-2)], dim=-2)
        return self.transform(hidden_states)

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GatedMLP(MLP):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


MLPS = {"plain": MLP, "gated": GatedMLP}


class BackboneLayer(GradientCheckpointingLayer):
    """Mixer and MLP, each with a residual connection, normed before (`pre`) or after the sum (`post`)."""

    def __init__(self, config: BackboneConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.mixer = MIXERS[config.layer_types[layer_idx]](config, layer_idx)
        self.mlp = MLPS[config.mlp_type](config)
        self.mixer_norm = make_norm(config)
        self.mlp_norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        mixed = self.mixer(self.before_mixer(hidden_states), **kwargs)[0]
        return in_pieces(self.after_mixer, hidden_states, mixed)

    def before_mixer(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the mixer takes of the layer's input."""
        return self.mixer_norm(hidden_states) if self.pre_norm else hidden_states

    def after_mixer(self, hidden_states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output, from its input and what the mixer made of that; each token for itself."""
        hidden_states = hidden_states + self.dropout(mixed)
        if self.pre_norm:
            return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.mixer_norm(hidden_states)
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))

    def flops(self, seq_len: int) -> int:
        return self.mixer.flops(seq_len) + linear_flops(self.mlp) * seq_len


class BackbonePreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving for every family; a family's subclass names its config class."""

    config: BackboneConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BackboneLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BackboneLayer, "attentions": Mixer}
    # Name endings of parameters that weight decay would harm; scripts/pretrain.py reads it.
    _no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        if not self.config.splits_heads:
            self._tp_plan = {}  # that of a head would let transformers load the model, and split nothing else
        if self.config.base_model_pp_plan is None:
            self._pp_plan = {}

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if getattr(distributed_config, "pp_size", 1) > 1 and not model._pp_plan:
            raise ValueError(
                f"{cls.__name__} has no `pp_plan`: its layers do not run one after the other on the same states, so "
                "that a pipeline cannot cut the stack. Load it with `fsdp_size` in place of `pp_size`."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            module.init_weights(self.config.initializer_range)


class BackboneModel(BackbonePreTrainedModel):
    """Token, token type and position embeddings, the layers, and the final norm."""

    layer_class: ClassVar[type[BackboneLayer]] = BackboneLayer

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        # a token that texts hold as well, as where eos pads, has an embedding to learn
        padding = None if config.pads_with_text else config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        if config.type_vocab_size:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rope":
            self.rotary_emb = LlamaRotaryEmbedding(config)
        if config.norm_position == "post":
            self.embed_norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.lm_transform = nn.Identity()  # of a causal head: see `heads.ForCausalLM`
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        cu_seq_lens_k: torch.LongTensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        rows: Rows | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Runs the stack.

        Rows may hold several documents, as `DataCollatorWithFlattening` and trl pack them: each gives what it gives
        alone. `position_ids` that start again, `seq_idx` or `cu_seq_lens_q` say where documents begin; of several marks
        each counts. Such rows leave no state to continue. In an exported or traced graph rows hold one document each.

        Args:
            input_ids: (B, N) token ids; or give `inputs_embeds`.
            attention_mask: (B, past + N), 1 for real tokens and 0 for padding, wherever it lies; rows are computed as
                if they stood alone and unpadded. Or a dictionary of ready masks by layer type.
            token_type_ids: (B, N) segment of each token, below `config.type_vocab_size`; all zero by default. Not used
                where that is 0: tokenizers make such ids for any model.
            position_ids: (B, N); by default each document's real tokens are counted from zero, whatever
                `config.position_offset` is. Where they do not go up, a document begins.
            past_key_values: the state returned by an earlier call, to continue it.
            inputs_embeds: (B, N, D) in place of `input_ids`.
            use_cache: return the generation state in `past_key_values`; None for packed rows.
            seq_idx: (B, N), the number of each token's document.
            cu_seq_lens_q, cu_seq_lens_k: (documents + 1,), where documents begin and end in the batch laid out flat.
            max_length_q, max_length_k: tokens of the longest document; known from the others.
            rows: what `packed_rows` makes of all these, where it is there already.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, the mask does not fit the
                tokens, a position or token type lies outside its table, marks of documents do not fit the batch, or
                packed rows come with `past_key_values`.
        """
        inputs_embeds = self.embed_inputs(input_ids, inputs_embeds)
        if rows is None:
            marks = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
            rows = self.packed_rows(inputs_embeds, attention_mask, position_ids, past_key_values, **marks)
        packed = rows is not None
        if not self.config.is_decoder or packed:
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        seen = self.own_states(past_key_values)
        if position_ids is None:
            position_ids = rows.positions if packed else self.default_position_ids(inputs_embeds, attention_mask, seen)
        ready = attention_mask if isinstance(attention_mask, dict) else {}
        if isinstance(attention_mask, dict):
            rows, attention_mask = Rows.of_mask(self.padding_in(ready)), None
        else:
            self.check_mask(inputs_embeds, attention_mask, seen)
            if not packed and not (attention_mask is not None and attention_mask.ndim == 4):
                rows = Rows.of_mask(Mixer.make_mask(self.config, inputs_embeds, attention_mask))
        masks = {}
        for kind in dict.fromkeys(self.config.layer_types):
            masks[kind] = ready.get(kind)
            if masks[kind] is None and issubclass(MIXERS[kind], Attention):
                masks[kind] = MIXERS[kind].make_mask(
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=seen,
                    rows=rows,
                )

        hidden_states, position_embeddings = self.embed(inputs_embeds, token_type_ids, position_ids)
        for kind, layer in zip(self.config.layer_types, self.layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                rows=rows,
                **self.shared_inputs(kind),
                **kwargs,
            )
        if is_here(self.layers[-1]):  # else a later stage of a pipeline norms and transforms
            hidden_states = self.lm_transform(self.norm(hidden_states))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
        )

    def packed_rows(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **marks: torch.LongTensor | None,
    ) -> Rows | None:
        """The rows of a batch that holds several documents in some row; None where each is one.

        Args:
            inputs: (B, N) ids or (B, N, D) embeddings.
            attention_mask, position_ids, past_key_values: as `forward` takes them.
            marks: `seq_idx`, `cu_seq_lens_q` and `cu_seq_lens_k`, likewise.

        Raises:
            ValueError: as `forward`.
        """
        marks = {name: mark for name, mark in marks.items() if mark is not None}
        shape = tuple(inputs.shape[:2])
        if not marks and (position_ids is None or shape[1] < 2):
            return None
        if is_graph():
            if marks:
                raise ValueError(
                    f"`{next(iter(marks))}` cannot be followed in an exported or traced graph, whose shapes do not "
                    "depend on data: give it one document a row, with an `attention_mask`."
                )
            return None
        if not marks and (isinstance(attention_mask, dict) or (is_tracing(inputs) and past_key_values is not None)):
            return None  # a step of compiled generation
        two_dimensional = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if marks and attention_mask is not None and not two_dimensional:
            raise ValueError(
                f"`{next(iter(marks))}` and a ready attention mask both say which tokens belong together: give one of "
                "them, or a mask (B, N) of the real tokens."
            )
        mask = attention_mask if two_dimensional and attention_mask.shape[1] >= shape[1] else None
        rows = find_documents(shape, mask, position_ids, marks)
        if rows is not None and past_key_values is not None:
            named = next(iter(marks), "position_ids")
            raise ValueError(
                f"`{named}` puts several documents into a row, and `past_key_values` continues a single one: leave one "
                "of them out, or give each document its own row."
            )
        return rows

    @staticmethod
    def padding_in(masks: dict[str, torch.Tensor | None]) -> torch.Tensor | None:
        """The mask (B, N) of real tokens among ready masks by layer type, or None where all tokens are real."""
        return next((mask for mask in masks.values() if mask is not None and mask.ndim == 2), None)

    def own_states(self, past_key_values: Cache | None) -> Cache | None:
        """A generation state as this model fills it: without the layers that an earlier stage of a pipeline has."""
        if past_key_values is None or is_here(self.layers[0]):
            return past_key_values
        own = copy.copy(past_key_values)
        own.layers = own.layers[next((i for i, layer in enumerate(self.layers) if is_here(layer)), 0) :]
        return own

    def shared_inputs(self, layer_type: str) -> dict[str, torch.Tensor]:
        """What every mixer of this type takes besides: parameters that the model owns once for all of them."""
        return {}

    def embed_inputs(self, input_ids, inputs_embeds) -> torch.Tensor:
        """(B, N, D), whichever of the two was given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if not is_tracing(inputs) and not inputs.numel():
            B, N = inputs.shape[:2]
            raise ValueError(f"There are {B} rows of {N} tokens: give at least one row of at least one token.")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def embed(
        self, inputs_embeds: torch.Tensor, token_type_ids: torch.LongTensor | None, position_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """What the first layer takes: states (B, N, D) and, with rope, the cosines and sines of the positions."""
        hidden_states, position_embeddings = inputs_embeds, None
        if not is_here(self.layers[0]):  # a later stage of a pipeline: what it takes is embedded
            rope = self.config.position_embedding_type == "rope"
            return hidden_states, self.rotary_emb(hidden_states, position_ids) if rope else None
        if self.config.type_vocab_size:
            if token_type_ids is None:
                token_type_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
            self.check_token_types(token_type_ids)
            hidden_states = hidden_states + self.embed_token_types(token_type_ids)
        if self.config.position_embedding_type == "learned":
            self.check_positions(position_ids)
            hidden_states = hidden_states + self.embed_positions(position_ids + self.config.position_offset)
        elif self.config.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if self.config.norm_position == "post":
            hidden_states = self.embed_norm(hidden_states)
        return self.dropout(hidden_states), position_embeddings

    def flops(self, seq_len: int) -> int:
        """FLOPs of a forward pass over one sequence of `seq_len` tokens, two per multiply-add.

        Counts the matrix products and the mixing; embeddings, norms and activations are left out.
        """
        return sum(layer.flops(seq_len) for layer in self.layers)

    def cache_bytes(self, seq_len: int) -> int:
        """Bytes of the generation state of one sequence after `seq_len` tokens, in the dtype of the weights."""
        return sum(layer.mixer.cache_bytes(seq_len, self.dtype.itemsize) for layer in self.layers)

    @staticmethod
    def default_position_ids(inputs_embeds, attention_mask, past_key_values) -> torch.LongTensor:
        """(B, N), or (1, N) where all rows are alike: the number of real tokens before each."""
        length = inputs_embeds.shape[1]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)

    def check_mask(self, inputs_embeds, attention_mask, past_key_values) -> None:
        if attention_mask is None or is_tracing(inputs_embeds):
            return
        B, N = inputs_embeds.shape[:2]
        if attention_mask.ndim == 4:
            others = sorted(set(self.config.layer_types) - {"full_attention"})
            if not others:
                return  # a ready mask, as transformers' own attention models take
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, which tells of each pair of tokens, and "
                f"layers of {others} do not look at pairs: give (B, N) with 1 for real tokens and 0 for padding, and "
                "mark several documents in a row by `position_ids` or `seq_idx`."
            )
        tokens = N + int(past_key_values.get_seq_length() if past_key_values is not None else 0)
        if tuple(attention_mask.shape) != (B, tokens):
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, but {B} rows of {tokens} tokens (those in "
                f"`past_key_values` included) need ({B}, {tokens}): 1 for each real token, 0 for each padding token."
            )

    def check_positions(self, position_ids) -> None:
        if is_tracing(position_ids):
            return
        highest = int(position_ids.max())
        if highest >= self.config.num_positions:
            raise ValueError(
                f"Position {highest} is outside the learned table of {self.config.num_positions} positions, counted "
                f"from 0: `max_position_embeddings` ({self.config.max_position_embeddings}) less `position_offset` "
                f"({self.config.position_offset}). Shorten the input, or train with more positions, "
                "position_embedding_type='rope' or, for ConvLM, 'none'."
            )

    def check_token_types(self, token_type_ids) -> None:
        if is_tracing(token_type_ids):
            return
        highest, types = int(token_type_ids.max()), self.config.type_vocab_size
        if highest >= types:
            raise ValueError(
                f"`token_type_ids` holds {highest}, but `type_vocab_size` is {types}: leave `token_type_ids` out, or "
                f"train with type_vocab_size={highest + 1}."
            )


__all__ = ["BackboneLayer", "BackboneModel", "BackbonePreTrainedModel"]
