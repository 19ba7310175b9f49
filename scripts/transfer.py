"""Pretrain variants on the same text, then fine-tune each on the same tasks.

    ordnung transfer --config transfer_cpu --glue_path data/glue --imdb_path data/imdb

Every variant is pretrained once by pretrain.py with the same text, tokenizer, steps and options, or, where its table
names a `source`, converted from that checkpoint and, with `distill` (options of linearize.py), trained to be like it.
Then it is fine-tuned on each task with each seed by finetune.py. The majority class and TF-IDF with logistic regression
are scored on the same data. The output folder receives results.json and results.md beside the runs. Finished runs are
kept and stopped ones resumed: the same command goes on where it was stopped, and a variant, task or seed can be added
later.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.experiments.options import TransferOptions

main = program(TransferOptions, "experiments.transfer", __doc__)

if __name__ == "__main__":
    run_script(main)
