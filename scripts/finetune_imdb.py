"""Fine-tune a checkpoint on IMDB's film reviews: `python scripts/finetune_imdb.py --model_name_or_path out/demo ...`.

Reviews have 230 words on average and 2,500 at most: --max_length and --truncation say how much of one is read. A tenth
of the training reviews is held out to compare checkpoints on; the test split is only scored. The same command goes on
where it was stopped; see finetuning/run.py for what the output folder receives.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.run import run
from ordnung.scripts.finetuning.tasks import IMDB


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    return run([IMDB], parse_options(FinetuneOptions, argv, __doc__))


if __name__ == "__main__":
    run_script(main)
