"""Count the text of a comparison: what bigrams and trigrams give where its models were measured.

    ordnung ngrams --results model_cards/results/conv_lm_compare.json --output_file out/conv_lm_compare_ngrams.json

Interpolated Kneser-Ney on the tokens that each seed's runs trained on, with their tokenizer and held-out text.
compare.py does this itself; results of transfer.py, and those of before, take it from here.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.experiments.options import NgramOptions


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(NgramOptions, argv, __doc__)
    from ordnung.scripts.experiments.ngrams import run

    return run(options)


if __name__ == "__main__":
    run_script(main)
