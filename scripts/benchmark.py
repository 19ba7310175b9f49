"""Speed and memory of ConvLM and its rivals: the same width, depth and vocabulary, one machine, one run.

    python scripts/benchmark.py                                   # everything, on the CPU: one to two hours
    python scripts/benchmark.py --lengths 512 2048 --tasks forward decode --seconds 10
    python scripts/benchmark.py --device cuda --dtype bfloat16
    python scripts/benchmark.py --variants softmax_encoder_sdpa linformer_encoder --baseline softmax_encoder_sdpa
    python scripts/benchmark.py --markdown out/benchmark.json     # the tables of an earlier run

Outputs are checked first; what is wrong is not timed. Every case is then tried once in a process of its own, which
gives its peak memory, or says why it cannot run here. Those that can are timed in turns, so that a disturbance of the
machine meets all alike. All models make the logits of every position in forward and train, and of the last one in
prefill. Results are saved after every task and length; decoding comes last, with all lengths in the same turns.
"""

import argparse
import sys
from pathlib import Path

import torch

from ordnung.scripts.benchmarks.checks import TOLERANCE
from ordnung.scripts.benchmarks.run import TASKS, run
from ordnung.scripts.benchmarks.variants import CAUSAL, VARIANTS, Shape


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        help="memory: peak memory of forward, train and prefill, state of decode, untimed",
    )
    usual = [name for name in CAUSAL if VARIANTS[name].by_default]
    add("--variants", nargs="+", choices=VARIANTS, default=usual, help="encoders run forward only")
    add("--baseline", choices=VARIANTS, help="what ratios are against (default: gpt2_sdpa)")
    add("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768], help="tokens")
    shape = Shape()
    add("--hidden_size", type=int, default=shape.hidden_size)
    add("--num_hidden_layers", type=int, default=shape.num_hidden_layers)
    add("--num_attention_heads", type=int, default=shape.num_attention_heads)
    add("--vocab_size", type=int, default=shape.vocab_size)
    add("--kernel_size", type=int, default=shape.kernel_size, help="taps of ConvLM")
    add("--batch_size", type=int, default=1)
    add("--decode_steps", type=int, default=32, help="single-token steps of one decode sample")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=TOLERANCE, default="float32")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=90.0, help="time to spend on the samples of one task at one length")
    add("--max_sample_seconds", type=float, default=180.0, help="leave out a case that needs more, set-up included")
    add("--output", type=Path, default=Path("out/benchmark.json"), help="JSON; a PNG of the same name goes beside it")
    add("--markdown", type=Path, metavar="JSON", help="print the tables of this results file and do nothing else")
    arguments = parser.parse_args(argv)

    arguments.lengths = sorted(set(arguments.lengths))
    for name in ("batch_size", "decode_steps", "threads", "kernel_size", "num_hidden_layers", "vocab_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} ({getattr(arguments, name)}) must be at least 1")
    if arguments.lengths[0] < 1:
        parser.error(f"--lengths ({arguments.lengths[0]}) must be at least 1")
    if arguments.hidden_size % arguments.num_attention_heads:
        parser.error(
            f"--hidden_size ({arguments.hidden_size}) must be a multiple of --num_attention_heads "
            f"({arguments.num_attention_heads})"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    if arguments.markdown is None:
        arguments.baseline = arguments.baseline or "gpt2_sdpa"
        if arguments.baseline not in arguments.variants:
            parser.error(f"--baseline {arguments.baseline} must be among --variants ({' '.join(arguments.variants)})")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    return run(parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
