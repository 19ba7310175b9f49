"""Train variants on associative recall: what can each look up, and from how far?

    ordnung recall --config recall_conv

A sequence shows key-value pairs; after them keys come again, and at each the model has to answer with the key's value
(MQAR, Arora et al. 2023, arXiv 2312.04927). Every variant trains on the same freshly drawn sequences for the same
number of steps; then its accuracy is measured by the number of pairs and by the distance between a query and its pair.
The output folder receives results.json, results.md and accuracy.png. Finished runs are kept: the same command goes on
where it was stopped, and a variant or seed can be added later.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.experiments.options import RecallOptions

main = program(RecallOptions, "experiments.recall", __doc__)

if __name__ == "__main__":
    run_script(main)
