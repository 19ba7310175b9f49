"""Writes the tables of README.md and model_cards/*.md, and the benchmark's figure, from model_cards/results.

    python scripts/make_cards.py            # rewrite what stands between the markers
    python scripts/make_cards.py --check    # exit status 1 if a table is not what the results give

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing else of a file is touched.
"""

import argparse
import json
import re
from pathlib import Path

from ordnung.scripts import bench_report
from ordnung.scripts.common import ScriptError, run_script, write_text
from ordnung.scripts.evidence import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "model_cards" / "results"
BENCHMARKS = [f"conv_lm_benchmark{run}" for run in ("", "_512", "_32768")]
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
    return markdown_table(["claim or aim", "measured; speed-ups with the ratio of FLOPs in brackets"], body)


TABLES = {
    "claims": claims,
    "benchmark": lambda: bench_report.markdown(load_benchmark(*BENCHMARKS)).strip(),
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
        bench_report.plot(load_benchmark(*BENCHMARKS), ROOT / "model_cards" / "figures" / "conv_lm_benchmark.png")
    return 1 if check and stale else 0


if __name__ == "__main__":
    run_script(main)
