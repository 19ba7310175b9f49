"""Measure attention with a squared kernel beside fused softmax attention.

    ordnung bench-quadratic                                  # ten minutes on one CPU core
    ordnung bench-quadratic --head_sizes 16 --lengths 512 2048 --repeats 3

The operators alone, with values as wide as queries and keys, forward and with the gradients: from what length on is the
squared kernel the faster one? Then single tokens after a context: the step of the state, and attention to keys and
values in a cache that grows (a copy for each token, as transformers' DynamicCache) and in a static one; and steps of
whole models, QuadraticKernelLM and SoftmaxLM with both caches. The size of the state is given in tokens of a key-value
cache. Outputs are compared first; competitors are timed in turns. With one thread, seconds are the thread's own, which
other programs on the machine do not lengthen much.
"""

from dataclasses import dataclass
from typing import Literal

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, program


@dataclass(kw_only=True)
class QuadraticBenchOptions:
    head_sizes: list[int] = option([16, 32, 64], "Channels of a head.", least=2, section="sizes")
    heads: int = option(4, "Heads.", least=1)
    chunk_size: int | None = option(
        None, "Tokens whose weights are computed pair by pair; default: by length.", least=1
    )
    decay_gate: bool = option(False, "Time the kernel with a decay gate.")
    lengths: list[int] = option([512, 1024, 2048, 4096, 8192, 16384], "Tokens.", least=1)
    decode_lengths: list[int] = option([512, 4096, 32768], "Tokens before those decoded.", least=1)
    model_lengths: list[int] = option([512, 2048, 8192, 32768], "Tokens before those that models generate.", least=1)
    decode_steps: int = option(16, "Tokens decoded in a sample.", least=1)
    repeats: int = option(5, "Times each is timed.", least=1, section="timing")
    device: Literal["cpu", "cuda"] = option("cpu", "Where to run.")
    threads: int = option(1, "CPU threads.", least=1)
    seed: int = option(0, "Of the inputs.")
    output: str = option("out/bench_quadratic.json", "JSON file for the results.", section="output")

    def __post_init__(self):
        self.lengths = sorted(set(self.lengths))


main = program(QuadraticBenchOptions, "benchmarks.quadratic", __doc__)

if __name__ == "__main__":
    run_script(main)
