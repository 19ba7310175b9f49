"""The rank of attention below the diagonal, and what a token costs."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import PreTrainedModel

from ordnung import QuadraticKernelLMConfig, QuadraticKernelLMModel
from ordnung.modeling.mixers.attention import Attention
from ordnung.scripts.common.corpus import find_files, read_text
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import COLOURS, LINES, MARKERS, nest, new_figure, shades
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import described, machine_info
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.linearizing.teacher import Mixed, watched
from ordnung.scripts.reports.mixing import load, mixing_weights

SQUARED = "quadratic_kernel_lm"
KERNELS = ("softmax", "shifted", "square")


def num_products(d: int) -> int:
    """Features of the shifted kernel: products of two of d entries and a constant one."""
    return (d + 1) * (d + 2) // 2


def rank(block: torch.Tensor, threshold: float) -> torch.Tensor:
    """(...) of blocks (..., m, n), as far as `threshold` tells."""
    values = torch.linalg.svdvals(block.double())
    return (values > threshold * values[..., :1]).sum(-1)


def needed(weights: torch.Tensor, share: float) -> torch.Tensor:
    """(...) of weights (..., n, keys): how many of the first singular values hold that share of the sum of all."""
    values = torch.linalg.svdvals(weights.double())
    held = values.cumsum(-1) / values.sum(-1, keepdim=True)
    return 1 + (held < share).sum(-1)


def shuffled(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """(..., n, keys), each row in an order of its own: sharp where it was sharp, and no more alike than by chance."""
    generator = torch.Generator().manual_seed(seed)
    return weights.gather(-1, torch.rand(weights.shape, generator=generator).argsort(-1))


def block_of(kernel: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(..., n / 2, n / 2) of queries and keys (..., n, d): later queries, earlier keys.

    A row's sum, which all of its weights are divided by, does not change the rank.
    """
    half = query.shape[-2] // 2
    scores = query[..., half:, :] @ key[..., :half, :].mT / math.sqrt(query.shape[-1])
    if kernel == "softmax":
        return scores.softmax(-1)
    return (0.5 * scores + 1).square() if kernel == "shifted" else scores.square()


def random_ranks(options) -> list[dict]:
    rows = []
    for d in options.head_sizes:
        for n in options.lengths:
            found = {kernel: [] for kernel in KERNELS}
            for seed in options.seeds:
                generator = torch.Generator().manual_seed(seed)
                query, key = (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(2))
                for kernel in KERNELS:
                    found[kernel].append(int(rank(block_of(kernel, query, key), options.threshold)))
            rows.append({"d": d, "n": n, "bound": num_products(d), **found})
    return rows


@torch.no_grad()
def queries_and_keys(model: PreTrainedModel, ids: torch.LongTensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(H, n, d) each, of every softmax layer, as the scores take them."""
    softmax = [i for i, layer in enumerate(model.layers) if isinstance(layer.mixer, Attention)]
    found = []

    def project(call: Mixed):
        mixer = model.layers[call.layer].mixer
        query, key = mixer.project(call.inputs, call.kwargs.get("position_embeddings"))[:2]
        found.append((query[0], key[0].repeat_interleave(mixer.num_key_value_groups, dim=0)))

    with watched(model, softmax, project):
        model(ids, use_cache=False)
    return found


def read_passages(options, name: str, text: str) -> tuple[PreTrainedModel, list[torch.LongTensor], list[int]]:
    """A checkpoint in float64, passages (1, tokens) of the text as it reads them, and the lengths to measure.

    A last passage that is shorter than the others is left out.

    Raises:
        ScriptError: as `load`; the text is too short.
    """
    model, tokenizer, _ = load(name)
    longest = max(options.lengths)
    if (model.config.longest_row or longest) < longest:  # the learned positions of a source can be repeated
        model, *_ = load(name, max_position_embeddings=longest + model.config.position_offset)
    if model.config.longest_row is not None:
        longest = max((n for n in options.lengths if n <= model.config.longest_row), default=0)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    whole = min(options.passages, ids.shape[1] // longest) if longest else 0
    passages = list(ids[:, : max(whole, 1) * longest].split(max(longest, 1), dim=1))
    lengths = [n for n in options.lengths if n <= min(longest, passages[0].shape[1])]
    if not lengths:
        raise ScriptError(f"{name} reads {passages[0].shape[1]} tokens of the text: give less in --lengths")
    if len(passages) < options.passages or len(lengths) < len(options.lengths):
        given = f"{ids.shape[1]:,} tokens of text give {len(passages)} of {options.passages} passages"
        print(f"{name}: {given}, for lengths {' '.join(map(str, lengths))}", flush=True)
    return model.double(), passages, lengths


def model_ranks(options, name: str, text: str) -> dict:
    """Ranks of every head of a checkpoint, by length: [layer][head]; of its own weights, and of "shifted" ones.

    The latter of the queries and keys of softmax layers, with d their size.

    With a `share`, also how many singular values of the whole matrix hold it, as it is and with its rows shuffled:
    [passage][layer][head], of passages of the text one after the other.

    Raises:
        ScriptError: as `read_passages`.
    """
    model, passages, lengths = read_passages(options, name, text)
    d = model.config.head_dim
    result = {"model": Path(name).name, "d": d, "bound": num_products(d), "layer_types": model.config.layer_types}
    result["lengths"] = []
    for n in lengths:
        part = passages[0][:, :n]
        blocks = [weights[:, n // 2 :, : n // 2] for weights in mixing_weights(model, part)]
        row = {"n": n, "own": [rank(block, options.threshold).tolist() for block in blocks]}
        if blocks := [block_of("shifted", *pair) for pair in queries_and_keys(model, part)]:
            row["shifted"] = [rank(block, options.threshold).tolist() for block in blocks]
        if options.share is not None:
            row |= {"needed": [], "shuffled": []}
            for i, passage in enumerate(passages):
                weights = mixing_weights(model, passage[:, :n])
                row["needed"].append([needed(layer, options.share).tolist() for layer in weights])
                by_chance = [needed(shuffled(layer, seed=i), options.share) for layer in weights]
                row["shuffled"].append([heads.tolist() for heads in by_chance])
        result["lengths"].append(row)
        print(f"{name}: {n} tokens", flush=True)
    return result


@torch.no_grad()
def costs(options) -> list[dict]:
    """Counted and predicted FLOPs of a token in a layer's mixing, one head, without its projections."""

    def in_place(added, a, b, out_shape=None, **_):  # torch's counter does not know products added in place
        return 2 * math.prod(a) * b[2]

    rows = []
    for d in options.cost_head_sizes:
        config = QuadraticKernelLMConfig.csq_preset(
            hidden_size=d,
            num_attention_heads=1,
            head_dim=d,
            num_hidden_layers=1,
            vocab_size=8,
            centering=None,
            chunk_size=128,  # stated, so that short rows take features too
        )
        for n in options.cost_lengths:
            counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place})
            with FakeTensorMode(), counter:
                mixer = QuadraticKernelLMModel(config).layers[0].mixer.eval()
                mixer(torch.empty(1, n, d))
            counts = counter.get_flop_counts()["Global"]
            counted = sum(flops for op, flops in counts.items() if "bmm" in str(op))
            predicted = mixer.flops(n) - 4 * 2 * n * d**2
            rows.append(
                {"d": d, "n": n, "counted": counted / n, "predicted": predicted / n, "softmax": 2 * d * (n + 1)}
            )
    return rows


def markdown(results: dict) -> str:
    settings = results["settings"]
    parts = [
        f"{described(results['machine'])} Rank of the block of the later half's queries and the earlier half's keys: "
        f"singular values above {settings['threshold']:.0e} of the first, in float64."
    ]
    body = [
        [str(row["d"]), f"{row['n']:,}", f"{row['n'] // 2:,}", *(shown(row[kernel]) for kernel in KERNELS)]
        + [str(row["bound"])]
        for row in results["random"]
    ]
    header = ["d", "n", "rows of the block", *KERNELS, "(d + 1)(d + 2) / 2"]
    parts.append(f"**Random queries and keys** (all seeds)\n\n{markdown_table(header, body)}")
    for model in results["models"]:
        body = []
        for row in model["lengths"]:
            own = [f"{min(layer)} to {max(layer)}" for layer in row["own"]]
            shifted = [max(layer) for layer in row.get("shifted", [])]
            body.append([f"{row['n']:,}", f"{row['n'] // 2:,}", ", ".join(own), str(max(shifted)) if shifted else "-"])
        header = ["n", "rows of the block", "its heads, layer by layer", "squared kernel on its queries and keys, most"]
        title = f"**{model['model']}**, d = {model['d']}, (d + 1)(d + 2) / 2 = {model['bound']}"
        parts.append(f"{title}\n\n{markdown_table(header, body)}")
    lengths, sizes = settings["cost_lengths"], settings["cost_head_sizes"]
    cells = {(row["d"], row["n"]): row for row in results["costs"]}
    body = [
        [f"{n:,}"] + [f"{cells[d, n]['counted']:,.0f} ({cells[d, n]['softmax']:,.0f})" for d in sizes] for n in lengths
    ]
    longest = np.log([[cells[d, lengths[-1]]["counted"], d] for d in sizes])
    grows = ", ".join(f"{flops / size:.2f}" for flops, size in np.diff(longest, axis=0))
    parts.append(
        "**FLOPs of a token and head, in brackets those of softmax attention**\n\n"
        + markdown_table(["n", *(f"d = {d}" for d in sizes)], body)
        + f"\n\nExponents of d at the longest, from size to size: {grows}."
    )
    return "\n\n".join(parts)


def shown(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def plot(results: dict, image: Path) -> None:
    """Ranks against n for random and for trained heads; FLOPs of a token against n and against d."""
    figure, axes = new_figure(2, 2, figsize=(15, 8.5))
    (random, trained), (by_length, by_size) = axes
    settings = results["settings"]
    sizes = settings["head_sizes"]
    drawn = {family: shades(family, len(sizes)) for family in ("softmax_lm", SQUARED)}
    half = {"color": "#DDDDDD", "linewidth": 9, "zorder": 0}  # under all that reach it
    for i, d in enumerate(sizes):
        rows = [row for row in results["random"] if row["d"] == d]
        for kernel, line in zip(KERNELS, LINES):  # ranks that are alike show through each other
            means = [sum(row[kernel]) / len(row[kernel]) for row in rows]
            colour = drawn["softmax_lm" if kernel == "softmax" else SQUARED][i]
            random.plot([row["n"] for row in rows], means, line, marker=MARKERS[i], color=colour, **nest(i, len(sizes)),
                        label=f"{kernel}, d = {d}")  # fmt: skip
    random.plot(settings["lengths"], [n / 2 for n in settings["lengths"]], label="n / 2", **half)
    random.set(title="random queries and keys", ylabel="rank of the block")
    for i, model in enumerate(results["models"]):
        softmax = any("shifted" in row for row in model["lengths"])  # what the squared kernel would give too
        for kind, line in (("own", "-"), ("shifted", "--")):
            rows = [row for row in model["lengths"] if kind in row]
            if not rows:
                continue
            heads = [[value for layer in row[kind] for value in layer] for row in rows]
            lengths = [row["n"] for row in rows]
            label = model["model"] if kind == "own" else f"{model['model']}: squared kernel on its q, k"
            colour = COLOURS["softmax_lm" if softmax and kind == "own" else SQUARED]
            look = {"marker": MARKERS[i], "color": colour, **nest(i, len(results["models"]))}
            means, least, most = ([of(x) for x in heads] for of in (np.mean, min, max))
            trained.plot(lengths, means, line, label=label, **look)
            if least != most:
                trained.fill_between(lengths, least, most, color=colour, alpha=0.12)
        bound = trained.axhline(model["bound"], color=COLOURS[SQUARED], linewidth=0.7, linestyle=":")
    bound.set_label("(d + 1)(d + 2) / 2 of each")
    trained.plot(settings["lengths"], [n / 2 for n in settings["lengths"]], label="n / 2", **half)
    trained.set(title="heads of checkpoints: mean, least and most", ylabel="rank of the block")
    for i, d in enumerate(settings["cost_head_sizes"]):
        rows = [row for row in results["costs"] if row["d"] == d]
        for name, family in (("counted", SQUARED), ("softmax", "softmax_lm")):
            label, line = f"{'squared' if name == 'counted' else name}, d = {d}", LINES[i % len(LINES)]
            colour = shades(family, len(settings["cost_head_sizes"]))[i]
            by_length.plot([row["n"] for row in rows], [row[name] for row in rows], line, color=colour, label=label)
    by_length.set(title="by length", ylabel="FLOPs of a token and head")
    longest = [row for row in results["costs"] if row["n"] == max(settings["cost_lengths"])]
    sizes = [row["d"] for row in longest]
    look = {"marker": "o", "color": COLOURS[SQUARED]}
    by_size.plot(sizes, [row["counted"] for row in longest], label="squared kernel", **look)
    for power, line in ((2, ":"), (3, "--")):
        scale = longest[0]["counted"] / sizes[0] ** power
        by_size.plot(sizes, [scale * d**power for d in sizes], line, color="grey", label=f"grows as d^{power}")
    by_size.set(title="by head size", ylabel="FLOPs of a token and head", xlabel="d", xticks=sizes)
    for panel in axes.flat:
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        if panel is not by_size:
            panel.set_xlabel("n")
    by_size.set_xticks(sizes, map(str, sizes))
    by_size.minorticks_off()
    figure.savefig(image, dpi=120)


def run(options) -> int:
    """Measure, write and print what plot_rank.py's options ask for; returns the exit status.

    Raises:
        ScriptError: as `read_passages`.
    """
    text = ""
    if options.text_file is not None:
        text = "".join(read_text(path) for path in find_files([options.text_file], "text_file"))
    for name in options.model_name_or_path:  # what is wrong with one is told before any is measured
        read_passages(options, name, text)
    results = {
        "machine": machine_info(),
        "settings": {name: value for name, value in asdict(options).items() if name != "output_dir"},
        "models": [model_ranks(options, name, text) for name in options.model_name_or_path],
        "random": random_ranks(options),
        "costs": costs(options),
    }
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "rank.json", results)
    plot(results, output_dir / "rank.png")
    print(markdown(results))
    for name in ("rank.png", "rank.json"):
        print(output_dir / name)
    return 0
