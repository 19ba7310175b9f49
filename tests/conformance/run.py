"""Runs the tests that every model in transformers has to pass on every ordnung family.

    python tests/conformance/run.py /path/to/transformers

takes transformers' common model, config, generation and training tests from a checkout of the tag of the installed
version, or from its unpacked source distribution, which has all but the generation tests. The pipeline and distributed
tests are left out: they need models from the Hub and several processes. Other arguments go to pytest, e.g. `-k config`;
environment variables act as in transformers, e.g. RUN_SLOW=1.
"""

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import transformers
from families import EXCLUDED, ROWS

HERE = Path(__file__).parent


class Records:
    """pytest plugin that keeps one record per test: outcome, and the reason where it is not "passed"."""

    def __init__(self):
        self.outcomes, self.reasons = {}, {}

    def pytest_collectreport(self, report):
        if report.failed:
            self.note("collecting the tests", "failed", str(report.longrepr))

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[-1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.note(name, "failed", crash.message if crash else str(report.longrepr))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.note(name, "skipped", reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self.note(name, "passed", "")

    def note(self, name, outcome, reason):
        """The worst of a test's phases and subtests counts."""
        worst = ("passed", "skipped", "failed")
        if worst.index(outcome) >= worst.index(self.outcomes.get(name, "passed")):
            self.outcomes[name], self.reasons[name] = outcome, reason


def run_row(name: str, checkout: str, pytest_args: list[str]) -> dict[str, tuple[str, str]]:
    """Runs one row in this process. Returns test name -> (outcome, reason)."""
    os.environ.update(CONFORMANCE_ROW=name, CONFORMANCE_CHECKOUT=checkout)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RUN_TRAINING_TESTS", "1")
    records = Records()
    # the project's own pytest settings and fixtures are not for these tests
    settings = ["-o", "addopts=", "--noconftest", "-p", "no:cacheprovider", "--import-mode=prepend", "-W", "ignore"]
    code = pytest.main([str(HERE / "suite.py"), *settings, "-q", "--tb=short", *pytest_args], plugins=[records])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        records.note("the run", "failed", f"pytest ended with {code!r}")
    return {test: (outcome, records.reasons[test]) for test, outcome in records.outcomes.items()}


def run_in_process(name: str, checkout: str, pytest_args: list[str]) -> dict[str, tuple[str, str]]:
    """`run_row` in a process of its own: tests change global state, and a crash of one row must not hide the others."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run_row, name, checkout, pytest_args).result()
        except Exception as error:  # the end of a process: whatever it is counts as a failed row
            return {"the run": ("failed", f"{type(error).__name__}: {error}")}


def check_checkout(path: str) -> str:
    """The absolute path of the checkout.

    Raises:
        ValueError: if there are no common tests under `path`, or they are of another version than the installed one.
    """
    checkout = Path(path).expanduser().resolve()
    if not (checkout / "tests" / "test_modeling_common.py").is_file():
        raise ValueError(
            f"{path!r} is no checkout of transformers: it has no tests/test_modeling_common.py. Get one with\n"
            f"git clone --depth 1 --branch v{transformers.__version__} https://github.com/huggingface/transformers"
        )
    source = (checkout / "src" / "transformers" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)[1]
    if version != transformers.__version__:
        raise ValueError(
            f"{path!r} has the tests of transformers {version}, but {transformers.__version__} is installed: check out "
            f"v{transformers.__version__}, or install transformers=={version}."
        )
    return str(checkout)


def report(results: dict[str, dict[str, tuple[str, str]]], seconds: dict[str, float]) -> Counter:
    """Prints what was skipped and why, the failures, the table and the sum. Returns the sum by outcome."""
    excluded, skipped, failed = {}, Counter(), []
    for name, tests in results.items():
        for test, (outcome, reason) in tests.items():
            if outcome == "failed":
                failed.append(f"{name}: {test}: {reason}")
            elif outcome == "skipped" and reason.startswith(EXCLUDED):
                excluded.setdefault(reason.removeprefix(EXCLUDED), []).append(f"    {name}: {test}")
            elif outcome == "skipped":
                skipped[reason] += 1
    sections = {
        "Skipped by the tests themselves, over all rows": [f"{n:4}  {reason}" for reason, n in skipped.most_common()],
        "Excluded by tests/conformance": ["\n".join([reason, *tests]) for reason, tests in excluded.items()],
        "Failed": failed,
    }
    for title, lines in sections.items():
        if lines:
            print(f"\n{title}:", *lines, sep="\n")
    counts = {name: Counter(outcome for outcome, _ in tests.values()) for name, tests in results.items()}
    print(f"\n{'':24} {'passed':>8} {'failed':>8} {'skipped':>8} {'seconds':>8}")
    for name, count in counts.items():
        print(f"{name:24} {count['passed']:8} {count['failed']:8} {count['skipped']:8} {seconds[name]:8.0f}")
    total = sum(counts.values(), Counter())
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="folder of a transformers checkout, or of its unpacked source distribution")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all of them")
    args, pytest_args = parser.parse_known_args(argv)  # e.g. -k word
    try:
        checkout = check_checkout(args.checkout)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    results, seconds = {}, {}
    for name in args.rows:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        results[name] = run_in_process(name, checkout, pytest_args)
        seconds[name] = time.perf_counter() - start
    total = report(results, seconds)
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
