"""Implementations of short convolutions against each other: see `bench_conv.py`."""

from functools import partial
from itertools import product

import torch

from ordnung.modeling.ops.causal_conv import causal_conv, faster
from ordnung.scripts.benchmarks.measure import in_turns, thread_timer
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.tables import markdown_table

IMPLEMENTATIONS = ("toeplitz", "conv1d")


def shape_of(rows: str) -> tuple[int, int]:
    """Rows and tokens of "32x48".

    Raises:
        ScriptError: it is no such pair.
    """
    parts = rows.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ScriptError(f"--rows {rows} is not a number of rows and one of tokens: write for example 32x48")
    return int(parts[0]), int(parts[1])


@torch.no_grad()
def forward(v, kernel, implementation: str) -> None:
    causal_conv(v, kernel, implementation=implementation)


def training(v, kernel, implementation: str) -> None:
    torch.autograd.grad(causal_conv(v, kernel, implementation=implementation).sum(), (v, kernel))


def measure(options, sharing: str, taps: int, rows: str, task: str) -> dict:
    """One line of the table; times are CPU seconds of a call."""
    torch.manual_seed(options.seed)
    B, N = shape_of(rows)
    kernels = options.num_attention_heads if sharing == "head" else options.hidden_size
    v = torch.randn(B, N, options.hidden_size, requires_grad=True)
    kernel = torch.randn(kernels, min(taps, N), requires_grad=True)  # the mixer leaves out taps that reach no token
    step = {"forward": forward, "forward and backward": training}[task]
    runs = {name: partial(step, v, kernel, name) for name in IMPLEMENTATIONS}
    seconds = in_turns(runs, options.rounds, thread_timer(1))
    fastest = {name: min(values) for name, values in seconds.items()}  # what else ran slows the others
    with torch.set_grad_enabled(task != "forward"):
        chosen = faster(v, kernel)
    return {
        "kernel_sharing": sharing,
        "kernel_size": taps,
        "rows": B,
        "tokens": N,
        "task": task,
        "seconds": seconds,
        "fastest": fastest,
        "auto": chosen,
        "auto_over_best": fastest[chosen] / min(fastest.values()),
    }


def table(cases: list[dict]) -> str:
    """The results as Markdown."""
    head = ["kernels a", "K", "rows x tokens", "task", *(f"{name}, ms" for name in IMPLEMENTATIONS), "auto"]
    lines = []
    for case in cases:
        times = [f"{1e3 * case['fastest'][name]:.2f}" for name in IMPLEMENTATIONS]
        shape = f"{case['rows']} x {case['tokens']}"
        lines.append([case["kernel_sharing"], str(case["kernel_size"]), shape, case["task"], *times, case["auto"]])
    return markdown_table(head, lines)


def run(options) -> int:
    """Time them by bench_conv.py's options and write the results; returns the exit status."""
    torch.set_num_threads(1)
    if options.hidden_size % options.num_attention_heads:
        raise ScriptError(
            f"--hidden_size {options.hidden_size} must be a multiple of --num_attention_heads "
            f"{options.num_attention_heads}"
        )
    for rows in options.rows:
        shape_of(rows)
    sizes = {"hidden_size": options.hidden_size, "num_attention_heads": options.num_attention_heads}
    results = {**sizes, "seed": options.seed, "cases": [], "machine": machine_info("cpu")}
    tasks = ("forward", "forward and backward")
    measure(options, "head", max(options.kernel_size), options.rows[-1], tasks[-1])  # memory from the system, once
    for case in product(("head", "channel"), options.kernel_size, options.rows, tasks):
        results["cases"].append(measure(options, *case))
        if options.output_file:
            write_json(options.output_file, results)
    print(table(results["cases"]))
    return 0
