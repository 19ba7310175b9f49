"""Configuration of CubicPrefixLM, fully connected attention over every prefix."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ordnung.configuration.configuration_backbone import BackboneConfig


@strict
class CubicPrefixLMConfig(BackboneConfig):
    """Configuration of CubicPrefixLM. Adds to the fields of `BackboneConfig`:

    Args:
        prefix_stride: s. The next token after t + 1 tokens is predicted from a pass in which the first
            s * floor((t + 1) / s) of them are fully connected and the others see all before them. 1 is the exact cubic
            model; None, or more than the number of tokens, an ordinary causal transformer. The weights are the same
            for every stride, so it can be changed during training.
        prefix_group_tokens: tokens of prefix passes to compute together, and to keep activations of for the backward
            pass; what exceeds it is recomputed there. It bounds the memory and never changes the result.

    `hidden_dropout` and `attention_dropout` draw one mask in the first layer's part that all prefixes share.
    `layer_types` takes "cubic_prefix" only.
    """

    model_type = "cubic_prefix_lm"
    mixer_types: ClassVar[tuple[str, ...]] = ("cubic_prefix",)
    encoder_generates: ClassVar[bool] = True
    base_model_pp_plan: ClassVar[None] = None  # a pass over each prefix runs the whole stack
    packs_documents: ClassVar[bool] = False  # its passes skip padding, and sharded they are planned by shapes alone

    position_embedding_type: Literal["none", "learned", "rope"] = "learned"
    prefix_stride: int | None = 1
    prefix_group_tokens: int = 16384

    @property
    def attends_causally(self) -> bool:
        """With `prefix_stride` None; otherwise a prediction comes from a bidirectional pass over its prefix."""
        return self.is_decoder and self.prefix_stride is None

    def validate_prefixes(self):
        if self.prefix_stride is not None and self.prefix_stride < 1:
            raise ValueError(
                f"`prefix_stride` ({self.prefix_stride}) must be at least 1, the exact cubic model, or None for an "
                "ordinary causal transformer."
            )
        if self.prefix_group_tokens < 1:
            raise ValueError(
                f"`prefix_group_tokens` ({self.prefix_group_tokens}) must be at least the length of the longest input."
            )
        if self.position_embedding_type == "none":
            raise ValueError(
                "`position_embedding_type` ('none'): fully connected tokens have no order without positions, set "
                "'learned' or 'rope'."
            )


__all__ = ["CubicPrefixLMConfig"]
