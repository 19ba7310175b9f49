"""Time a training step on packed documents against full rows and against the padded batch of the same documents.

    ordnung bench-packing --dataset_path data/glue --output_file packing.json

For every family and the control: `full` is a batch of rows without boundaries; `packed` holds as many tokens, of real
documents side by side; `padded` holds the same documents with a row each. One step of each after the other in each
round, so that all see the same machine. Lengths are those of a GLUE task's sentences, or of IMDB's reviews.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, parse_options
from ordnung.scripts.finetuning.tasks import TASKS


@dataclass(kw_only=True)
class PackingBenchOptions:
    model_type: list[str] = option(["all"], "Families, or all.", section="model")
    hidden_size: int = option(256, "Width.", least=1)
    num_hidden_layers: int = option(4, "Layers.", least=1)
    task_name: list[str] = option(["sst2", "imdb"], f"Whose lengths to take, of {', '.join(TASKS)}.", section="data")
    dataset_path: str | None = option(None, "Local folder with a folder for each task; default: the Hub.")
    tokenizer_name: str | None = option(None, "Tokenizer folder or Hub name; default: pieces split at spaces.")
    block_size: int = option(256, "Tokens of a row.", least=2)
    per_device_train_batch_size: int = option(8, "Rows in a batch.", least=1)
    rounds: int = option(5, "Rounds; one more before them is not counted.", least=1, section="timing")
    num_threads: int = option(1, "Threads.", least=1)
    seed: int = option(0, "Seed of lengths and weights.")
    output_file: str | None = option(None, "JSON file for the results.", section="output")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(PackingBenchOptions, argv, __doc__)
    from ordnung.scripts.benchmarks.packing import run

    return run(options)


if __name__ == "__main__":
    run_script(main)
