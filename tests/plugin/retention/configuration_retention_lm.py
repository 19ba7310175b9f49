"""Configuration of RetentionLM."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ordnung.configuration.configuration_backbone import BackboneConfig


@strict
class RetentionLMConfig(BackboneConfig):
    """Configuration of RetentionLM. Adds to the fields of `BackboneConfig`:

    Args:
        chunk_size: tokens that are mixed at a time, by the weights of all their pairs; what is computed is the same.
    """

    model_type = "retention_lm"
    mixer_types: ClassVar[tuple[str, ...]] = ("retention", "full_attention")

    chunk_size: int = 64

    def validate_retention(self):
        if self.chunk_size < 1:
            raise ValueError(f"`chunk_size` ({self.chunk_size}) must be at least 1.")
        if not self.is_decoder:
            raise ValueError("RetentionLM is causal: `is_decoder` must be True. SoftmaxLM has a bidirectional form.")
