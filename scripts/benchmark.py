"""Speed and memory of ConvLM and its rivals: the same width, depth and vocabulary, one machine, one run.

    python scripts/benchmark.py                                   # everything, on the CPU: one to two hours
    python scripts/benchmark.py --lengths 512 2048 --tasks forward decode --seconds 10
    python scripts/benchmark.py --device cuda --dtype bfloat16
    python scripts/benchmark.py --variants softmax_encoder_sdpa linformer_encoder --baseline softmax_encoder_sdpa
    python scripts/benchmark.py --markdown out/benchmark.json     # the tables of an earlier run

Outputs are checked first; what is wrong is not timed. Every case is then tried once in a process of its own, which
gives its peak memory, or says why it cannot run here. Those that can are timed in turns, so that a disturbance of the
machine meets all alike. All models make the logits of every position in forward and train, and of the last one in
prefill. Results are saved after every task and length; decoding comes last, with all lengths in the same turns.
"""

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path

import torch

from ordnung.scripts.bench_cases import MODEL_TASKS, Case, Settings
from ordnung.scripts.bench_checks import TOLERANCE, run_checks
from ordnung.scripts.bench_measure import make_sample, prepare_process, probe, summarise, time_in_turns
from ordnung.scripts.bench_mixer import PARTS
from ordnung.scripts.bench_report import add_ratios, markdown, plot
from ordnung.scripts.bench_variants import CAUSAL, VARIANTS, Shape
from ordnung.scripts.common import write_json
from ordnung.scripts.machine import machine_info

TASKS = (*MODEL_TASKS, "memory", "mixer")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        help="memory: peak memory of forward, train and prefill, state of decode, untimed",
    )
    usual = [name for name in CAUSAL if VARIANTS[name].by_default]
    add("--variants", nargs="+", choices=VARIANTS, default=usual, help="encoders run forward only")
    add("--baseline", choices=VARIANTS, help="what ratios are against (default: gpt2_sdpa)")
    add("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768], help="tokens")
    shape = Shape()
    add("--hidden_size", type=int, default=shape.hidden_size)
    add("--num_hidden_layers", type=int, default=shape.num_hidden_layers)
    add("--num_attention_heads", type=int, default=shape.num_attention_heads)
    add("--vocab_size", type=int, default=shape.vocab_size)
    add("--kernel_size", type=int, default=shape.kernel_size, help="taps of ConvLM")
    add("--batch_size", type=int, default=1)
    add("--decode_steps", type=int, default=32, help="single-token steps of one decode sample")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=TOLERANCE, default="float32")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=90.0, help="time to spend on the samples of one task at one length")
    add("--max_sample_seconds", type=float, default=180.0, help="leave out a case that needs more, set-up included")
    add("--output", type=Path, default=Path("out/benchmark.json"), help="JSON; a PNG of the same name goes beside it")
    add("--markdown", type=Path, metavar="JSON", help="print the tables of this results file and do nothing else")
    arguments = parser.parse_args(argv)

    arguments.lengths = sorted(set(arguments.lengths))
    for name in ("batch_size", "decode_steps", "threads", "kernel_size", "num_hidden_layers", "vocab_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} ({getattr(arguments, name)}) must be at least 1")
    if arguments.lengths[0] < 1:
        parser.error(f"--lengths ({arguments.lengths[0]}) must be at least 1")
    if arguments.hidden_size % arguments.num_attention_heads:
        parser.error(
            f"--hidden_size ({arguments.hidden_size}) must be a multiple of --num_attention_heads "
            f"({arguments.num_attention_heads})"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    if arguments.markdown is None:
        arguments.baseline = arguments.baseline or "gpt2_sdpa"
        if arguments.baseline not in arguments.variants:
            parser.error(f"--baseline {arguments.baseline} must be among --variants ({' '.join(arguments.variants)})")
    return arguments


def make_settings(arguments: argparse.Namespace) -> Settings:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "kernel_size")
    shared = ("batch_size", "device", "dtype", "threads", "seed", "decode_steps")
    shape = Shape(**{name: getattr(arguments, name) for name in sizes})
    return Settings(shape=shape, **{name: getattr(arguments, name) for name in shared})


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


def probe_case(case: Case, earlier: dict | None, settings: Settings, limit_seconds: float) -> dict:
    """The row of `case` without its time; `earlier` is that of the same competitor at the next shorter length."""
    reason = hopeless(earlier, case.length, limit_seconds)
    outcome = {"status": "skipped", "reason": reason} if reason else probe(case, settings, limit_seconds)
    return {**dataclasses.asdict(case), **outcome}


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


def measure(task: str, names: list[str], lengths: list[int], settings: Settings, arguments, before: list[dict]) -> list:
    """Probe and time one task at `lengths`, all in the same turns; `before` holds the rows of shorter lengths."""
    gc.collect()  # models of the task before are cyclic garbage; the probes should see their memory as free
    latest = {row["name"]: row for row in before if row["task"] == task}
    rows = []
    for length in lengths:
        for name in names:
            case = Case(task, name, length)
            latest[name] = probe_case(case, latest.get(name), settings, arguments.max_sample_seconds)
            rows.append(latest[name])
    if task in arguments.tasks:
        add_times(rows, settings, arguments.seconds * len(lengths))
    for row in rows:
        outcome = row.get("reason") or (f"{row['seconds']['median']:.4g} s" if "seconds" in row else "probed")
        print(f"{task} {row['name']} N={row['length']}: {row['status']}, {outcome}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if an output was wrong or a case failed with an error, otherwise 0."""
    arguments = parse_arguments(argv)
    if arguments.markdown is not None:
        results = json.loads(arguments.markdown.read_text())
        results["baseline"] = arguments.baseline or results["baseline"]
        add_ratios(results["results"], results["baseline"])
        print(markdown(results))
        return 0

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = make_settings(arguments)
    prepare_process(settings)
    checks = run_checks(arguments.variants, settings)
    wrong = {name for check in checks.values() if not check["passed"] for name in check["variants"]}
    results = {
        "machine": machine_info(),
        "settings": dataclasses.asdict(settings),
        "baseline": arguments.baseline,
        "variants": {name: VARIANTS[name].description for name in arguments.variants},
        "parts": {name: part.description for name, part in PARTS.items()},
        "checks": checks,
        "results": [],
    }
    probed = [task for task in MODEL_TASKS if task in arguments.tasks or "memory" in arguments.tasks]
    competitors = {
        task: [
            name
            for name in arguments.variants
            if name not in wrong and (task == "forward" or not VARIANTS[name].encoder)
        ]
        for task in probed
    }
    if "mixer" in arguments.tasks and "conv_lm" not in wrong:
        competitors["mixer"] = list(PARTS)
    # Decoding claims a time that does not grow with the context: all contexts take turns, so that a slow minute of the
    # machine cannot look like growth.
    groups = [(task, [length]) for length in arguments.lengths for task in competitors if task != "decode"]
    groups += [("decode", arguments.lengths)] if "decode" in competitors else []
    for task, lengths in groups:
        results["results"] += measure(task, competitors[task], lengths, settings, arguments, results["results"])
        add_ratios(results["results"], arguments.baseline)
        write_json(arguments.output, results)
    plot(results, arguments.output.with_suffix(".png"))
    print(markdown(results))
    print(f"Written: {arguments.output} and {arguments.output.with_suffix('.png')}")
    return int(bool(wrong) or any(row["status"] == "failed" for row in results["results"]))


if __name__ == "__main__":
    sys.exit(main())
