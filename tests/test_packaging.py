"""Wheel, sdist and editable install: built, installed into a new environment, imported, a model loaded."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoConfig, AutoModelForCausalLM

import ordnung

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", ".*cache", "__pycache__", "out", "build", "dist", "*.egg-info")
CODE_FOLDERS = ("configuration", "modeling", "scripts")

LOAD = """
import json, sys
import ordnung, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(torch.arange(20)[None]).logits
equal = torch.equal(logits, torch.load(sys.argv[1] + "/logits.pt"))
print(json.dumps({"file": ordnung.__file__, "model": type(model).__module__, "equal": equal}))
"""


def run(*command, **kwargs):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, so that building leaves nothing in the checkout."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "ordnung-source", ignore=NOT_SOURCE))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """Folder with the sdist and the wheel; `build` makes the wheel out of the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = AutoConfig.for_model(
        "conv_lm", vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, kernel_size=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    torch.save(model(torch.arange(20)[None]).logits, folder / "logits.pt")
    return folder


@pytest.fixture
def environment(tmp_path):
    """A new virtual environment that sees this one's packages, but nothing that was installed here as editable."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "shared.pth").write_text("\n".join(shared))
    return folder / "bin" / "python", site


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_install_import_and_load(kind, built, source, environment, checkpoint, tmp_path):
    python, site = environment
    before = {path.name for path in site.iterdir()}
    what = {
        "wheel": lambda: next(built.glob("*.whl")),
        "sdist": lambda: next(built.glob("*.tar.gz")),
        "editable": lambda: f"--editable={source}",
    }[kind]()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    # The other environment's editable install is visible through the shared path: pip must not try to replace it.
    run(*pip, "--ignore-installed", what)

    name = f"ordnung-{ordnung.__version__}.dist-info"
    underscored = f"__editable___ordnung_{ordnung.__version__.replace('.', '_')}_finder.py"
    if kind == "wheel":
        # outside the clone, the command pretrains on what is installed with it
        command = [python.with_name("ordnung"), "pretrain", "--config", "demo", "--max_steps", "2", "--use_cpu"]
        tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "kernel_size": 4}
        tiny = ",".join(f"{name}={value}" for name, value in tiny.items())
        run(*command, "--config_overrides", tiny, "--max_eval_blocks", "4", "--block_size", "32", cwd=tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path / "out/demo")
        assert json.loads((tmp_path / "out/demo/results.json").read_text())["machine"]["command"].startswith(
            "ordnung pretrain --config demo"
        )
    allowed = {
        "editable": {name, f"__editable__.ordnung-{ordnung.__version__}.pth", underscored, "__pycache__"},
    }.get(kind, {name, "ordnung"})
    assert {path.name for path in site.iterdir()} - before <= allowed

    report = json.loads(run(python, "-c", LOAD, checkpoint, cwd=tmp_path))
    home = source if kind == "editable" else site / "ordnung"
    assert Path(report["file"]) == home / "__init__.py"
    assert report["model"] == "ordnung.modeling.modeling_conv_lm"
    assert report["equal"]


@pytest.mark.slow
def test_wheel_holds_all_code_and_nothing_else(built, source):
    code = {path for folder in CODE_FOLDERS for path in (source / folder).rglob("*.py")} | {source / "__init__.py"}
    data = {path for folder in ("configs", "data") for path in (source / "scripts" / folder).iterdir()}
    expected = {f"ordnung/{path.relative_to(source).as_posix()}" for path in code | data}
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected


@pytest.mark.slow
def test_sdist_holds_all_that_the_make_targets_need(built, source):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {
        "LICENSE",
        "README.md",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "constraints.txt",
        ".ci/run",
        "scripts/data/moby_dick.txt",
    }
    tests = {path.relative_to(source).as_posix() for path in (source / "tests").rglob("*.py")}
    assert needed | tests <= names


def test_import_is_light(tmp_path):
    heavy = ["accelerate", "datasets", "evaluate", "matplotlib", "peft", "transformers.modeling_utils"]
    program = f"import sys, ordnung; print([name for name in {heavy} if name in sys.modules])"
    assert run(sys.executable, "-c", program, cwd=tmp_path).strip() == "[]"


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = PROJECT["project"]
    for text in sum(project["optional-dependencies"].values(), project["dependencies"]):
        requirement = Requirement(text)
        assert pins.get(canonicalize_name(requirement.name)) in requirement.specifier, text


@pytest.mark.parametrize(
    ("python", "message"),
    [("no-such-python", "No no-such-python here"), ("old-python", "Needs Python 3.11 or later")],
)
def test_make_says_which_python_it_needs(python, message, tmp_path):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check of the Makefile gives under an older Python
    old.chmod(0o755)
    command = ["make", "test", f"PYTHON={old if python == old.name else python}", f"VENV={tmp_path / 'none'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stderr
