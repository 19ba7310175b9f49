"""Measurements of claims, each from a results file with a verdict that follows from an interval and a bound."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ordnung.scripts.benchmarks.measure import summarise
from ordnung.scripts.experiments.verdicts import (
    MARGIN,
    OPEN,
    Interval,
    at_least,
    at_most,
    beyond_counting,
    changes,
    difference,
    equal,
    interval,
)
from ordnung.scripts.reports.lowrank import exponents, needed
from ordnung.scripts.reports.results import Timings, has_results, load, load_compare

SAME_ORDER = 0.1  # exponents that differ by less are the same order of growth
SPARSE, SQUARED, RANK = "sparse_attention_lm_bench", "quadratic_kernel_lm_bench", "quadratic_kernel_lm_rank"
LOW_RANK = "linformer_lm_lowrank"
STEADY = 0.1  # relative: a time that rises by less does not grow


@dataclass(frozen=True)
class Finding:
    """One measurement of a claim.

    Args:
        file: the stem of the results file that it stands in.
        key: where in it.
        more: the stems of further files, where it is of several runs.
    """

    against: str
    number: str
    verdict: str
    file: str | None = None
    key: str = ""
    more: tuple[str, ...] = ()


def no_experiment(what: str) -> list[Finding]:
    return [Finding(what, "no experiment yet", OPEN)]


def not_run(against: str, file: str) -> Finding:
    return Finding(against, "not run yet", OPEN, file)


def ratio(pairs: Sequence[tuple[dict, dict]], bound: float) -> tuple[str, str]:
    """Number and verdict on "`bound` times as fast": by the quartiles of both over all runs.

    Args:
        pairs: of each run, what `summarise` gives of the times of one and of what it is held against.
    """
    medians = [b["median"] / a["median"] for a, b in pairs]
    n = min(seconds["n"] for pair in pairs for seconds in pair)
    low, high = min(b["q1"] / a["q3"] for a, b in pairs), max(b["q3"] / a["q1"] for a, b in pairs)
    number = " and ".join(f"{value:.2f}×" for value in medians)
    if n == 1:
        return f"{number} (n = 1)", OPEN
    verdict = at_least(Interval(medians[-1], low, high, n), bound)
    return f"{number} (quartiles {low:.2f} to {high:.2f}, n = {n})", verdict


def speed(files: Sequence[str], task: str, name: str, other: str, length: int, bound: float, against: str) -> Finding:
    """Whether `name` is `bound` times as fast as `other`: by the quartiles of both, over all runs."""
    pairs = Timings(*files).ratios(task, name, other, length)
    where = f"{task}, {name} and {other}, N = {length}"
    if not pairs:
        return Finding(f"{against}, {length:,} tokens", "could not be run", OPEN, files[0], where)
    number, verdict = ratio([(a["seconds"], b["seconds"]) for a, b in pairs], bound)
    return Finding(f"{against}, {length:,} tokens: {bound:g}×", number, verdict, *timed(files, pairs, where))


def timed(files: Sequence[str], pairs: Sequence[tuple[dict, dict]], key: str) -> tuple[str, str, tuple[str, ...]]:
    """What a `Finding` says of where it stands: the files that rows of `pairs` are in."""
    first, *others = [stem for stem in files if any(row in load(stem)["results"] for row, _ in pairs)]
    return first, key, tuple(others)


def memory(files: Sequence[str], name: str, other: str, length: int, times: float, against: str) -> Finding:
    """Whether the peak of `name` is `times` below that of `other`: in every run that has both."""
    pairs = Timings(*files).ratios("forward", name, other, length)
    against, where = (
        f"{against}, {length:,} tokens: {times:g}×",
        f"forward, peak_bytes, {name} and {other}, N = {length}",
    )
    if not pairs:
        return Finding(against, "could not be run", OPEN, files[0], where)
    ratios = [b["peak_bytes"] / a["peak_bytes"] for a, b in pairs]
    number, n = " and ".join(f"{ratio:.1f}×" for ratio in ratios) + f" less (n = {len(ratios)})", len(ratios)
    verdict = at_least(Interval(ratios[-1], min(ratios), max(ratios), n), times) if n > 1 else OPEN
    return Finding(against, number, verdict, *timed(files, pairs, where))


def perplexity(file: str, name: str, other: str, bound: float, against: str) -> Finding:
    """Whether the perplexity of `name` is lower than that of `other` by `bound`; none where counting beats either."""
    if not has_results(file) or not {name, other} <= set(load(file)["variants"]):
        return not_run(against, file)
    results = load_compare(file)
    own, reference = (results["variants"][which]["eval_perplexity"]["values"] for which in (name, other))
    found = changes(own, reference)
    number, verdict = f"{found.text(1, 100, ' %')}", OPEN
    if "ngrams" in results:
        trigram = results["ngrams"]["trigram"]["mean"]
        means = [sum(values) / len(values) for values in (own, reference)]
        verdict = beyond_counting(at_most(found, bound), means, trigram)
        number += f"; perplexity {means[0]:.3g} and {means[1]:.3g}, trigram {trigram:.3g}"
    return Finding(against, number, verdict, file, f"variants, {name} and {other}, eval_perplexity")


def mixes(file: str, name: str, against: str) -> Finding:
    """Whether the perplexity of `name` is below that of counted pairs: what sees no other token cannot be."""
    if not has_results(file):
        return not_run(against, file)
    results = load_compare(file)
    own, pairs = results["variants"][name]["eval_perplexity"]["values"], results["ngrams"]["bigram"]["values"]
    found = changes(own, pairs)
    number = f"{found.text(1, 100, ' %')}; perplexity {statistics.fmean(own):.3g}, bigram {statistics.fmean(pairs):.3g}"
    return Finding(against, number, at_most(found, 0.0), file, f"variants, {name}, eval_perplexity; ngrams, bigram")


def steadier(file: str, name: str, other: str, against: str) -> Finding:
    """Whether losses of `name` differ less between seeds than those of `other`: by the ratio's 95 % F-interval."""
    from scipy.special import fdtri

    if not has_results(file) or not {name, other} <= set(load(file)["variants"]):
        return not_run(against, file)
    results = load_compare(file)
    perplexities = [results["variants"][which]["eval_perplexity"]["values"] for which in (name, other)]
    a, b = (statistics.stdev(map(math.log, values)) for values in perplexities)
    n = len(perplexities[0])
    edge = math.sqrt(fdtri(n - 1, n - 1, 0.975))
    found = Interval(a / b, a / b / edge, a / b * edge, n)
    number = f"standard deviation of the loss {a:.3f} and {b:.3f}: {found.text(2)} of it"
    verdict = OPEN
    if "ngrams" in results:
        means = [statistics.fmean(values) for values in perplexities]
        verdict = beyond_counting(at_most(found, 1.0), means, results["ngrams"]["trigram"]["mean"])
    return Finding(against, number, verdict, file, f"variants, {name} and {other}, eval_perplexity")


def answers(file: str, own: tuple[str, str], other: tuple[str, str], least: float, against: str) -> Finding:
    """Whether one variant answers more by `least` (a share of all answers): variant and point of both."""
    if not has_results(file):
        return not_run(against, file)
    variants, values = load(file)["variants"], []
    for name, point in (own, other):
        values.append(variants[name][point]["answers"]["values"])
    found = difference(*values)
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


def recall(file: str, name: str, other: str, pairs: int, what: str = "", worse: bool = False) -> Finding:
    """Whether two variants recall as much of so many pairs, but for `MARGIN` of all answers.

    Args:
        worse: ask only whether the first recalls no less.
    """
    against = f"{what}recall of {pairs} pairs"
    if not has_results(file):
        return not_run(against, file)
    results = load(file)
    row = results["settings"]["num_pairs"].index(pairs)
    own, reference = (results["variants"][which]["accuracy"][row]["values"] for which in (name, other))
    found = difference(own, reference)
    means = f"{sum(own) / len(own):.3f} and {sum(reference) / len(reference):.3f} right"
    where = f"variants, {name} and {other}, accuracy[{row}]"
    verdict = at_least(found, -MARGIN) if worse else equal(found)
    return Finding(against, f"{means}: {found.text(3)} more", verdict, file, where)


def steady(seconds: dict[int, dict], file: str, where: str) -> Finding:
    """Whether a token takes no longer after the longest context than after the shortest, but for `STEADY`.

    Args:
        seconds: what `summarise` gives of a token's time, by the tokens before it.
    """
    first, last = (seconds[length] for length in (min(seconds), max(seconds)))
    n, quartiles = min(first["n"], last["n"]), (last["q1"] / first["q3"], last["q3"] / first["q1"])
    ratio = last["median"] / first["median"]
    found = Interval(ratio - 1, quartiles[0] - 1, quartiles[1] - 1, n)
    number = f"{ratio:.2f}× from {min(seconds):,} to {max(seconds):,} tokens "
    number += f"(quartiles {quartiles[0]:.2f} to {quartiles[1]:.2f}, n = {n})"
    return Finding(f"nothing: at most {STEADY:.0%} longer", number, at_most(found, STEADY), file, where)


def steady_decode(files: Sequence[str], name: str) -> Finding:
    rows = Timings(*files).rows
    seconds = {
        length: row["seconds"] for (task, which, length), row in rows.items() if (task, which) == ("decode", name)
    }
    return steady(seconds, files[-1], f"decode, {name}")


def competitors(part: str, name: str) -> dict[int, dict]:
    """Times of a competitor of bench_sparse.py, forward, by length."""
    rows = [row for row in load(SPARSE)[part] if not row.get("backward")]
    return {row["length"]: summarise(row["competitors"][name]["all_seconds"]) for row in rows}


def sparse_faster(part: str, name: str, other: str, length: int, bound: float) -> Finding:
    number, verdict = ratio([tuple(competitors(part, which)[length] for which in (name, other))], bound)
    return Finding(f"{name}, {length:,} tokens: {bound:g}×", number, verdict, SPARSE, f"{part}, {name} and {other}")


def sparse_growth(name: str) -> Finding:
    """Whether the time of a kind grows as the length does, but for `SAME_ORDER`, between the two longest."""
    seconds = competitors("attention", name)
    *_, a, b = sorted(seconds)
    ends = ((seconds[b][i] / seconds[a][j]) for i, j in (("median", "median"), ("q1", "q3"), ("q3", "q1")))
    mean, low, high = (math.log(value) / math.log(b / a) for value in ends)
    n = min(seconds[a]["n"], seconds[b]["n"])
    number = f"exponent {mean:.2f} from {a:,} to {b:,} tokens (quartiles {low:.2f} to {high:.2f}, n = {n})"
    verdict = equal(Interval(mean - 1, low - 1, high - 1, n), SAME_ORDER)
    return Finding(f"{name}, time", number, verdict, SPARSE, f"attention, {name}")


def squared_faster(head_size: int, length: int) -> Finding:
    """Whether the squared kernel's forward is faster than fused attention's, at the first such length or later."""
    rows = [row for row in load(SQUARED)["lengths"] if row["head_size"] == head_size and row["length"] >= length]
    row = min(rows, key=lambda row: row["length"])
    number, verdict = ratio([(row["forward"]["squared"], row["forward"]["softmax"])], 1)
    where = f"lengths, head size {head_size}, N = {row['length']}, forward"
    against = f"fused attention, head size {head_size}, {row['length']:,} tokens"
    return Finding(against, number, verdict, SQUARED, where)


def squared_steady(head_size: int) -> Finding:
    rows = [row for row in load(SQUARED)["decoding"] if row["head_size"] == head_size]
    seconds = {row["length"]: row["state"] for row in rows}
    found = steady(seconds, SQUARED, f"decoding, head size {head_size}, state")
    return replace(found, against=f"head size {head_size}, {found.against}")


def squared_cost(by: str, power: float) -> Finding:
    """Whether the FLOPs of a token grow as that power of `n` or of `d`, by the two largest of it."""
    costs = load(RANK)["costs"]
    largest = {name: sorted({row[name] for row in costs})[-2:] for name in "nd"}
    other = "d" if by == "n" else "n"
    a, b = (row["counted"] for row in costs if row[by] in largest[by] and row[other] == largest[other][-1])
    found = math.log(b / a) / math.log(largest[by][1] / largest[by][0])
    number = f"exponent {found:.2f} from {by} = {largest[by][0]:,} to {largest[by][1]:,} (counted)"
    verdict = equal(Interval(*3 * [found - power], 1), SAME_ORDER)
    return Finding(f"FLOPs of a token grow as {by}^{power:g}", number, verdict, RANK, f"costs, {by}")


def squared_ranks(squared: bool) -> list[Finding]:
    """Whether (d + 1)(d + 2) / 2 bounds the rank in every head, at their longest rows: of each trained model a finding.

    Args:
        squared: of the squared kernel, of a model that has it or on what softmax layers score; else of softmax.
    """
    found = []
    for model in load(RANK)["models"]:
        row = model["lengths"][-1]
        if not squared and "shifted" not in row:  # it has no softmax
            continue
        kind = "shifted" if squared and "shifted" in row else "own"
        ranks = [rank for layer in row[kind] for rank in layer]
        number = f"{min(ranks)} to {max(ranks)} in {len(ranks)} heads of {model['model']} at {row['n']:,} tokens, "
        number += f"bound {model['bound']}"
        verdict = at_most(Interval(sum(ranks) / len(ranks), min(ranks), max(ranks), len(ranks)), model["bound"])
        what = "the squared kernel's" if squared else "softmax attention's weights"
        found.append(Finding(f"rank of {what}: (d + 1)(d + 2) / 2", number, verdict, RANK, f"models, lengths, {kind}"))
    return found


def low_rank(exponent: bool) -> Finding:
    """Of attention's weights: whether the rank that holds a share of them stays as rows grow; or is below chance."""
    against = "nothing: the rank does not grow" if exponent else "rows shuffled: a lower rank"
    if not has_results(LOW_RANK):
        return not_run(against, LOW_RANK)
    results = load(LOW_RANK)
    share, where = f"rank for {results['settings']['share']:.0%}", "models, lengths, needed and shuffled"
    lengths, own, shuffled = needed(results)
    if exponent:
        slopes = interval(exponents(lengths, own))
        means = ", ".join(f"{sum(ranks) / len(ranks):.0f}" for ranks in zip(*own))
        number = f"{share} {means} at {', '.join(map(str, lengths))} tokens: exponent {slopes.text(2)}"
        return Finding(against, number, equal(slopes, SAME_ORDER), LOW_RANK, where)
    found = changes(own[:, -1], shuffled[:, -1])
    number = f"{share} at {lengths[-1]} tokens {found.text(0, 100, ' %')}"
    return Finding(against, number, at_most(found, -MARGIN), LOW_RANK, where)


def on_par(file: str, name: str, other: str, tasks: Sequence[str]) -> list[Finding]:
    """Whether the scores of a fine-tuned variant are no lower than those of another, but for `MARGIN`."""
    if not has_results(file):
        return [not_run(f"{name} against {other} on {', '.join(tasks)}", file)]
    variants, found = load(file)["variants"], []
    for task in tasks:
        own, reference = (variants[which]["tasks"][task]["score"]["values"] for which in (name, other))
        change = difference(own, reference)
        number = f"{change.text(1, 100, ' points')}"
        where = f"variants, {name} and {other}, tasks, {task}"
        # a converted model, whose mixing was trained for as long
        tokens = variants[name].get("start", {}).get("tokens")
        after = f", distilled for {tokens / 1e6:.2f} M tokens" if tokens else ""
        found.append(Finding(f"{name} on {task}{after}", number, at_least(change, -MARGIN), file, where))
    return found


def better(file: str, name: str, other: str, tasks: Sequence[str]) -> Finding:
    """Whether a fine-tuned variant scores higher than another in the mean of the tasks."""
    against = f"{name} against {other}, mean of {', '.join(tasks)}"
    if not has_results(file):
        return not_run(against, file)
    variants = load(file)["variants"]
    own, reference = (
        [
            sum(scores) / len(tasks)
            for scores in zip(*(variants[which]["tasks"][task]["score"]["values"] for task in tasks))
        ]
        for which in (name, other)
    )
    change = difference(own, reference)
    where = f"variants, {name} and {other}, tasks, score"
    return Finding(against, change.text(1, 100, " points"), at_least(change, 0), file, where)


def grows(task: str, name: str, other: str, against: str) -> Finding:
    """Whether the FLOPs that two models count grow with the same exponent, but for `SAME_ORDER`, where longest."""
    if not has_results("growth"):
        return not_run(against, "growth")
    results = load("growth")
    own, reference = (results["families"][which][task] for which in (name, other))
    exponents = [of["exponent"]["last"] for of in (own, reference)]
    more = own["values"][-1] / reference["values"][-1]
    number = f"exponents {exponents[0]:.2f} and {exponents[1]:.2f}; {more:,.3g}× the FLOPs at "
    number += f"{results['lengths'][-1]:,} tokens (counted)"
    difference = exponents[0] - exponents[1]
    verdict = equal(Interval(difference, difference, difference, 1), SAME_ORDER)
    return Finding(against, number, verdict, "growth", f"families, {name} and {other}, {task}")
