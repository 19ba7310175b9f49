"""What predicting from every prefix costs: CubicPrefixLM, the loop that defines it, and the causal transformer.

    python scripts/bench_prefix.py                                   # some minutes on one CPU core
    python scripts/bench_prefix.py --layers 2 3 --lengths 128 --repeats 3

Forward and backward of one sequence: `naive` runs one encoder pass for each prefix, `cubic` shares what prefixes have
in common, `recomputed` is the same with gradient checkpointing, `stride` has `prefix_stride` 8, `causal` is None.
`encoder` is one plain batch of the same layers, for the rate of FLOPs that the machine gives them. Then single tokens
after a prompt: by encoding all anew, and with the generation state. Outputs are compared first; competitors are timed
in turns. Results go to a JSON file.
"""

import argparse
from pathlib import Path

from ordnung.scripts.benchmarks.prefix import run
from ordnung.scripts.common.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", nargs="+", type=int, default=[2, 3, 4])
    add("--lengths", nargs="+", type=int, default=[64, 128, 256], help="tokens")
    add("--hidden_size", type=int, default=128)
    add("--num_attention_heads", type=int, default=4)
    add("--repeats", type=int, default=5)
    add("--count_lengths", nargs="+", type=int, default=[512, 1024], help="tokens to count FLOPs at")
    add("--decode_lengths", nargs="+", type=int, default=[192, 512], help="tokens before those decoded")
    add("--decode_layers", type=int, default=3)
    add("--decode_steps", type=int, default=16)
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("out/bench_prefix.json"))
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    run_script(main)
