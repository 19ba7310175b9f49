"""Train variants on tasks that causal attention may not express.

    ordnung prefix-tasks --config tasks_pointer

`pointer`: a permutation is shown, then at each query the model has to answer with what the permutation gives when it is
applied once, twice, or up to `hops` times; causal tokens cannot look up where the values after them point (arXiv
2412.02975). `function`: a random function is shown, and at each query the model has to answer with what `hops`
applications of it give. `triplets`: Triplet-Counting (ENTP, arXiv 2410.01600), where each token counts the pairs among
all tokens so far that sum with the last one to a multiple of their number. Every variant sees the same sequences for
the same number of steps (or its own in --training_by_variant); those that cost less than the dearest then go on to the
same number of FLOPs, unless --equal_compute False. The output folder receives results.json, results.md and
accuracy.png. Finished runs are kept: the same command goes on where it was stopped, and a variant or seed can be added
later.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.experiments.options import TaskOptions

main = program(TaskOptions, "experiments.prefix_tasks", __doc__)

if __name__ == "__main__":
    run_script(main)
