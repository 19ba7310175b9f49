"""The fine-tuning loop against a bare accelerate loop around the same model, on the same rows in the same order.

    python scripts/bench_finetune.py --model_name_or_path out/demo --dataset_path data/glue --task_name sst2

The bare loop is what a user would write: a DataLoader over tokenized data with transformers' padding collator, forward,
backward, clipping, AdamW and the schedule, and nothing else. Both take the same steps, one after the other in each
round, and change places from round to round. The ratio is the median over rounds of ours to theirs.
"""

from ordnung.scripts.benchmarks.finetune import run
from ordnung.scripts.benchmarks.options import FinetuneBenchOptions
from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import parse_options


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    return run(parse_options(FinetuneBenchOptions, argv, __doc__))


if __name__ == "__main__":
    run_script(main)
