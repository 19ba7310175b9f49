"""The claims of the sources, one a row, with verdicts computed from results files: nothing here types a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import yaml

from ordnung.scripts.benchmarks.variants import copies_its_cache
from ordnung.scripts.common.options import CONFIGS
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.experiments.compare import EQUAL
from ordnung.scripts.experiments.verdicts import MARGIN, everywhere, together
from ordnung.scripts.reports.findings import (
    SPARSE,
    Finding,
    answers,
    best_control,
    better,
    competitors,
    grows,
    low_rank,
    memory,
    mixes,
    no_experiment,
    on_par,
    perplexity,
    recall,
    sparse_faster,
    sparse_growth,
    speed,
    squared_cost,
    squared_faster,
    squared_ranks,
    squared_steady,
    steadier,
    steady,
    steady_decode,
)
from ordnung.scripts.reports.results import (
    ANSWERS,
    CONV_BENCHMARKS,
    ENCODER_BENCHMARKS,
    FEED_FORWARD,
    FUNCTION,
    GRID,
    HOPS,
    PROTOCOL,
    TABLE2,
    Timings,
    commits,
    has_results,
    load,
    machines,
)

ARTICLE = "MikeyBeez, DifferentialLR, [zenodo 18498944](https://zenodo.org/records/18498944)"
LINFORMER = "Wang et al. 2020, [arXiv 2006.04768](https://arxiv.org/abs/2006.04768)"
PROPOSAL = "Yam Peleg"
PULLBACK = "Lee 2026, The d² Pullback Theorem, [zenodo 18842724](https://doi.org/10.5281/zenodo.18842724)"
LONGFORMER = "Beltagy et al. 2020, [arXiv 2004.05150](https://arxiv.org/abs/2004.05150)"
BIGBIRD = "Zaheer et al. 2020, [arXiv 2007.14062](https://arxiv.org/abs/2007.14062)"
LONG = 90  # minutes of one core: 45 of two
CONTENT_SCORES = ("additive", "bilinear", "distance", "mlp")  # of the ladder, beside the dot product


@dataclass(frozen=True)
class Claim:
    """`rested` is what the source gives for it; `judge` makes one verdict of those of the findings."""

    family: str
    quote: str
    source: str
    rested: str
    findings: Sequence[Finding]
    judge: Callable[[Sequence[str]], str] = together

    @property
    def verdict(self) -> str:
        return self.judge([finding.verdict for finding in self.findings])


def ours(family: str, quote: str, findings: Sequence[Finding], judge=together) -> Claim:
    """A claim of this project, which rests on nothing else."""
    return Claim(family, quote, "ours", "-", findings, judge)


def decode_claims(name: str, file: str, longest: int) -> list[Claim]:
    """Ours, of generation: a token's time does not grow, and is below attention's after `longest` tokens."""
    against = "attention, the faster of its caches"
    faster = [speed([file], "decode", name, "softmax_lm", longest, 1.0, against)]
    if copies_its_cache(which for task, which, _ in Timings(file).rows if task == "decode"):
        faster = no_experiment("attention with a static cache")
    return [
        ours(name, "a token takes no longer after a longer context", [steady_decode([file], name)]),
        ours(name, f"a token is faster than attention's after {longest:,} tokens", faster),
    ]


def protocol(name: str, bound: float = 0.0) -> list[Finding]:
    """Whether a variant's perplexity is lower than that of attention with rope by `bound`: equal steps, equal FLOPs."""
    return [
        perplexity(PROTOCOL, name + end, "softmax", bound, f"text, attention with rope, equal {what}")
        for end, what in (("", "parameters and steps"), (EQUAL, "FLOPs"))
    ]


def ladder(names: Sequence[str]) -> list[Finding]:
    """Whether these rungs of the ladder of scores are no worse than the dot product: in language, and in recall."""
    found = []
    for name in names:
        found.append(perplexity("ladder_compare", name, "dot", MARGIN, f"{name} score: text"))
        found.append(recall("ladder_recall", name, "dot", 24, f"{name} score: ", worse=True))
    return found


def conv_claims() -> list[Claim]:
    attention = {"eager": "attention that stores its scores", "sdpa": "fused attention"}
    faster = [
        speed(CONV_BENCHMARKS, "mixer", f"source_{part}_conv", f"source_{part}_{kind}", 2048, 5.5, f"{what}, {which}")
        for part, what in (("mixer", "mixer"), ("model", "model"))
        for kind, which in attention.items()
    ]
    lower = [
        perplexity("conv_lm_compare", "conv_source", f"softmax_{name}", -0.032, f"attention {which}")
        for name, which in (("no_positions", "without positions"), ("learned", "learned"))
    ]
    lower += protocol("conv_source", -0.032)
    name, reading = "conv_lm", "our reading of the article"
    robust = [
        steadier("conv_lm_compare", "conv_source", "softmax_rope", "attention with rope, 300 steps"),
        steadier(PROTOCOL, "conv_source", "softmax", "attention with rope, 1,500 steps"),
    ]
    without = [recall("conv_lm_recall", "conv", "softmax_rope", pairs) for pairs in (2, 16)]
    without += protocol("conv_source", MARGIN)[:1] + ladder(("position", "convolution"))
    alone = [
        perplexity(FEED_FORWARD, "feed_forward", "both", MARGIN, "alone against with attention, equal parameters"),
        mixes(FEED_FORWARD, "feed_forward", "alone, below a bigram that counts"),
    ]
    return [
        Claim(name, "5.5× faster at 2,048 tokens", ARTICLE, "one run, attention that stores N×N scores", faster),
        Claim(name, "3.2 % lower perplexity", ARTICLE, "one unseeded run, attention without positions", lower),
        Claim(name, "more robust to train", ARTICLE, reading, robust),
        Claim(name, "content-dependent scores are unnecessary", ARTICLE, "that perplexity", without, everywhere),
        Claim(name, "the dot product is not special", ARTICLE, reading, ladder(CONTENT_SCORES)),
        Claim(name, "the FFN does the mixing", ARTICLE, reading, alone, everywhere),
        *decode_claims(name, "conv_lm_benchmark_decode", 32768),
        ours(name, "gated: no worse than attention on text", protocol("conv_gated")),
        ours(name, "attention in every second layer: no worse than attention on text", protocol("conv_hybrid")[:1]),
    ]


def linformer_claims() -> list[Claim]:
    name, encoder = "linformer_lm", "linformer_encoder"
    fused, stored = "softmax_encoder_sdpa", "softmax_encoder_eager"
    times = ((512, 1.5), (4096, 3.4), (16384, 8.6), (65536, 20))
    measured = [*ENCODER_BENCHMARKS, *([GRID] if has_results(GRID) else [])]
    faster = [
        speed(measured, "forward", encoder, other, length, bound, which)
        for other, which in ((f"{stored}_by_head", "stored scores, a head at a time"), (fused, "fused"))
        for length, bound in times
    ]
    less = [
        memory(measured, encoder, other, length, bound, which)
        for other, which in (
            (stored, "stored scores, all heads at once"),
            (f"{stored}_by_head", "stored scores, a head at a time"),
            (fused, "fused"),
        )
        for length, bound in ((4096, 14), (65536, 60))
    ]
    table = "Table 3, k = 128, one V100, stored scores"
    tasks = ("sst2", "qnli", "imdb")
    scores = [
        finding
        for variant in ("layerwise_64", "layerwise_128", "layerwise_256")
        for finding in on_par(TABLE2, variant, "softmax", tasks)
    ]
    shared = [better(TABLE2, "layerwise_64", f"{kind}_64", tasks) for kind in ("none", "headwise", "key_value")]
    ranks = [low_rank(exponent=True), low_rank(exponent=False)]
    text = protocol("linformer")[:1]
    return [
        Claim(name, "1.5×, 3.4×, 8.6× and 20× faster", LINFORMER, table, faster),
        Claim(name, "14× less memory at 4,096 tokens, 60× at 65,536", LINFORMER, table, less),
        Claim(name, "performs on par with standard Transformer models", LINFORMER, "Table 2, single runs", scores),
        Claim(
            name,
            "best accuracy result of all three parameter sharing strategies",
            LINFORMER,
            "Table 2, single runs",
            shared,
            everywhere,
        ),
        Claim(name, "can be approximated by a low-rank matrix", LINFORMER, "figure 1, no null", ranks),
        *decode_claims(name, "linformer_lm_causal", 65536),
        ours(name, "the causal form is no worse than attention", text),
    ]


def prefix_claims() -> list[Claim]:
    name, same = "cubic_prefix_lm", "same inference cost as today O(N²)"
    at_end, control = ("cubic", "equal_compute"), ("softmax", "equal_compute")
    function = best_control(FUNCTION)

    def sized(file: str, size: int, against: str, kind: str = "cubic") -> Finding:
        """Of hops or answers, at the end of training: variants are named by kind and size."""
        own, other = ((f"{which}_{size}", "equal_compute") for which in (kind, "softmax"))
        return answers(file, own, other, MARGIN, against)

    (text,) = protocol("cubic")[1:]
    variants = load(PROTOCOL)["settings"].get("variants", {}) if has_results(PROTOCOL) else {}
    if "prefix_stride" in variants.get("cubic", {}):
        text = replace(text, against=f"{text.against}, prefix_stride {variants['cubic']['prefix_stride']}")
    stronger = [
        answers(FUNCTION, at_end, function, MARGIN, f"7 hops, 3× the steps for attention ({function[0]})"),
        *(sized(HOPS, hops, f"{hops} hops, 3× the steps for attention") for hops in (2, 3, 4, 5, 6, 8, 9)),
        *(sized(HOPS, hops, f"{hops} hops, as many steps", "cubic_longer") for hops in (2, 4, 6, 8)),
        *(sized(ANSWERS, count, f"7 hops, {count} answers a sequence, equal FLOPs") for count in (2, 3, 5, 10)),
        answers("cubic_prefix_lm_pointer", at_end, control, MARGIN, "3 hops, ten answers, equal FLOPs"),
        answers("cubic_prefix_lm_triplets_short", at_end, control, MARGIN, "triplets of 10 tokens, equal FLOPs"),
        text,
    ]
    costs = [grows(task, name, "softmax_lm", which) for task, which in (("prefill", "a prompt"), ("decode", "a token"))]
    return [
        Claim(name, "insanely more powerful", PROPOSAL, "nothing measured", stronger),
        Claim(name, same, PROPOSAL, "nothing measured", costs),
    ]


def quadratic_claims() -> list[Claim]:
    name, scores = "quadratic_kernel_lm", "a count of parameters, a toy retrieval"
    cost = [
        squared_cost("d", 2),
        squared_cost("n", 0),
        *squared_ranks(squared=False),
        *squared_ranks(squared=True),
    ]
    sizes, file = (16, 32, 64), "quadratic_kernel_lm_compare"
    text = [
        perplexity(file, f"shifted{extras}", f"softmax{extras}", 0.0, f"softmax attention, {what}")
        for extras, what in (("", "both bare"), ("_extras", "both with norm, convolution and gate"))
    ]
    looked_up = [
        recall("quadratic_kernel_lm_recall", which, "softmax_16", 24, f"{which} against softmax_16: ")
        for which in ("csq_16", "shifted_16")
    ]
    return [
        Claim(name, "attention is an O(d²) problem", PULLBACK, scores, cost),
        Claim(name, "a squared score retrieves as softmax does", PULLBACK, "our reading", looked_up),
        ours(name, "a token takes no longer after a longer context", [squared_steady(d) for d in sizes]),
        ours(name, "faster than fused attention at 16,384 tokens", [squared_faster(d, 16384) for d in sizes]),
        ours(name, "faster from d² tokens on", [squared_faster(d, d**2) for d in sizes]),
        ours(name, "no worse than attention on text", text),
    ]


def sparse_claims() -> list[Claim]:
    name, kinds = "sparse_attention_lm", ("local", "local + global", "local + strided", "local + random", "all")
    counted = grows("train", name, "conv_lm", "local + global, FLOPs of training, against a convolution's, linear")
    both, control = "local + global", "softmax_rope"
    faster = [sparse_faster("attention", kind, "SDPA", 4096, 1.0) for kind in kinds]
    constant = [steady(competitors("decoding", both), SPARSE, f"decoding, {both}")]
    cached = "full attention, static"
    decoding = [sparse_faster("decoding", which, cached, 32768, 1.0) for which in ("local", both, "all")]
    linear = "an attention mechanism that scales linearly with sequence length"
    looked_up = [
        recall("sparse_attention_lm_recall", which, control, 16, f"{which} against full attention: ")
        for which in ("local", "global_8", "stride_2", "stride_4", "random_2")
    ]
    return [
        Claim(name, linear, LONGFORMER, "measured by its authors", [counted, sparse_growth(both)]),
        Claim(name, "reduces this quadratic dependency to linear", BIGBIRD, "a proof", [sparse_growth(kinds[3])]),
        ours(name, "each kind is faster than fused attention at 4,096 tokens", faster),
        ours(name, "a token takes no longer after a longer context", constant),
        ours(name, "a token is faster than attention's after 32,768 tokens", decoding),
        ours(name, "each kind recalls what full attention does", looked_up, everywhere),
        ours(name, "no worse than attention on text", protocol("sparse")[:1]),
    ]


FAMILIES = {
    "conv_lm": conv_claims,
    "linformer_lm": linformer_claims,
    "cubic_prefix_lm": prefix_claims,
    "quadratic_kernel_lm": quadratic_claims,
    "sparse_attention_lm": sparse_claims,
}


def all_claims() -> list[Claim]:
    return [claim for claims in FAMILIES.values() for claim in claims()]


def markdown(claims: Sequence[Claim]) -> str:
    """A row a claim: what was claimed, on what it rested, what was measured against which lines, and the verdict."""
    body = []
    for claim in claims:
        numbers = [f"{f.against}: {f.number} → {f.verdict}" for f in claim.findings]
        body.append([claim.family, f'"{claim.quote}"', claim.source, claim.rested, "<br>".join(numbers), claim.verdict])
    return markdown_table(["family", "claim", "source", "rested on", "measured", "verdict"], body, padded=False)


def evidence(claims: Sequence[Claim]) -> str:
    """Where each number stands: results file and key, the command that made it, and the commit."""
    body = []
    for claim in claims:
        for finding in claim.findings:
            for file in [finding.file, *finding.more]:
                if file is None or not has_results(file):
                    continue
                place = f"[{file}.json](results/{file}.json): {finding.key}"
                commands = "<br>".join(f"`{machine['command']}`" for machine in machines(file))
                row = [f'"{claim.quote}"', place, commands, commits(file)]
                if row not in body:
                    body.append(row)
    return markdown_table(["claim", "results", "command", "commit"], body, padded=False)


def effort() -> str:
    """How long the experiments behind the page take, by their estimates."""
    experiments = yaml.safe_load((CONFIGS / "claims.yaml").read_text(encoding="utf-8"))["experiments"]
    minutes = {name: experiment["minutes"] for name, experiment in experiments.items()}
    longer = sorted((name for name in minutes if minutes[name] > LONG), key=lambda name: -minutes[name])
    named = ", ".join(f"{name} ({minutes[name] / 60:.1f})" for name in longer)
    return (
        f"{len(minutes)} experiments, {sum(minutes.values()) / 60:.0f} hours of one CPU core in all by the estimates "
        f"of claims.yaml; those of more than {LONG} minutes, in hours: {named}."
    )


def of_family(family: str) -> str:
    """The verdicts of one family in a paragraph, for its card."""
    words = "; ".join(f'"{claim.quote}": **{claim.verdict}**' for claim in FAMILIES[family]())
    return f"[Computed](claims.md) from the results files: {words}."
