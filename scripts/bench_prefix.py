"""Measure what predicting from every prefix costs.

CubicPrefixLM is held against the loop that defines it and against the causal transformer.

    ordnung bench-prefix                                   # some minutes on one CPU core
    ordnung bench-prefix --layers 2 3 --lengths 128 --repeats 3

Forward and backward of one sequence: `naive` runs one encoder pass for each prefix, `cubic` shares what prefixes have
in common, `recomputed` is the same with gradient checkpointing, `stride` has `prefix_stride` 8, `causal` is None.
`encoder` is one plain batch of the same layers, for the rate of FLOPs that the machine gives them. Then single tokens
after a prompt: by encoding all anew, and with the generation state. Outputs are compared first; competitors are timed
in turns. Results go to a JSON file.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, program


@dataclass(kw_only=True)
class PrefixBenchOptions:
    layers: list[int] = option([2, 3, 4], "Numbers of layers.", least=1, section="models")
    hidden_size: int = option(128, "Width.", least=1)
    num_attention_heads: int = option(4, "Heads.", least=1)
    lengths: list[int] = option([64, 128, 256], "Tokens to train on.", least=2, section="data")
    count_lengths: list[int] = option([512, 1024], "Tokens to count FLOPs at.", least=2)
    decode_lengths: list[int] = option([192, 512], "Tokens before those decoded.", least=2)
    decode_layers: int = option(3, "Layers of the models that decode.", least=1)
    decode_steps: int = option(16, "Tokens decoded.", least=1)
    repeats: int = option(5, "Times each is timed.", least=1, section="timing")
    threads: int = option(1, "CPU threads.", least=1)
    seed: int = option(0, "Of weights and tokens.")
    output: str = option("out/bench_prefix.json", "JSON file for the results.", section="output")


main = program(PrefixBenchOptions, "benchmarks.prefix", __doc__)

if __name__ == "__main__":
    run_script(main)
