"""Count the text of a comparison: what bigrams and trigrams give where its models were measured.

    ordnung ngrams --results model_cards/results/conv_lm_compare.json --output_file out/conv_lm_compare_ngrams.json

Interpolated Kneser-Ney on the tokens that each seed's runs trained on, with their tokenizer and held-out text.
compare.py does this itself; results of transfer.py, and those of before, take it from here.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.experiments.options import NgramOptions

main = program(NgramOptions, "experiments.ngrams", __doc__)

if __name__ == "__main__":
    run_script(main)
