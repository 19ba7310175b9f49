"""Experiments run one after the other by their commands, each into its results file.

Results files are tracked: they are written when no experiment of the call is left, so that none records changed files.
"""

import os
import shlex
import shutil
import string
import subprocess
import sys
import time
from pathlib import Path

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_json, write_text


def missing(command: str, inputs: dict) -> list[str]:
    """What a command names in braces and nobody has given."""
    named = {name for _, name, *_ in string.Formatter().parse(command) if name}
    return sorted(named - {"out", *inputs})


def words_of(experiment: dict, options) -> list[str]:
    """The command of an experiment, with its inputs in their places."""
    command = experiment["command"]
    if options.device == "cuda":
        command += f" {experiment.get('cuda') or ''}"
    return shlex.split(command.format(out=options.output_dir, **options.inputs))


def program_path() -> str:
    """The command `ordnung` of this Python.

    Raises:
        ScriptError: it is not installed.
    """
    found = shutil.which("ordnung", path=str(Path(sys.executable).parent)) or shutil.which("ordnung")
    if found is None:
        raise ScriptError("the command `ordnung` is not installed: pip install -e .")
    return found


def start(words: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; returns the exit status."""
    return subprocess.run(words, env=environment).returncode


def made_by(experiment: dict, options) -> Path:
    """The file that an experiment writes."""
    return Path(experiment["result"].format(out=options.output_dir))


def run(options) -> int:
    """Run what is not finished, then write the results files; returns the exit status, that of what failed."""
    results, log = Path(options.results_dir), Path(options.output_dir) / "done.json"
    if not results.is_dir():
        raise ScriptError(f"--results_dir {results}: there is no such folder; run this in a clone, or make it")
    log.parent.mkdir(parents=True, exist_ok=True)
    done = read_json(log) if log.exists() else {}
    status, finished = run_all(options, done, log)
    names = [name for name in options.only or options.experiments if name in finished]
    for name in names:
        made = made_by(options.experiments[name], options)
        write_text(results / f"{name}.json", made.read_text(encoding="utf-8"))
    minutes = sum(done[name]["seconds"] for name in names) / 60
    print(f"{len(names)} experiments, {minutes:.0f} min in all, are in {results}; see {log}")
    return status


def run_all(options, done: dict, log: Path) -> tuple[int, list[str]]:
    """Run what `done` has not, and tell how long the rest takes; `done` and its file `log` hold what was.

    The time left is that of the estimates, times how much longer than theirs the experiments so far have taken.

    Returns:
        0, or the exit status of the first that failed; the names of those that are finished as the options ask.
    """
    ordnung, names, left, finished = program_path(), options.only or options.experiments, [], []
    for name in names:
        experiment = options.experiments[name]
        if lacks := missing(experiment["command"], options.inputs):
            print(f"{name}: left out, it needs --inputs {','.join(f'{each}=...' for each in lacks)}")
        elif done.get(name, {}).get("words") == words_of(experiment, options) and made_by(experiment, options).exists():
            print(f"{name}: finished, kept")
            finished.append(name)
        else:
            left.append(name)
            if options.device == "cuda" and not experiment.get("cuda"):
                print(f"{name}: has no form for a GPU, runs on the CPU")
    environment = dict(os.environ)
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # programs that train take a GPU where they see one
    spent = estimated = 0.0
    for i, name in enumerate(left):
        experiment, rest = options.experiments[name], sum(options.experiments[each]["minutes"] for each in left[i:])
        minutes = rest * (spent / estimated if estimated else 1)
        words = words_of(experiment, options)
        print(f"[{i + 1}/{len(left)}, about {minutes:.0f} min left] ordnung {shlex.join(words)}", flush=True)
        done.pop(name, None)
        write_json(log, done)  # what it writes is not what was there, should it be stopped
        begin = time.perf_counter()
        if status := start([ordnung, *words], environment):
            print(f"{name}: exit status {status}; the same command goes on here", file=sys.stderr)
            return status, finished
        taken = time.perf_counter() - begin
        spent, estimated = spent + taken / 60, estimated + experiment["minutes"]
        done[name] = {"words": words, "seconds": taken}
        write_json(log, done)
        finished.append(name)
    return 0, finished
