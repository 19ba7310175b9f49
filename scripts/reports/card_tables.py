"""The tables and figures of README.md and the model cards by name, each made from files of model_cards/results."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ordnung.scripts.benchmarks import growth
from ordnung.scripts.benchmarks import prefix as bench_prefix
from ordnung.scripts.benchmarks import quadratic as bench_quadratic
from ordnung.scripts.benchmarks import report as bench_report
from ordnung.scripts.benchmarks import sparse as bench_sparse
from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import estimate, markdown_table, paragraphs, ranged, seeds_described
from ordnung.scripts.experiments import compare, prefix_tasks, recall, transfer
from ordnung.scripts.experiments.ngrams import NAMES as NGRAMS
from ordnung.scripts.experiments.verdicts import changes
from ordnung.scripts.linearizing import report
from ordnung.scripts.reports import (
    claims,
    grid,
    growing,
    ladder,
    linearized,
    lowrank,
    patterns,
    pooling,
    rank,
    widths,
    window,
)
from ordnung.scripts.reports import mixing as plot_mixing
from ordnung.scripts.reports.findings import LOW_RANK
from ordnung.scripts.reports.results import (
    ANSWERS,
    CAUSAL_BENCHMARKS,
    CONV_BENCHMARKS,
    ENCODER_BENCHMARKS,
    FEED_FORWARD,
    FUNCTION,
    GRID,
    HOPS,
    PROTOCOL,
    TABLE2,
    Timings,
    has_results,
    load,
    load_benchmark,
    load_compare,
)


def perplexity_change(results: dict, name: str, other: str) -> str:
    """How much higher the perplexity of `name` is than that of `other` with the same seed."""
    own, reference = (results["variants"][which]["eval_perplexity"]["values"] for which in (name, other))
    return changes(own, reference).text(1, 100, " %")


def conv_claims() -> str:
    """What the article claims and the design aims at, beside what was measured."""
    timings, body = Timings(*CONV_BENCHMARKS), []

    for part, what in (("mixer", "the mixer alone"), ("model", "the whole model, forward")):
        for kind, which in (("eager", "unfused"), ("sdpa", "fused")):
            measured = timings.ratio("mixer", f"source_{part}_conv", f"source_{part}_{kind}", 2048)
            body.append([f"5.5× faster than attention at 2048 tokens: {what}, against {which} attention", measured])

    for task, what in (("forward", "forward"), ("train", "training step")):
        for length in (2048, 8192, 32768):
            for other, which in (("gpt2_sdpa", "GPT-2"), ("gpt2_sdpa_gelu", "GPT-2 with our activation")):
                if timings.rows.get((task, other, length)):
                    ratio = timings.ratio(task, "conv_lm", other, length)
                    body.append([f"ConvLM against {which}, SDPA, {what} at {length} tokens", ratio])

    for name, which in (("conv_lm", "ConvLM"), ("gpt2_sdpa", "for comparison, GPT-2")):
        body.append(
            [f"time of one decoded token does not grow with the context: {which}", timings.growth("decode", name)]
        )

    quality = load("conv_lm_compare")
    for name, which in (("conv_source", "the article's mixer"), ("conv_gated", "gated"), ("conv_hybrid", "hybrid")):
        for other, without in (
            ("softmax_no_positions", "without positions (as in the article)"),
            ("softmax_learned", "with learned positions"),
            ("softmax_rope", "with rope"),
        ):
            body.append(
                [
                    f"3.2 % lower perplexity than softmax attention: {which}, against attention {without}",
                    perplexity_change(quality, name, other),
                ]
            )
    return markdown_table(["claim or aim", "measured; speed-ups with the ratio of FLOPs in brackets"], body)


def linformer_claims() -> str:
    """What the paper and the design aim at, beside what was measured."""
    encoder, body = Timings(*ENCODER_BENCHMARKS), []
    for length in (512, 4096, 16384, 65536):
        ratio = encoder.ratio("forward", "linformer_encoder", "softmax_encoder_sdpa", length)
        body.append([f"encoder layer against fused attention (SDPA), {length} tokens", ratio])
    for length, paper in ((512, 1.5), (4096, 3.4), (16384, 8.6)):
        for kind, how in (("eager", ""), ("eager_by_head", ", a head at a time")):
            if encoder.rows.get(("forward", f"softmax_encoder_{kind}", length)):
                ratio = encoder.ratio("forward", "linformer_encoder", f"softmax_encoder_{kind}", length)
                body.append([f"paper: {paper}× against attention that stores its scores{how}, {length} tokens", ratio])
    returned = Timings("linformer_lm_encoder_returned")
    for timings, lengths, how in (
        (encoder, (512, 4096, 16384, 65536), ""),
        (returned, (512, 4096, 16384), ", freed memory returned at once"),
    ):
        for name, chunks in (("linformer_encoder", ""), ("linformer_encoder_chunked", ", feed-forward in chunks")):
            for length in lengths:
                share = timings.memory("forward", name, "softmax_encoder_sdpa", length)
                body.append([f"encoder layer's peak memory, share of SDPA's{chunks}{how}, {length} tokens", share])
    share = encoder.memory("forward", "linformer_encoder", "softmax_encoder_eager", 4096)
    body.append(["its peak memory, share of that of stored scores, 4096 tokens (paper: 1 / 14)", share])

    causal = Timings(*CAUSAL_BENCHMARKS)
    for length in (512, 4096, 16384, 65536):
        ratio = causal.ratio("forward", "linformer_lm", "softmax_lm", length)
        body.append([f"causal model of one layer against SDPA, {length} tokens", ratio])
    for length in (4096, 16384):
        ratio = Timings("linformer_lm_training").ratio("train", "linformer_lm", "softmax_lm", length)
        body.append([f"causal training step of two layers against SDPA, {length} tokens", ratio])
    for run, how in (("", ""), ("_returned", ", freed memory returned at once")):
        training = Timings(f"linformer_lm_training{run}")
        for length in (4096, 16384):
            share = training.memory("train", "linformer_lm", "softmax_lm", length)
            body.append([f"its peak memory, share of SDPA's{how}, {length} tokens", share])
    for name, which in (("linformer_lm", "causal LinformerLM"), ("softmax_lm", "for comparison, SoftmaxLM")):
        body.append([f"time of one decoded token against the context: {which}", causal.growth("decode", name)])

    quality = load("linformer_lm_compare")
    for name, which in (
        ("linformer", "causal LinformerLM"),
        ("linformer_mean_pool", "with segment means"),
        ("local_only", "its window alone"),
    ):
        if name in quality["variants"]:
            change = perplexity_change(quality, name, "softmax_rope")
            body.append([f"perplexity against SoftmaxLM with rope: {which}", change])
    return markdown_table(["claim or aim", "measured; speed-ups with the ratio of FLOPs in brackets"], body)


def prefix_claims() -> str:
    """The claim, beside what was measured."""
    body = []
    for run, what in (
        ("pointer", "pointers, answers after the most hops"),
        ("triplets_short", "Triplet-Counting, sequences of 10 tokens"),
        ("triplets", "Triplet-Counting, sequences of 64 tokens"),
    ):
        for when, how in (("equal_steps", "equal steps"), ("equal_compute", "equal FLOPs")):
            cells = []
            for name, result in load(f"cubic_prefix_lm_{run}")["variants"].items():
                point = result[when]
                score = point["answers_by_hops"][-1] if run == "pointer" else point["answers"]
                cells.append(f"{name} {estimate(score, 3)}")
            body.append([f"{what}, {how}", "; ".join(cells)])
    text = load("cubic_prefix_lm_compare")
    for name, how in (("cubic", "equal steps"), ("stride_8", "stride 8, equal steps")):
        body.append([f"perplexity on text against SoftmaxLM, {how}", perplexity_change(text, name, "softmax_rope")])
    change = perplexity_change(text, "cubic", "softmax_rope_equal_compute")
    body.append(["perplexity on text against SoftmaxLM, equal FLOPs", change])
    return markdown_table(["insanely more powerful?", "measured"], body)


def function_table(results: dict) -> str:
    """Hops along a function, with what fewer hops would answer."""
    shares = ", ".join(f"{hops} hops {share:.2f}" for hops, share in enumerate(results["fewer_hops"]))
    lines = f"A walk along a random function soon goes round, so fewer hops give many answers too: {shares}."
    return f"{prefix_tasks.markdown(results)}\n\n{lines}"


def benchmark_table(*names: str) -> str:
    return bench_report.markdown(load_benchmark(*names)).strip()


MINILM = "transfer_minilm"
MORE_TASKS = f"transfer --config {MINILM} --task_name imdb qnli qqp mnli"


def transfer_table(*names: str, file: str = "transfer") -> str:
    """Fine-tuned on tasks: these variants, or all."""
    results = load(file)
    names = names or tuple(results["variants"])
    chosen = {name: results["variants"][name] for name in names}
    return paragraphs(transfer.markdown({**results, "variants": chosen}), *counted_text(file, chosen))


def counted_text(file: str, variants: dict[str, dict]) -> list[str]:
    """What n-grams that counted the pretraining tokens reach in bits per byte, where that was computed."""
    if not has_results(f"{file}_ngrams"):
        return []
    found = {name: variant["pretraining"]["evaluation"] for name, variant in variants.items()}
    any_one = next(iter(found.values()))
    bits = any_one["eval_bits_per_byte"] / any_one["eval_loss"]  # of a nat a token
    ngrams = load(f"{file}_ngrams")["ngrams"]
    lines = {name: bits * math.log(ngrams[name]["mean"]) for name in NGRAMS.values() if name in ngrams}
    below = [name for name, evaluation in found.items() if evaluation["eval_bits_per_byte"] < lines["trigram"]]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in lines.items())
    named = ", ".join(below) or "none"
    return [f"Held-out bits per byte of what counted the same tokens: {shown}. Below its trigram: {named}."]


def glue_table(results: dict) -> str:
    """Scores on tasks alone, without costs."""
    seeds = f"Scores in %, {seeds_described(results['seeds'])} of fine-tuning. {described(results['machine'])}"
    return f"{markdown_table(['', *results['task_name']], transfer.score_rows(results))}\n\n{seeds}"


def throughput_table() -> str:
    """Fine-tuning against a bare accelerate loop."""
    results = load("finetune_throughput")
    speeds = results["examples_per_second"]
    body = [[results["task"], f"{speeds['ours']:,.0f}", f"{speeds['bare']:,.0f}", ranged(results["ratios"], 3)]]
    header = ["task", "examples/s", "of the bare loop", f"time, median ratio of {len(results['ratios'])} rounds"]
    return f"{described(results['machine'])}\n\n{markdown_table(header, body)}"


def recipes_table() -> str:
    """Ways to fine-tune against the plain loop, and prediction against a loop over batches in the file's order."""
    results = load("finetune_recipes")
    speeds, body = results["examples_per_second"], []
    timed = {name: (recipe["each"], "the plain loop") for name, recipe in results["recipes"].items()}
    timed = {"the plain loop": (results["ratios"], "a bare accelerate loop"), **timed}
    timed["predict"] = (results["predict"]["ratios"], "a bare batched loop")
    for name, (ratios, other) in timed.items():
        speed = speeds["ours" if name == "the plain loop" else name]
        body.append([name, f"{speed:,.0f}", other, ranged(ratios, 2)])
    header = ["", "examples/s", "beside", f"time, median ratio of {len(results['ratios'])} rounds"]
    return f"{described(results['machine'])}\n\n{markdown_table(header, body)}"


def if_run(
    name: str,
    told: Callable[[dict], str],
    shown: str | None = None,
    command: str | None = None,
    figures: str = "figures",
) -> str:
    """The tables of a recipe's results and a picture of `shown`, if any; in words that it is not run yet.

    Args:
        figures: the folder of pictures, from the card.
    """
    if not has_results(name):
        command = command or f"{name.partition('_')[0]} --config {name}"
        return f"Not run yet: `ordnung {command}`."
    return told(load(name)) + (f"\n\n![{shown}]({figures}/{name}.png)" if shown else "")


def task_table(name: str, told: Callable[[dict], str], against: str, recipe: str) -> Callable[[], str]:
    """`if_run` of prefix_tasks.py, in a folder beside that of the figures."""
    shown, command = f"Share of right answers against {against}", f"prefix-tasks --config {recipe}"
    return partial(if_run, name, told, shown, command, "../figures")


# Linearizations of SmolLM2-135M by the name to show; the first is told at length.
DECODERS = {
    "window 64 and the first 4": "linearized_smollm2_sparse",
    "the same, full attention in 6 layers": "linearized_smollm2_hybrid_6",
    "the same, full attention in 10 layers": "linearized_smollm2_hybrid_10",
    "Linformer": "linearized_smollm2_linformer",
    "squared kernel": "linearized_smollm2_quadratic",
    "gated convolution": "linearized_smollm2_conv",
}


# And of all-MiniLM-L6-v2.
ENCODERS = {
    "gated convolution": "linearized_minilm_conv",
    "the same, attention in three layers": "linearized_minilm_hybrid",
    "gated convolution, causal": "linearized_minilm_conv_causal",
    "Linformer, 16 rows": "linearized_minilm_linformer_16",
    "Linformer, 32 rows": "linearized_minilm_linformer_32",
    "window of 8 to each side and the first": "linearized_minilm_sparse",
}


def encoders_table() -> str:
    """Linearized sentence encoders side by side, as far as they are run."""
    found = {name: load(file) for name, file in ENCODERS.items() if has_results(file)}
    left = [name for name in ENCODERS if name not in found]
    return linearized.encoders(found) + (f"\n\nNot run yet: {'; '.join(left)}." if left else "")


def run_decoders() -> dict[str, dict]:
    return {name: load(file) for name, file in DECODERS.items() if has_results(file)}


def decoders_table() -> str:
    """Linearized language models side by side, as far as they are run, and the first of them at length."""
    found = run_decoders()
    parts = [linearized.decoders(found)] if found else []
    if left := [name for name in DECODERS if name not in found]:
        parts.append(f"Not run yet: {'; '.join(left)}.")
    if found:
        name, run = next(iter(found.items()))
        parts += [f"In more detail, {name}:", linearized.one_decoder(run)]
        parts.append("![Loss by position, and against tokens trained on](figures/linearized_decoder.png)")
    return "\n\n".join(parts)


def draw_decoder(image: Path):
    report.draw(load(next(file for file in DECODERS.values() if has_results(file))), image)


def packing_table(name: str) -> str:
    """Time of a packed token against one of a full row, and one of the padded batch of the same documents."""
    results = load(name)
    header = ["family", "documents", "mean tokens", "rows filled", "packed / full", "packed / padded"]
    body = []
    for case in results["cases"]:
        filled = case["tokens"]["packed"] / case["tokens"]["full"]
        ratios = [ranged(case[f"packed_per_token_of_{other}"]["each"], 2) for other in ("full", "padded")]
        sizes = [case["model_type"], str(case["documents"]), f"{case['mean_length']:.0f}", f"{filled:.0%}"]
        body.append(sizes + ratios)
    return f"{described(results['machine'])}\n\n{markdown_table(header, body)}"


TABLES = {
    "packing_sentences": partial(packing_table, "packing_sentences"),
    "packing_reviews": partial(packing_table, "packing_reviews"),
    "finetune_throughput": throughput_table,
    "finetune_recipes": recipes_table,
    "pooling": partial(if_run, "pooling", pooling.markdown, command="transfer --config transfer_pooling"),
    "transfer": transfer_table,
    "transfer_longer": partial(transfer_table, file="transfer_longer"),
    "transfer_minilm": partial(if_run, MINILM, transfer.markdown),
    "glue": partial(if_run, MINILM, glue_table),
    "smollm2": lambda: linearized.decoders_in_short(run_decoders()),
    "transfer_minilm_more": partial(if_run, f"{MINILM}_more", transfer.markdown, command=MORE_TASKS),
    "conv_transfer": partial(transfer_table, "conv", "softmax"),
    "linformer_transfer": partial(transfer_table, "linformer", "softmax"),
    "prefix_transfer": partial(transfer_table, "cubic_stride_32", "softmax"),
    "claims": conv_claims,
    "benchmark": partial(benchmark_table, *CONV_BENCHMARKS),
    "compare": lambda: compare.markdown(load_compare("conv_lm_compare")),
    "recall": lambda: recall.markdown(load("conv_lm_recall")),
    "linformer_claims": linformer_claims,
    "linformer_encoder": partial(benchmark_table, *ENCODER_BENCHMARKS),
    "linformer_table2": partial(if_run, TABLE2, transfer.markdown, command="transfer --config transfer_linformer"),
    "linformer_grid": partial(if_run, GRID, grid.markdown, command="claims --config claims --only linformer_lm_grid"),
    "linformer_causal": partial(benchmark_table, *CAUSAL_BENCHMARKS),
    "linformer_training": partial(benchmark_table, "linformer_lm_training"),
    "linformer_compare": lambda: compare.markdown(load_compare("linformer_lm_compare")),
    "linformer_recall": lambda: recall.markdown(load("linformer_lm_recall")),
    "linformer_spectrum": lambda: plot_mixing.markdown(load("linformer_lm_spectrum")),
    "prefix_benchmark": lambda: bench_prefix.markdown(load("cubic_prefix_lm_benchmark")),
    "prefix_pointer": lambda: prefix_tasks.markdown(load("cubic_prefix_lm_pointer")),
    "prefix_function": task_table(FUNCTION, function_table, "steps and FLOPs", "tasks_function"),
    "prefix_hops": task_table(HOPS, prefix_tasks.markdown, "hops", "tasks_function_hops"),
    "prefix_answers": task_table(ANSWERS, prefix_tasks.markdown, "answers a sequence", "tasks_function_answers"),
    "prefix_memory": partial(benchmark_table, "cubic_prefix_lm_memory"),
    "prefix_claims": prefix_claims,
    "prefix_triplets_short": lambda: prefix_tasks.markdown(load("cubic_prefix_lm_triplets_short")),
    "prefix_triplets": lambda: prefix_tasks.markdown(load("cubic_prefix_lm_triplets")),
    "prefix_compare": lambda: compare.markdown(load_compare("cubic_prefix_lm_compare")),
    "sparse_patterns": patterns.markdown,
    "sparse_claims": lambda: bench_sparse.claims(load("sparse_attention_lm_bench")),
    "sparse_bench": lambda: bench_sparse.markdown(load("sparse_attention_lm_bench")),
    "sparse_recall": lambda: recall.markdown(load("sparse_attention_lm_recall")),
    "sparse_imdb": lambda: window.markdown(
        *(load(f"sparse_attention_lm_imdb{which}") for which in ("", "_whole", "_time"))
    ),
    "quadratic_claims": lambda: bench_quadratic.claims(load("quadratic_kernel_lm_bench")),
    "quadratic_bench": lambda: bench_quadratic.markdown(load("quadratic_kernel_lm_bench")),
    "quadratic_rank": lambda: rank.markdown(load("quadratic_kernel_lm_rank")),
    "quadratic_recall": lambda: recall.markdown(load("quadratic_kernel_lm_recall")),
    "quadratic_compare": lambda: compare.markdown(load("quadratic_kernel_lm_compare")),
    "linearized_decoders": decoders_table,
    "linearized_encoders": encoders_table,
    "linearized_sinks": lambda: linearized.converted(
        {
            "window 64": load("linearized_sinks_sparse_0"),
            "window 64 and the first 4": load("linearized_sinks_sparse_4"),
            "Linformer, window 33 to 64, 128 slots": load("linearized_sinks_linformer_0"),
            "the same and the first 4": load("linearized_sinks_linformer_4"),
        }
    ),
    "linearized_encoder_layers": lambda: report.layer_table(load("linearized_minilm_conv")),
    "protocol": partial(if_run, PROTOCOL, compare.markdown, "Held-out loss by position"),
    "feed_forward": partial(if_run, FEED_FORWARD, compare.markdown, "Held-out loss by position"),
    "sizes": partial(if_run, widths.SIZES, widths.sizes_markdown, "Held-out loss against training FLOPs"),
    "capacity": partial(if_run, widths.CAPACITY, widths.capacity_markdown, "Recall against bytes of state"),
    "growth": lambda: growth.markdown(load("growth")),
    "growth_measured": growing.markdown,
    "ladder": ladder.markdown,
    "linformer_lowrank": lambda: lowrank.markdown(load(LOW_RANK)),
    "all_claims": lambda: claims.markdown(claims.all_claims()),
    "claims_effort": claims.effort,
    "claims_evidence": lambda: claims.evidence(claims.all_claims()),
    **{f"verdicts_{family}": partial(claims.of_family, family) for family in claims.FAMILIES},
}


FIGURES = {
    "conv_lm_benchmark": lambda image: bench_report.plot(load_benchmark(*CONV_BENCHMARKS), image),
    "conv_lm_compare": lambda image: compare.plot(load_compare("conv_lm_compare"), image),
    "conv_lm_recall": lambda image: recall.plot(load("conv_lm_recall"), image),
    "linformer_lm_encoder": lambda image: bench_report.plot(load_benchmark(*ENCODER_BENCHMARKS), image),
    "linformer_lm_causal": lambda image: bench_report.plot(load_benchmark(*CAUSAL_BENCHMARKS), image),
    "linformer_lm_compare": lambda image: compare.plot(load_compare("linformer_lm_compare"), image),
    "linformer_lm_recall": lambda image: recall.plot(load("linformer_lm_recall"), image),
    "linformer_lm_spectrum": lambda image: plot_mixing.draw_spectrum(load("linformer_lm_spectrum"), image),
    "cubic_prefix_lm_function": lambda image: prefix_tasks.plot(load(FUNCTION), image),
    HOPS: lambda image: prefix_tasks.plot_sizes(load(HOPS), image),
    ANSWERS: lambda image: prefix_tasks.plot_sizes(load(ANSWERS), image),
    "cubic_prefix_lm_pointer": lambda image: prefix_tasks.plot(load("cubic_prefix_lm_pointer"), image),
    "cubic_prefix_lm_triplets_short": lambda image: prefix_tasks.plot(load("cubic_prefix_lm_triplets_short"), image),
    "cubic_prefix_lm_triplets": lambda image: prefix_tasks.plot(load("cubic_prefix_lm_triplets"), image),
    "cubic_prefix_lm_compare": lambda image: compare.plot(load_compare("cubic_prefix_lm_compare"), image),
    "sparse_attention_lm_patterns": patterns.plot,
    "sparse_attention_lm_recall": lambda image: recall.plot(load("sparse_attention_lm_recall"), image),
    "quadratic_kernel_lm_bench": lambda image: bench_quadratic.plot(load("quadratic_kernel_lm_bench"), image),
    "quadratic_kernel_lm_rank": lambda image: rank.plot(load("quadratic_kernel_lm_rank"), image),
    "quadratic_kernel_lm_recall": lambda image: recall.plot(load("quadratic_kernel_lm_recall"), image),
    "quadratic_kernel_lm_compare": lambda image: compare.plot(load("quadratic_kernel_lm_compare"), image),
    "linformer_lm_lowrank": lambda image: lowrank.plot(load(LOW_RANK), image),
    "ladder": ladder.plot,
    "linearized_decoder": draw_decoder,
    PROTOCOL: lambda image: compare.plot(load(PROTOCOL), image),
    FEED_FORWARD: lambda image: compare.plot(load(FEED_FORWARD), image),
    widths.SIZES: lambda image: widths.sizes_plot(load(widths.SIZES), image),
    widths.CAPACITY: lambda image: widths.capacity_plot(load(widths.CAPACITY), image),
    "growth": lambda image: growth.plot(load("growth"), image),
    "growth_measured": growing.plot,
}
