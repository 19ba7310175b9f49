"""Stand-alone checkpoint folders: weights, config, tokenizer and the code that runs them.

transformers loads such a folder with `trust_remote_code=True` in a process that does not have this package. Its loader
knows only flat files beside `config.json` that import each other as `from .stem import name`, which it finds with a
regular expression; so the modules that a family needs are flattened into that form, and whatever the loader could not
follow is refused when the folder is written instead of failing on somebody else's machine.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ordnung import __version__
from ordnung.modeling.registration import is_registered

__all__ = ["save_standalone"]

# What every process that can import transformers' models has; any other package is optional and belongs into a `try`.
PROVIDED = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers", *sys.stdlib_module_names}

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save_standalone(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "50GB",
) -> list[Path]:
    """Write a checkpoint folder that loads where this package is not installed.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, and the same for every other head of the
    family, then needs torch and transformers only. Everything is written beside `folder` first and moved in when it
    is complete; weights of an earlier checkpoint in `folder` are replaced, other files there stay as they are.

    Args:
        model: a model of this package or of a registered family, any head, any dtype.
        folder: where to write; made if need be.
        tokenizer: saved beside the model if given.
        max_shard_size: largest weight file, in bytes or as in "2GB".

    Returns:
        The files written, in `folder`.

    Raises:
        TypeError: `model` is wrapped (PEFT, `torch.compile`) or carries adapters, or its class is not of a registered
            family.
        NotADirectoryError: `folder` is a file.
        ValueError: the model's code holds an import that transformers' loader cannot follow.
    """
    _check_model(model)
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give save_standalone a folder")

    auto_map = _auto_map_classes(type(model.config))
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write_code({cls.__module__ for cls in [type(model), *auto_map.values()]}, staging)
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        config_file = staging / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["auto_map"] = {name: f"{_stem(cls.__module__)}.{cls.__name__}" for name, cls in auto_map.items()}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        error.add_note(f"save_standalone changed nothing in {folder}")
        raise
    return _move_in(staging, folder)


def write_code(modules: Iterable[str], folder: Path) -> list[Path]:
    """Write `modules` and all that they import from their packages and this one into `folder`, flat, as `<stem>.py`.

    Raises:
        ValueError: two modules share a stem, or an import is of a kind that transformers' loader cannot follow.
    """
    waiting, files = list(modules), {}  # files: stem -> module name
    packages = {"ordnung", *(module.partition(".")[0] for module in waiting)}
    while waiting:
        module = waiting.pop()
        stem = _stem(module)
        if files.setdefault(stem, module) != module:
            raise ValueError(f"{files[stem]} and {module} would both become {stem}.py: rename one of them")
        path = folder / f"{stem}.py"
        if path.exists():
            continue
        source, needed = _flatten(module, packages)
        path.write_text(source, encoding="utf-8")
        _check_as_loader(path, module, {_stem(name) for name in needed})
        waiting += needed
    return [folder / f"{stem}.py" for stem in sorted(files)]


def _stem(module: str) -> str:
    return module.rpartition(".")[2]


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_standalone needs the bare model, not {type(model).__name__}: call merge_and_unload() on a PEFT "
            "model, take ._orig_mod of a compiled one"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError("the model carries PEFT adapters, which save_pretrained stores alone: merge them first")
    if not is_registered(type(model)):
        raise TypeError(
            f"{type(model).__name__} is defined in {type(model).__module__}, not in ordnung: save_standalone writes "
            "only code of ordnung and of families that ordnung.register_family made known"
        )


def _auto_map_classes(config_class: type) -> dict[str, type]:
    """Each auto class's name with the class that it stands for in the family of `config_class`."""
    classes = {"AutoConfig": config_class}
    for name, auto in vars(modeling_auto).items():
        if (
            isinstance(auto, type)
            and issubclass(auto, _BaseAutoModelClass)
            and config_class in (auto._model_mapping or ())
        ):
            classes[name] = auto._model_mapping[config_class]
    return classes


def _flatten(module: str, packages: set[str]) -> tuple[str, list[str]]:
    """Source of `module` with its imports from `packages` rewritten, and the modules that these imports name."""
    path = Path(importlib.util.find_spec(module).origin)
    source = path.read_text(encoding="utf-8")
    tree, lines, needed = ast.parse(source), source.splitlines(keepends=True), []
    for node in ast.walk(tree):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        targets = names if isinstance(node, ast.Import) else {getattr(node, "module", None) or ""}
        roots = packages & {target.partition(".")[0] for target in targets}
        if not names or not (relative or roots):
            continue
        package = min(roots, default=module.partition(".")[0])
        if relative:
            cure = f"write the absolute import, from {package}.<module> import <name>"
        elif isinstance(node, ast.Import):
            cure = f"write from {package}.<module> import <name>"
        elif "*" in names:
            cure = "name what is imported"
        elif node not in tree.body:
            cure = "move it to the top level of the module"
        elif importlib.util.find_spec(node.module).submodule_search_locations is not None:
            cure = f"{node.module} is a package: import from the module that defines the name"
        else:
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(r"^from\s+[\w.]+", f"from .{_stem(node.module)}", line)
            needed.append(node.module)
            continue
        statement = ast.unparse(node)
        raise ValueError(f"{path}:{node.lineno}: {statement!r} cannot go into a stand-alone folder: {cure}")
    licence = ", Apache-2.0" if module.startswith("ordnung.") else ""
    origin = f"# {module}{licence}, written as a flat file by ordnung {__version__} (save_standalone).\n"
    return origin + "".join(lines), needed


def _check_as_loader(path: Path, module: str, expected: set[str]) -> None:
    """Read a flat file as transformers' loader does and refuse it where the two readings differ."""
    relative = set(get_relative_imports(path))
    if relative != expected:
        raise ValueError(
            f"{module}: transformers' loader reads relative imports of {sorted(relative)}, the code has "
            f"{sorted(expected)}: write each import as a statement on lines of its own, and no line of a docstring or "
            "comment that looks like a relative import"
        )
    missing = set(get_imports(path)) - PROVIDED
    if missing:
        raise ValueError(
            f"{module} needs {', '.join(sorted(missing))}, which a process with transformers need not have: put an "
            "optional import inside `try`"
        )


def _move_in(staging: Path, folder: Path) -> list[Path]:
    """Move the finished files into `folder`, replacing those of the same name and weights that are no longer part."""
    names = [path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()]
    if not folder.exists():
        os.replace(staging, folder)
        return [folder / name for name in names]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    for path in folder.iterdir():
        # A stale model.safetensors would be preferred to the shards just written.
        if WEIGHTS.fullmatch(path.name) and path.relative_to(folder) not in names:
            path.unlink()
    shutil.rmtree(staging)
    return [folder / name for name in names]
