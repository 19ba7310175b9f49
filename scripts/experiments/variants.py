"""The models that an experiment compares."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.models import build_config
from ordnung.scripts.experiments import control_attention  # noqa: F401 - controls that are no family


def variant_configs(
    variants: dict[str, dict[str, Any]], shared: dict[str, Any], **kwargs
) -> dict[str, PreTrainedConfig]:
    """The config of each variant, so that a wrong table is told before anything is trained.

    Args:
        variants: by name: `model_type`, and the config fields in which the variant differs.
        shared: config fields of all variants.
        kwargs: further fields of all variants, such as `vocab_size`.
    Raises:
        ScriptError: no variants, a name that is no folder name, no `model_type`, or a config that cannot be made.
    """
    if not variants:
        raise ScriptError("there are no variants: give --config with a table of them")
    configs = {}
    for name, variant in variants.items():
        if not isinstance(variant, dict) or "model_type" not in variant:
            raise ScriptError(f"variant {name} must be a mapping with a model_type, not {variant!r}")
        if Path(name).name != name:
            raise ScriptError(f"variant {name!r} names a folder: leave out '/'")
        overrides = {**shared, **variant}
        try:
            configs[name] = build_config(overrides.pop("model_type"), None, {**overrides, **kwargs})
        except ScriptError as error:
            raise ScriptError(f"variant {name}: {error}") from error
    return configs
