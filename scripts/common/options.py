"""The options of a program: a dataclass, filled from the command line and a YAML file."""

import argparse
import copy
import dataclasses
import importlib
import json
import operator
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.machine import is_command

Options = TypeVar("Options")


def parse_key_values(text: str) -> dict[str, Any]:
    """Parse `name=value,name=value`, or a JSON object; `hidden_size=64,layer_types=[causal_conv,full_attention]`.

    Values become numbers, booleans, None or lists where they read as such. Commas inside brackets do not separate.

    Raises:
        ScriptError: an item without "=" or a JSON text that is not an object.
    """
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise ScriptError(f"{text!r} is not a JSON object: {error}") from None
    items, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    pairs = [item.partition("=") for item in items if item.strip()]
    for name, equals, _ in pairs:
        if not equals:
            raise ScriptError(f"{name!r} is not of the form name=value")
    return {name.strip(): _parse_value(value.strip()) for name, _, value in pairs}


def _parse_value(text: str) -> Any:
    if text in ("None", "null"):
        return None
    if text in ("True", "true", "False", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    if text[:1] in "[{":
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise ScriptError(f"{text!r} is neither a list nor a mapping") from None
    return text


def option(
    default: Any,
    help: str,
    *,
    section: str | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **metadata,
) -> Any:
    """A field of an options dataclass, for `parse_options`.

    Args:
        section: heading in --help, for this and the options after it.
        least, above, most, below: bounds of a number, or of each of a list, which `check_bounds` holds it to.
        metadata: as `argparse.add_argument` takes it.
    """
    own = {"section": section, "least": least, "above": above, "most": most, "below": below}
    metadata |= {"help": help, **{name: value for name, value in own.items() if value is not None}}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, **kwargs) -> Any:
    """As `option`, without a default: the user has to give it."""
    return option(dataclasses.MISSING, help, **kwargs)


def other_default(base: type, name: str, default: Any) -> Any:
    """A field of a dataclass of options as it is in `base`, with a default of its own."""
    return option(default, **base.__dataclass_fields__[name].metadata)


_BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def check_bounds(options: Any):
    """Raise a ScriptError where a number of an options dataclass is out of its bounds."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for name, (holds, words) in _BOUNDS.items():
            bound = field.metadata.get(name)
            if bound is None or value is None:
                continue
            for number in value if isinstance(value, list) else [value]:
                if not holds(number, bound):
                    raise ScriptError(f"--{field.name} must be {words} {bound}, not {number}")


class MergeKeyValues(argparse.Action):
    """Option of `name=value` pairs; given twice (in a YAML file and on the command line), the later pairs are added."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **parse_key_values(values)})


class _Help(argparse.RawDescriptionHelpFormatter):
    """Every option once, by one name, with its default unless that is nothing."""

    def _format_action_invocation(self, action):
        first = ", ".join(action.option_strings) if action.dest == "help" else action.option_strings[0]
        return first if action.nargs in (0, "?") and action.default is not True else f"{first} {self._kind(action)}"

    def _kind(self, action) -> str:
        if isinstance(action, MergeKeyValues):
            kind = "NAME=VALUE,..."
        elif action.choices:
            kind = "NAME" if self._many(action) else "{" + ",".join(map(str, action.choices)) + "}"
        else:
            kind = action.metavar or {int: "N", float: "X", str: "TEXT"}.get(action.type, "BOOL")
        return f"{kind} ..." if action.nargs == "+" else kind

    def _many(self, action) -> bool:
        return action.choices is not None and len(action.choices) > 4

    def _expand_help(self, action):
        return self._get_help_string(action)  # a % is a percent sign: our texts have no places to fill

    def _get_help_string(self, action):
        words, default = action.help, action.default
        if self._many(action):
            words += f" One of {', '.join(map(str, action.choices))}."
        if action.required:
            return f"{words} Required."
        if default in (None, False, argparse.SUPPRESS) or default == {} or "efault:" in words:
            return words
        return f"{words} Default: {' '.join(map(str, default)) if isinstance(default, list) else default}."


class _Parser(HfArgumentParser):
    """Options under the headings that they name."""

    def __init__(self, options_type: type, **kwargs):
        super().__init__(options_type, formatter_class=_Help, allow_abbrev=False, **kwargs)
        self._optionals.title = "other"
        # what is trained on what comes first, whichever class says so, and what all programs have comes last
        first = ["model", "models", "data", "adapters", "output", "optimisation"]
        self._action_groups.sort(key=lambda group: first.index(group.title) if group.title in first else len(first))
        self._action_groups.sort(key=lambda group: group is self._optionals)

    def _add_dataclass_arguments(self, dtype: type):
        hints, fields = typing.get_type_hints(dtype), {field.name: field for field in dataclasses.fields(dtype)}
        group, groups = self, {}
        # an option that a base class has too stands where it has it
        place = {name: kind for kind in dtype.__mro__ for name in vars(kind).get("__annotations__", {})}
        for kind in dtype.__mro__:
            for name in [
                name for name in vars(kind).get("__annotations__", {}) if place[name] is kind and name in fields
            ]:
                field = copy.copy(fields.pop(name))
                title = field.metadata.get("section")
                if title is not None:
                    group = groups[title] = groups.get(title) or self.add_argument_group(title)
                # what argparse knows; the class itself keeps its fields as they are
                field.metadata = {key: value for key, value in field.metadata.items() if key not in _OWN}
                field.type = hints[name]
                self._parse_dataclass_field(group, field)
        for action in self._actions:
            if action.option_strings and action.option_strings[0] == f"--no_{action.dest}":
                action.help = argparse.SUPPRESS

    def error(self, message):
        raise ScriptError(f"{message}; --help lists all options")


_OWN = {"section", *_BOUNDS}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def parse_options(
    options_type: type[Options], argv: list[str] | None = None, description: str | None = None
) -> Options:
    """Read a dataclass of options from the command line and from the YAML file that `--config` names.

    The file holds option names and values; the command line wins over it.

    Args:
        options_type: the dataclass; its fields become options as `transformers.HfArgumentParser` makes them.
        argv: command line without the program, `sys.argv[1:]` if None.
    Raises:
        ScriptError: an unknown option or key, a wrong type, a file that cannot be read, a number out of its bounds.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    program = f"ordnung {sys.argv[1]}" if is_command(sys.argv) else Path(sys.argv[0]).name
    known = {field.name for field in dataclasses.fields(options_type)}
    parser = _Parser(options_type, prog=program, usage="%(prog)s [options]", description=description)
    also = ""
    if not {"-h", "--help"}.isdisjoint(argv):  # reading all configs takes longer than all else here
        installed = [name for name, values in _installed_configs().items() if values.keys() <= known]
        also = f" Installed: {', '.join(installed)}." if installed else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of options; the command line wins over it.{also}")
    file_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_only.add_argument("--config")
    config_file = file_only.parse_known_args(argv)[0].config
    if config_file:
        argv = _yaml_arguments(config_file, known) + argv
    argv = _take_nulls(parser, options_type, argv)
    options, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        names = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
        cure = closest(unknown[0].lstrip("-"), names)
        if "=" in unknown[0].lstrip("-") and not unknown[0].startswith("-"):
            cure = ": several NAME=VALUE of one option are joined by commas"
        raise ScriptError(f"unknown option {unknown[0]!r}{cure}; --help lists all")
    check_bounds(options)
    return options


def program(options_type: type, module: str, description: str) -> Callable[[list[str] | None], int]:
    """The `main` of a program: it parses the options, and only then imports what does the work.

    Args:
        options_type, description: as `parse_options` takes them.
        module: in `ordnung.scripts`; its `run` takes the options and returns the exit status.
    """

    def main(argv: list[str] | None = None) -> int:
        """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
        options = parse_options(options_type, argv, description)
        return importlib.import_module(f"ordnung.scripts.{module}").run(options)

    return main


def _installed_configs() -> dict[str, dict]:
    """The configs that come with the package, by name; accelerate's are none of a program."""
    files = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("accelerate_"))
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}


def find_config(name: str) -> Path:
    """The file of this path, or else the installed config of this name.

    Raises:
        ScriptError: there is neither.
    """
    path, installed = Path(name), CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if path.exists() or not installed.is_file():
        return path
    return installed


class _Null(str):
    """The word after an option that is to be None: by its type, so that a text may be the same word."""


def arguments(values: dict[str, Any]) -> list[str]:
    """The words that give a program's options these values, for `parse_options`."""
    words = []
    for name, value in values.items():
        if value is None:
            words += [f"--{name}", _Null("null")]
        else:
            items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name}", *map(str, items)]
    return words


def _take_nulls(parser: argparse.ArgumentParser, options_type: type, argv: list[str]) -> list[str]:
    """The words without those that make an option None, which is then its default.

    Raises:
        ScriptError: an option that cannot be None.
    """
    hints, fields = typing.get_type_hints(options_type), options_type.__dataclass_fields__
    nulls = [i for i, word in enumerate(argv) if isinstance(word, _Null) and argv[i - 1][2:] in fields]
    for name in (argv[i - 1][2:] for i in nulls):
        if type(None) not in typing.get_args(hints[name]):
            default = parser.get_default(name)
            cure = "give it a value" if default is None else f"leave it out for its default, {default}"
            raise ScriptError(f"--{name} null: it cannot be nothing; {cure}")
        parser.set_defaults(**{name: None})
    return [word for i, word in enumerate(argv) if not {i, i + 1} & set(nulls)]


def _yaml_arguments(path: str, known: set[str]) -> list[str]:
    """The file's entries as command-line arguments, so that one parser checks and converts both."""
    try:
        values = yaml.safe_load(find_config(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        hint, names = closest(path, _installed_configs()), ", ".join(_installed_configs())
        raise ScriptError(f"--config {path}: no such file{hint}; those installed are {names}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScriptError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ScriptError(f"--config {path} must hold `option: value` lines, not a {type(values).__name__}")
    for name in values:
        if name not in known:
            raise ScriptError(f"unknown option {name!r} in {path}{closest(str(name), known)}; --help lists all")
    return arguments(values)
