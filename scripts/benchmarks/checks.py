"""Checks that `benchmark.py` makes before it times anything: a wrong output has no speed.

Small inputs, on the device and in the dtype of the run.
"""

from dataclasses import replace

import torch

from ordnung.modeling.ops.causal_conv import IMPLEMENTATIONS, causal_conv, causal_conv_naive
from ordnung.modeling.ops.causal_linformer import CausalLinformer, causal_linformer_naive
from ordnung.modeling.ops.linformer import project_naive, project_rows
from ordnung.scripts.benchmarks.cases import Settings, build_model, new_cache
from ordnung.scripts.benchmarks.variants import VARIANTS, Shape, split_form, with_static_forms

# Largest deviation allowed, relative to the largest value expected.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected magnitude; infinite where `actual` is not finite."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(torch.nan_to_num(difference / expected.double().abs().max(), nan=torch.inf))


def random_inputs(settings: Settings, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Normal numbers, the same whatever the device."""
    generator = torch.Generator().manual_seed(settings.seed)
    return [torch.randn(shape, generator=generator).to(settings.device, settings.torch_dtype) for shape in shapes]


def convolution_deviation(implementation: str, settings: Settings) -> float:
    """Of an implementation of the convolution, output and gradients, against the formula computed in float64."""
    heads, taps = settings.shape.num_attention_heads, settings.shape.kernel_size
    length = 2 * taps + 3
    generator = torch.Generator().manual_seed(settings.seed)
    v = torch.randn(2, length, 4 * heads, generator=generator)
    kernel = torch.randn(heads, taps, generator=generator).softmax(-1)
    target = torch.randn(v.shape, generator=generator)
    results = []
    for function, dtype in (
        (lambda v, k: causal_conv(v, k, implementation=implementation), settings.torch_dtype),
        (causal_conv_naive, torch.float64),
    ):
        # rounded to the dtype of the run for both, so that only the computation differs
        inputs = [x.to(settings.torch_dtype).to(settings.device, dtype).requires_grad_() for x in (v, kernel)]
        output = function(*inputs)
        gradients = torch.autograd.grad((output * target.to(output)).sum(), inputs)
        results.append([output.detach(), *gradients])
    return max(deviation(actual, expected) for actual, expected in zip(*results))


@torch.no_grad()
def projection_deviation(settings: Settings) -> float:
    """Of the bidirectional projection against its definition in float64."""
    x, weight = random_inputs(settings, (2, 50, 1, 16), (1, 64, 8))
    expected = torch.stack([project_naive(row[:, 0].double(), "linear", weight[0].double(), 8, 64)[0] for row in x])
    return deviation(project_rows(x, "linear", weight, 8, 64)[:, :, 0], expected)


@torch.no_grad()
def causal_linformer_deviation(settings: Settings) -> float:
    """Of the causal operator against its formula, query by query, in float64."""
    *inputs, weight = random_inputs(settings, *3 * [(2, 90, 2, 16)], (1, 1, 96, 8))
    actual = CausalLinformer("linear", weight, 8, 96, 16, 1).forward(*inputs)[0]
    table = weight[0].double().softmax(-1).expand(2, 2, -1, -1)
    rows = zip(*(tensor.double() for tensor in inputs))
    return deviation(actual, torch.stack([causal_linformer_naive(*row, table, 16, 1) for row in rows]))


@torch.no_grad()
def cache_deviation(name: str, settings: Settings) -> float:
    """Of a variant's logits after prefill and decoding, against the same positions without a cache."""
    heads = settings.shape.num_attention_heads
    variant, static = split_form(name)
    shape = Shape(16 * heads, 2, heads, vocab_size=128, kernel_size=settings.shape.kernel_size)
    length, steps = 2 * shape.kernel_size + 3, 3
    model = build_model(variant, length + steps, replace(settings, shape=shape))
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.randint(shape.vocab_size, (2, length + steps), generator=generator).to(settings.device)
    expected = variant.run(model, tokens).logits[:, length - 1 :]
    cache = new_cache(model.config, length + steps, static)
    logits = [variant.run(model, tokens[:, :length], cache, logits_to_keep=1).logits]
    for position in range(length, length + steps):
        logits.append(variant.run(model, tokens[:, position : position + 1], cache, position).logits)
    return deviation(torch.cat(logits, dim=1), expected)


def run_checks(variants: list[str], settings: Settings) -> dict[str, dict]:
    """Check the operators of our families and the cache of every causal variant.

    Returns:
        By name of the check: `passed`, `deviation` and `tolerance`, and `variants`, those that a failure excludes.
    """
    tolerance = TOLERANCE[settings.dtype]
    checks = {}

    def record(name, value, concerned):
        passed = value <= tolerance
        checks[name] = {"passed": passed, "deviation": value, "tolerance": tolerance, "variants": concerned}

    for implementation in ("auto", *IMPLEMENTATIONS):
        # the others are not what the benchmark times: a failure there is reported and excludes nothing
        concerned = ["conv_lm"] if implementation == "auto" else []
        record(f"convolution {implementation}", convolution_deviation(implementation, settings), concerned)
    record("linformer causal", causal_linformer_deviation(settings), ["linformer_lm"])
    encoders = [name for name in VARIANTS if name.startswith("linformer_encoder")]
    record("linformer projection", projection_deviation(settings), encoders)
    for name in with_static_forms(variants):
        if not split_form(name)[0].encoder:
            record(f"cache {name}", cache_deviation(name, settings), [name])
    return checks
