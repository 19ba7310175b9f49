"""Run the experiments of the page of claims again, each into its results file.

    ordnung claims --config claims --inputs books=books.jsonl,one_book=one_book.jsonl,encoder=out/all-MiniLM-L6-v2
    ordnung claims --config claims --only growth ladder_recall
    ordnung claims --config claims --device cuda

Experiments whose inputs are not given are left out, by name. The same command goes on where it was stopped: what is
finished is kept. `make claims` then writes the page and the cards from the results files.
"""

from dataclasses import dataclass
from typing import Literal

from ordnung.scripts.common.errors import ScriptError, closest, run_script
from ordnung.scripts.common.options import MergeKeyValues, option, program, required


@dataclass(kw_only=True)
class ClaimsOptions:
    experiments: str = required(
        "By name of the results file: command, result (what it writes), minutes on a CPU core, cuda (words that the "
        "command gets for a GPU); claims.yaml has them.",
        section="experiments",
        action=MergeKeyValues,
    )
    only: list[str] | None = option(None, "Names of experiments; default: all.")
    inputs: str | None = option(
        None,
        "What commands name in braces: books, one_book, encoder, reviews, glue, imdb.",
        section="data",
        action=MergeKeyValues,
    )
    device: Literal["cpu", "cuda"] = option("cpu", "With cuda, larger where an experiment has a larger form.")
    output_dir: str = option("out/claims", "Folder for runs and for done.json.", section="output")
    results_dir: str = option("model_cards/results", "Folder for the results files.")

    def __post_init__(self):
        self.inputs = self.inputs or {}
        for name in self.only or ():
            if name not in self.experiments:
                raise ScriptError(f"unknown --only {name!r}{closest(name, list(self.experiments))}")


main = program(ClaimsOptions, "reports.reproduce", __doc__)

if __name__ == "__main__":
    run_script(main)
