"""What attention with a squared kernel costs, beside fused softmax attention."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from ordnung.modeling.ops.quadratic_kernel import CHUNK_SIZE, Kernel, quadratic_kernel
from ordnung.modeling.ops.symmetric_square import num_features
from ordnung.scripts.benchmarks import growth
from ordnung.scripts.benchmarks.measure import in_turns, summarise, thread_timer
from ordnung.scripts.benchmarks.variants import state_bytes
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import MARKERS, legend_below, new_figure, reaching, shades
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import check_device, described, machine_info
from ordnung.scripts.common.tables import markdown_table

KERNEL = Kernel(0.5, 1.0)
TASKS = {"forward": "Forward", "gradients": "Forward and gradients"}
CACHES = ("state", "dynamic", "static")
PIECE = 1024  # tokens that fill a state at a time
# what was aimed at: (head size, tokens) -> how many times faster than fused softmax attention at least, forward
AIMS = {(16, 4096): 2.4, (32, 4096): 1.05, (64, 4096): 0.5, (16, 16384): 9.0, (32, 16384): 4.0, (64, 16384): 1.6}


def make_inputs(options, d: int, length: int) -> list[torch.Tensor]:
    """Queries, keys and values (1, N, H, d), the first two of norm sqrt(d) as after a norm of them."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    query, key, value = (torch.randn(1, length, options.heads, d, generator=generator) for _ in range(3))
    return [torch.nn.functional.rms_norm(query, (d,)), torch.nn.functional.rms_norm(key, (d,)), value]


def squared(query, key, value, gate=None, **more):
    return quadratic_kernel(query, key, value, KERNEL, gate, **more)[0]


def softmax(query, key, value):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def check(options, d: int) -> None:
    """
    Raises:
        ScriptError: a form, with features or with pairs alone, differs from the weights of all pairs.
    """
    chunk_size = options.chunk_size or CHUNK_SIZE
    query, key, value = (x.double() for x in make_inputs(options, d, 2 * chunk_size + 3))
    scores = 0.5 * torch.einsum("rihc,rjhc->rhij", query, key) / math.sqrt(d) + 1
    weights = (scores.square() + 1e-4).tril()
    expected = torch.einsum("rhij,rjhc->rihc", weights / weights.sum(-1, keepdim=True), value)
    for size in (chunk_size, 5 * chunk_size):
        error = (squared(query, key, value, chunk_size=size) - expected).abs().max()
        if not error < 1e-10:
            raise ScriptError(f"the squared kernel differs from its formula by {error:.1e} at head size {d}")


def measure_length(options, d: int, length: int) -> dict:
    """Seconds of both operators by task; each with the inputs of the other."""
    inputs = [x.requires_grad_() for x in make_inputs(options, d, length)]
    gate = logsigmoid(torch.randn(1, length, options.heads) + 4) if options.decay_gate else None
    competitors = {
        "squared": partial(squared, *inputs, gate, chunk_size=options.chunk_size),
        "softmax": partial(softmax, *inputs),
    }
    seed = torch.randn(1, length, options.heads, d)

    @torch.no_grad()
    def forward(compute):
        compute()

    def gradients(compute):
        torch.autograd.grad(compute(), inputs, seed)

    row = {"head_size": d, "length": length}
    for task, run in (("forward", forward), ("gradients", gradients)):
        runs = {name: partial(run, compute) for name, compute in competitors.items()}
        seconds = in_turns(runs, options.repeats, thread_timer(options.threads, options.device))
        row[task] = {name: summarise(values) for name, values in seconds.items()}
    return row


@torch.no_grad()
def measure_decoding(options, d: int, length: int) -> dict:
    """Seconds of one token after a context, median over samples of `decode_steps`."""
    heads, steps = options.heads, options.decode_steps
    query, key, value = make_inputs(options, d, steps)
    state = torch.rand(1, heads, d + 1, num_features(d + 1))
    full = [torch.randn(1, heads, length + steps, d) for _ in range(2)]

    def with_state():
        now = state
        for t in range(steps):
            token = (x[:, t : t + 1] for x in (query, key, value))
            now = quadratic_kernel(*token, KERNEL, None, now, return_state=True)[1]

    def with_cache(grows):
        held = [x[:, :, :length] for x in full] if grows else full
        for t in range(steps):
            one = [x[:, t : t + 1].transpose(1, 2) for x in (query, key, value)]
            if grows:
                held = [torch.cat([x, new], dim=2) for x, new in zip(held, one[1:])]
            else:
                for x, new in zip(held, one[1:]):
                    x[:, :, length + t : length + t + 1] = new
            scaled_dot_product_attention(one[0], *(x[:, :, : length + t + 1] for x in held))

    runs = {"state": with_state, "dynamic": partial(with_cache, True), "static": partial(with_cache, False)}
    return {"head_size": d, "length": length, **steps_in_turns(options, runs)}


def steps_in_turns(options, runs: dict[str, Callable]) -> dict[str, dict]:
    """Seconds of one of the `decode_steps` that each of `runs` takes."""
    seconds = in_turns(runs, options.repeats, thread_timer(options.threads, options.device))
    return {name: summarise([x / options.decode_steps for x in values]) for name, values in seconds.items()}


@torch.no_grad()
def measure_model(options, length: int) -> dict:
    """Seconds of a step of whole models after a context, as generation takes it, and bytes of what they go on from.

    The caches of softmax attention hold random keys and values; the state is filled by the model, in pieces.
    """
    torch.manual_seed(options.seed)
    steps, heads, width = options.decode_steps, options.heads, 64 * options.heads
    fields = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": heads}
    fields |= {"max_position_embeddings": length + steps, "position_embedding_type": "rope"}
    squared, soft = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields)).eval()
        for name in ("quadratic_kernel_lm", "softmax_lm")
    )
    ids = torch.randint(256, (1, length + steps))
    past = {name: DynamicCache(config=(squared if name == "state" else soft).config) for name in ("state", "dynamic")}
    past["static"] = StaticCache(soft.config, max_cache_len=length + steps)
    for start in range(0, length, PIECE):
        squared(ids[:, start : min(start + PIECE, length)], past_key_values=past["state"], logits_to_keep=1)
    for i in range(2):
        random = [torch.randn(1, heads, length, 64) for _ in range(2)]
        for name in ("dynamic", "static"):
            past[name].update(*random, i)
    held = {name: state_bytes(cache) for name, cache in past.items()}
    outputs = {}

    def decode(name):
        model, cache = squared if name == "state" else soft, past[name]
        for i in range(length, length + steps):
            position = torch.tensor([[i]])
            outputs[name] = model(ids[:, i : i + 1], past_key_values=cache, position_ids=position).logits
        if name == "dynamic":
            cache.crop(-steps)
        elif name == "static":
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)

    times = steps_in_turns(options, {name: partial(decode, name) for name in CACHES})
    if not torch.allclose(outputs["dynamic"], outputs["static"], atol=1e-4):
        raise ScriptError("softmax attention gives other logits with a static cache than with one that grows")
    return {"length": length, **times, "bytes": held}


def faster(row: dict, task: str) -> float:
    """How many times faster the squared kernel is than fused softmax attention."""
    return row[task]["softmax"]["median"] / row[task]["squared"]["median"]


def crossover(rows: list[dict], d: int, task: str) -> float | None:
    """Tokens from which on the squared kernel is the faster one, as `growth.crossover` tells."""
    rows = sorted((row for row in rows if row["head_size"] == d), key=lambda row: row["length"])
    return growth.crossover([row["length"] for row in rows], [faster(row, task) for row in rows])


def state_tokens(d: int) -> float:
    """Tokens whose keys and values, in the same dtype, are as large as the state."""
    return num_features(d + 1) * (d + 1) / (2 * d)


def markdown(results: dict) -> str:
    settings, rows = results["settings"], results["lengths"]
    chunks, gate = settings["chunk_size"] or CHUNK_SIZE, "with" if settings["decay_gate"] else "without"
    parts = [
        f"{described(results['machine'])} One sequence, {settings['heads']} heads, values as wide as queries and keys, "
        f"chunks of {chunks} tokens, {gate} a decay gate. "
        f"Medians of {settings['repeats']} runs in turns; above 1 the squared kernel is faster than fused softmax."
    ]
    sizes, lengths = settings["head_sizes"], settings["lengths"]
    for task, title in TASKS.items():
        ratio = {(row["head_size"], row["length"]): faster(row, task) for row in rows}
        header = ["tokens", *(f"d = {d}" for d in sizes)]
        body = [[f"{n:,}", *(f"{ratio[d, n]:.2f}×" for d in sizes)] for n in lengths]
        found = [crossover(rows, d, task) for d in sizes]
        body.append(["faster from", *("not reached" if n is None else f"{n:,.0f} tokens" for n in found)])
        parts.append(f"**{title}**\n\n{markdown_table(header, body)}")

    def times(row: dict) -> list[str]:
        return [f"{row['length']:,}", *(f"{1e6 * row[name]['median']:,.0f}" for name in CACHES)]

    header = ["tokens before", "state, µs", "growing cache, µs", "static cache, µs"]
    body = [[str(row["head_size"]), *times(row)] for row in results["decoding"]]
    parts.append(f"**One decoded token**\n\n{markdown_table(['d', *header], body)}")
    if results.get("models"):
        header += ["state, MiB", "cache, MiB"]
        held = [[f"{row['bytes'][name] / 2**20:.2f}" for name in ("state", "dynamic")] for row in results["models"]]
        body = [times(row) + sizes for row, sizes in zip(results["models"], held)]
        what = (
            f"One generated token of whole models of 2 layers and {settings['heads']} heads of 64 channels: "
            "QuadraticKernelLM with its defaults, and SoftmaxLM"
        )
        parts.append(f"**{what}**\n\n{markdown_table(header, body)}")
    held = ", ".join(f"{tokens:,.0f} at d = {d}" for d, tokens in results["state_tokens"].items())
    parts.append(f"The state is as large as the keys and values of this many tokens: {held}.")
    return "\n\n".join(parts)


def claims(results: dict) -> str:
    """What was aimed at beside what was measured."""
    body = []
    for (d, length), least in AIMS.items():
        rows = [row for row in results["lengths"] if (row["head_size"], row["length"]) == (d, length)]
        got = faster(rows[0], "forward") if rows else None
        verdict = "not run" if got is None else "yes" if got >= least else "no"
        body.append([f"d = {d}, {length:,} tokens", f"{least:g}×", f"{got:.2f}×" if rows else "-", verdict])
    for name, what in (("state", "QuadraticKernelLM"), ("dynamic", "SoftmaxLM, growing cache")):
        rows = sorted(results.get("models", []), key=lambda row: row["length"])
        if len(rows) > 1:
            got = rows[-1][name]["median"] / rows[0][name]["median"]
            aim, verdict = ("1.15× at most", "yes" if got <= 1.15 else "no") if name == "state" else ("-", "-")
            step = f"a step after {rows[-1]['length']:,} tokens against one after {rows[0]['length']:,}: {what}"
            body.append([step, aim, f"{got:.2f}×", verdict])
    return markdown_table(["forward against fused softmax, and decoding", "aim", "measured", "reached"], body)


def plot(results: dict, image: Path) -> None:
    """Speed against fused softmax, and time of a decoded token, by length; bars are quartiles."""
    sizes = results["settings"]["head_sizes"]
    drawn, softmax = (shades(family, len(sizes)) for family in ("quadratic_kernel_lm", "softmax_lm"))
    figure, panels = new_figure(1, 3, figsize=(13, 4.6))
    for panel, (task, title) in zip(panels, TASKS.items()):
        for i, d in enumerate(sizes):
            rows = [row for row in results["lengths"] if row["head_size"] == d]
            pairs = [(row[task]["softmax"], row[task]["squared"]) for row in rows]
            ratios = [faster(row, task) for row in rows]
            ends = [(slow["q1"] / own["q3"], slow["q3"] / own["q1"]) for slow, own in pairs]
            bars = reaching(ratios, *zip(*ends))
            look = {"color": drawn[i], "marker": MARKERS[i], "markersize": 4, "capsize": 2}
            panel.errorbar([row["length"] for row in rows], ratios, bars, label=f"d = {d}", **look)
        panel.axhline(1, color="grey", linewidth=0.8, linestyle="--")
        panel.set(title=title, ylabel="times as fast as fused softmax", xlabel="tokens", xscale="log", yscale="log")
    for i, d in enumerate(sizes):
        rows = [row for row in results["decoding"] if row["head_size"] == d]
        for name, line in zip(CACHES, ("-", ":", "--")):
            cache = "growing" if name == "dynamic" else name
            label = f"d = {d}" + ("" if name == "state" else f", softmax, {cache} cache")
            times = [[1e6 * row[name][key] for row in rows] for key in ("median", "q1", "q3")]
            look = {"color": (drawn if name == "state" else softmax)[i], "marker": MARKERS[i], "markersize": 5}
            look |= {"markerfacecolor": "none"} if name == "dynamic" else {}
            where = [row["length"] for row in rows]
            panels[2].errorbar(where, times[0], reaching(*times), linestyle=line, label=label, capsize=2, **look)
    panels[2].set(title="One decoded token", ylabel="µs per token", xlabel="tokens before", xscale="log", yscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
    legend_below(figure, panels[2:], columns=3)
    figure.savefig(image, dpi=120)


def run(options) -> int:
    """Measure as bench_quadratic.py's options say; returns the exit status.

    Raises:
        ScriptError: as `check` and `check_device`.
    """
    check_device(options.device)
    torch.set_num_threads(options.threads)
    with torch.device(options.device):
        results = measure_all(options)
    plot(results, Path(options.output).with_suffix(".png"))
    print(markdown(results))
    return 0


def measure_all(options) -> dict:
    """The results of every part, on torch's device as it is set now; saved after each."""
    for d in options.head_sizes:
        check(options, d)
    results = {
        "machine": machine_info(options.device),
        "settings": {name: value for name, value in asdict(options).items() if name != "output"},
        "state_tokens": {str(d): state_tokens(d) for d in options.head_sizes},
        "lengths": [],
        "decoding": [],
        "models": [],
    }
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    cases = [("lengths", measure_length, case) for case in product(options.head_sizes, options.lengths)]
    cases += [("decoding", measure_decoding, case) for case in product(options.head_sizes, options.decode_lengths)]
    cases += [("models", measure_model, [length]) for length in sorted(options.model_lengths)]
    for key, measure, (*head_size, length) in cases:
        results[key].append(measure(options, *head_size, length))
        write_json(output, results)
        print(f"{key}: {''.join(f'head size {d}, ' for d in head_size)}{length} tokens", flush=True)
    return results
