"""Who may import whom: folders stand in one order and import from those below, and no file imports a program."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; folders of one floor do not import each other.
FLOORS = [
    {"modeling/ops"},
    {"configuration", ""},  # "": the root, which registers the families
    {"modeling"},
    {"scripts/common"},
    {"scripts/training"},
    {"scripts/hub"},
    {"scripts/pretraining", "scripts/finetuning"},
    {"scripts/linearizing"},
    {"scripts/experiments", "scripts/benchmarks"},
    {"scripts/reports"},
    {"scripts"},  # the programs
]
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}


def modules() -> dict[str, Path]:
    """Every module of the package by name, without the files that make folders packages."""
    files = [ROOT / "__init__.py"]
    for folder in ("configuration", "modeling", "scripts"):
        files += [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    return {name_of(path.relative_to(ROOT)): path for path in files}


def name_of(path: Path) -> str:
    return ".".join(["ordnung", *path.with_suffix("").parts]).removesuffix(".__init__")


def imported(source: str, known) -> set[str]:
    """The modules of the package that a source text imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "ordnung"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            if node.module.split(".")[0] == "ordnung":
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in known else node.module for name in below}
    return names


def without_encoding(source: str) -> list[int]:
    """Lines that read or write text in whatever encoding the system has."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        text = {word.value for word in call.args[1:] if isinstance(word, ast.Constant)} <= {"r", "w", "a", "x"}
        opens = name == "open" or (name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute))
        if opens and text and "encoding" not in {keyword.arg for keyword in call.keywords}:
            lines.append(call.lineno)
    return lines


def folder_of(name: str) -> str:
    parts = name.split(".")[1:-1]
    return "modeling" if parts[:1] == ["modeling"] and parts[1:2] != ["ops"] else "/".join(parts[:2])


def faults(name: str, source: str, known) -> list[str]:
    """What a module imports against the order, in words."""
    own, wrong = folder_of(name), []
    for other in sorted(imported(source, known)):
        if other not in known:
            wrong.append(f"{name} imports {other}, which is no module")
        elif folder_of(other) == "scripts":
            wrong.append(f"{name} imports the program {other}")
        elif folder_of(other) != own and not FLOOR[folder_of(other)] < FLOOR[own]:
            wrong.append(f"{name} imports {other}, which is not below it")
    return wrong


def test_imports_point_one_way():
    known = modules()
    assert {folder_of(name) for name in known} <= FLOOR.keys(), "a folder without a floor"
    root = known.pop("ordnung")
    wrong = [fault for name, path in known.items() for fault in faults(name, path.read_text(), {*known, "ordnung"})]
    assert wrong == []
    assert imported(root.read_text(), known) == {"ordnung.modeling.registration"}


def test_what_programs_hand_over_to_is_there():
    named = [re.findall(r'program\(\w+, "([\w.]+)", __doc__\)', path.read_text()) for path in modules().values()]
    assert len(names := [name for some in named for name in some]) > 20
    for name in names:
        assert "\ndef run(" in modules()[f"ordnung.scripts.{name}"].read_text(), name


def test_files_are_read_and_written_as_utf8():
    wrong = {name: without_encoding(path.read_text(encoding="utf-8")) for name, path in modules().items()}
    assert {name: lines for name, lines in wrong.items() if lines} == {}
    assert without_encoding('open("x")\nopen("x", "rb")\npath.read_text()\nwrite_text(path, "")') == [1, 3]


@pytest.mark.parametrize(
    "name, source, fault",
    [
        ("scripts.training.x", "from ordnung.scripts.pretraining import run", "which is not below it"),
        ("scripts.pretraining.x", "import ordnung.scripts.finetuning.run", "which is not below it"),
        ("scripts.hub.x", "def f():\n    from ordnung.scripts.reports.card_tables import TABLES", "is not below it"),
        ("scripts.experiments.x", "from ordnung.scripts import pretrain", "imports the program"),
        ("scripts.transfer", "from ordnung.scripts.pretrain import main", "imports the program"),
        ("modeling.ops.x", "from ordnung.modeling.mixers.mixer import Mixer", "which is not below it"),
        ("modeling.x", "from ordnung.scripts.common.errors import ScriptError", "which is not below it"),
        ("scripts.common.x", "from ordnung.scripts.common.gone import f", "is no module"),
    ],
)
def test_a_wrong_import_is_noticed(name, source, fault):
    (found,) = faults(f"ordnung.{name}", source, modules())
    assert fault in found
