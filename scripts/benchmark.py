"""Measure speed and memory of ConvLM and its rivals, at equal width, depth and vocabulary.

    ordnung benchmark                                   # everything, on the CPU: one to two hours
    ordnung benchmark --lengths 512 2048 --tasks forward decode --seconds 10
    ordnung benchmark --device cuda --dtype bfloat16
    ordnung benchmark --variants softmax_encoder_sdpa linformer_encoder --baseline softmax_encoder_sdpa
    ordnung benchmark --markdown out/benchmark.json     # the tables of an earlier run

Outputs are checked first; what is wrong is not timed. Every case is then tried once in a process of its own, which
gives its peak memory, or says why it cannot run here. Those that can are timed in turns, so that a disturbance of the
machine meets all alike. All models make the logits of every position in forward and train, and of the last one in
prefill. Attention decodes twice, in the cache that grows and in a static one (rows `NAME_static`); ratios are against
the faster. Results are saved after every task and length; decoding comes last, with all lengths in the same turns.
"""

from dataclasses import dataclass
from typing import Literal

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import check_bounds, option, program


@dataclass(kw_only=True)
class BenchmarkOptions:
    variants: list[str] | None = option(
        None, "Default: the usual causal models. Encoders run forward only.", section="models"
    )
    baseline: str | None = option(None, "Variant that ratios are against; default: gpt2_sdpa.")
    hidden_size: int = option(512, "Width.", least=1)
    num_hidden_layers: int = option(4, "Layers.", least=1)
    num_attention_heads: int = option(8, "Heads.", least=1)
    vocab_size: int = option(4096, "Tokens of the vocabulary.", least=1)
    kernel_size: int = option(64, "Taps of ConvLM.", least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Of the weights.")
    device: Literal["cpu", "cuda"] = option("cpu", "Where to run.")
    lengths: list[int] = option([512, 2048, 8192, 32768], "Tokens.", least=1, section="data")
    batch_size: int = option(1, "Sequences.", least=1)
    decode_steps: int = option(32, "Single-token steps of one decode sample.", least=1)
    seed: int = option(0, "Of weights and tokens.")
    tasks: list[str] | None = option(
        None,
        "Of forward, train, prefill, decode, memory (peak memory of forward, train and prefill, state of decode, "
        "untimed) and mixer; default: all.",
        section="timing",
    )
    threads: int | None = option(None, "CPU threads; default: as torch has them.", least=1)
    seconds: float = option(90.0, "Time to spend on the samples of one task at one length.")
    max_sample_seconds: float = option(180.0, "Leave out a case that needs more, set-up included.")
    output: str = option("out/benchmark.json", "JSON; a PNG of the same name goes beside it.", section="output")
    markdown: str | None = option(None, "Print the tables of this results file and do nothing else.", metavar="JSON")

    def __post_init__(self):
        check_bounds(self)
        self.lengths = sorted(set(self.lengths))
        if self.hidden_size % self.num_attention_heads:
            raise ScriptError(
                f"--hidden_size ({self.hidden_size}) must be a multiple of --num_attention_heads "
                f"({self.num_attention_heads})"
            )


main = program(BenchmarkOptions, "benchmarks.run", __doc__)

if __name__ == "__main__":
    run_script(main)
