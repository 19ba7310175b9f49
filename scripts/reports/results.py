"""The files of model_cards/results, and the timed rows that several runs of benchmark.py give together."""

import math
from pathlib import Path

from ordnung.scripts.benchmarks.variants import STATIC, VARIANTS, copies_its_cache
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json

RESULTS = Path(__file__).resolve().parents[2] / "model_cards" / "results"
CONV_BENCHMARKS = [f"conv_lm_benchmark{run}" for run in ("", "_512", "_32768", "_decode", "_mixer")]
ENCODER_BENCHMARKS = ["linformer_lm_encoder", "linformer_lm_encoder_512"]
FUNCTION, HOPS, ANSWERS = (f"cubic_prefix_lm_{name}" for name in ("function", "hops", "answers"))
GRID, TABLE2 = "linformer_lm_grid", "linformer_lm_table2"
PROTOCOL, FEED_FORWARD = "compare_protocol", "compare_feed_forward"
CAUSAL_BENCHMARKS = ["linformer_lm_causal", "linformer_lm_causal_512"]


def load(name: str) -> dict:
    """A results file by its stem.

    Raises:
        ScriptError: there is no such file.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise ScriptError(f"there is no {path}: make it with the command that the card names")
    return read_json(path)


def has_results(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def machines(name: str) -> list[dict]:
    """Machine, command and commit of all runs that a file holds: its own, and those of `compare --earlier`."""
    results = load(name)
    return [results["machine"], *(one["machine"] for one in results.get("earlier", []))]


def commits(name: str) -> str:
    """The first ten digits of the commits of all runs that a file holds."""
    found = dict.fromkeys(machine.get("commit") for machine in machines(name))
    return ", ".join(f"`{commit[:10]}`" if commit else "not recorded" for commit in found)


def key(row: dict) -> tuple[str, str, int]:
    return row["task"], row["name"], row["length"]


def load_compare(name: str) -> dict:
    """Results of compare.py with the n-grams of its text, where a file holds them."""
    results = load(name)
    if "ngrams" not in results and has_results(f"{name}_ngrams"):
        results["ngrams"] = load(f"{name}_ngrams")["ngrams"]
    return results


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
    """The timed rows of a benchmark's runs; where several have the same row, the latest, and of ratios all."""

    def __init__(self, *names: str):
        self.runs = [{key(row): row for row in load(name)["results"] if "seconds" in row} for name in names]
        self.rows = {key(row): row for row in load_benchmark(*names)["results"] if "seconds" in row}

    def ratios(self, task: str, name: str, other: str, length: int) -> list[tuple[dict, dict]]:
        """The rows of `name` and of `other`, in decode of its faster form, of each run that has both."""
        found = []
        for rows in self.runs:
            forms = [rows[task, form, length] for form in (other, other + STATIC) if (task, form, length) in rows]
            if forms and (task, name, length) in rows:
                found.append((rows[task, name, length], min(forms, key=lambda row: row["seconds"]["median"])))
        return found

    def ratio(self, task: str, name: str, other: str, length: int) -> str:
        """How many times faster `name` is than `other`, in each run: measured (predicted from FLOPs)."""
        pairs = self.ratios(task, name, other, length)
        if not pairs:
            return "not run"
        measured = " and ".join(f"{b['seconds']['median'] / a['seconds']['median']:.2f}×" for a, b in pairs)
        single = any(row["seconds"]["n"] == 1 for pair in pairs for row in pair)
        return f"{measured} ({pairs[-1][1]['flops'] / pairs[-1][0]['flops']:.2f}×)" + ", n = 1" * single

    def memory(self, task: str, name: str, other: str, length: int) -> str:
        """Peak memory of `name`, in units of that of `other`."""
        rows = [self.rows.get((task, which, length)) for which in (name, other)]
        if None in rows:
            return "not run"
        return f"{rows[0]['peak_bytes'] / rows[1]['peak_bytes']:.2f}"

    def medians(self, task: str, name: str) -> dict[int, float]:
        """Seconds by length, rising, in decode of the faster form."""
        found: dict[int, float] = {}
        for (kind, which, length), row in self.rows.items():
            if kind == task and which in (name, name + STATIC):
                found[length] = min(found.get(length, math.inf), row["seconds"]["median"])
        return dict(sorted(found.items()))

    def growth(self, task: str, name: str) -> str:
        """How many times longer a token takes after the longest context than after the shortest, in its faster form."""
        seconds = self.medians(task, name)
        shortest, longest = min(seconds), max(seconds)
        ratio = seconds[longest] / seconds[shortest]
        copied = task == "decode" and copies_its_cache([which for kind, which, _ in self.rows if kind == task])
        how = ", in a cache that is copied to grow" if copied and VARIANTS[name].static_form else ""
        return f"{ratio:.2f}× from {shortest} to {longest} tokens{how}"
