"""Variants that an earlier run of a program has trained, taken over from its results file: its folder may be gone."""

import json
import math
from pathlib import Path
from typing import Any

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json
from ordnung.scripts.common.machine import described

FILES = ("train_file", "validation_file")  # may lie elsewhere; counting n-grams tells whether they hold the same text


def trained_earlier(results: dict[str, Any]) -> list[str]:
    """A sentence for each earlier run that a results file has taken variants from."""
    return [
        f"Trained earlier: {', '.join(origin['variants'])}. {described(origin['machine'])}"
        for origin in results.get("earlier", [])
    ]


class Earlier:
    """What a results file gives to another run of its program.

    Args:
        path: of the file; None for a run without one.
        settings: of the run, as the file holds them, with its `seeds` and without its variants.
        variants: its table.
        holds: what else a file of this program holds.
        files: settings of `pretrain` that may differ.
    Raises:
        ScriptError: the file is of something else; settings, seeds or a variant are not the same.
    """

    def __init__(self, path: str | None, settings: dict[str, Any], variants: dict[str, dict], holds: str, files=()):
        self.path, self.results = path, {"variants": {}}
        if path:
            try:
                self.results = read_json(Path(path))
            except (OSError, ValueError) as error:
                raise ScriptError(f"--earlier {path} cannot be read ({error}): name a results.json") from error
            needed = {"settings", "variants", holds, "machine", "seeds"}
            if not isinstance(self.results, dict) or not needed <= self.results.keys():
                raise ScriptError(f"--earlier {path} is no results.json of this program with {holds}")
            self._check(*json.loads(json.dumps([settings, variants])), files)

    def _check(self, settings: dict[str, Any], variants: dict[str, dict], files):
        there, of_there = self._told()
        there["seeds"] = self.results["seeds"]
        for both in (settings, there):
            if both.get("pretrain"):
                both["pretrain"] = {name: value for name, value in both["pretrain"].items() if name not in files}
        # options of a task, or of variants that start from a checkpoint, decide nothing where one side has none
        of_one = {name for name in there.keys() ^ settings.keys() if name.startswith(("finetune ", "linearize"))}
        names = (there.keys() | settings.keys()) - of_one
        pairs = [(name, there.get(name), settings.get(name)) for name in sorted(names)]
        pairs += [(f"variant {name}", of_there[name], variants[name]) for name in of_there if name in variants]
        for name, old, new in pairs:
            if old != new:
                raise ScriptError(
                    f"--earlier {self.path} was made with {name} {json.dumps(old)}, not {json.dumps(new)}: leave it out"
                )

    def _told(self) -> tuple[dict[str, Any], dict[str, dict]]:
        """The settings of the file without its variants, and these."""
        told = dict(self.results["settings"])
        return told, told.pop("variants")

    def origins(self, taken) -> list[dict[str, Any]]:
        """Which machine, with which command and commit, has trained which of the variants that were taken over."""
        older = self.results.get("earlier", [])
        names = {name for origin in older for name in origin["variants"]}
        found = [(origin["machine"], [name for name in taken if name in origin["variants"]]) for origin in older]
        if self.path:
            found.append((self.results["machine"], [name for name in taken if name not in names]))
        return [{"machine": machine, "variants": own} for machine, own in found if own]


class EarlierTransfer(Earlier):
    """A results file of transfer.py; as `Earlier` takes it."""

    def __init__(self, path: str | None, settings: dict[str, Any], variants: dict[str, dict]):
        super().__init__(path, settings, variants, "baselines")

    def finished(self, variants, tasks: list[str]) -> dict[str, dict]:
        """Results by name of those variants that the file holds with all the tasks."""
        held = {name: found for name, found in self.results["variants"].items() if name in variants}
        return {
            name: {**found, "tasks": {task: found["tasks"][task] for task in tasks}}
            for name, found in held.items()
            if set(tasks) <= found["tasks"].keys()
        }

    def check_data(self, baselines: dict[str, dict]):
        """Raise a ScriptError where baselines score otherwise than they did for the file: the data are others."""
        for task, found in baselines.items():
            old = self.results.get("baselines", {}).get(task, found)
            for name in ("majority", "tfidf"):
                if not math.isclose(old[name]["score"], found[name]["score"], abs_tol=0.003):
                    raise ScriptError(
                        f"--earlier {self.path} was made with other data of {task}: {name} scores "
                        f"{old[name]['score']:.4f}, and {found[name]['score']:.4f} here"
                    )


class EarlierTask(Earlier):
    """A results file of recall.py or prefix_tasks.py; as `Earlier` takes it, settings with `training_by_variant`."""

    def __init__(self, path: str | None, settings: dict[str, Any], variants: dict[str, dict]):
        super().__init__(path, *_with_training(settings, variants), "seeds")

    def _told(self) -> tuple[dict[str, Any], dict[str, dict]]:
        return _with_training(*super()._told())

    def finished(self, variants, steps: dict[str, int] | None) -> dict[str, dict]:
        """Results by name of those variants that the file holds, trained for as many steps as here.

        Args:
            steps: of each; None where the settings have them.
        """
        held = {name: found for name, found in self.results["variants"].items() if name in variants}
        return {
            name: found for name, found in held.items() if steps is None or steps[name] == found["curve"][-1]["step"]
        }


def _with_training(settings: dict[str, Any], variants: dict[str, dict]) -> tuple[dict[str, Any], dict[str, dict]]:
    """Settings and variants, what variants train with of their own among the latter.

    Older files name no device, as there was but one, and no training of single variants.
    """
    settings = {"device": "cpu", **settings}
    own = settings.pop("training_by_variant", {})
    return settings, {name: {**variant, **own.get(name, {})} for name, variant in variants.items()}


class EarlierComparison(Earlier):
    """A results file of compare.py; as `Earlier` takes it."""

    def __init__(self, path: str | None, settings: dict[str, Any], variants: dict[str, dict]):
        super().__init__(path, settings, variants, "ngrams", FILES)

    def tried(self, choices: dict[str, list[dict]]) -> dict[str, list[dict]]:
        """The sweeps by variant that the file holds, of those `choices` that they were to try."""
        sweeps = self.results.get("sweep", {})
        return {
            name: sweeps[name]
            for name, wanted in choices.items()
            if name in sweeps and [one["options"] for one in sweeps[name]] == wanted
        }

    def trained(self, runs: dict[str, tuple[dict, float]], steps: dict[str, int]) -> dict[str, dict]:
        """Results by name of those of `runs` that the file holds, trained for as many steps as here.

        Args:
            runs: as `compare.with_equal_compute` gives them.
            steps: of each; None where epochs are counted, which the settings have.
        """
        held = {name: dict(result) for name, result in self.results["variants"].items() if name in runs}
        for result in held.values():
            result.pop("perplexity_change", None)  # against the baseline of then
        return {name: result for name, result in held.items() if steps[name] in (None, result["steps"])}

    def check_text(self, lines: dict[str, Any]):
        """Raise a ScriptError where counting gives another perplexity than it gave the file: the text is another.

        Args:
            lines: as `ngrams.ngram_lines` gives them, of the file's first seeds.
        """
        for name, old in self.results["ngrams"].items():
            if name != "training_tokens":
                for a, b in zip(old["values"], lines[name]["values"]):
                    if not math.isclose(a, b, rel_tol=1e-6):
                        raise ScriptError(
                            f"--earlier {self.path} was made with another text: a {name} that has counted it has "
                            f"perplexity {a:.6f}, and {b:.6f} here"
                        )
