"""The claims of the sources, one a row, with verdicts computed from results files: nothing here types a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ordnung.scripts.benchmarks.variants import copies_its_cache
from ordnung.scripts.experiments.verdicts import (
    MARGIN,
    OPEN,
    Interval,
    at_least,
    at_most,
    beyond_counting,
    changes,
    equal,
    everywhere,
    interval,
    together,
)
from ordnung.scripts.reports.results import (
    CONV_BENCHMARKS,
    ENCODER_BENCHMARKS,
    FUNCTION,
    Timings,
    has_results,
    load,
    load_compare,
)

ARTICLE = "MikeyBeez, DifferentialLR, [zenodo 18498944](https://zenodo.org/records/18498944)"
LINFORMER = "Wang et al. 2020, [arXiv 2006.04768](https://arxiv.org/abs/2006.04768)"
PROPOSAL = "Yam Peleg"
SAME_ORDER = 0.1  # exponents that differ by less are the same order of growth
STEADY = 0.1  # relative: a time that changes by less does not grow


@dataclass(frozen=True)
class Finding:
    """One measurement of a claim. `key` says where in which results file it stands, `file` is that file's stem."""

    against: str
    number: str
    verdict: str
    file: str | None = None
    key: str = ""


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


def no_experiment(what: str) -> list[Finding]:
    return [Finding(what, "no experiment yet", OPEN)]


def speed(files: Sequence[str], task: str, name: str, other: str, length: int, bound: float, against: str) -> Finding:
    """Whether `name` is `bound` times as fast as `other`: by the quartiles of both, over all runs."""
    pairs = Timings(*files).ratios(task, name, other, length)
    where = f"{task}, {name} and {other}, N = {length}"
    if not pairs:
        return Finding(f"{against}, {length:,} tokens", "could not be run", OPEN, files[0], where)
    own, others = ([pair[i]["seconds"] for pair in pairs] for i in (0, 1))
    medians = [b["median"] / a["median"] for a, b in zip(own, others)]
    n = min(row["n"] for row in own + others)
    low, high = min(b["q1"] / a["q3"] for a, b in zip(own, others)), max(b["q3"] / a["q1"] for a, b in zip(own, others))
    found = Interval(medians[-1], low, high, n)
    number = " and ".join(f"{value:.2f}×" for value in medians)
    number += f" (quartiles {low:.2f} to {high:.2f}, n = {n})" if n > 1 else " (n = 1)"
    verdict = at_least(found, bound) if n > 1 else OPEN
    file = [name for name, run in zip(files, Timings(*files).runs) if (task, other, length) in run]
    return Finding(f"{against}, {length:,} tokens: {bound:g}×", number, verdict, file[-1], where)


def memory(files: Sequence[str], name: str, other: str, length: int, times: float, against: str) -> Finding:
    """Whether the peak of `name` is `times` below that of `other`; a peak is the same in every run, so one decides."""
    rows, where = Timings(*files).rows, f"forward, peak_bytes, {name} and {other}, N = {length}"
    if ("forward", other, length) not in rows:
        return Finding(f"{against}, {length:,} tokens: {times:g}×", "could not be run", OPEN, files[0], where)
    ratio = rows["forward", other, length]["peak_bytes"] / rows["forward", name, length]["peak_bytes"]
    verdict = at_least(Interval(ratio, ratio, ratio, 1), times)
    return Finding(f"{against}, {length:,} tokens: {times:g}×", f"{ratio:.1f}× less", verdict, files[0], where)


def perplexity(file: str, name: str, other: str, bound: float, against: str) -> Finding:
    """Whether the perplexity of `name` is lower than that of `other` by `bound`; none where counting beats either."""
    results = load_compare(file)
    own, reference = (results["variants"][which]["eval_perplexity"]["values"] for which in (name, other))
    found = changes(own, reference)
    number, verdict = f"{found.text(1, 100, ' %')}", OPEN
    if "ngrams" in results:
        trigram = results["ngrams"]["trigram"]["mean"]
        means = [sum(values) / len(values) for values in (own, reference)]
        verdict = beyond_counting(at_most(found, bound), means, trigram)
        number += f"; perplexity {means[0]:.0f} and {means[1]:.0f}, trigram {trigram:.0f}"
    return Finding(against, number, verdict, file, f"variants, {name} and {other}, eval_perplexity")


def answers(file: str, own: tuple[str, str], other: tuple[str, str], least: float, against: str) -> Finding:
    """Whether one variant answers more by `least` (a share of all answers): variant and point of both."""
    if not has_results(file):
        return Finding(against, "not run yet", OPEN, file, "")
    variants, values = load(file)["variants"], []
    for name, point in (own, other):
        values.append(variants[name][point]["answers"]["values"])
    found = interval([a - b for a, b in zip(*values)])
    means = [sum(shares) / len(shares) for shares in values]
    number = f"{means[0]:.3f} and {means[1]:.3f} right: {found.text(3)} more"
    verdict = at_least(found, least)
    return Finding(against, number, verdict, file, f"variants, {own[0]} {own[1]} and {other[0]} {other[1]}, answers")


def best_control(file: str) -> tuple[str, str]:
    """The attention of most right answers among those of a results file, at the end of its training."""
    variants = load(file)["variants"] if has_results(file) else {"softmax": None}
    names = [name for name in variants if name.startswith("softmax")]
    key = (lambda name: variants[name]["equal_compute"]["answers"]["mean"]) if len(names) > 1 else None
    return max(names, key=key), "equal_compute"


def recall(file: str, name: str, other: str, pairs: int) -> Finding:
    results = load(file)
    row = results["settings"]["num_pairs"].index(pairs)
    own, reference = (results["variants"][which]["accuracy"][row]["values"] for which in (name, other))
    found = interval([a - b for a, b in zip(own, reference)])
    means = f"{sum(own) / len(own):.3f} and {sum(reference) / len(reference):.3f} right"
    where = f"variants, {name} and {other}, accuracy[{row}]"
    return Finding(f"recall of {pairs} pairs", f"{means}: {found.text(3)} more", equal(found), file, where)


def steady_decode(files: Sequence[str], name: str) -> Finding:
    """Whether a token takes as long after the longest context as after the shortest."""
    rows = Timings(*files).rows
    lengths = sorted(length for task, which, length in rows if (task, which) == ("decode", name))
    first, last = (rows["decode", name, length]["seconds"] for length in (lengths[0], lengths[-1]))
    n, quartiles = min(first["n"], last["n"]), (last["q1"] / first["q3"], last["q3"] / first["q1"])
    ratio = last["median"] / first["median"]
    found = Interval(ratio - 1, quartiles[0] - 1, quartiles[1] - 1, n)
    number = f"{ratio:.2f}× from {lengths[0]:,} to {lengths[-1]:,} tokens "
    number += f"(quartiles {quartiles[0]:.2f} to {quartiles[1]:.2f}, n = {n})"
    return Finding(f"nothing: within {STEADY:.0%}", number, equal(found, STEADY), files[-1], f"decode, {name}")


def grows(task: str, name: str, other: str, against: str) -> Finding:
    """Whether the FLOPs that two models count grow with the same exponent, but for `SAME_ORDER`, where longest."""
    if not has_results("growth"):
        return Finding(against, "not run yet", OPEN, "growth", "")
    results = load("growth")
    own, reference = (results["families"][which][task] for which in (name, other))
    exponents = [of["exponent"]["last"] for of in (own, reference)]
    more = own["values"][-1] / reference["values"][-1]
    number = f"exponents {exponents[0]:.2f} and {exponents[1]:.2f}; {more:,.3g}× the FLOPs at "
    number += f"{results['lengths'][-1]:,} tokens (counted)"
    difference = exponents[0] - exponents[1]
    verdict = equal(Interval(difference, difference, difference, 1), SAME_ORDER)
    return Finding(against, number, verdict, "growth", f"families, {name} and {other}, {task}")


def decode_claims(name: str, file: str, longest: int) -> list[Claim]:
    """Ours, of generation: a token's time does not grow, and is below attention's after `longest` tokens."""
    against = "attention, the faster of its caches"
    faster = [speed([file], "decode", name, "softmax_lm", longest, 1.0, against)]
    if copies_its_cache(which for task, which, _ in Timings(file).rows if task == "decode"):
        faster = no_experiment("attention with a static cache")
    return [
        Claim(name, "a token takes the same time after any context", "ours", "-", [steady_decode([file], name)]),
        Claim(name, f"a token is faster than attention's after {longest:,} tokens", "ours", "-", faster),
    ]


def conv_claims() -> list[Claim]:
    attention = {"eager": "attention that stores its scores", "sdpa": "fused attention"}
    faster = [
        speed(CONV_BENCHMARKS, "mixer", f"source_{part}_conv", f"source_{part}_{kind}", 2048, 5.5, f"{what}, {which}")
        for part, what in (("mixer", "mixer"), ("model", "model"))
        for kind, which in attention.items()
    ]
    lower = [
        perplexity("conv_lm_compare", "conv_source", f"softmax_{name}", -0.032, f"attention {which}")
        for name, which in (("no_positions", "without positions"), ("learned", "learned"), ("rope", "with rope"))
    ]
    name, reading = "conv_lm", "our reading of the article"
    return [
        Claim(name, "5.5× faster at 2,048 tokens", ARTICLE, "one run, attention that stores N×N scores", faster),
        Claim(name, "3.2 % lower perplexity", ARTICLE, "one unseeded run, attention without positions", lower),
        Claim(
            name,
            "content-dependent scores are unnecessary",
            ARTICLE,
            "that perplexity",
            [recall("conv_lm_recall", "conv", "softmax_rope", pairs) for pairs in (2, 16)] + lower[-1:],
            everywhere,
        ),
        Claim(name, "the dot product is not special", ARTICLE, reading, no_experiment("other score functions")),
        Claim(name, "the FFN does the mixing", ARTICLE, reading, no_experiment("attention × feed-forward")),
        *decode_claims(name, "conv_lm_benchmark_decode", 32768),
    ]


def linformer_claims() -> list[Claim]:
    name, encoder = "linformer_lm", "linformer_encoder"
    fused, stored = "softmax_encoder_sdpa", "softmax_encoder_eager"
    times = ((512, 1.5), (4096, 3.4), (16384, 8.6), (65536, 20))
    faster = [
        speed(ENCODER_BENCHMARKS, "forward", encoder, other, length, bound, which)
        for other, which in ((f"{stored}_by_head", "stored scores, a head at a time"), (fused, "fused"))
        for length, bound in times
    ]
    less = [
        memory(ENCODER_BENCHMARKS, encoder, other, length, bound, which)
        for other, which in ((stored, "stored scores"), (fused, "fused"))
        for length, bound in ((4096, 14), (65536, 60))
    ]
    table = "Table 3, k = 128, one V100, stored scores"
    return [
        Claim(name, "1.5×, 3.4×, 8.6× and 20× faster", LINFORMER, table, faster),
        Claim(name, "14× less memory at 4,096 tokens, 60× at 65,536", LINFORMER, table, less),
        Claim(
            name,
            "performs on par with standard Transformer models",
            LINFORMER,
            "Table 2, single runs",
            no_experiment("an encoder fine-tuned on SST-2, IMDB and QNLI"),
        ),
        Claim(
            name,
            "can be approximated by a low-rank matrix",
            LINFORMER,
            "figure 1, no null",
            no_experiment("rank against length, with shuffled keys"),
        ),
        *decode_claims(name, "linformer_lm_causal", 65536),
        Claim(
            name,
            "the causal form is no worse than attention",
            "ours",
            "-",
            [perplexity("linformer_lm_compare", "linformer", "softmax_rope", 0.0, "attention with rope")],
        ),
    ]


def prefix_claims() -> list[Claim]:
    name, same = "cubic_prefix_lm", "same inference cost as today O(N²)"
    at_end, control = ("cubic", "equal_compute"), ("softmax", "equal_compute")
    function = best_control(FUNCTION)
    stronger = [
        answers(FUNCTION, at_end, function, MARGIN, f"7 hops, 3× the steps for attention ({function[0]})"),
        answers("cubic_prefix_lm_pointer", at_end, control, MARGIN, "3 hops, ten answers, equal FLOPs"),
        answers("cubic_prefix_lm_triplets_short", at_end, control, MARGIN, "triplets of 10 tokens, equal FLOPs"),
        perplexity("cubic_prefix_lm_compare", "cubic", "softmax_rope_equal_compute", 0.0, "text, equal FLOPs"),
    ]
    costs = [grows(task, name, "softmax_lm", which) for task, which in (("prefill", "a prompt"), ("decode", "a token"))]
    return [
        Claim(name, "insanely more powerful", PROPOSAL, "nothing measured", stronger),
        Claim(name, same, PROPOSAL, "nothing measured", costs),
    ]


FAMILIES = {"conv_lm": conv_claims, "linformer_lm": linformer_claims, "cubic_prefix_lm": prefix_claims}


def all_claims() -> list[Claim]:
    return [claim for claims in FAMILIES.values() for claim in claims()]


def _commit(file: str | None) -> str:
    commit = load(file)["machine"].get("commit") if file and has_results(file) else None
    return "-" if not file else f"`{commit[:10]}`" if commit else "not recorded"


def table(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table, not padded: its cells are long."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(claims: Sequence[Claim]) -> str:
    """A row a claim: what was claimed, on what it rested, what was measured against which lines, and the verdict."""
    body = []
    for claim in claims:
        numbers = [f"{f.against}: {f.number} → {f.verdict}" for f in claim.findings]
        body.append([claim.family, f'"{claim.quote}"', claim.source, claim.rested, "<br>".join(numbers), claim.verdict])
    return table(["family", "claim", "source", "rested on", "measured", "verdict"], body)


def evidence(claims: Sequence[Claim]) -> str:
    """Where each number stands: results file and key, the command that made it, and the commit."""
    body = []
    for claim in claims:
        for finding in claim.findings:
            if finding.file and has_results(finding.file):
                machine = load(finding.file)["machine"]
                place = f"[{finding.file}.json](results/{finding.file}.json): {finding.key}"
                row = [f'"{claim.quote}"', place, f"`{machine['command']}`", _commit(finding.file)]
                if row not in body:
                    body.append(row)
    return table(["claim", "results", "command", "commit"], body)


def of_family(family: str) -> str:
    """The verdicts of one family in a paragraph, for its card."""
    words = "; ".join(f'"{claim.quote}": **{claim.verdict}**' for claim in FAMILIES[family]())
    return f"[Computed](claims.md) from the results files: {words}."
