"""Time packed training steps beside full rows and the padded batch.

    ordnung bench-packing --train_file sst2.parquet imdb.parquet --text_column sentence text --output_file packing.json

For every family and the control: `full` is a batch of rows without boundaries; `packed` holds as many tokens, of real
documents side by side; `padded` holds the same documents with a row each. One step of each after the other in each
round, so that all see the same machine. Documents have the lengths of real ones, in words and punctuation.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, program, required


@dataclass(kw_only=True)
class PackingBenchOptions:
    model_type: list[str] = option(["all"], "Families, or all.", section="model")
    hidden_size: int = option(256, "Width.", least=1)
    num_hidden_layers: int = option(4, "Layers.", least=1)
    train_file: list[str] = required("Files of documents: text, JSON or Parquet; each is a case.", section="data")
    text_column: list[str] = option(["text"], "Column of each file that holds the text.")
    block_size: int = option(256, "Tokens of a row.", least=2)
    per_device_train_batch_size: int = option(8, "Rows in a batch.", least=1)
    rounds: int = option(5, "Rounds; one more before them is not counted.", least=1, section="timing")
    num_threads: int = option(1, "Threads.", least=1)
    seed: int = option(0, "Seed of lengths and weights.")
    output_file: str | None = option(None, "JSON file for the results.", section="output")


main = program(PackingBenchOptions, "benchmarks.packing", __doc__)

if __name__ == "__main__":
    run_script(main)
