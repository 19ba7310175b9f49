"""How the FLOPs of every family grow with the length: counted by the models, and exponents fitted to them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from scipy.stats import linregress
from transformers import AutoModelForCausalLM

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.benchmarks.variants import VARIANTS, Shape
from ordnung.scripts.common.figures import draw_slopes, legend_below, nested, new_figure, styles
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.tables import markdown_table, paragraphs

TASKS = {"train": "training step", "prefill": "prompt", "decode": "one more token", "state": "generation state, bytes"}


def count(name: str, shape: Shape, lengths: list[int]) -> dict[str, list[int]]:
    """FLOPs, and bytes of the state, of one sequence of each length (tokens); the weights take no memory."""
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(variant.config(shape))

    def of(task: str, length: int) -> int:
        return model.cache_bytes(length) if task == "state" else variant.count_flops(model, task, length)

    return {task: [of(task, length) for length in lengths] for task in TASKS}


def exponents(lengths: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """The slope of log value on log length: least squares over all lengths, and of the last two alone.

    `low` and `high` are the 95 % t-interval of the former; counts do not scatter, so theirs tells how far from a power
    of the length they are.
    """
    x, y = np.log(lengths), np.log(values)
    found = {"last": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}
    if len(x) < 3:
        return {"all": found["last"], "low": -math.inf, "high": math.inf, **found}
    line = linregress(x, y)
    half = float(np.nan_to_num(line.stderr) * stdtrit(len(x) - 2, 0.975))  # a constant has none
    return {"all": float(line.slope), "low": float(line.slope) - half, "high": float(line.slope) + half, **found}


def crossover(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length from which on ratios are 1 or more, between two lengths along the logarithms.

    None where they are so at no length's end; the shortest length where they are so everywhere.
    """
    below = [i for i, ratio in enumerate(ratios) if ratio < 1]
    if not below:
        return lengths[0]
    last = below[-1]
    if last + 1 == len(lengths):
        return None
    (n, low), (m, high) = (lengths[last], ratios[last]), (lengths[last + 1], ratios[last + 1])
    return n * (m / n) ** (-math.log(low) / (math.log(high) - math.log(low)))


def cheaper_from(results: dict[str, Any], name: str, task: str, control: str = "softmax_lm") -> str:
    """From how many tokens on a family takes less than the control, in words."""
    lengths = results["lengths"]
    own, reference = (results["families"][which][task]["values"] for which in (name, control))
    found = crossover(lengths, [b / a if a else math.inf for a, b in zip(own, reference)])
    if found is None:
        return "not up to the longest"
    return f"{found:,.0f}" if found > lengths[0] else f"all from {found:,}"


def markdown(results: dict[str, Any]) -> str:
    """The exponents, by family and task."""
    lengths, shape = results["lengths"], results["settings"]["shape"]
    fitted = [[of[task]["exponent"] for task in TASKS] for of in results["families"].values()]
    body = [
        [name, *(f"{e['last']:.2f} ({e['all']:.2f}, {e['low']:.2f} to {e['high']:.2f})" for e in row)]
        for name, row in zip(results["families"], fitted)
    ]
    crossings = [
        [name, *(cheaper_from(results, name, task) for task in TASKS)]
        for name in results["families"]
        if name != "softmax_lm"
    ]
    header = ["family", *TASKS.values()]
    return paragraphs(
        f"Exponent of N from {lengths[-2]:,} to {lengths[-1]:,} tokens (and fitted from {lengths[0]:,} on, with "
        "the 95 % interval of the fit: how far from a power of N it is). Counted by the models: width "
        f"{shape['hidden_size']}, {shape['num_hidden_layers']} layers, one sequence.",
        markdown_table(header, body),
        "Cheaper than softmax attention from so many tokens on:",
        markdown_table(header, crossings),
    )


def plot(results: dict[str, Any], image: Path):
    """Log-log: each task against N, with slopes 1, 2 and 3 to compare."""
    lengths, families = results["lengths"], results["families"]
    figure, panels = new_figure(1, len(TASKS), figsize=(5 * len(TASKS), 5))
    drawn = nested(styles({name: name for name in families}))
    for panel, (task, title) in zip(panels, TASKS.items()):
        for name, of in families.items():
            panel.plot(lengths, of[task]["values"], label=name, **drawn[name])
        lowest = min(of[task]["values"][0] for of in families.values())
        highest = max(of[task]["values"][-1] for of in families.values())
        draw_slopes(panel, (lengths[0], lengths[-1]), lowest / 2, 2 * highest)
        panel.set(xscale="log", yscale="log", xlabel="tokens N", ylim=(lowest / 3, 3 * highest), title=title)
        panel.set_ylabel("bytes" if task == "state" else "FLOPs")
        panel.set_xticks(lengths[::2], [f"{n:,}" for n in lengths[::2]])
        panel.xaxis.minorticks_off()
    legend_below(figure, panels, columns=len(families))
    figure.savefig(image, dpi=120)


def run(options) -> int:
    """Count as growth.py's options say, print and write the results; returns the exit status."""
    lengths = [options.shortest * 2**i for i in range(1 + int(math.log2(options.longest / options.shortest)))]
    shape = Shape(max_length=2 * lengths[-1])
    families = {}
    for name in FAMILIES:
        counted = count(name, shape, lengths)
        families[name] = {
            task: {"values": values, "exponent": exponents(lengths, values)} for task, values in counted.items()
        }
    results = {"machine": machine_info(), "settings": {"shape": vars(shape)}, "lengths": lengths, "families": families}
    write_json(options.output_file, results)
    print(markdown(results))
    return 0
