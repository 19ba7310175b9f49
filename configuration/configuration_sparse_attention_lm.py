"""Configuration of SparseAttentionLM, softmax attention to a few keys of each row."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ordnung.configuration.configuration_backbone import BackboneConfig

PER_LAYER = ("sliding_window", "num_global_tokens", "global_stride", "num_random_blocks")


@strict
class SparseAttentionLMConfig(BackboneConfig):
    """Configuration of SparseAttentionLM. Adds to the fields of `BackboneConfig`, where a list gives one per layer:

    Args:
        sliding_window: tokens w that each token sees around it. Causal: the last w, itself included. Bidirectional: w
            to each side, and itself.
        num_global_tokens: the first tokens g of each row that all see; in a bidirectional model they also see all. A
            causal model needs some: softmax puts on them the weight that it has no use for ("attention sinks").
        global_stride: every token before a multiple of this stride is seen by all (after it, in a causal model); None
            for no such tokens. The generation state then grows, by one token a stride.
        num_random_blocks: blocks R of tokens that a token sees besides. Causal: the R completed blocks of lowest
            priority, which is drawn once for each block, so that a block that has left never returns. Bidirectional:
            each block of queries draws its own, as in BigBird.
        random_block_size: tokens of such a block; at most `sliding_window`.
        random_seed: what the blocks are drawn by; layer i draws by `random_seed` + i.
        global_projections: "shared", or "separate": bidirectional models whose global tokens look at the others through
            projections of their own, as in Longformer.

    `layer_types` takes "sparse_attention" and "full_attention".
    """

    model_type = "sparse_attention_lm"
    mixer_types: ClassVar[tuple[str, ...]] = ("sparse_attention", "full_attention")

    sliding_window: int | list[int] = 256
    num_global_tokens: int | list[int] = 4
    global_stride: int | list[int | None] | None = None
    num_random_blocks: int | list[int] = 0
    random_block_size: int = 64
    random_seed: int = 0
    global_projections: Literal["shared", "separate"] = "shared"

    @property
    def splits_heads(self) -> bool:
        return self.global_projections == "shared"

    def per_layer(self, name: str) -> list:
        """One of the fields that may be lists, as one value per layer."""
        value = getattr(self, name)
        return value if isinstance(value, list) else [value] * self.num_hidden_layers

    @property
    def receptive_field(self) -> int | None:
        """Tokens (itself included) that an output of a causal model can depend on; None if unlimited."""
        beyond = (*self.per_layer("num_global_tokens"), *self.per_layer("num_random_blocks"))
        if any(beyond) or any(self.per_layer("global_stride")) or "full_attention" in self.layer_types:
            return None
        return 1 + sum(window - 1 for window in self.per_layer("sliding_window"))

    def validate_pattern(self):
        for name in PER_LAYER:
            if len(self.per_layer(name)) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` has {len(self.per_layer(name))} entries for `num_hidden_layers` "
                    f"({self.num_hidden_layers}): give one value, or one per layer."
                )
        for window in self.per_layer("sliding_window"):
            if window < 1:
                raise ValueError(f"`sliding_window` ({window}) must be at least 1: a token sees itself.")
        for tokens in self.per_layer("num_global_tokens"):
            if not 0 <= tokens <= self.num_positions:
                raise ValueError(
                    f"`num_global_tokens` ({tokens}) must be from 0 to the {self.num_positions} positions of a row "
                    "(`max_position_embeddings` less `position_offset`): take fewer, or make the model longer."
                )
        for stride in self.per_layer("global_stride"):
            if stride is not None and stride < 2:
                raise ValueError(
                    f"`global_stride` ({stride}) must be at least 2, or None for no such tokens; to see every token "
                    "take layer_types 'full_attention'."
                )

    def validate_random_blocks(self):
        for name in ("random_block_size", "num_random_blocks", "random_seed"):
            values, least = getattr(self, name), int(name == "random_block_size")
            if any(value < least for value in (values if isinstance(values, list) else [values])):
                raise ValueError(f"`{name}` ({values}) must be at least {least}.")
        for window, blocks in zip(self.per_layer("sliding_window"), self.per_layer("num_random_blocks")):
            if blocks and self.random_block_size > window:
                raise ValueError(
                    f"`random_block_size` ({self.random_block_size}) must be at most `sliding_window` ({window}): a "
                    "token that leaves the window before its block is complete would come back later. Take smaller "
                    "blocks or a wider window."
                )

    def validate_global_projections(self):
        if self.is_decoder and self.global_projections == "separate":
            raise ValueError(
                "global_projections='separate' is for bidirectional models, whose global tokens see the whole row: set "
                "it to 'shared', or is_decoder=False."
            )

    @classmethod
    def local(cls, **overrides: Any) -> "SparseAttentionLMConfig":
        """A window and nothing else."""
        return cls(**{"num_global_tokens": 0, **overrides})

    @classmethod
    def longformer(cls, **overrides: Any) -> "SparseAttentionLMConfig":
        """A window, and global tokens (Beltagy et al. 2020, arXiv 2004.05150)."""
        return cls(**{"num_global_tokens": 16, **overrides})

    @classmethod
    def strided(cls, **overrides: Any) -> "SparseAttentionLMConfig":
        """A window, and every 64th token: the "fixed" pattern of Child et al. 2019 (arXiv 1904.10509)."""
        return cls(**{"num_global_tokens": 0, "global_stride": 64, **overrides})

    @classmethod
    def bigbird(cls, **overrides: Any) -> "SparseAttentionLMConfig":
        """A window, global tokens and three random blocks (Zaheer et al. 2020, arXiv 2007.14062)."""
        return cls(**{"num_global_tokens": 16, "num_random_blocks": 3, **overrides})


__all__ = ["SparseAttentionLMConfig"]
