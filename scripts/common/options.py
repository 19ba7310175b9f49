"""The options of a program: a dataclass, filled from the command line and a YAML file."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from ordnung.scripts.common.errors import ScriptError, closest

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


def option(default: Any, help: str, **metadata) -> Any:
    """A field of an options dataclass, for `parse_options`; `metadata` as `argparse.add_argument` takes it."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def required(help: str, **metadata) -> Any:
    """As `option`, without a default: the user has to give it."""
    return dataclasses.field(metadata={"help": help, **metadata})


class MergeKeyValues(argparse.Action):
    """Option of `name=value` pairs; given twice (in a YAML file and on the command line), the later pairs are added."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **parse_key_values(values)})


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ScriptError(f"{message}; --help lists all options")


def parse_options(
    options_type: type[Options], argv: list[str] | None = None, description: str | None = None
) -> Options:
    """Read a dataclass of options from the command line and from the YAML file that `--config` names.

    The file holds option names and values; the command line wins over it.

    Args:
        options_type: the dataclass; its fields become options as `transformers.HfArgumentParser` makes them.
        argv: command line without the program, `sys.argv[1:]` if None.
    Raises:
        ScriptError: an unknown option or key, a wrong type, a file that cannot be read.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(options_type, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins over it.")
    file_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_only.add_argument("--config")
    config_file = file_only.parse_known_args(argv)[0].config
    if config_file:
        argv = _yaml_arguments(config_file, {field.name for field in dataclasses.fields(options_type)}) + argv
    options, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        names = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
        raise ScriptError(f"unknown option {unknown[0]!r}{closest(unknown[0].lstrip('-'), names)}; --help lists all")
    return options


def _yaml_arguments(path: str, known: set[str]) -> list[str]:
    """The file's entries as command-line arguments, so that one parser checks and converts both."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScriptError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ScriptError(f"--config {path} must hold `option: value` lines, not a {type(values).__name__}")
    arguments = []
    for name, value in values.items():
        if name not in known:
            raise ScriptError(f"unknown option {name!r} in {path}{closest(str(name), known)}; --help lists all")
        if value is None:
            continue
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        arguments += [f"--{name}", *map(str, items)]
    return arguments


def positive(kind):
    def parse(text):
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def probability(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value
