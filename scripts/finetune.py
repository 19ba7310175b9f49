"""Fine-tune a checkpoint on labelled data of your own, on GLUE's tasks or on IMDB.

    ordnung finetune --model_name_or_path out/demo --train_file tickets.csv --output_dir out/tickets
    ordnung finetune --model_name_or_path out/demo --task_name sst2 rte --seeds 0 1 2 --output_dir out/glue

Runs on one process or, through `accelerate launch`, on several. The output folder receives results.json and results.md
and, for each task and seed, a folder with the model; the same command goes on where it was stopped, and a task or seed
can be added later. IMDB's reviews have 230 words on average and 2,500 at most: --max_length and --truncation say how
much of one is read. A tenth of its training reviews, and of your own rows without --validation_file, is held out to
compare checkpoints on; test splits are only scored. `ordnung predict` labels new rows with what was trained.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.finetuning.options import FinetuneOptions

main = program(FinetuneOptions, "finetuning.run", __doc__)

if __name__ == "__main__":
    run_script(main)
