"""Count how the FLOPs and the generation state of every family grow with the length.

    ordnung growth --output_file out/growth.json

The models count: nothing is computed and nothing timed. Lengths double from --shortest to --longest.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import option, program, required


@dataclass(kw_only=True)
class GrowthOptions:
    shortest: int = option(512, "Tokens.", least=1, section="data")
    longest: int = option(65536, "Tokens.", least=2)
    output_file: str = required("JSON.", section="output")

    def __post_init__(self):
        if self.longest < 2 * self.shortest:
            raise ScriptError(f"--longest ({self.longest}) must be at least twice --shortest ({self.shortest})")


main = program(GrowthOptions, "benchmarks.growth", __doc__)

if __name__ == "__main__":
    run_script(main)
