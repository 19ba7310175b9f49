"""Pretrain a language model.

    ordnung pretrain --config demo

Runs on one process or, through `accelerate launch --config_file scripts/configs/accelerate_*.yaml scripts/pretrain.py`,
on several. The model and its tokenizer end up in the output folder, ready for `from_pretrained`; beside them are
metrics.jsonl, the loss curve, results.json, run.yaml (all options, usable with --config), the best model and the
checkpoints.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.pretraining.options import PretrainOptions


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(PretrainOptions, argv, __doc__)
    from ordnung.scripts.pretraining.run import run

    return run(options)


if __name__ == "__main__":
    run_script(main)
