"""What results are summed up and shown with: mean and spread over seeds, tables."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ordnung.scripts.common.files import write_json, write_text


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of a single value) beside the values, one per seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": list(values)}


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and its 95 % t-interval; of a single value, everything."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, decimals: int, scale: float = 1.0, unit: str = "") -> str:
        """The mean, the interval and n."""
        if self.n == 1:
            return f"{self.mean * scale:,.{decimals}f}{unit} (n = 1)"
        low, high = (f"{value * scale:,.{decimals}f}" for value in (self.low, self.high))
        return f"{self.mean * scale:,.{decimals}f}{unit} ({low} to {high}, n = {self.n})"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of one value a seed."""
    from scipy.special import stdtrit

    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def estimate(summary: dict[str, Any], decimals: int, scale: float = 1.0) -> str:
    """A summary, times `scale`, as text: mean ± half its 95 % t-interval; of a single value, that there is but one."""
    found = interval(summary["values"])
    if found.n == 1:
        return f"{found.mean * scale:,.{decimals}f} (n = 1)"
    return f"{found.mean * scale:,.{decimals}f} ± {(found.high - found.mean) * scale:,.{decimals}f}"


def seeds_described(seeds: Sequence[int]) -> str:
    """What `estimate` shows, in words for the head of a table."""
    if len(seeds) == 1:
        return f"seed {seeds[0]} alone (n = 1)"
    return f"mean ± half the 95 % t-interval over n = {len(seeds)} seeds ({', '.join(map(str, seeds))})"


def ranged(values: Sequence[float], decimals: int, more: str = "") -> str:
    """Values as text: their median, and in brackets the least, the largest and what else is to be said."""
    middle, low, high = (f"{value:.{decimals}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high}{more})"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], padded: bool = True) -> str:
    """A Markdown table, padded so that it also reads well in a terminal, unless its cells are long."""
    widths = [max(len(line[i]) for line in [header, *body]) if padded else 0 for i in range(len(header))]
    lines = [header, ["-" * width or "---" for width in widths], *body]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def paragraphs(*parts: str) -> str:
    """Markdown of these parts, with an empty line between."""
    return "\n\n".join(parts)


def write_results(
    output_dir: str | Path, results: dict, markdown: Callable[[dict], str], **plots: Callable[[dict, Path], None]
):
    """Write results.json, results.md and a figure for each of `plots`, by name, and print the tables."""
    folder, text = Path(output_dir), markdown(results)
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", text + "\n")
    for name, plot in plots.items():
        plot(results, folder / f"{name}.png")
    print(f"\n{text}\n\nWritten: results.json, results.md{''.join(f', {name}.png' for name in plots)} in {folder}")
