"""The `mixer` task of `benchmark.py`: parts of a model on their own, called with the inputs they get inside the model.

How much of a ConvLM block is the convolution itself, and, in the configuration of the article that proposed this mixer,
how much faster its mixer and its whole model are than the same ones with unfused and with fused softmax attention. As
there, that attention has no position information.
"""

from dataclasses import dataclass
from unittest import mock

import torch

from ordnung import ConvLMConfig, ConvLMForCausalLM, SoftmaxLMConfig, SoftmaxLMForCausalLM
from ordnung.modeling import modeling_conv_lm
from ordnung.modeling.mixers.mixer import linear_flops
from ordnung.scripts.benchmarks.cases import ForwardSample, Sample, Settings, build_model, random_tokens
from ordnung.scripts.benchmarks.variants import VARIANTS, Variant, unfused_extra


class PartSample(Sample):
    """A block, a mixer or the bare convolution of `variant`'s first layer."""

    measures_memory = False  # the inputs are held, and making them takes more than the part

    def __init__(self, variant: Variant, part: str, length: int, settings: Settings):
        self.part, self.length, self.settings = part, length, settings
        self.model = build_model(variant, length, settings)
        self.tokens = length
        layer = self.model.model.layers[0]
        if part == "convolution":
            flops = layer.mixer.flops(length) - length * linear_flops(layer.mixer)
        else:
            flops = (layer if part == "block" else layer.mixer).flops(length)
            if variant.attn_implementation == "eager":
                flops += unfused_extra(self.model.config.hidden_size, length)
        self.flops = settings.batch_size * flops

    @torch.no_grad()
    def setup(self):
        base = self.model.model
        # the first layer only: all are alike
        del base.layers[1:]
        tokens = random_tokens(self.settings, base.config.vocab_size, self.length)
        layer = base.layers[0]
        module = layer if self.part == "block" else layer.mixer
        owner, name = (modeling_conv_lm, "causal_conv") if self.part == "convolution" else (module, "forward")
        self.function = getattr(owner, name) if self.part == "convolution" else module
        with mock.patch.object(owner, name, wraps=getattr(owner, name)) as called:
            base(tokens, use_cache=False)
        called.assert_called_once()
        self.args, self.kwargs = called.call_args

    @torch.no_grad()
    def run(self, argument):
        self.function(*self.args, **self.kwargs)


def _source_attention(implementation: str) -> Variant:
    def config(shape) -> SoftmaxLMConfig:
        source = ConvLMConfig.source_preset()
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        same += ("hidden_act", "norm_position", "position_embedding_type", "tie_word_embeddings", "lm_head_bias")
        return SoftmaxLMConfig(**{name: getattr(source, name) for name in same}, bos_token_id=None, eos_token_id=None)

    description = f"the source configuration with {implementation} attention"
    return Variant(description, SoftmaxLMForCausalLM, config, attn_implementation=implementation)


SOURCE_VARIANTS = {
    "conv": Variant("the source configuration", ConvLMForCausalLM, lambda shape: ConvLMConfig.source_preset()),
    "sdpa": _source_attention("sdpa"),
    "eager": _source_attention("eager"),
}


@dataclass(frozen=True)
class Part:
    """A part of a variant's model: "block", "mixer", "convolution", or all of the "model"."""

    description: str
    variant: Variant
    kind: str
    compared_with: tuple[str, ...] = ()

    def make_sample(self, length: int, settings: Settings) -> Sample:
        if self.kind == "model":
            return ForwardSample(self.variant, "forward", length, settings)
        return PartSample(self.variant, self.kind, length, settings)


PARTS = {
    "block": Part("one ConvLM block", VARIANTS["conv_lm"], "block"),
    "convolution": Part("the convolution alone, inside that block", VARIANTS["conv_lm"], "convolution", ("block",)),
}
for kind, variant in SOURCE_VARIANTS.items():
    for part, what in (("mixer", "mixer alone"), ("model", "whole model, forward")):
        others = (f"source_{part}_sdpa", f"source_{part}_eager") if kind == "conv" else ()
        PARTS[f"source_{part}_{kind}"] = Part(f"{what}: {variant.description}", variant, part, others)
