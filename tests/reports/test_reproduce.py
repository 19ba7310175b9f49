"""The experiments of the page of claims are run by one program, and its state survives what stops it."""

import importlib
import json
from types import SimpleNamespace

import pytest
import yaml

from ordnung.scripts import claims as program
from ordnung.scripts import cli
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import CONFIGS
from ordnung.scripts.reports import claims, reproduce
from ordnung.scripts.reports.results import CAUSAL_BENCHMARKS, CONV_BENCHMARKS, ENCODER_BENCHMARKS, RESULTS

MADE = "{{out}}/{}.json"
GROWTH = "growth --shortest 8 --longest {{longest}} --output_file {{out}}/{}.json"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "results").mkdir()

    def run(commands, **options):
        experiments = {
            name: {"command": command.format(name), "result": MADE.format(name), "minutes": 2}
            for name, command in commands.items()
        }
        words = ["--experiments", json.dumps(experiments), "--output_dir", str(tmp_path / "out")]
        words += ["--results_dir", str(tmp_path / "results")]
        for name, value in options.items():
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
        return program.main(words)

    run.results = tmp_path / "results"
    return run


@pytest.fixture
def started(monkeypatch):
    """Programs run in this process, which is much faster; a list of their environments."""
    calls = []

    def start(words, environment):
        calls.append(environment)
        return cli.main(words[1:])

    monkeypatch.setattr(reproduce, "start", start)
    return calls


def test_finished_experiments_are_kept_and_the_rest_is_told(run, capfd):
    commands = {"first": GROWTH, "second": "growth --output_file nowhere/x.json --shortest 0", "third": "x {{encoder}}"}
    assert run(commands, inputs="longest=16") == 1
    assert json.loads((run.results / "first.json").read_text())["lengths"] == [8, 16]  # what failed later costs nothing
    told = capfd.readouterr()
    assert "[1/2, about 4 min left] ordnung growth --shortest 8 --longest 16" in told.out
    assert "third: left out, it needs --inputs encoder=..." in told.out
    assert "second: exit status 1; the same command goes on here" in told.err
    assert not (run.results / "second.json").exists()

    commands["second"] = GROWTH
    assert run(commands, inputs="longest=16") == 0  # what was mended runs, with less of it left
    told = capfd.readouterr().out
    assert "first: finished, kept" in told and "[1/1, about 2 min left]" in told

    assert run(commands, inputs="longest=32", only="first") == 0  # another input is another experiment
    assert json.loads((run.results / "first.json").read_text())["lengths"] == [8, 16, 32]


def test_results_files_change_when_no_experiment_is_left(run, started, monkeypatch):
    """They are tracked, and what runs beside a changed one would record that files differ."""
    seen, start = [], reproduce.start

    def watched(*args):
        seen.append(list(run.results.iterdir()))
        return start(*args)

    monkeypatch.setattr(reproduce, "start", watched)
    assert run({"first": GROWTH, "second": GROWTH}, inputs="longest=16") == 0
    assert seen == [[], []] and len(list(run.results.iterdir())) == 2


def test_larger_forms_are_for_gpus(run, started, capfd):
    larger = {
        "first": {
            "command": GROWTH.format("first"),
            "result": MADE.format("first"),
            "minutes": 1,
            "cuda": "--longest 64",
        }
    }
    assert run({}, experiments=json.dumps(larger), inputs="longest=16", device="cuda") == 0
    assert json.loads((run.results / "first.json").read_text())["lengths"] == [8, 16, 32, 64]
    assert run({"second": GROWTH}, inputs="longest=16", device="cuda") == 0
    assert "second: has no form for a GPU, runs on the CPU" in capfd.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_programs_take_the_commands(device, monkeypatch):
    given, load = [], importlib.import_module
    does = SimpleNamespace(run=lambda options: given.append(options) or 0)
    monkeypatch.setattr(importlib, "import_module", lambda name: does if name.count(".") == 3 else load(name))
    experiments = yaml.safe_load((CONFIGS / "claims.yaml").read_text())["experiments"]
    inputs = dict.fromkeys(("books", "one_book", "encoder", "reviews", "glue", "imdb"), "x")
    asked = SimpleNamespace(device=device, output_dir="out", inputs=inputs)
    for name, one in experiments.items():
        assert cli.main(reproduce.words_of(one, asked)) == 0, name
        if hasattr(given[-1], "device"):
            assert given[-1].device == device, name
    assert len(given) == len(experiments) and all(one.get("cuda") for one in experiments.values())


def test_on_the_cpu_programs_see_no_gpu(run, started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for device in ("cpu", "cuda"):
        assert run({device: GROWTH}, inputs="longest=16", device=device) == 0
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in started] == ["", "3"]


def test_an_unknown_experiment_is_refused(run):
    with pytest.raises(ScriptError, match="unknown --only 'frst'; did you mean 'first'"):
        run({"first": GROWTH}, only="frst")


def test_every_experiment_has_its_place():
    experiments = yaml.safe_load((CONFIGS / "claims.yaml").read_text())["experiments"]
    for name, one in experiments.items():
        assert set(one) <= {"command", "result", "minutes", "cuda"} and one["result"].startswith("{out}/"), name
        assert one["result"].removesuffix(".json").rpartition("/")[0] in one["command"], name
    assert all((RESULTS / f"{name}.json").exists() for name in experiments)


def test_every_file_that_a_claim_rests_on_has_an_experiment():
    experiments = yaml.safe_load((CONFIGS / "claims.yaml").read_text())["experiments"]
    findings = [finding for claim in claims.all_claims() for finding in claim.findings if finding.file]
    cited = {file for finding in findings for file in (finding.file, *finding.more)}
    assert "linformer_lm_grid" in cited
    benchmarks = {*CONV_BENCHMARKS, *ENCODER_BENCHMARKS, *CAUSAL_BENCHMARKS}
    assert cited | benchmarks <= set(experiments)


def test_what_was_stopped_is_not_taken_for_what_was_there(run, started, monkeypatch, capfd):
    assert run({"first": GROWTH}, inputs="longest=16") == 0
    (run.results / "first.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(reproduce, "start", lambda *args: 130)
        assert run({"first": GROWTH}, inputs="longest=32") == 130
    assert not (run.results / "first.json").exists()  # it is of other inputs
    assert run({"first": GROWTH}, inputs="longest=16") == 0
    assert "first: finished, kept" not in capfd.readouterr().out
