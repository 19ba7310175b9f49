"""Compare converted models with transformers' own classes, architecture by architecture.

    ordnung peers --output_file peers.json [--sources FOLDER ...]

Each architecture that `convert` reads is made with random weights, and checkpoints are read as they are; the table says
what was compared in float64 and how far the two lay apart at most.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, program


@dataclass(kw_only=True)
class PeersOptions:
    sources: list[str] | None = option(
        None, "Checkpoints to compare besides: folders, with a GGUF file or transformers' own.", section="models"
    )
    seed: int = option(0, "Seed of weights and tokens.")
    output_file: str | None = option(None, "JSON file for the results.", section="output")


main = program(PeersOptions, "experiments.peers", __doc__)

if __name__ == "__main__":
    run_script(main)
