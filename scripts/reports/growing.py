"""How measured times and memory grow with the length, and from where on each mixer is faster than attention."""

from ordnung.scripts.benchmarks.growth import crossover, exponents
from ordnung.scripts.benchmarks.report import TITLES
from ordnung.scripts.benchmarks.variants import copies_its_cache
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.reports.results import CAUSAL_BENCHMARKS, CONV_BENCHMARKS, ENCODER_BENCHMARKS, Timings

# runs of benchmark.py of one shape, what is measured in them, and the attention that it is held against
GROUPS = (
    (CONV_BENCHMARKS, "conv_lm", "softmax_lm"),
    (CAUSAL_BENCHMARKS, "linformer_lm", "softmax_lm"),
    (ENCODER_BENCHMARKS, "linformer_encoder", "softmax_encoder_sdpa"),
)


def fitted(values: dict[int, float]) -> str:
    if len(values) < 3:
        return "-"
    found = exponents(list(values), list(values.values()))
    return f"{found['last']:.2f} ({found['all']:.2f}, {found['low']:.2f} to {found['high']:.2f})"


def markdown() -> str:
    """A row a task of each group: exponents of the time of both sides, of peak memory, and where they cross."""
    body = []
    for files, name, control in GROUPS:
        timings = Timings(*files)
        for task, title in TITLES.items():
            own, reference = (timings.medians(task, which) for which in (name, control))
            both = [length for length in own if length in reference]
            if len(both) < 2:
                continue
            met = crossover(both, [reference[length] / own[length] for length in both])
            from_on = (
                f"not up to {both[-1]:,}" if met is None else f"{met:,.0f}" if met > both[0] else f"all from {met:,}"
            )
            if task == "decode" and copies_its_cache(which for kind, which, _ in timings.rows if kind == task):
                from_on, reference = "a cache that is copied", {}
            peaks = {n: row["peak_bytes"] for (kind, which, n), row in sorted(timings.rows.items())
                     if (kind, which) == (task, name) and row.get("peak_bytes")}  # fmt: skip
            body.append([name, title.lower(), fitted(own), control, fitted(reference), fitted(peaks), from_on])
    header = ["model", "task", "exponent of its time", "attention", "exponent of its time"]
    header += ["of the model's peak memory", "faster from"]
    return (
        "Measured: slope of log time on log length between the two longest (and fitted to all, with its interval of "
        "95 %), and the length from which on the model is faster; attention whose cache is copied at each token is not "
        "held against.\n\n" + markdown_table(header, body)
    )
