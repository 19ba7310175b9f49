"""What the evidence programs share: variants trained with several seeds, runs that are kept, spread, tables."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ordnung.scripts.common import ScriptError, build_config, write_json


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


def check_seeds(seeds: Sequence[int]):
    """Raise a ScriptError where there are no seeds, or one twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ScriptError(f"--seeds {list(seeds)} must be one or more different numbers")


def claim_output_dir(output_dir: Path, settings: dict[str, Any], variants: dict[str, Any]):
    """Record in settings.json what the runs of a folder are made with.

    A later call may add variants; what the finished runs were made with must be the same.

    Raises:
        ScriptError: the folder holds runs that were made otherwise, or something else.
    """
    path = output_dir / "settings.json"
    settings = json.loads(json.dumps({**settings, **{f"variant {name}": value for name, value in variants.items()}}))
    if output_dir.exists() and not output_dir.is_dir():
        raise ScriptError(f"--output_dir {output_dir} is a file; name a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    recorded = {}
    # Settings alone are left by a call that failed before its first run.
    if any(entry != path for entry in output_dir.iterdir()):
        if not path.exists():
            raise ScriptError(f"--output_dir {output_dir} holds something else than runs of this program: name another")
        recorded = json.loads(path.read_text())
    for name in recorded.keys() & settings.keys():
        if recorded[name] != settings[name]:
            raise ScriptError(
                f"--output_dir {output_dir} holds runs with {name} {json.dumps(recorded[name])}, not "
                f"{json.dumps(settings[name])}: name another folder, or delete this one"
            )
    write_json(path, recorded | settings)


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of a single value) beside the values, one per seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "values": list(values)}


def spread(summary: dict[str, Any], decimals: int, scale: float = 1.0) -> str:
    """A summary, times `scale`, as text: mean ± sample standard deviation."""
    values = [value for value in (summary["mean"], summary["standard_deviation"]) if value is not None]
    return " ± ".join(f"{value * scale:,.{decimals}f}" for value in values)


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
