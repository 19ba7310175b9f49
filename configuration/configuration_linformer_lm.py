"""Configuration of LinformerLM, attention to a fixed number of projected rows."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ordnung.configuration.configuration_backbone import BackboneConfig


@strict
class LinformerLMConfig(BackboneConfig):
    """Configuration of LinformerLM. Adds to the fields of `BackboneConfig`:

    Args:
        projected_size: number of rows k that keys and values are projected to; a list gives one per layer. A causal
            layer with 0 sees the tokens of its blocks only.
        projection_type: how tokens become rows: "linear" (learned matrix E), "mean_pool", "max_pool" or "conv" (mean,
            maximum or learned weighted sum of segments of n / k tokens), or "adaptive_mean_pool" (mean of segments
            that are fitted to each row's own length: exact attention up to k tokens). Causal models take "linear",
            "mean_pool" and "conv".
        projection_sharing: who shares E: "none" (each head, for keys and for values, has its own), "headwise" (one for
            keys and one for values a layer), "key_value" (one a layer) or "layerwise" (one for the whole model).
        local_block_size: causal models: tokens C of a block.
        local_blocks_back: causal models: earlier blocks that a token attends to exactly, beside its own.
        num_global_tokens: causal models: first tokens of a row ("sinks", Xiao et al. 2023, arXiv 2309.17453) that
            every later one attends to exactly, and that are in no projected row. Models trained with full attention
            give them much of their weight: with 4 of them a converted one loses far less.

    `max_position_embeddings`, less `position_offset`, is n, the number of positions that E has weights for.
    Bidirectional models refuse longer rows (except "adaptive_mean_pool" without learned positions); causal ones use
    the weights periodically.

    `is_decoder` is False by default, as in the paper, and chooses between the two mixers: `layer_types` takes
    "linformer_attention" (bidirectional) or "causal_linformer_attention" (causal), and "full_attention".
    """

    model_type = "linformer_lm"

    is_decoder: bool = False
    position_embedding_type: Literal["none", "learned", "rope"] = "learned"
    projected_size: int | list[int] = 128
    projection_type: Literal["linear", "mean_pool", "max_pool", "conv", "adaptive_mean_pool"] = "linear"
    projection_sharing: Literal["none", "headwise", "key_value", "layerwise"] = "layerwise"
    local_block_size: int = 64
    local_blocks_back: int = 1
    num_global_tokens: int = 0

    @property
    def mixer_types(self) -> tuple[str, ...]:
        return ("causal_linformer_attention" if self.is_decoder else "linformer_attention", "full_attention")

    @property
    def projected_sizes(self) -> list[int]:
        """`projected_size` of each layer."""
        k = self.projected_size
        return k if isinstance(k, list) else [k] * self.num_hidden_layers

    @property
    def receptive_field(self) -> int | None:
        """Tokens (itself included) that the last one of a block can depend on; None if any, of slots or sinks."""
        if any(self.projected_sizes) or self.num_global_tokens or "full_attention" in self.layer_types:
            return None
        return (self.num_hidden_layers * self.local_blocks_back + 1) * self.local_block_size

    @property
    def longest_row(self) -> int | None:
        fixed = "linformer_attention" in self.layer_types and self.projection_type != "adaptive_mean_pool"
        return self.num_positions if fixed else super().longest_row

    @property
    def splits_heads(self) -> bool:
        """All heads share a projection that has nothing to learn: gradients of others would be those of some heads."""
        return not any(map(self.learns_projection, range(self.num_hidden_layers)))

    def learns_projection(self, layer_idx: int) -> bool:
        """Whether the projection of a layer has weights to learn."""
        return self.projection_type in ("linear", "conv") and self.projected_sizes[layer_idx] > 0

    def validate_projection(self):
        k, n = self.projected_size, self.num_positions
        if isinstance(k, list) and self.projection_sharing == "layerwise":
            raise ValueError(
                f"`projected_size` ({k}) differs by layer, but projection_sharing='layerwise' has one projection for "
                "all: give one number, or set projection_sharing='key_value'."
            )
        if len(self.projected_sizes) != self.num_hidden_layers:
            raise ValueError(
                f"`projected_size` has {len(self.projected_sizes)} entries for `num_hidden_layers` "
                f"({self.num_hidden_layers}): give one number, or one per layer."
            )
        for size in self.projected_sizes:
            least = 0 if self.is_decoder else 1
            if not least <= size <= n:
                raise ValueError(
                    f"`projected_size` ({size}) must be from {least} to `max_position_embeddings` ({n}): there are no "
                    "more tokens to project. Make it smaller, or the model longer."
                )
            if size and self.projection_type in ("mean_pool", "max_pool", "conv") and n % size:
                raise ValueError(
                    f"projection_type={self.projection_type!r} cuts `max_position_embeddings` ({n}) into "
                    f"`projected_size` ({size}) segments of equal length: choose a multiple."
                )

    def validate_blocks(self):
        if self.local_block_size < 1 or self.local_blocks_back < 0:
            raise ValueError(
                f"`local_block_size` ({self.local_block_size}) must be at least 1 and `local_blocks_back` "
                f"({self.local_blocks_back}) at least 0."
            )
        if self.num_global_tokens < 0:
            raise ValueError(f"`num_global_tokens` ({self.num_global_tokens}) must be 0 (none) or more.")
        if not self.is_decoder:
            if self.num_global_tokens:
                raise ValueError(
                    f"`num_global_tokens` ({self.num_global_tokens}) is of causal models, whose blocks leave first "
                    "tokens behind; a bidirectional model projects all: set it to 0, or is_decoder=True."
                )
            return
        if self.num_positions % self.local_block_size:
            raise ValueError(
                f"`max_position_embeddings` ({self.num_positions}) must be a multiple of `local_block_size` "
                f"({self.local_block_size}) in a causal model."
            )
        if self.projection_type in ("max_pool", "adaptive_mean_pool"):
            raise ValueError(
                f"projection_type={self.projection_type!r} cannot be causal, whose state is a running sum over a row "
                "of unknown length: set 'linear', 'mean_pool' or 'conv', or is_decoder=False."
            )


__all__ = ["LinformerLMConfig"]
