"""Configuration of SoftmaxLM, the softmax attention control."""

from huggingface_hub.dataclasses import strict

from ordnung.configuration.configuration_backbone import BackboneConfig


@strict
class SoftmaxLMConfig(BackboneConfig):
    """Configuration of SoftmaxLM: the backbone with softmax attention in every layer, and no field of its own.

    `is_decoder=True` makes it causal (`SoftmaxLMForCausalLM`), `is_decoder=False` bidirectional
    (`SoftmaxLMForMaskedLM`). The fields are those of `BackboneConfig`.
    """

    model_type = "softmax_lm"

    @property
    def splits_heads(self) -> bool:
        return True


__all__ = ["SoftmaxLMConfig"]
