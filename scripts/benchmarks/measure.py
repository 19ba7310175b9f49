"""Timing and memory for `benchmark.py`: a probe of each case in a process of its own, then timed samples in turns.

The probe runs one sample in a fresh child process under a memory and a time limit. That gives peak memory, which a
process that has done other work cannot tell, and it shows before any timing whether the case can run here at all.
"""

import ctypes
import gc
import logging
import multiprocessing
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
import transformers

from ordnung.scripts.benchmarks.cases import MODEL_TASKS, Case, Sample, Settings
from ordnung.scripts.benchmarks.mixer import PARTS
from ordnung.scripts.benchmarks.variants import split_form

MIN_ROUNDS, MAX_ROUNDS = 3, 50
WARM_UP_LENGTH = 16  # tokens, of the tiny sample that a probe starts with
GIB = 2**30
MEMORY_ERRORS = (MemoryError, RuntimeError)  # where `out_of_memory` has to be asked


def make_sample(case: Case, settings: Settings) -> Sample:
    """Build the competitor of `case`: one of `VARIANTS`, in the mixer task one of `PARTS`."""
    if case.task in MODEL_TASKS:
        variant, static = split_form(case.name)
        return MODEL_TASKS[case.task](variant, case.task, case.length, settings, static)
    return PARTS[case.name].make_sample(case.length, settings)


def prepare_process(settings: Settings) -> None:
    """Threads as asked for, and no warnings of slow paths or receptive fields: both are on purpose here."""
    torch.set_num_threads(settings.threads)
    logging.getLogger("ordnung").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


def timed(run: Callable, *arguments, device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def thread_timer(threads: int, device: str = "cpu") -> Callable[[Callable], float]:
    """What times a call; with one thread of the CPU in its own seconds, which other programs hardly lengthen."""
    own = threads == 1 and device == "cpu"
    return partial(timed, device=device, clock=time.thread_time if own else time.perf_counter)


def in_turns(
    runs: Mapping[str, Callable], rounds: int, timer: Callable[[Callable], float] = timed
) -> dict[str, list[float]]:
    """Seconds of each of `runs`, called in turns, A B B A A B; a first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            seconds[name].append(timer(runs[name]))
    return {name: values[1:] for name, values in seconds.items()}


def out_of_memory(error: BaseException) -> bool:
    """Whether one of `MEMORY_ERRORS` says that memory ran out; on the CPU torch has no exception class for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _peak_bytes() -> int | None:
    """The high-water mark of this process's resident memory, which psutil does not tell; None but on Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class PeakMemory:
    """Peak memory above what is in use at construction: resident memory on the CPU, the allocator's on a GPU."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.baseline = torch.cuda.memory_allocated() if self.cuda else psutil.Process().memory_info().rss

    def restart(self) -> None:
        """Forget the peak so far, not the baseline."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif _peak_bytes() is not None:
            # what the set-up has freed would otherwise stay resident and hide what the sample needs
            getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: None)(0)
            # Linux then resets the high-water mark of resident memory
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def read(self) -> int | None:
        peak = torch.cuda.max_memory_allocated() if self.cuda else _peak_bytes()
        return None if peak is None else max(peak - self.baseline, 0)


def _limit_memory() -> None:
    """Let allocations beyond 90 % of the free memory fail in this process, instead of starving the machine."""
    used = getattr(psutil.Process().memory_info(), "data", None)
    if used is not None:  # Linux alone tells it and limits by it
        import resource

        limit = used + int(0.9 * psutil.virtual_memory().available)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _run_probe(case: Case, settings: Settings) -> dict:
    prepare_process(settings)
    # loads code and starts threads, so that they are not taken for memory of the sample
    tiny = make_sample(replace(case, length=WARM_UP_LENGTH), settings.tiny())
    tiny.setup()
    tiny.run(tiny.prepare())
    del tiny
    gc.collect()
    free = torch.cuda.mem_get_info()[0] if settings.device == "cuda" else psutil.virtual_memory().available
    if settings.device == "cpu":
        _limit_memory()
    try:
        sample = make_sample(case, settings)
        memory = PeakMemory(settings.device)
        sample.setup()
        argument = sample.prepare()
        memory.restart()
        seconds = timed(sample.run, argument, device=settings.device)
    except MEMORY_ERRORS as error:
        if not out_of_memory(error):
            raise
        cause = str(error).splitlines()[0]
        return {"status": "skipped", "reason": f"needs more than the {free / GIB:.1f} GiB that are free: {cause}"}
    peak = memory.read() if sample.measures_memory else None
    return {"status": "ok", "probe_seconds": seconds, "peak_bytes": peak, **sample.facts()}


def _probe_process(case: Case, settings: Settings, connection) -> None:
    try:
        outcome = _run_probe(case, settings)
    except Exception as error:  # the end of a process: whatever it is, the table shows it and the program fails
        outcome = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    connection.send(outcome)


def probe(case: Case, settings: Settings, limit_seconds: float) -> dict:
    """Run one sample of `case` in a fresh process.

    Returns:
        `status` "ok" with `probe_seconds`, `peak_bytes` (above the weights; None where sample or system do not tell)
        and the facts of the sample; or "skipped" (memory or time does not suffice) or "failed" (an error) with a
        `reason`.
    """
    # A server that has imported this module and computed nothing: its children start at once and with a clean slate.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_probe_process, args=(case, settings, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_seconds):
            return {"status": "skipped", "reason": f"one sample with its set-up takes more than {limit_seconds:g} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"status": "skipped", "reason": f"its process was ended by the system (exit code {process.exitcode})"}
    finally:
        process.kill()
        process.join()


def time_in_turns(
    samples: Mapping[Hashable, Sample], device: str, budget: float, expected: Mapping[Hashable, float]
) -> tuple[dict[Hashable, list[float]], dict[Hashable, str]]:
    """Time `samples` in turns, A B C A B C, until another round would pass `budget` seconds.

    At least `MIN_ROUNDS` rounds, at most `MAX_ROUNDS`; a sample that has used the whole budget alone drops out of later
    rounds. A sample whose `expected` seconds are short against the budget is run once beforehand, off the clock; a long
    one warms itself up.

    Returns:
        The seconds of each sample, and in words why others have none (memory ran out with all of them loaded).
    """
    seconds: dict[Hashable, list[float]] = {name: [] for name in samples}
    dropped: dict[Hashable, str] = {}

    def attempt(name, action):
        if name in dropped:
            return
        try:
            action(samples[name])
        except MEMORY_ERRORS as error:
            if not out_of_memory(error):
                raise
            dropped[name] = f"memory ran out with all competitors loaded: {str(error).splitlines()[0]}"
            seconds.pop(name)

    def warm_up(sample):
        sample.setup()
        if expected[name] < budget / 20:
            sample.run(sample.prepare())

    for name in samples:
        attempt(name, warm_up)

    def measure(sample):
        if rounds == 0 or sum(seconds[name]) < budget:
            seconds[name].append(timed(sample.run, sample.prepare(), device=device))

    start, rounds, longest_round = time.perf_counter(), 0, 0.0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - start + longest_round < budget):
        round_start = time.perf_counter()
        for name in samples:
            attempt(name, measure)
        longest_round = max(longest_round, time.perf_counter() - round_start)
        rounds += 1
    return seconds, dropped


def summarise(seconds: list[float]) -> dict:
    """Median, quartiles and number of samples; all three are the value itself where there is but one."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(seconds)}
