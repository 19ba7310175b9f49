"""How measured times and memory grow with the length, and from where on each mixer is faster than attention."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ordnung.scripts.benchmarks.growth import crossover, exponents
from ordnung.scripts.benchmarks.measure import summarise
from ordnung.scripts.benchmarks.report import TITLES
from ordnung.scripts.benchmarks.variants import copies_its_cache
from ordnung.scripts.common.figures import draw_slopes, legend_below, new_figure, reaching, styles
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.reports.findings import SPARSE, SQUARED, competitors
from ordnung.scripts.reports.results import CAUSAL_BENCHMARKS, CONV_BENCHMARKS, ENCODER_BENCHMARKS, Timings, load

# runs of benchmark.py of one shape, what is measured in them, its family, and the attention that it is held against
GROUPS = (
    (CONV_BENCHMARKS, "conv_lm", "conv_lm", "softmax_lm"),
    (CAUSAL_BENCHMARKS, "linformer_lm", "linformer_lm", "softmax_lm"),
    (ENCODER_BENCHMARKS, "linformer_encoder", "linformer_lm", "softmax_encoder_sdpa"),
)
CUBIC, CUBIC_LAYERS = "cubic_prefix_lm_benchmark", 3
TASKS = {task: title.lower() for task, title in TITLES.items()}


@dataclass(frozen=True)
class Series:
    """Times of one program's runs by length, as `summarise` gives them, beside those of attention; peaks in bytes."""

    name: str
    family: str
    task: str
    own: dict[int, dict]
    control: str
    reference: dict[int, dict]
    peaks: dict[int, int] = field(default_factory=dict)
    control_peaks: dict[int, int] = field(default_factory=dict)

    def from_on(self) -> str:
        """The length from which on attention takes longer, in words; "-" without attention to hold against."""
        both = [length for length in self.own if length in self.reference]
        if not both:
            return "-"
        met = crossover(both, [self.reference[n]["median"] / self.own[n]["median"] for n in both])
        return f"not up to {both[-1]:,}" if met is None else f"{met:,.0f}" if met > both[0] else f"all from {met:,}"


def of_benchmarks() -> Iterator[Series]:
    """What benchmark.py measured; no attention to hold decoding against where its cache is copied at each token."""
    for files, name, family, control in GROUPS:
        rows = sorted(Timings(*files).rows.items())
        for task, title in TASKS.items():
            own, reference = (
                {n: row["seconds"] for (kind, who, n), row in rows if (kind, who) == (task, which)}
                for which in (name, control)
            )
            peaks, control_peaks = (
                {n: row["peak_bytes"] for (kind, who, n), row in rows if (kind, who) == (task, which)
                 and row.get("peak_bytes")}
                for which in (name, control)
            )  # fmt: skip
            if task == "decode" and copies_its_cache(who for kind, who, _ in Timings(*files).rows if kind == task):
                reference = {}
            if len(own) > 1:
                yield Series(name, family, title, own, control, reference, peaks, control_peaks)


def of_operations() -> Iterator[Series]:
    """What the programs measured that time one family's operation in its forms."""
    kind, static = "local + global", "full attention, static"
    rows = {row["length"]: row["competitors"] for row in load(SPARSE)["attention"] if not row["backward"]}
    peaks, control_peaks = ({n: row[which]["peak_bytes"] for n, row in rows.items()} for which in (kind, "SDPA"))
    name, times = f"{kind}, attention alone", competitors("attention", kind)
    reference = competitors("attention", "SDPA")
    yield Series(name, "sparse_attention_lm", TASKS["forward"], times, "SDPA", reference, peaks, control_peaks)
    times, reference = (competitors("decoding", which) for which in (kind, static))
    yield Series(f"{kind}, a layer", "sparse_attention_lm", TASKS["decode"], times, static, reference)
    results, family = load(SQUARED), "quadratic_kernel_lm"
    for size in results["settings"]["head_sizes"]:
        name, rows = f"squared kernel, head size {size}", [r for r in results["lengths"] if r["head_size"] == size]
        times, reference = ({row["length"]: row["forward"][which] for row in rows} for which in ("squared", "softmax"))
        yield Series(name, family, TASKS["forward"], times, "SDPA", reference)
        rows = [row for row in results["decoding"] if row["head_size"] == size]
        times, reference = ({row["length"]: row[which] for row in rows} for which in ("state", "static"))
        yield Series(name, family, TASKS["decode"], times, static, reference)
    rows = {row["length"]: row["competitors"] for row in load(CUBIC)["training"] if row["layers"] == CUBIC_LAYERS}
    times, reference = (
        {n: summarise(row[which]["all_seconds"]) for n, row in rows.items()} for which in ("cubic", "causal")
    )
    name = f"cubic_prefix_lm, {CUBIC_LAYERS} layers"
    yield Series(name, "cubic_prefix_lm", TASKS["train"], times, "causal", reference)


def series() -> list[Series]:
    return [*of_benchmarks(), *of_operations()]


def fitted(values: dict[int, float]) -> str:
    if len(values) < 3:
        return "-"
    found = exponents(list(values), list(values.values()))
    return f"{found['last']:.2f} ({found['all']:.2f}, {found['low']:.2f} to {found['high']:.2f})"


def medians(seconds: dict[int, dict]) -> dict[int, float]:
    return {length: of["median"] for length, of in seconds.items()}


def markdown() -> str:
    """A row a task of each mixer: exponents of the time of both sides, of peak memory, and where they cross."""
    body = []
    for one in series():
        times = (fitted(medians(one.own)), one.control, fitted(medians(one.reference)), fitted(one.peaks))
        body.append([one.name, one.task, *times, one.from_on()])
    header = ["model", "task", "exponent of its time", "attention", "exponent of its time"]
    header += ["of the model's peak memory", "faster from"]
    return (
        "Measured: slope of log time on log length between the two longest (and fitted to all, with its interval of "
        "95 %), and the length from which on the model is faster; attention whose cache is copied at each token is not "
        "held against.\n\n" + markdown_table(header, body)
    )


def plot(image: Path):
    """Log-log: time and peak memory of a row against N, each in units of its own at its shortest; slopes 1, 2 and 3.

    The forward pass of all, where it was measured, else the training step; of attention whose memory was measured too,
    one curve a form.
    """
    found = series()
    forward = {one.family for one in found if one.task == TASKS["forward"]}
    shown = [one for one in found if one.task == TASKS["forward" if one.family in forward else "train"]]
    curves = {f"{one.name}, {one.task}": (one.family, one.own, one.peaks) for one in shown}
    for one in shown:
        if one.control_peaks:
            curves.setdefault(one.control, ("softmax_lm", one.reference, one.control_peaks))
    drawn = styles({name: family for name, (family, *_) in curves.items()})
    figure, panels = new_figure(1, 2, figsize=(13, 6))
    for panel, title in zip(panels, ("time of a row", "peak memory of a row, above the weights")):
        lengths, highest = set(), 1.0
        for name, (_, seconds, peaks) in curves.items():
            points = {n: (of["median"], of["q1"], of["q3"]) for n, of in seconds.items()}
            if panel is not panels[0]:
                points = {n: 3 * (peak,) for n, peak in peaks.items()}
            if len(points) < 2:
                continue
            first, lengths = points[min(points)][0], lengths | set(points)
            middles, *ends = ([value / first for value in values] for values in zip(*points.values()))
            panel.errorbar(list(points), middles, reaching(middles, *ends), label=name, capsize=2, **drawn[name])
            highest = max(highest, *middles)
        draw_slopes(panel, (min(lengths), max(lengths)), 1, 2 * highest)
        ticks = sorted(n for n in lengths if n & (n - 1) == 0)
        panel.set(xscale="log", yscale="log", xlabel="tokens N", title=title)
        panel.set_ylabel("in units of its own at the shortest")
        panel.set_xticks(ticks[::2], [f"{n:,}" for n in ticks[::2]])
        panel.xaxis.minorticks_off()
    legend_below(figure, panels, columns=3)
    figure.savefig(image, dpi=120)
