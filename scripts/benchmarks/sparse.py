"""What sparse attention costs, beside full attention and the sparse attention of others."""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    DynamicCache,
    LongformerConfig,
    LongformerModel,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from ordnung.modeling.convert import convert
from ordnung.modeling.ops.sparse_attention import sparse_attention
from ordnung.modeling.ops.sparse_pattern import Pattern
from ordnung.scripts.benchmarks.measure import PeakMemory, in_turns, thread_timer
from ordnung.scripts.benchmarks.variants import state_bytes
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import check_device, machine_info
from ordnung.scripts.common.tables import markdown_table

HEAD_DIM = 64
VOCAB = 256
RANDOM_BLOCK = 64  # tokens of a random block, where the window is not shorter
# what SparseAttentionLM adds to a window
KINDS = {
    "local": {},
    "local + global": {"num_global": 16},
    "local + strided": {"stride": 64},
    "local + random": {"num_random": 4},
    "all": {"num_global": 16, "stride": 64, "num_random": 4},
}
FLEX = "FlexAttention, local"
FULL = "full attention"
PIECE = 1024  # tokens that fill a cache at a time


def sdpa(query, key, value):
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def compiled_flex(window: int, device: str) -> Callable:
    """FlexAttention with a causal window; block masks are made once for each length, off the clock."""
    attend, masks = torch.compile(flex_attention), {}

    def inside(b, h, query, key):
        return (query >= key) & (query - key < window)

    def run(query, key, value):
        N = query.shape[1]
        if N not in masks:
            masks[N] = create_block_mask(inside, None, None, N, N, device=device)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return attend(*heads, block_mask=masks[N]).transpose(1, 2)

    return run


def compared(runs: dict[str, Callable], baseline: str, options) -> dict[str, dict]:
    """Median seconds of each, and the median of how many times faster it is than `baseline` in the same turn."""
    seconds = in_turns(runs, options.rounds, thread_timer(options.threads, options.device))
    return {
        name: {
            "seconds": statistics.median(own),
            "faster": statistics.median(other / mine for other, mine in zip(seconds[baseline], own)),
            "all_seconds": own,
        }
        for name, own in seconds.items()
    }


def peak_bytes(run: Callable, device: str) -> int | None:
    """Peak memory of a run above what is in use before it, on a system that tells it."""
    PeakMemory(device).restart()  # what was freed goes back to the system
    memory = PeakMemory(device)
    memory.restart()
    run()
    return memory.read()


def check(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises ScriptError: a result is not what it should be, so its time says nothing."""
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise ScriptError(f"{name} differs by {error:.1e} from what it should give: nothing is timed")


def measure_attention(options, length: int, backward: bool, flex: Callable | None) -> dict:
    """Attention alone, causal."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    shape = 1, length, options.num_attention_heads, HEAD_DIM
    inputs = [torch.randn(shape, generator=generator, requires_grad=backward) for _ in range(3)]
    gradient = torch.randn(shape, generator=generator)
    block = min(RANDOM_BLOCK, options.window)
    patterns = {name: Pattern(options.window, **fields, random_block=block) for name, fields in KINDS.items()}
    attend = {"SDPA": sdpa}
    attend |= {name: partial(sparse_attention, pattern=pattern) for name, pattern in patterns.items()}
    reason = flex_reason(flex, inputs, backward)
    if flex is not None and reason is None:
        attend[FLEX] = flex
        with torch.no_grad():
            check(FLEX, flex(*inputs), attend["local"](*inputs))

    def run(function):
        with torch.set_grad_enabled(backward):
            output = function(*inputs)
        if backward:
            torch.autograd.grad(output, inputs, gradient)

    runs = {name: partial(run, function) for name, function in attend.items()}
    rows = compared(runs, "SDPA", options)
    for name, row in rows.items():
        row["peak_bytes"] = peak_bytes(runs[name], options.device)
    if reason is not None:
        rows[FLEX] = {"reason": reason}
    return {"length": length, "backward": backward, "competitors": rows}


def flex_reason(flex: Callable | None, inputs, backward: bool) -> str | None:
    """Why FlexAttention cannot run here, in its own words; None if it can, or is not asked to."""
    try:
        with torch.set_grad_enabled(backward):
            None if flex is None else flex(*inputs)
    except (TorchDynamoException, RuntimeError, NotImplementedError) as error:  # a compiler fails in many ways
        return str(error).strip().splitlines()[0].split(". ")[0]
    return None


def sizes_of(options, length: int) -> dict[str, int]:
    """Config fields of one layer for so many tokens."""
    width = options.num_attention_heads * HEAD_DIM
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": options.num_attention_heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": length,
    }


def encoders(options, length: int) -> dict[str, torch.nn.Module]:
    """One layer each, embeddings included. Ours has Longformer's weights, and full attention ours."""
    torch.manual_seed(options.seed)
    sizes = {**sizes_of(options, length + 2), "pad_token_id": 0}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    longformer = LongformerModel(LongformerConfig(**sizes, attention_window=options.window), add_pooling_layer=False)
    bert = {"position_embedding_type": "learned", "norm_position": "post", "is_decoder": False}
    ours = convert(longformer, "sparse_attention_lm", output_report=True)[0]
    big_bird = BigBirdModel(BigBirdConfig(**sizes, num_random_blocks=3), add_pooling_layer=False)
    full = convert(longformer, "sparse_attention_lm", output_report=True, sliding_window=length, **bert)[0]
    return {
        "full attention": full,
        "SparseAttentionLM": ours,
        "Longformer": longformer.eval(),
        "BigBird, block_sparse": big_bird.eval(),
    }


def measure_encoders(options, length: int, backward: bool) -> dict:
    models = encoders(options, length)
    ids = torch.randint(1, VOCAB, (1, length), generator=torch.Generator(options.device).manual_seed(options.seed))
    chosen = torch.zeros_like(ids)
    chosen[:, 0] = 1  # one global token, as for a classifier

    def forward(name):
        marked = {} if name.startswith(("BigBird", "full")) else {"global_attention_mask": chosen}
        return models[name](ids, **marked)[0]

    with torch.no_grad():
        check("SparseAttentionLM", forward("SparseAttentionLM"), forward("Longformer"))

    def run(name):
        with torch.set_grad_enabled(backward):
            output = forward(name)
        if backward:
            output.square().mean().backward()
            models[name].zero_grad()

    rows = compared({name: partial(run, name) for name in models}, "full attention", options)
    return {"length": length, "backward": backward, "competitors": rows}


def decoders(options, room: int) -> dict[str, torch.nn.Module]:
    """Causal models of one layer with the weights of a Mistral, by what they look at."""
    torch.manual_seed(options.seed)
    heads = {"num_key_value_heads": options.num_attention_heads}
    config = MistralConfig(**sizes_of(options, room), **heads, sliding_window=options.window)
    mistral = MistralForCausalLM(config).eval()
    ours = partial(convert, mistral, "sparse_attention_lm", output_report=True)
    besides = {"num_global_tokens": 16, "random_block_size": min(RANDOM_BLOCK, options.window)}
    return {
        FULL: ours(layer_types=["full_attention"])[0],
        "Mistral, sliding window": mistral,
        "local": ours()[0],
        "local + global": ours(**besides)[0],
        "local + strided": ours(global_stride=64)[0],
        "all": ours(**besides, global_stride=64, num_random_blocks=4)[0],
    }


@torch.no_grad()
def measure_prefill(options, length: int) -> dict:
    """All of a prompt at once, logits of the last token, state to go on from."""
    models = decoders(options, length)
    ids = torch.randint(VOCAB, (1, length), generator=torch.Generator(options.device).manual_seed(options.seed))

    def prefill(name):
        past = DynamicCache(config=models[name].config)
        return models[name](ids, past_key_values=past, logits_to_keep=1).logits

    check("local", prefill("local"), prefill("Mistral, sliding window"))
    rows = compared({name: partial(prefill, name) for name in models}, FULL, options)
    return {"length": length, "competitors": rows}


@torch.no_grad()
def measure_decoding(options, length: int) -> dict:
    """Single tokens after `length` others.

    The caches of full attention hold random keys and values; the others are filled by the model, in pieces.
    """
    room = length + options.decode_steps
    models = decoders(options, room)
    models |= {f"{FULL}, {kind}": models[FULL] for kind in ("static", "dynamic")}
    del models[FULL]
    generator = torch.Generator(options.device).manual_seed(options.seed)
    ids = torch.randint(VOCAB, (1, room), generator=generator)
    random = [torch.randn(1, options.num_attention_heads, length, HEAD_DIM, generator=generator) for _ in range(2)]
    caches = {}
    for name, model in models.items():
        static = name.endswith("static")
        caches[name] = StaticCache(model.config, max_cache_len=room) if static else DynamicCache(config=model.config)
        if name.startswith(FULL):
            caches[name].update(*random, 0)
            continue
        for start in range(0, length, PIECE):
            part = ids[:, start : min(start + PIECE, length)]
            model(part, past_key_values=caches[name], logits_to_keep=1)
    held = {name: state_bytes(cache) for name, cache in caches.items()}
    small = [name for name in models if not name.startswith(FULL)]
    copies = {name: [copy.deepcopy(caches[name]) for _ in range(options.rounds + 1)] for name in small}
    outputs = {}

    def decode(name):
        cache = copies[name].pop() if name in copies else caches[name]
        for i in range(length, room):
            position = torch.tensor([[i]])
            outputs[name] = models[name](ids[:, i : i + 1], past_key_values=cache, position_ids=position).logits
        if name.endswith("dynamic"):  # these are too large for copies: the new tokens are taken away again
            cache.crop(-options.decode_steps)
        elif name.endswith("static"):
            cache.layers[0].cumulative_length.fill_(length)

    rows = compared({name: partial(decode, name) for name in models}, f"{FULL}, static", options)
    check("local", outputs["local"], outputs["Mistral, sliding window"])
    check(f"{FULL}, dynamic", outputs[f"{FULL}, dynamic"], outputs[f"{FULL}, static"])
    for name, row in rows.items():
        row["state_bytes"] = held[name]
    return {"length": length, "competitors": rows}


def growth(rows: list[dict], name: str) -> str:
    """Exponent of N from the last but one to the last length."""
    if len(rows) < 2:
        return "-"
    (first, a), (last, b) = [(row["length"], row["competitors"].get(name, {}).get("seconds")) for row in rows[-2:]]
    return f"{math.log(b / a) / math.log(last / first):.2f}" if a and b else "-"


def table(rows: list[dict], cell: Callable[[dict], str], exponent: bool = True) -> str:
    names = dict.fromkeys(name for row in rows for name in row["competitors"])
    header = ["", *(f"{row['length']:,}" for row in rows), *(["exponent"] if exponent else [])]
    body = [
        [name, *(cell(row["competitors"][name]) if name in row["competitors"] else "-" for row in rows)]
        + ([growth(rows, name)] if exponent else [])
        for name in names
    ]
    return markdown_table(header, body)


def markdown(results: dict) -> str:
    """The tables of a results dictionary."""

    def ms(row):
        if "reason" in row:
            return row["reason"]
        return f"{1e3 * row['seconds']:.1f} ms, {row['faster']:.2f}×"

    def mib(row):
        return "-" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.1f}"

    def step(row):
        microseconds = 1e6 * row["seconds"] / results["settings"]["decode_steps"]
        return f"{microseconds:,.0f} µs, {row['faster']:.2f}×"

    settings = results["settings"]
    parts, heads = [], f"{settings['num_attention_heads']} heads of {HEAD_DIM}, window {settings['window']}"
    for key, what in (
        ("attention", f"Attention alone, causal, {heads}; how many times faster than SDPA"),
        ("encoders", "One encoder layer; how many times faster than full attention"),
    ):
        for backward, how in ((False, "forward"), (True, "forward and backward")):
            rows = [row for row in results[key] if row["backward"] == backward]
            if rows:
                parts += [f"{what}, {how}:", table(rows, ms)]
            if rows and key == "attention":
                parts += [f"Its peak memory, {how}, MiB:", table(rows, mib, exponent=False)]
    if results["prefill"]:
        parts += ["Prefill of one layer; how many times faster than full attention:", table(results["prefill"], ms)]
    if results["decoding"]:
        parts += [
            "One more token after so many, one layer; how many times faster than full attention in a static cache:",
            table(results["decoding"], step),
            "State after so many tokens, MiB:",
            table(results["decoding"], lambda row: f"{row['state_bytes'] / 2**20:.2f}", exponent=False),
        ]
    return "\n\n".join(parts)


# what was aimed at: (part, backward, length, competitor) -> how many times faster than full attention at least
AIMS = {
    ("attention", False, 256, "local"): 1.0,
    ("attention", False, 2048, "local"): 2.1,
    ("attention", False, 4096, "local"): 3.8,
    ("attention", False, 8192, "local"): 7.0,
    ("attention", False, 16384, "local"): 9.5,
    ("attention", False, 4096, "all"): 2.2,
    ("attention", True, 4096, "local"): 4.5,
    ("decoding", None, 32768, "local"): 5.0,
    ("decoding", None, 32768, "local + global"): 5.0,
}


def claims(results: dict) -> str:
    """What was aimed at beside what was measured."""
    body = []
    for (part, backward, length, name), least in AIMS.items():
        rows = [row for row in results[part] if row["length"] == length and row.get("backward") == backward]
        what = {True: "forward and backward", False: "forward", None: "one more token of a layer"}[backward]
        got = rows[0]["competitors"][name]["faster"] if rows else None
        verdict = "not run" if got is None else "yes" if got >= least else "no"
        body.append([f"{name}, {what}, {length:,} tokens", f"{least:g}×", f"{got:.2f}×" if got else "-", verdict])
    for row in results["attention"]:
        peaks = {name: of.get("peak_bytes") for name, of in row["competitors"].items()}
        if row["length"] == 16384 and not row["backward"] and peaks["SDPA"] and peaks["local"]:
            got = peaks["local"] / peaks["SDPA"]
            body.append(
                ["local, peak memory, forward, 16,384 tokens", "below 1", f"{got:.3f}", "yes" if got < 1 else "no"]
            )
    return markdown_table(["as fast as full attention, or a static cache", "aim", "measured", "reached"], body)


def run(options) -> int:
    """Measure as bench_sparse.py's options say, print and write the results; returns the exit status."""
    check_device(options.device)
    torch.set_num_threads(options.threads)
    with torch.device(options.device):
        results = measure_all(options)
    write_json(options.output, results)
    print(f"{markdown(results)}\n\nWritten: {options.output}")
    return 0


def measure_all(options) -> dict:
    """The results of every part, on torch's device as it is set now."""
    flex = compiled_flex(options.window, options.device) if options.flex else None
    results = {
        "machine": machine_info(options.device),
        "settings": {name: value for name, value in asdict(options).items() if name != "output"},
        "attention": [],
        "encoders": [],
        "prefill": [],
        "decoding": [],
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    for lengths, backward in ((options.lengths, False), (options.backward_lengths, True)):
        for length in sorted(lengths):
            results["attention"].append(measure_attention(options, length, backward, flex))
    for backward in (False, True):
        for length in sorted(options.encoder_lengths):
            results["encoders"].append(measure_encoders(options, length, backward))
    results["prefill"] = [measure_prefill(options, length) for length in sorted(options.encoder_lengths)]
    for length in sorted(options.decode_lengths):
        results["decoding"].append(measure_decoding(options, length))
    return results
