"""Pretrain a language model.

    ordnung pretrain --config demo

Runs on one process or, through `accelerate launch --config_file scripts/configs/accelerate_*.yaml scripts/pretrain.py`,
on several. The model and its tokenizer end up in the output folder, ready for `from_pretrained`; beside them are
metrics.jsonl, the loss curve, results.json, run.yaml (all options, usable with --config), the best model and the
checkpoints.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.pretraining.options import PretrainOptions

main = program(PretrainOptions, "pretraining.run", __doc__)

if __name__ == "__main__":
    run_script(main)
