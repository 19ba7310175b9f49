"""What predicting from every prefix costs."""

import math
import operator
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from ordnung import CubicPrefixLMConfig, CubicPrefixLMForCausalLM
from ordnung.scripts.benchmarks.measure import in_turns, timed
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.training.optimization import recompute_activations

VOCAB = 256
ENCODER_ROWS = 16


def build(options, layers: int, length: int, **fields) -> CubicPrefixLMForCausalLM:
    torch.manual_seed(options.seed)
    config = CubicPrefixLMConfig(
        vocab_size=VOCAB,
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        num_hidden_layers=layers,
        max_position_embeddings=length,
        pad_token_id=None,
        **{"prefix_group_tokens": max(length**2, 1 << 16), **fields},
    )
    return CubicPrefixLMForCausalLM(config).train()


def predict(model, tokens):
    return model(tokens, use_cache=False).logits


def predict_naively(model, tokens):
    """One encoder pass for each prefix, read at its last token."""
    states = [model.model(tokens[:, : t + 1]).last_hidden_state[:, -1] for t in range(tokens.shape[1])]
    return model.lm_head(torch.stack(states, dim=1))


def encode(model, tokens):
    return model.lm_head(model.model(tokens.expand(ENCODER_ROWS, -1)).last_hidden_state)


def step(model, compute, tokens) -> float:
    """Seconds of forward and backward."""
    seconds = timed(lambda: compute(model, tokens).logsumexp(-1).mean().backward())
    model.zero_grad()
    return seconds


def saved_bytes(model, compute, tokens) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = compute(model, tokens)
    del logits
    return sum(held.values())


@torch.no_grad()
def counted_flops(model, compute, tokens) -> tuple[int, int]:
    """FLOPs of the forward pass as torch counts them: all, and those of attention (all but the linear layers)."""
    # unfused, since torch does not count its fused kernel on a CPU
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        compute(model, tokens)
    model.set_attn_implementation("sdpa")
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    return sum(counts.values()), sum(counts.values()) - linear


def measure_training(options, layers: int, length: int) -> dict:
    tokens = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(options.seed))
    recomputed = build(options, layers, length)
    recompute_activations(recomputed)
    competitors = {
        "naive": (build(options, layers, length), predict_naively),
        "cubic": (build(options, layers, length), predict),
        "recomputed": (recomputed, predict),
        "stride": (build(options, layers, length, prefix_stride=8), predict),
        "causal": (build(options, layers, length, prefix_stride=None), predict),
        "encoder": (build(options, layers, length), encode),
    }
    with torch.no_grad():
        expected = predict_naively(competitors["naive"][0], tokens)
        error = (predict(competitors["cubic"][0], tokens) - expected).abs().max() / expected.abs().max()
    if not error < 1e-4:
        raise ScriptError(f"cubic differs from naive by {error:.1e} with {layers} layers and {length} tokens")
    steps = {name: partial(step, model, compute, tokens) for name, (model, compute) in competitors.items()}
    seconds = in_turns(steps, options.repeats, operator.call)  # they time themselves
    rows = {}
    for name, (model, compute) in competitors.items():
        flops, attention = counted_flops(model, compute, tokens)
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "flops": 3 * flops,
            "attention_flops": 3 * attention,
            "saved_bytes": saved_bytes(model, compute, tokens),
        }
    return {"layers": layers, "length": length, "competitors": rows}


@torch.no_grad()
def measure_decoding(options, length: int) -> dict:
    """Seconds a token after a prompt of `length` tokens, in turns of `decode_steps` tokens."""
    steps, layers = options.decode_steps, options.decode_layers
    tokens = torch.randint(VOCAB, (1, length + steps), generator=torch.Generator().manual_seed(options.seed))
    strides = {"stride 1": 1, "stride 8": 8, "causal": None}
    models = {name: build(options, layers, length + steps, prefix_stride=s).eval() for name, s in strides.items()}

    def encode_anew():
        for i in range(steps):
            models["stride 1"].model(tokens[:, : length + i + 1])

    def decode(model, past):
        for i in range(steps):
            model(tokens[:, length + i : length + i + 1], past_key_values=past, use_cache=True)

    def after_prompt(model) -> float:
        past = DynamicCache(config=model.config)
        model(tokens[:, :length], past_key_values=past, use_cache=True, logits_to_keep=1)
        return timed(decode, model, past)

    timers = {"encoded anew": lambda: timed(encode_anew)}
    timers |= {name: partial(after_prompt, model) for name, model in models.items()}
    seconds = in_turns(timers, options.repeats, operator.call)
    prefill = {}
    for n in (length // 2, length):
        prompt = tokens[:, :n]
        last = counted_flops(models["stride 1"], lambda m, x: m(x, use_cache=True, logits_to_keep=1), prompt)
        prefill[n] = {"flops": last[0], "attention_flops": last[1]}
    return {
        "length": length,
        "layers": layers,
        "seconds": {name: statistics.median(values) / steps for name, values in seconds.items()},
        "prefill": prefill,
    }


def count(options, layers: int) -> dict[str, dict[str, int]]:
    """FLOPs of the forward pass at lengths too long to time everything at."""
    counts = {}
    for length in options.count_lengths:
        flops, attention = counted_flops(build(options, layers, length), predict, torch.zeros(1, length, dtype=int))
        counts[str(length)] = {"flops": flops, "attention_flops": attention}
    return counts


def growth(values: dict[int | str, float]) -> str:
    """Exponent of N from the first to the last length that there are values for."""
    lengths = sorted(values, key=int)
    first, last = lengths[0], lengths[-1]
    if first == last:
        return "-"
    return f"{math.log(values[last] / values[first]) / math.log(int(last) / int(first)):.2f}"


def markdown(results: dict) -> str:
    """The tables of a results dictionary."""
    header = ["layers", "N", "naive s", "cubic s", "faster", "FLOP ratio", "recomputed s", "stride 8 s", "causal s"]
    header += ["of encoder's FLOP rate", "saved MB: naive", "cubic", "recomputed"]
    body = []
    for row in results["training"]:
        c = row["competitors"]
        seconds = {name: f"{of['seconds']:.3f}" for name, of in c.items()}
        faster, fewer = (c["naive"][what] / c["cubic"][what] for what in ("seconds", "flops"))
        rate = {name: of["flops"] / of["seconds"] for name, of in c.items()}
        body.append([str(row["layers"]), str(row["length"]), seconds["naive"], seconds["cubic"]])
        body[-1] += [f"{faster:.2f}×", f"{fewer:.2f}", *(seconds[name] for name in ("recomputed", "stride", "causal"))]
        saved = (c[name]["saved_bytes"] / 1e6 for name in ("naive", "cubic", "recomputed"))
        body[-1] += [f"{rate['cubic'] / rate['encoder']:.0%}", *(f"{size:.1f}" for size in saved)]
    exponents = []
    for layers, counts in results["counted"].items():
        row = [{n: value[what] for n, value in counts.items()} for what in ("attention_flops", "flops")]
        two = results["counted"].get("2", counts)
        middle = {n: value["attention_flops"] - two[n]["attention_flops"] for n, value in counts.items()}
        timed = [row for row in results["training"] if row["layers"] == int(layers)]
        seconds = {row["length"]: row["competitors"]["cubic"]["seconds"] for row in timed}
        exponents.append([layers, *map(growth, row), growth(middle) if all(middle.values()) else "-", growth(seconds)])
    lengths = sorted(int(n) for n in counts)
    parts = [
        markdown_table(header, body),
        f"Exponent of N in what CubicPrefixLM computes: FLOPs counted from {lengths[0]} to {lengths[-1]} tokens, those "
        "of attention between the first and the last layer by subtracting what 2 layers have; seconds over the lengths "
        "above:",
        markdown_table(["layers", "attention FLOPs", "all FLOPs", "attention between", "seconds"], exponents),
    ]
    for decoding in results["decoding"]:
        anew = decoding["seconds"]["encoded anew"]
        rows = [[name, f"{s * 1e3:.2f}", f"{anew / s:.2f}×"] for name, s in decoding["seconds"].items()]
        parts += [
            f"One more token after {decoding['length']}, {decoding['layers']} layers:",
            markdown_table(["", "ms", "against encoding anew"], rows),
            "Prefill: "
            + "; ".join(
                f"{n} tokens {v['flops']:,} FLOPs, {v['attention_flops']:,} of attention"
                for n, v in decoding["prefill"].items()
            ),
        ]
    return "\n\n".join(parts)


def run(options) -> int:
    """Measure as bench_prefix.py's options say, print and write the results; returns the exit status."""
    torch.set_num_threads(options.threads)
    rows = []
    for layers in options.layers:
        for length in sorted(options.lengths):
            rows.append(measure_training(options, layers, length))
            print(f"{layers} layers, {length} tokens: done", flush=True)
    settings = {name: value for name, value in asdict(options).items() if name != "output"}
    results = {
        "machine": machine_info("cpu"),
        "settings": settings,
        "training": rows,
        "counted": {str(layers): count(options, layers) for layers in options.layers},
        "decoding": [measure_decoding(options, length) for length in options.decode_lengths],
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)
    print(f"\n{markdown(results)}\n\nWritten: {options.output}")
    return 0
