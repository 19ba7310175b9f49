"""Measure sparse attention beside full attention and that of Longformer, BigBird and Mistral.

    ordnung bench-sparse                                   # a quarter of an hour on one CPU core
    ordnung bench-sparse --lengths 2048 4096 --rounds 5 --flex False

First attention alone, causal, forward and with its derivative: fused attention (SDPA), a window, what SparseAttentionLM
adds to it, and FlexAttention's forward with the same window. Then one encoder layer with the weights of a Longformer,
beside that, BigBird's block_sparse layer and full attention; then single tokens of a causal model with the weights of a
Mistral, beside that and full attention in a static cache. Outputs are compared first; competitors are timed in turns,
and the medians are of the ratios within a turn. With one thread, seconds are the thread's own, which other programs on
the machine do not lengthen much. Results go to a JSON file.
"""

from dataclasses import dataclass
from typing import Literal

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, program


@dataclass(kw_only=True)
class SparseBenchOptions:
    num_attention_heads: int = option(4, "Heads, of 64 channels each.", least=1, section="models")
    window: int = option(256, "Tokens of the causal window; an encoder sees half of it to each side.", least=2)
    lengths: list[int] = option([256, 2048, 4096, 8192, 16384], "Tokens, forward.", least=1, section="data")
    backward_lengths: list[int] = option([2048, 4096, 8192], "Tokens, forward and backward.", least=1)
    encoder_lengths: list[int] = option([1024, 2048, 4096], "Tokens of the encoders, and of prefill.", least=1)
    decode_lengths: list[int] = option([512, 4096, 32768], "Tokens before those decoded.", least=1)
    decode_steps: int = option(32, "Tokens decoded in one sample.", least=1)
    flex: bool = option(True, "Time FlexAttention too, which needs a C++ compiler.", section="timing")
    rounds: int = option(5, "Times each is timed.", least=1)
    device: Literal["cpu", "cuda"] = option("cpu", "Where to run.")
    threads: int = option(1, "CPU threads.", least=1)
    seed: int = option(0, "Of weights and tokens.")
    output: str = option("out/bench_sparse.json", "JSON file for the results.", section="output")


main = program(SparseBenchOptions, "benchmarks.sparse", __doc__)

if __name__ == "__main__":
    run_script(main)
