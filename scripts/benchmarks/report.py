"""Tables and the figure of `benchmark.py`, made from its results alone."""

from pathlib import Path

from ordnung.scripts.benchmarks.mixer import PARTS
from ordnung.scripts.benchmarks.variants import STATIC, VARIANTS, copies_its_cache
from ordnung.scripts.common.figures import family_of, legend_below, nested, new_figure, reaching, styles
from ordnung.scripts.common.tables import markdown_table

TITLES = {
    "forward": "Forward",
    "train": "Training step",
    "prefill": "Prefill",
    "decode": "Decode, one token",
    "mixer": "Parts",
}


def add_ratios(rows: list[dict], baseline: str) -> None:
    """Give each timed row `ratios`: how many times faster than another row of its task and length, by name.

    `measured` divides the median times, `predicted` the FLOPs. Models are compared with `baseline`, in decode with the
    faster of its forms, and parts with those that `PARTS` names.
    """
    timed = {(row["task"], row["length"], row["name"]): row for row in rows if "seconds" in row}
    for (task, length, name), row in timed.items():
        others = PARTS[name].compared_with if task == "mixer" else (faster_form(timed, task, length, baseline),)
        row["ratios"] = {
            other: {
                "measured": reference["seconds"]["median"] / row["seconds"]["median"],
                "predicted": reference["flops"] / row["flops"],
            }
            for other in others
            if (reference := timed.get((task, length, other))) is not None
        }


def faster_form(timed: dict[tuple, dict], task: str, length: int, name: str) -> str:
    """`name` or its form in a static cache: that whose row takes less time; `timed` by task, length and name."""
    forms = [form for form in (name, name + STATIC) if (task, length, form) in timed]
    return min(forms, key=lambda form: timed[task, length, form]["seconds"]["median"], default=name)


def _time_cell(row: dict) -> str:
    """Microseconds per token, half the interquartile range in per cent, samples, and ratios: measured (predicted)."""
    scale = 1e6 / row["tokens"]
    seconds = row["seconds"]
    spread = 50 * (seconds["q3"] - seconds["q1"]) / seconds["median"]
    known = f"±{spread:.0f}% of {seconds['n']}" if seconds["n"] > 1 else "(n = 1)"
    cell = f"{seconds['median'] * scale:.4g} {known}"
    for name, ratio in row.get("ratios", {}).items():
        if row["name"] == "convolution":
            return f"{cell}, {100 / ratio['measured']:.1f}% ({100 / ratio['predicted']:.1f}%) of the block"
        if name != row["name"]:
            of = f" {name.rsplit('_', 1)[1]}" if row["task"] == "mixer" else ""
            cell += f", {ratio['measured']:.2f}x ({ratio['predicted']:.2f}x){of}"
    return cell


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.4g}"


def _state_cell(row: dict) -> str:
    predicted = row["predicted_state_bytes"]
    return _mib(row["state_bytes"]) + (f" ({_mib(predicted)})" if predicted is not None else "")


def markdown(results: dict) -> str:
    """All tables of a results dictionary as `benchmark.py` writes it."""
    rows = results["results"]
    machine, settings = results["machine"], results["settings"]
    device = (
        machine["gpu"][0]["name"] if settings["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    )
    shape = settings["shape"]
    kernel = f", K={shape['kernel_size']}" if "conv_lm" in results["variants"] else ""
    parts = [
        f"{device}, {settings['dtype']}, batch {settings['batch_size']}, width {shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers, {shape['num_attention_heads']} heads, vocabulary {shape['vocab_size']}"
        f"{kernel}; torch {machine['torch']}, transformers {machine['transformers']}, "
        f"ordnung {machine['ordnung']}, {machine['date'][:10]}.",
        f"Times are medians with half the interquartile range of n samples; ratios against {results['baseline']}: "
        "measured (predicted from FLOPs), above 1 is faster.",
    ]
    decoded = [row["name"] for row in rows if row["task"] == "decode" and "seconds" in row]
    if copies_its_cache(decoded):
        parts[-1] += " Attention decodes in a cache that is copied to grow: a static one was not timed here."
    elif any(name.endswith(STATIC) for name in decoded):
        parts[-1] += " Decode is held against the faster of its forms, with a growing or with a static cache."

    def section(title, task, cell, wanted):
        chosen = [row for row in rows if row["task"] == task and wanted(row)]
        if not chosen:
            return
        lengths = sorted({row["length"] for row in chosen})
        cells = {(row["name"], row["length"]): cell(row) for row in chosen}
        names = dict.fromkeys(row["name"] for row in chosen)
        body = [[name, *(cells.get((name, length), "-") for length in lengths)] for name in names]
        parts.append(f"**{title}**\n\n" + markdown_table(["N", *map(str, lengths)], body))

    for task, title in TITLES.items():
        section(f"{title}, µs per token", task, _time_cell, lambda row: "seconds" in row)
    for task, title in TITLES.items():
        peak = f"Peak memory above the weights, {title.lower()}, MiB"
        section(peak, task, lambda row: _mib(row["peak_bytes"]), lambda row: row.get("peak_bytes") is not None)
    section(
        "Generation state of one sequence, MiB (predicted)", "decode", _state_cell, lambda row: "state_bytes" in row
    )

    failures = [f"{name}: deviates by {c['deviation']:.2g}" for name, c in results["checks"].items() if not c["passed"]]
    if failures:
        parts.append("**Wrong outputs, not timed**\n\n" + "\n".join(f"- {line}" for line in failures))
    left_out = [row for row in rows if row["status"] != "ok"]
    if left_out:
        lines = (
            f"- {row['task']}, {row['name']}, N={row['length']}: {row['status']}, {row['reason']}" for row in left_out
        )
        parts.append("**Left out**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot(results: dict, path: Path) -> None:
    """Log-log panels against N: time per token of every task, peak memory of forward and training, generation state.

    Bars are quartiles. The names of parts stand beside their panel, which is the last.
    """
    rows = [row for row in results["results"] if row["status"] == "ok"]
    panels = []
    for task, title in TITLES.items():
        timed = [row for row in rows if row["task"] == task and "seconds" in row]
        times = [(row, *(row["seconds"][key] * 1e6 / row["tokens"] for key in ("median", "q1", "q3"))) for row in timed]
        if task == "decode" and copies_its_cache(row["name"] for row in timed):
            title += "\n(attention's cache is copied to grow)"
        panels.append((title, "µs per token", times))
    for task in ("forward", "train"):
        found = [row for row in rows if row["task"] == task and row["peak_bytes"]]
        peaks = [(row, *3 * [row["peak_bytes"] / 2**20]) for row in found]
        panels.append((f"{TITLES[task]}: memory", "peak MiB above the weights", peaks))
    states = [(row, *3 * [row["state_bytes"] / 2**20]) for row in rows if "state_bytes" in row]
    panels.append(("Generation state of one sequence", "MiB", states))
    panels = sorted((panel for panel in panels if panel[-1]), key=lambda panel: panel[0] == TITLES["mixer"])
    if not panels:
        return

    parts = panels[-1][0] == TITLES["mixer"]
    columns = min(3, len(panels) + parts)
    lines = -(-(len(panels) + parts) // columns)
    figure, axes = new_figure(lines, columns, figsize=(5.2 * columns, 4 * lines + 0.6), squeeze=False)
    axes = list(axes.flat)
    names = dict.fromkeys(row["name"] for *_, points in panels for row, *_ in points)
    whole, of_parts = ([name for name in names if (name in PARTS) == part] for part in (False, True))
    drawn = {}
    for group in (whole, of_parts):
        drawn |= nested(styles({name: family_of(name) for name in group}))
    for axis, (title, label, points) in zip(axes, panels):
        for name in [name for name in drawn if name in {row["name"] for row, *_ in points}]:
            line = sorted((row["length"], *values) for row, *values in points if row["name"] == name)
            where, middles, *ends = zip(*line)
            called, look = name, drawn[name]
            if title.startswith(TITLES["decode"]) and name in VARIANTS and VARIANTS[name].static_form:
                called, look = f"{name}, growing cache", look | {"markerfacecolor": look["color"]}
            axis.errorbar(where, middles, reaching(middles, *ends), label=called, capsize=2, elinewidth=1, **look)
        axis.set(title=title, xlabel="tokens N", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(lengths := sorted({row["length"] for row, *_ in points}), map(str, lengths))
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    used = axes[: len(panels)]
    for axis in axes[len(panels) + parts :]:
        axis.remove()
    if parts:
        beside = axes[len(panels)]
        beside.axis("off")
        beside.legend(*used[-1].get_legend_handles_labels(), loc="center left", title=TITLES["mixer"], fontsize=8)
    legend_below(figure, used[:-1] if parts else used, columns=5)
    figure.savefig(path, dpi=120)
