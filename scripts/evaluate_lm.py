"""Perplexity of a causal language model on local text or a data set of the Hub.

    python scripts/evaluate_lm.py --model_name_or_path out/demo --text_file book.txt --stride 128

The text's documents follow one another, each closed by the end-of-text token, as in pretraining. Without --stride they
are cut into blocks, as pretrain.py evaluates, so that the two agree to the digit on the same text; the first token of
a block is not predicted. With --stride, a window of --block_size tokens slides over the text by so many tokens, and
every token but the first is predicted once, from at least block_size - stride tokens before it where there are so many.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.pretraining.options import EvaluateOptions
from ordnung.scripts.pretraining.perplexity import run


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    return run(parse_options(EvaluateOptions, argv, __doc__))


if __name__ == "__main__":
    run_script(main)
