"""Writes the tables of README.md and model_cards/*.md, and the cards' figures, from model_cards/results.

    python scripts/make_cards.py            # rewrite what stands between the markers
    python scripts/make_cards.py --check    # exit status 1 if a table is not what the results give

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing else of a file is touched.
"""

import argparse
import json
import re
from pathlib import Path

from ordnung.scripts import bench_report, compare, recall
from ordnung.scripts.common import ScriptError, run_script, write_text
from ordnung.scripts.evidence import markdown_table, spread, summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "model_cards" / "results"
BENCHMARKS = [f"conv_lm_benchmark{run}" for run in ("", "_512", "_32768", "_decode", "_mixer")]
MARKER = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def load(name: str) -> dict:
    """A results file by its stem.

    Raises:
        ScriptError: there is no such file.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise ScriptError(f"there is no {path}: make it with the command that the card names")
    return json.loads(path.read_text())


def load_benchmark(*names: str) -> dict:
    """Results of several runs of benchmark.py as one: a later run's rows replace all of the same task and length.

    So the rows of a task and length, and the ratios between them, always come from one run.
    """
    runs = [load(name) for name in names]
    rows: dict[tuple[str, int], list[dict]] = {}
    for run in runs:
        for key in {(row["task"], row["length"]) for row in run["results"]}:
            rows[key] = [row for row in run["results"] if (row["task"], row["length"]) == key]
    return {**runs[0], "results": [row for key in sorted(rows) for row in rows[key]]}


class Timings:
    """The timed rows of a benchmark's results."""

    def __init__(self, results: dict):
        self.rows = {(row["task"], row["name"], row["length"]): row for row in results["results"] if "seconds" in row}

    def ratio(self, task: str, name: str, other: str, length: int) -> str:
        """How many times faster `name` is than `other`: measured (predicted from FLOPs)."""
        rows = [self.rows.get((task, which, length)) for which in (other, name)]
        if None in rows:
            return "not run"
        measured, predicted = ((a / b) for a, b in zip(*((r["seconds"]["median"], r["flops"]) for r in rows)))
        return f"{measured:.2f}× ({predicted:.2f}×)"

    def growth(self, task: str, name: str) -> str:
        """How many times longer a token takes after the longest context than after the shortest."""
        rows = {length: row for (kind, which, length), row in self.rows.items() if (kind, which) == (task, name)}
        shortest, longest = min(rows), max(rows)
        ratio = rows[longest]["seconds"]["median"] / rows[shortest]["seconds"]["median"]
        return f"{ratio:.2f}× from {shortest} to {longest} tokens"


def perplexity_change(results: dict, name: str, other: str) -> str:
    """How much higher the perplexity of `name` is than that of `other` with the same seed."""
    pairs = zip(*(results["variants"][which]["eval_perplexity"]["values"] for which in (name, other)))
    return spread(summarise([own / reference - 1 for own, reference in pairs]), 1, scale=100) + " %"


def claims() -> str:
    """What was claimed or aimed at, beside what was measured."""
    timings, body = Timings(load_benchmark(*BENCHMARKS)), []

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


TABLES = {
    "claims": claims,
    "benchmark": lambda: bench_report.markdown(load_benchmark(*BENCHMARKS)).strip(),
    "compare": lambda: compare.markdown(load("conv_lm_compare")),
    "recall": lambda: recall.markdown(load("conv_lm_recall")),
}


FIGURES = {
    "conv_lm_benchmark": lambda image: bench_report.plot(load_benchmark(*BENCHMARKS), image),
    "conv_lm_compare": lambda image: compare.plot(load("conv_lm_compare"), image),
    "conv_lm_recall": lambda image: recall.plot(load("conv_lm_recall"), image),
}


def fill(text: str) -> str:
    """`text` with every marked table made anew.

    Raises:
        ScriptError: a marker names no table.
    """

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ScriptError(f"no table {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKER.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is out of date")
    check = parser.parse_args(argv).check
    stale = 0
    for path in [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
            if not check:
                write_text(path, new)
    if not check:
        for name, draw in FIGURES.items():
            draw(ROOT / "model_cards" / "figures" / f"{name}.png")
    return 1 if check and stale else 0


if __name__ == "__main__":
    run_script(main)
