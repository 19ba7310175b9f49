"""Write text with a checkpoint: `python scripts/generate.py --model_name_or_path out/demo --prompt "Call me"`.

Text appears on stdout as it is made, the speed on stderr. Without a sampling option decoding is what the checkpoint's
generation config says, which is greedy if it says nothing.
"""

import argparse
from pathlib import Path

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.generation import run
from ordnung.scripts.common.options import positive, probability


def build_parser():
    parser = argparse.ArgumentParser(description="Write text with a checkpoint.")
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder or Hub name")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", help="one or more texts to continue; default: standard input")
    source.add_argument("--prompt_file", nargs="+", type=Path, help="files to continue, each a prompt")
    parser.add_argument("--max_new_tokens", type=positive(int), default=200)
    parser.add_argument("--num_return_sequences", type=positive(int), default=1, help="texts per prompt")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    sampling = parser.add_argument_group("sampling (any of these switches it on)")
    sampling.add_argument("--temperature", type=positive(float), help="1 samples from the model as it is")
    sampling.add_argument("--top_k", type=positive(int), help="sample from the k likeliest tokens")
    sampling.add_argument(
        "--top_p", type=probability, help="sample from the likeliest tokens of this total probability"
    )
    parser.add_argument("--repetition_penalty", type=positive(float), help="above 1: tokens used before get unlikelier")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    return run(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_script(main)
