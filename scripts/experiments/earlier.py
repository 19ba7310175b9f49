"""Variants that an earlier comparison has trained, taken over from its results file: the runs may lie elsewhere."""

import json
import math
from pathlib import Path
from typing import Any

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json

FILES = ("train_file", "validation_file")  # may lie elsewhere; counting n-grams tells whether they hold the same text


class Earlier:
    """What a results file of compare.py has to give to a comparison of the same settings.

    Args:
        path: of the file; None for a comparison without one.
        settings: `pretrain`, `config_overrides` and, with one, `sweep` of the comparison.
        variants: its table.
    Raises:
        ScriptError: the file is no results file of compare.py; settings, seeds or a variant are not the same.
    """

    def __init__(self, path: str | None, settings: dict[str, Any], variants: dict[str, dict], seeds: list[int]):
        self.path = path
        self.results = read_json(Path(path)) if path else {"variants": {}, "settings": {"variants": {}}}
        if path:
            self._check(json.loads(json.dumps({**settings, "seeds": seeds, "variants": variants})))
        self.tried: dict[str, list[dict]] = self.results.get("sweep", {})

    def _check(self, wanted: dict[str, Any]):
        if not {"settings", "variants", "ngrams", "machine", "seeds"} <= self.results.keys():
            raise ScriptError(f"--earlier {self.path} is no results.json of compare.py that counts n-grams")
        there = {**self.results["settings"], "seeds": self.results["seeds"]}
        of_here, of_there = wanted.pop("variants"), there.pop("variants")
        for both in (wanted, there):
            both["pretrain"] = {name: value for name, value in both["pretrain"].items() if name not in FILES}
        pairs = [(name, there.get(name), wanted.get(name)) for name in sorted(there.keys() | wanted.keys())]
        pairs += [(f"variant {name}", of_there[name], of_here[name]) for name in of_there if name in of_here]
        for name, old, new in pairs:
            if old != new:
                raise ScriptError(
                    f"--earlier {self.path} was made with {name} {json.dumps(old)}, not {json.dumps(new)}: leave it out"
                )

    def trained(self, runs: dict[str, tuple[dict, float]], steps: dict[str, int]) -> dict[str, dict]:
        """Results by name of those of `runs` that the file holds, trained for as many steps as here.

        Args:
            runs: as `compare.with_equal_compute` gives them.
            steps: of each.
        """
        held = {name: result for name, result in self.results["variants"].items() if name in runs}
        return {name: result for name, result in held.items() if result["steps"] == steps[name]}

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

    def origins(self, taken: dict[str, dict]) -> list[dict[str, Any]]:
        """Which machine, with which command and commit, has trained which of the variants that were taken over."""
        older = self.results.get("earlier", [])
        names = {name for origin in older for name in origin["variants"]}
        found = [(origin["machine"], [name for name in taken if name in origin["variants"]]) for origin in older]
        if self.path:
            found.append((self.results["machine"], [name for name in taken if name not in names]))
        return [{"machine": machine, "variants": own} for machine, own in found if own]
