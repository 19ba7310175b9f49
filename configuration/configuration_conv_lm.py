"""Configuration of ConvLM, the learned convolution family."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ordnung.configuration.configuration_backbone import BackboneConfig


@strict
class ConvLMConfig(BackboneConfig):
    """Configuration of ConvLM. Adds to the fields of `BackboneConfig`:

    Args:
        kernel_size: number of taps K of each kernel; a list gives one per layer. None means 64, and 63 in a
            bidirectional model, whose taps are centred: as many after a token as before it, an odd number together.
        kernel_sharing: "head" (the channels of a head share one kernel, H kernels) or "channel" (D kernels).
        kernel_normalization: "softmax" (weights are positive and sum to one) or "none" (used as they are).
        kernel_init: "decay" (head h starts as exp(-lag / tau_h), tau log-spaced from 1.5 to K / 1.5, or to
            (K + 1) / 3 where taps are centred) or "uniform".
        gate: "none", or "input_output": C * conv(B * v), B and C projected from the layer's input, with a bias
            whatever `attention_bias` is.
        dilation: distance in tokens between taps; a list gives one per layer.
        conv_implementation: "auto", or one of "toeplitz", "conv1d", "fft": the same function, computed differently.
            "fft" rounds differently for every length, so it is used without a generation state only.

    `is_decoder` chooses between the two mixers: `layer_types` takes "causal_conv" (causal) or "centred_conv"
    (bidirectional), either of them as "conv" too, and "full_attention".
    """

    model_type = "conv_lm"

    position_embedding_type: Literal["none", "learned", "rope"] = "none"
    kernel_size: int | list[int] | None = None
    kernel_sharing: Literal["head", "channel"] = "head"
    kernel_normalization: Literal["softmax", "none"] = "softmax"
    kernel_init: Literal["decay", "uniform"] = "decay"
    gate: Literal["none", "input_output"] = "none"
    dilation: int | list[int] = 1
    conv_implementation: Literal["auto", "toeplitz", "conv1d", "fft"] = "auto"

    def __post_init__(self, **kwargs):
        if self.kernel_size is None:
            self.kernel_size = 64 if self.is_decoder else 63
        if self.layer_types is not None:
            # transformers' own name "conv" stands for a cache layer that cannot count tokens: ours has its own name
            self.layer_types = [self.mixer_types[0] if kind == "conv" else kind for kind in self.layer_types]
        super().__post_init__(**kwargs)

    @property
    def mixer_types(self) -> tuple[str, ...]:
        return ("causal_conv" if self.is_decoder else "centred_conv", "full_attention")

    def per_layer(self, name: str) -> list[int]:
        """`kernel_size` or `dilation` as one value per layer."""
        value = getattr(self, name)
        return value if isinstance(value, list) else [value] * self.num_hidden_layers

    @property
    def receptive_field(self) -> int | None:
        """Tokens (itself included) that an output can depend on: 1 + sum of (K - 1) * dilation; None if unlimited."""
        if "full_attention" in self.layer_types:
            return None
        return 1 + sum((k - 1) * d for k, d in zip(self.per_layer("kernel_size"), self.per_layer("dilation")))

    def validate_convolution(self):
        for name in ("kernel_size", "dilation"):
            values = self.per_layer(name)
            if len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` has {len(values)} entries for `num_hidden_layers` ({self.num_hidden_layers}): give one "
                    "number, or one per layer."
                )
            if any(value < 1 for value in values):
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1.")
        if self.kernel_sharing == "head" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), whose kernels it is shared out to: change one, or set "
                "kernel_sharing='channel'."
            )
        if not self.is_decoder:
            for kind, taps in zip(self.layer_types, self.per_layer("kernel_size")):
                if kind == "centred_conv" and taps % 2 == 0:
                    raise ValueError(
                        f"`kernel_size` ({self.kernel_size}) must be odd in a bidirectional model, whose taps are as "
                        f"many after a token as before it: set {taps - 1} or {taps + 1}, or is_decoder=True."
                    )

    @classmethod
    def source_preset(cls, **overrides) -> "ConvLMConfig":
        """The configuration of the article that proposed this mixer (MikeyBeez, DifferentialLR, zenodo 18498944).

        Width 256, 6 layers, 8 heads, K = 64 softmax-normalised taps a head starting uniform, GELU MLP of 4x, pre-norm,
        no position embedding, an untied head with bias, GPT-2's vocabulary.
        """
        source = {
            "vocab_size": 50257,
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "kernel_size": 64,
            "kernel_init": "uniform",
            "position_embedding_type": "none",
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "lm_head_bias": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        }
        return cls(**{**source, **overrides})


__all__ = ["ConvLMConfig"]
