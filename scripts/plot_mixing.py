"""Draw how a model mixes the tokens of a text, and how much of it a low rank holds.

`python scripts/plot_mixing.py --model_name_or_path out/demo --text "Call me Ishmael." --output_dir out/mixing`

`mixing.png` shows the weights of every head of every layer: softmax weights, a convolution's Toeplitz matrix, weights
of slots. `spectrum.png` shows the share of the sum of singular values that the first ones hold, as figure 1 of the
Linformer paper (Wang et al. 2020, arXiv 2006.04768), `spectrum.json` the figures at one rank. BERT, RoBERTa and GPT-2
checkpoints are drawn as the softmax models that they are.
"""

import argparse
from pathlib import Path

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import positive
from ordnung.scripts.reports.mixing import run


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw how a model mixes the tokens of a text.")
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder or Hub name")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="the text")
    text.add_argument("--text_file", type=Path, help="file with the text")
    parser.add_argument("--max_length", type=positive(int), default=512, help="tokens of it to use")
    parser.add_argument("--rank", type=positive(int), help="rank of the figures; default: a quarter of the tokens")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the images and figures")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    run_script(main)
