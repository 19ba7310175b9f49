"""Each variant at its best: options tried in short runs, before the runs that are compared."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.experiments.compare_data import DATA_OPTIONS
from ordnung.scripts.training.loop import NotFiniteError


def number(value: Any) -> Any:
    """YAML takes 1e-3 for a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def grid(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Every choice of a value from each list; what is no list is the same for all."""
    lists = {name: [number(each) for each in values] for name, values in sweep.items() if isinstance(values, list)}
    fixed = {name: value for name, value in sweep.items() if name not in lists}
    return [{**fixed, **dict(zip(lists, chosen))} for chosen in product(*lists.values())]


def options_of(choice: dict[str, Any], pretrain: dict[str, Any], data: dict[str, str], seed: int) -> dict[str, Any]:
    """Options of pretrain.py to try a choice with.

    A part of what variants train on is held out for it, so that the text which they are compared on decides nothing.
    """
    shared = {name: value for name, value in pretrain.items() if name not in (*DATA_OPTIONS, "eval_steps")}
    own = {name: value for name, value in data.items() if name != "validation_file"}
    return {**shared, **own, **choice, "seed": seed}


def try_all(
    choices: list[dict[str, Any]], train: Callable[[dict[str, Any], Path], int], folder: Path
) -> tuple[int, list[dict[str, Any]]]:
    """Train a variant with each choice; finished runs are kept.

    Args:
        train: takes a choice and a folder, and gives the exit status.
    Returns:
        exit status of the run that was stopped, or 0; of each choice `options` and the held-out `eval_loss`, None where
        the loss did not stay finite.
    """
    tried = []
    for choice in choices:
        own = folder / ",".join(f"{name}={value}" for name, value in choice.items())
        loss, diverged = None, own / "diverged.json"
        if not diverged.exists():
            try:
                if status := train(choice, own):
                    return status, tried
                loss = read_json(own / "results.json")["evaluation"]["eval_loss"]
            except NotFiniteError as error:
                own.mkdir(parents=True, exist_ok=True)
                write_json(diverged, {"error": str(error)})
        tried.append({"options": choice, "eval_loss": loss})
    return 0, tried


def best(tried: list[dict[str, Any]], sweep: dict[str, Any]) -> dict[str, Any]:
    """The swept options of lowest loss.

    Raises:
        ScriptError: no loss stayed finite.
    """
    finite = [one for one in tried if one["eval_loss"] is not None]
    if not finite:
        raise ScriptError("no loss of the sweep stayed finite: try lower learning rates")
    chosen = min(finite, key=lambda one: one["eval_loss"])["options"]
    return {name: value for name, value in chosen.items() if isinstance(sweep[name], list)}


def described(results: dict[str, Any]) -> str:
    """What was chosen for each variant, and for which of them a value lies at the end of its list."""
    sweep, lines = results["settings"]["sweep"], []
    for name, tried in results["sweep"].items():
        chosen = best(tried, sweep)
        values = {option: sorted({one["options"][option] for one in tried}) for option in chosen}
        ends = [option for option, value in chosen.items() if value in (values[option][0], values[option][-1])]
        words = ", ".join(f"{option} {value}" for option, value in chosen.items())
        lines.append(f"- {name}: {words}" + (f" (at the end of what was tried: {', '.join(ends)})" if ends else ""))
    fixed = ", ".join(f"{name} {value}" for name, value in sweep.items() if not isinstance(value, list))
    return f"Chosen for each variant on text that it trains on otherwise, by runs with {fixed}:\n\n" + "\n".join(lines)
