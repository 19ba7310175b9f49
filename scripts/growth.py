"""Count how the FLOPs and the generation state of every family grow with the length.

    ordnung growth --output_file out/growth.json

The models count: nothing is computed and nothing timed. Lengths double from --shortest to --longest.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import option, parse_options, required


@dataclass(kw_only=True)
class GrowthOptions:
    shortest: int = option(512, "Tokens.", least=1, section="data")
    longest: int = option(65536, "Tokens.", least=2)
    output_file: str = required("JSON.", section="output")

    def __post_init__(self):
        if self.longest < 2 * self.shortest:
            raise ScriptError(f"--longest ({self.longest}) must be at least twice --shortest ({self.shortest})")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(GrowthOptions, argv, __doc__)
    from ordnung.scripts.benchmarks.growth import run

    return run(options)


if __name__ == "__main__":
    run_script(main)
