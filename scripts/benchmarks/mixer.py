"""The `mixer` task of `benchmark.py`: parts of a model on their own, called with the inputs they get inside the model.

How much of a ConvLM block is the convolution itself, and, in the configuration of the article that proposed this mixer,
how much faster its mixer and its whole model are than the same ones with unfused and with fused softmax attention. As
there, that attention has no position information.
"""

from collections.abc import Callable
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
        calls = []

        def record(module, args, kwargs):
            calls.append((module, args, kwargs))

        if self.part == "convolution":
            convolve = modeling_conv_lm.causal_conv

            def recording(*args, **kwargs):
                calls.append((convolve, args, kwargs))
                return convolve(*args, **kwargs)

            with mock.patch.object(modeling_conv_lm, "causal_conv", recording):
                base(tokens, use_cache=False)
        else:
            module = layer if self.part == "block" else layer.mixer
            handle = module.register_forward_pre_hook(record, with_kwargs=True)
            base(tokens, use_cache=False)
            handle.remove()
        [(self.function, self.args, self.kwargs)] = calls

    @torch.no_grad()
    def run(self, argument):
        self.function(*self.args, **self.kwargs)


def _source_attention(implementation: str) -> Variant:
    def config(shape) -> SoftmaxLMConfig:
        source = ConvLMConfig.source_preset()
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        same += ("hidden_act", "norm_position", "position_embedding_type", "tie_word_embeddings", "lm_head_bias")
        return SoftmaxLMConfig(**{name: getattr(source, name) for name in same}, bos_token_id=None, eos_token_id=None)

    return Variant(
        f"the source configuration with {implementation} attention",
        SoftmaxLMForCausalLM,
        config,
        attn_implementation=implementation,
    )


SOURCE_VARIANTS = {
    "conv": Variant("the source configuration", ConvLMForCausalLM, lambda shape: ConvLMConfig.source_preset()),
    "sdpa": _source_attention("sdpa"),
    "eager": _source_attention("eager"),
}


@dataclass(frozen=True)
class Part:
    description: str
    make_sample: Callable[[int, Settings], Sample]
    compared_with: tuple[str, ...] = ()


def _parts() -> dict[str, Part]:
    conv_lm = VARIANTS["conv_lm"]
    parts = {
        "block": Part("one ConvLM block", lambda n, s: PartSample(conv_lm, "block", n, s)),
        "convolution": Part(
            "the convolution alone, inside that block",
            lambda n, s: PartSample(conv_lm, "convolution", n, s),
            ("block",),
        ),
    }
    for kind, variant in SOURCE_VARIANTS.items():
        others = tuple(other for other in SOURCE_VARIANTS if other != kind) if kind == "conv" else ()
        parts[f"source_mixer_{kind}"] = Part(
            f"mixer alone: {variant.description}",
            lambda n, s, variant=variant: PartSample(variant, "mixer", n, s),
            tuple(f"source_mixer_{other}" for other in others),
        )
        parts[f"source_model_{kind}"] = Part(
            f"whole model, forward: {variant.description}",
            lambda n, s, variant=variant: ForwardSample(variant, "forward", n, s),
            tuple(f"source_model_{other}" for other in others),
        )
    return parts


PARTS = _parts()
