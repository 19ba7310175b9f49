"""Parts that the command-line programs share: errors in words, options with a YAML file, configs, atomic writing."""

import argparse
import dataclasses
import difflib
import errno
import json
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Options = TypeVar("Options")


class ScriptError(Exception):
    """Something the user can cure. The message names the value and the cure; no traceback is shown for it."""


def run_script(main: Callable[[], int | None]):
    """Run a program's main function; turn a `ScriptError` into one line on stderr and exit status 1."""
    try:
        sys.exit(main() or 0)
    except ScriptError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: no space is left on the device of {error.filename}; free some and resume")
    except KeyboardInterrupt:
        sys.exit(130)


def closest(name: str, known: Iterable[str]) -> str:
    """A hint "; did you mean 'x'?" for a misspelt name, empty where nothing is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def write_text(path: str | Path, text: str):
    """Write a file so that a reader, or a crash half-way, sees the whole old content or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | Path, value: Any):
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json_lines(path: str | Path) -> list[dict]:
    """The objects of a JSON lines file; a last line that was not written to its end is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class StopSignals:
    """Context in which SIGINT and SIGTERM set `received`, so that a loop can end at a whole step.

    A second signal ends a single process at once. Launchers forward signals to processes that already had them, so
    several processes ignore repeats.
    """

    def __init__(self, several_processes: bool):
        self.received, self.several_processes, self._handlers = 0, several_processes, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        if self.received and not self.several_processes:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


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


def build_config(
    model_type: str | None,
    config_name: str | None,
    overrides: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    **kwargs,
) -> PreTrainedConfig:
    """A model config by type name, or from a JSON file, folder or Hub name, with some fields changed.

    Args:
        overrides: field names and values, checked against the config class.
        defaults: values for fields that `overrides` leaves alone; passed over where the class has no such field.
        kwargs: passed to `AutoConfig.from_pretrained`.
    Raises:
        ScriptError: unknown model type, unknown field, wrong value.
    """
    import ordnung  # noqa: F401  (its model types enter the Auto classes)

    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise ScriptError(
            f"unknown model_type {model_type!r}{closest(model_type, CONFIG_MAPPING.keys())}; "
            "ordnung's own are conv_lm and softmax_lm, and any type of transformers works too"
        )
    try:
        if model_type is not None:
            config_class, values = CONFIG_MAPPING[model_type], {}
        else:
            config = AutoConfig.from_pretrained(config_name, **kwargs)
            config_class, values = type(config), config.to_dict()
        fields = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
        values |= {name: value for name, value in (defaults or {}).items() if name in fields}
        values |= check_overrides(config_class, overrides)
        return config_class.from_dict(values)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ScriptError(f"the config of {model_type or config_name} cannot be made: {reason}") from error


def check_overrides(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """Check override names against the fields of a config class and fit numbers to the fields' types.

    Raises:
        ScriptError: a name that is no field.
    """
    hints = {field.name: field.type for field in dataclasses.fields(config_class)}
    aliases = config_class.attribute_map
    fitted = {}
    for name, value in overrides.items():
        field = aliases.get(name, name)
        if field not in hints:
            raise ScriptError(
                f"config_overrides names {name!r}, which is no field of {config_class.__name__}"
                f"{closest(name, [*hints, *aliases])}"
            )
        fitted[name] = _fit(value, hints[field])
    return fitted


def _fit(value: Any, hint: Any) -> Any:
    allowed = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    if type(value) is int and float in allowed and int not in allowed:
        return float(value)
    if type(value) in (int, float, bool) and str in allowed and not allowed & {int, float, bool}:
        return str(value)
    return value
