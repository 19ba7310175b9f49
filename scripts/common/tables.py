"""What results are summed up and shown with: mean and spread over seeds, tables."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ordnung.scripts.common.files import write_json, write_text


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of a single value) beside the values, one per seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": list(values)}


def spread(summary: dict[str, Any], decimals: int, scale: float = 1.0) -> str:
    """A summary, times `scale`, as text: mean ± sample standard deviation."""
    values = [value for value in (summary["mean"], summary["standard_deviation"]) if value is not None]
    return " ± ".join(f"{value * scale:,.{decimals}f}" for value in values)


def ranged(values: Sequence[float], decimals: int, more: str = "") -> str:
    """Values as text: their median, and in brackets the least, the largest and what else is to be said."""
    middle, low, high = (f"{value:.{decimals}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high}{more})"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


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
