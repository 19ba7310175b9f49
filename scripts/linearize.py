"""Replace the attention of a checkpoint by a family's mixing, and train the difference away.

    ordnung linearize --source teacher --model_type sparse_attention_lm --train_file texts.txt --output_dir out/student

The teacher is any checkpoint that `ordnung convert` reads. Its weights are converted; each mixer is matched to the
attention that it replaces; the whole is matched to the teacher; both are measured side by side. The student ends up in
the output folder, ready for `from_pretrained`; beside it are linearize_results.json, a picture, a card, metrics.jsonl,
run.yaml (all options, usable with --config) and the checkpoints. It runs on one process or, through `accelerate launch
--config_file scripts/configs/accelerate_*.yaml scripts/linearize.py`, on several.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.linearizing.options import LinearizeOptions

main = program(LinearizeOptions, "linearizing.run", __doc__)

if __name__ == "__main__":
    run_script(main)
