"""Pretrain variants on the same text and compare them.

    ordnung compare --config compare_conv

Every variant is a run of pretrain.py with the same data, tokenizer, steps and options, once with each seed; a seed
chooses initial weights and the order of the data, and the text held out is the same for all. The output folder
receives results.json, results.md and positions.png, and the runs under runs/. Finished runs are kept and stopped ones
resumed: the same command goes on where it was stopped, and a variant or seed can be added later.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.experiments.options import CompareOptions

main = program(CompareOptions, "experiments.compare", __doc__)

if __name__ == "__main__":
    run_script(main)
