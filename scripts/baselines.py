"""Score the majority class and TF-IDF with logistic regression, which need no network.

    ordnung baselines --task_name sst2 imdb --dataset_path data/ --output_dir out/baselines

A model below these has learned nothing that counting words would not. TF-IDF counts words and pairs of words with
sublinear term frequencies; a pair of texts gives the weights of both, their absolute difference and their product.
The regularisation is chosen on a tenth of the training data. Similarities (stsb) are predicted by ridge regression,
and by their mean.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.experiments.options import BaselineOptions

main = program(BaselineOptions, "experiments.baselines", __doc__)

if __name__ == "__main__":
    run_script(main)
