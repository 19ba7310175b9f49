"""Configuration fields that every ordnung family shares."""

import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


def check_rope_type(rope_parameters: Mapping | None) -> None:
    """Raise a ValueError where rotary positions are of a type that transformers does not compute."""
    kind, known = (rope_parameters or {}).get("rope_type", "default"), ("default", *ROPE_INIT_FUNCTIONS)
    if kind not in known:
        raise ValueError(f"`rope_type` ({kind!r}) is not known: it must be one of {sorted(known)}")


@strict
class BackboneConfig(PreTrainedConfig):
    """Fields of the shared backbone; a family's config inherits them and adds those of its mixer.

    Args:
        vocab_size: number of token ids.
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of layers L.
        num_attention_heads: number of heads H of a mixer, in every family; `hidden_size` is a multiple of it unless
            `head_dim` is given.
        num_key_value_heads: heads of keys and values, each shared by as many query heads, H if None. ConvLM's
            convolutions have values of `hidden_size` whatever this, `head_dim` and `qk_norm` are.
        head_dim: channels of a head, `hidden_size / num_attention_heads` if None.
        qk_norm: RMSNorm over the channels of each query and key, before rotary positions, as in Qwen3.
        attention_bias: biases of a mixer's projections: True (all), False (none) or "qkv" (all but the output's, as in
            Qwen2).
        intermediate_size: width of the MLP, `4 * hidden_size` if None.
        mlp_type: "plain" (down(act(up(x)))) or "gated" (down(act(gate(x)) * up(x)), as in Llama).
        mlp_bias: biases of the MLP's projections.
        hidden_act: activation of the MLP, a name of `transformers.activations.ACT2FN`.
        norm_type: "layer_norm" or "rms_norm", every norm of the model.
        norm_position: "pre" (norm before mixer and MLP, and one after the last layer) or "post" (after each residual
            sum, and one after the embeddings, as in BERT).
        layer_norm_eps: epsilon of every norm.
        position_embedding_type: "none", "learned" (table of `max_position_embeddings` rows added to the token
            embeddings) or "rope" (rotary embedding of queries and keys in attention layers).
        max_position_embeddings: rows of the learned table; the trained length that rope scaling refers to.
        position_offset: row of the learned table that holds the first position; rows before it are not used. RoBERTa
            has 2.
        rope_parameters: transformers' rope dictionary (`rope_theta`, `rope_type`, ...), for "rope".
        type_vocab_size: number of token types (segments, as in BERT) that have an embedding; 0 for no such table.
        hidden_dropout: dropout after the embeddings, each mixer and each MLP.
        attention_dropout: dropout on softmax attention weights.
        classifier_dropout: dropout before a classification head, `hidden_dropout` if None.
        classifier_pooling: what a sequence is classified by: "first" or "last" (its first or last real token's state)
            or "mean" (of all). None means the last of a causal and the first of a bidirectional model.
        initializer_range: standard deviation of the initial weights of linear layers and embeddings.
        is_decoder: causal (True) or bidirectional (False).
        use_cache: return the generation state by default.
        tie_word_embeddings: share the token embedding with the language-modelling head.
        lm_head_bias: bias of the causal language-modelling head.
        lm_head_transform: put a dense layer, activation and norm before that head, as BERT's for masked tokens has.
        layer_types: one mixer name per layer, e.g. to mix a family's own layers with "full_attention" ones. None
            means the family's own mixer in every layer.

    Raises:
        ValueError: where fields contradict each other; the message gives the values and the cure.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    # The names that `layer_types` may hold in this family; the first fills a stack whose `layer_types` is not given.
    mixer_types: ClassVar[tuple[str, ...]] = ("full_attention",)
    # Whether the causal model runs the bidirectional one on each prefix, so that an encoder's weights generate.
    encoder_generates: ClassVar[bool] = False
    # How pipelines cut the base model: its parts in order, with what they take and give.
    base_model_pp_plan: ClassVar[Mapping | None] = MappingProxyType(
        {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }
    )
    # Whether a row of several documents costs less than a row for each: scripts/pretrain.py then packs them.
    packs_documents: ClassVar[bool] = True
    # trl reads it of every class that transformers itself does not have; a stand-alone folder's config has its own.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    attention_bias: bool | Literal["qkv"] = True
    intermediate_size: int | None = None
    mlp_type: Literal["plain", "gated"] = "plain"
    mlp_bias: bool = True
    hidden_act: str = "gelu"
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_position: Literal["pre", "post"] = "pre"
    layer_norm_eps: float | int = 1e-5
    position_embedding_type: Literal["none", "learned", "rope"] = "rope"
    max_position_embeddings: int = 1024
    position_offset: int = 0
    rope_parameters: RopeParameters | dict | None = None
    type_vocab_size: int = 0
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    classifier_pooling: Literal["first", "last", "mean"] | None = None
    initializer_range: float | int = 0.02
    is_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    lm_head_transform: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0 and not self.hidden_size % self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        mixers = kwargs.pop("mixers", None)  # see `to_json_file`
        if self.layer_types is None:
            self.layer_types = mixers or [self.mixer_types[0]] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """As transformers', with `layer_types` under "mixers".

        Where this package is not imported, transformers reads a folder's config.json as a base config to find out about
        its tokenizer, and takes no `layer_types` but its own there. Files that have them are read as well.
        """
        fields = json.loads(self.to_json_string(use_diff))
        if "layer_types" in fields:
            fields["mixers"] = fields.pop("layer_types")
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(fields, indent=2, sort_keys=True) + "\n")

    @property
    def splits_heads(self) -> bool:
        """Whether every mixer treats each head by itself, so that devices can take some heads each."""
        return False

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """transformers' tensor-parallel plan, None where heads cannot be split: it then refuses to load in words."""
        if not self.splits_heads:
            return None
        columns = ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mlp.up_proj"]
        columns += ["mlp.gate_proj"] if self.mlp_type == "gated" else []
        plan = dict.fromkeys(columns, "colwise") | dict.fromkeys(["mixer.out_proj", "mlp.down_proj"], "rowwise")
        if self.qk_norm:  # of all heads, each device sees some
            plan |= dict.fromkeys(["mixer.q_norm", "mixer.k_norm"], "replicated_with_grad_allreduce")
        return {f"layers.*.{name}": style for name, style in plan.items()}

    @property
    def attends_causally(self) -> bool:
        """Whether the states of a token do not depend on later ones."""
        return self.is_decoder

    @property
    def pads_with_text(self) -> bool:
        """Whether the padding token is also one that begins or ends texts."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return self.pad_token_id is not None and self.pad_token_id in (self.bos_token_id, *ends)

    @property
    def pooling(self) -> str:
        """`classifier_pooling`, or what it is by default."""
        return self.classifier_pooling or ("last" if self.is_decoder else "first")

    @property
    def num_positions(self) -> int:
        """Rows of the learned table that are positions."""
        return self.max_position_embeddings - self.position_offset

    @property
    def longest_row(self) -> int | None:
        """Tokens of the longest row that the model takes; None if any."""
        return self.num_positions if self.position_embedding_type == "learned" else None

    def validate_layer_type(self):
        unknown = sorted(set(self.layer_types) - set(self.mixer_types))
        if unknown:
            raise ValueError(f"`layer_types` has {unknown}, but {self.model_type} takes {list(self.mixer_types)}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.layer_types)} entries for `num_hidden_layers` "
                f"({self.num_hidden_layers}): give one per layer, or leave `layer_types` out."
            )

    def validate_backbone(self):  # validators run in alphabetical order, and others rely on these sizes
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1.")
        if self.type_vocab_size < 0:
            raise ValueError(f"`type_vocab_size` ({self.type_vocab_size}) must be 0 (no token types) or more.")
        if not 0 <= self.position_offset < self.max_position_embeddings:
            raise ValueError(
                f"`position_offset` ({self.position_offset}) must be a row of the learned table of "
                f"`max_position_embeddings` ({self.max_position_embeddings})."
            )
        if self.head_dim is None:  # where the sizes give none
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}): change one, or set `head_dim`."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` ({self.num_key_value_heads}) must divide `num_attention_heads` "
                f"({self.num_attention_heads}): each head of keys serves equally many heads of queries."
            )
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise ValueError(
                f"rope needs an even head size, but `head_dim` ({self.head_dim}), by default `hidden_size` "
                f"({self.hidden_size}) / `num_attention_heads` ({self.num_attention_heads}), is odd: change one, or "
                "set position_embedding_type='learned'."
            )
        if self.position_embedding_type == "rope":
            check_rope_type(self.rope_parameters)

    def validate_hidden_act(self):
        from transformers.activations import ACT2FN

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` ({self.hidden_act!r}) must be one of {sorted(ACT2FN)}.")

    def validate_dropout(self):
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` ({value}) must be in [0, 1).")


__all__ = ["BackboneConfig", "check_rope_type"]
