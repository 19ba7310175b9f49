"""Time the implementations of short convolutions, by kernel sharing, kernel size and length.

    taskset -c 1 ordnung bench-conv --output_file conv_implementations.json

Toeplitz products and depthwise convolutions compute the same; which is faster is in the number of kernels, in their
taps and in the rows. One thread, in CPU seconds. `conv_implementation="auto"` chooses one: the table says at each size
whether it chose the faster.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, program


@dataclass(kw_only=True)
class ConvBenchOptions:
    hidden_size: int = option(256, "Width.", least=1, section="sizes")
    num_attention_heads: int = option(8, "Heads, each with a kernel where kernels are shared.", least=1)
    kernel_size: list[int] = option([4, 8, 16, 31, 64, 128, 512], "Taps of the kernels.")
    rows: list[str] = option(["32x48", "8x256", "4x512", "1x2048", "8x1024"], "Rows and their tokens, as in 32x48.")
    rounds: int = option(7, "Rounds; one more before them is not counted.", least=1, section="timing")
    seed: int = option(0, "Seed of values and kernels.")
    output_file: str | None = option(None, "JSON file for the results.", section="output")


main = program(ConvBenchOptions, "benchmarks.conv", __doc__)

if __name__ == "__main__":
    run_script(main)
