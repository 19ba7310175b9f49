"""Models by name: their configs, made and checked, and the folders that they lie in."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ordnung.modeling.registration import REGISTERED
from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.files import read_json


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
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise ScriptError(
            f"unknown model_type {model_type!r}{closest(model_type, CONFIG_MAPPING.keys())}; "
            f"ordnung's own are {', '.join(REGISTERED)}, and any type of transformers works too"
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


def check_whole(report: dict[str, Any], name: str):
    """Raise a ScriptError where a causal model's checkpoint lacks weights, which would be random.

    Args:
        report: what `from_pretrained` tells with `output_loading_info`.
    """
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ScriptError(f"{name} is no causal language model checkpoint: it has no {missing}")


def check_writes_text(config: PreTrainedConfig, name: str):
    """Raise a ScriptError where a checkpoint is of a class that writes no text: its config still names that class."""
    for architecture in config.architectures or []:
        if architecture.endswith(("Classification", "QuestionAnswering", "MultipleChoice")):
            raise ScriptError(f"{name} is a {architecture}, which writes no text: give a causal language model")


def check_folder(name):
    """Say what is wrong with a local path before it is looked up as a Hub name, which takes a minute offline."""
    path = Path(name)
    if path.is_dir():
        if not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
            raise ScriptError(f"{name} holds no config.json: give the folder that save_pretrained or pretrain.py wrote")
    elif path.exists():
        raise ScriptError(f"{name} is a file: give the checkpoint's folder")
    elif len(path.parts) > 2 or name.startswith((".", "~")) or (len(path.parts) == 2 and path.parent.is_dir()):
        raise ScriptError(f"no such checkpoint folder: {name}")


def check_source(name: str, gguf_file: str | None):
    """`check_folder` of a checkpoint to convert, which may be a GGUF file in a folder."""
    path = Path(name)
    if gguf_file is None:
        check_folder(name)
    elif path.is_dir() and not (path / gguf_file).is_file():
        files = sorted(path.name for path in path.glob("*.gguf"))
        raise ScriptError(f"--gguf_file {gguf_file} is not in {name}, whose GGUF files are {files}")


def best_run(name: str) -> str:
    """The folder of the best run in a folder of fine-tuning runs on one task; any other name as it is.

    Raises:
        ScriptError: runs on several tasks.
    """
    path = Path(name) / "results.json"
    if not path.is_file() or (Path(name) / "config.json").is_file():
        return name
    tasks = read_json(path).get("tasks", {})
    if len(tasks) > 1:
        runs = ", ".join(str(Path(name) / task["runs"][0]) for task in tasks.values())
        raise ScriptError(f"{name} holds runs on {', '.join(tasks)}: name one of {runs}")
    for task in tasks.values():
        values = task["score"]["values"]
        return str(Path(name) / task["runs"][values.index(max(values))])
    return name
