"""Speed and memory of variants: probed, timed in turns, saved after every task and length."""

import dataclasses
import gc
from pathlib import Path

import torch

from ordnung.scripts.benchmarks.cases import MODEL_TASKS, Case, Settings
from ordnung.scripts.benchmarks.checks import run_checks
from ordnung.scripts.benchmarks.measure import make_sample, prepare_process, probe, summarise, time_in_turns
from ordnung.scripts.benchmarks.mixer import PARTS
from ordnung.scripts.benchmarks.report import add_ratios, markdown, plot
from ordnung.scripts.benchmarks.variants import CAUSAL, VARIANTS, Shape, with_static_forms
from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.common.machine import check_device, machine_info

TASKS = (*MODEL_TASKS, "memory", "mixer")


def filled(kind: type, options, **given):
    """A dataclass with the fields that the options have too."""
    names = [field.name for field in dataclasses.fields(kind) if hasattr(options, field.name)]
    return kind(**{name: getattr(options, name) for name in names}, **given)


def hopeless(earlier: dict | None, length: int, limit_seconds: float) -> str | None:
    """Why a case need not be tried, judged by its own outcome at the next shorter length; None if it should be."""
    if earlier is None or earlier["status"] == "failed":
        return None
    if earlier["status"] == "skipped":
        return earlier["reason"] if "at N=" in earlier["reason"] else f"at N={earlier['length']}: {earlier['reason']}"
    # no task gets cheaper per token with the length, so this is a lower bound; decode alone does not depend on it
    least = earlier["probe_seconds"] * (1 if earlier["task"] == "decode" else length / earlier["length"])
    if least > limit_seconds:
        seen = f"{earlier['probe_seconds']:.0f} s at N={earlier['length']}"
        return f"one sample would take at least {least:.0f} s, judged from {seen}"
    return None


def add_times(rows: list[dict], settings: Settings, budget: float) -> None:
    """Time all rows whose probe succeeded in turns, within about `budget` seconds, and enter the results in them."""
    runnable = {(row["name"], row["length"]): row for row in rows if row["status"] == "ok"}
    samples = {key: make_sample(Case(row["task"], *key), settings) for key, row in runnable.items()}
    expected = {key: row["probe_seconds"] for key, row in runnable.items()}
    seconds, dropped = time_in_turns(samples, settings.device, budget, expected)
    for key, values in seconds.items():
        runnable[key]["seconds"] = summarise(values)
    for key, reason in dropped.items():
        runnable[key] |= {"status": "skipped", "reason": reason}


def measure(task: str, names: list[str], lengths: list[int], settings: Settings, options, before: list[dict]) -> list:
    """Probe and time one task at `lengths`, all in the same turns; `before` holds the rows of shorter lengths."""
    gc.collect()  # models of the task before are cyclic garbage; the probes should see their memory as free
    latest = {row["name"]: row for row in before if row["task"] == task}
    rows = []
    for length in lengths:
        for name in names:
            case, limit = Case(task, name, length), options.max_sample_seconds
            reason = hopeless(latest.get(name), length, limit)
            outcome = {"status": "skipped", "reason": reason} if reason else probe(case, settings, limit)
            rows.append({**dataclasses.asdict(case), **outcome})
            latest[name] = rows[-1]
    if task in options.tasks:
        add_times(rows, settings, options.seconds * len(lengths))
    for row in rows:
        outcome = row.get("reason") or (f"{row['seconds']['median']:.4g} s" if "seconds" in row else "probed")
        print(f"{task} {row['name']} N={row['length']}: {row['status']}, {outcome}", flush=True)
    return rows


def complete(options):
    """Put what the options leave open in their place.

    Raises:
        ScriptError: a variant or task that there is not, a baseline that does not run, no GPU.
    """
    options.variants = options.variants or [name for name in CAUSAL if VARIANTS[name].by_default]
    options.tasks, options.threads = options.tasks or list(TASKS), options.threads or torch.get_num_threads()
    for option, known in (("variants", VARIANTS), ("tasks", TASKS)):
        for name in getattr(options, option):
            if name not in known:
                raise ScriptError(f"--{option} {name}{closest(name, known)}; there are {', '.join(known)}")
    check_device(options.device)
    options.baseline = options.baseline or "gpt2_sdpa"
    if options.baseline not in options.variants:
        raise ScriptError(f"--baseline {options.baseline} must be among --variants ({' '.join(options.variants)})")


def run(options) -> int:
    """Measure as benchmark.py's options say.

    Returns:
        exit status: 1 if an output was wrong or a case failed with an error, otherwise 0.
    Raises:
        ScriptError: as `complete`.
    """
    if options.markdown is not None:
        results = read_json(Path(options.markdown))
        results["baseline"] = options.baseline or results["baseline"]
        add_ratios(results["results"], results["baseline"])
        print(markdown(results))
        return 0

    complete(options)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = filled(Settings, options, shape=filled(Shape, options))
    prepare_process(settings)
    checks = run_checks(options.variants, settings)
    wrong = {name for check in checks.values() if not check["passed"] for name in check["variants"]}
    results = {
        "machine": machine_info(settings.device),
        "settings": dataclasses.asdict(settings),
        "baseline": options.baseline,
        "variants": {name: VARIANTS[name].description for name in options.variants},
        "parts": {name: part.description for name, part in PARTS.items()},
        "checks": checks,
        "results": [],
    }
    probed = [task for task in MODEL_TASKS if task in options.tasks or "memory" in options.tasks]
    competitors = {
        task: [
            name for name in options.variants if name not in wrong and (task == "forward" or not VARIANTS[name].encoder)
        ]
        for task in probed
    }
    if "decode" in competitors:
        competitors["decode"] = [name for name in with_static_forms(competitors["decode"]) if name not in wrong]
    if "mixer" in options.tasks and "conv_lm" not in wrong:
        competitors["mixer"] = list(PARTS)
    # Decoding claims a time that does not grow with the context: all contexts take turns, so that a slow minute of the
    # machine cannot look like growth.
    groups = [(task, [length]) for length in options.lengths for task in competitors if task != "decode"]
    groups += [("decode", options.lengths)] if "decode" in competitors else []
    for task, lengths in groups:
        results["results"] += measure(task, competitors[task], lengths, settings, options, results["results"])
        add_ratios(results["results"], options.baseline)
        write_json(output, results)
    plot(results, output.with_suffix(".png"))
    print(markdown(results))
    print(f"Written: {output} and {output.with_suffix('.png')}")
    return int(bool(wrong) or any(row["status"] == "failed" for row in results["results"]))
