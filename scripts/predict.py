"""Predict labels for the rows of a file with a fine-tuned model.

    ordnung predict --model_name_or_path out/tickets --file new.csv --output predictions.csv

Takes what finetune.py wrote (its output folder means the best of its runs), merged, stand-alone and adapter folders,
and models of transformers' own, also from the Hub. The output has the columns of the input and, beside them, what is
predicted: `predicted_label` and `predicted_probability` of classes, `predicted_labels` above the threshold of a
multi-label model, `predicted_value` of a regression, `predicted_tags` of words, `predicted_answer` of a question.
Files larger than memory are read piece by piece; the same command goes on where it was stopped.
"""

from dataclasses import dataclass
from typing import Literal

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import check_bounds, option, parse_options, required


@dataclass(kw_only=True)
class PredictOptions:
    model_name_or_path: str = required("Fine-tuned checkpoint: folder or Hub name.", section="model")
    tokenizer_name: str | None = option(None, "Default: model_name_or_path.")
    pad_token: str | None = option(None, "Token to pad with, for a tokenizer that names none.")
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Of the weights.")
    use_cpu: bool = option(False, "Stay on the CPU even where there is an accelerator.")
    file: list[str] = required("CSV, TSV, JSON lines or Parquet of one kind.", section="data")
    text_column: list[str] | None = option(None, "Column of the text, or the two of a pair; guessed where it is plain.")
    max_length: int | None = option(None, "Tokens of a text; default: as in training.", least=4)
    truncation: Literal["head", "tail", "head_tail"] = option("head", "What is kept of a longer text, as in training.")
    per_device_eval_batch_size: int = option(64, "Rows in a batch.", least=1)
    output: str = required("File to write: .csv, .tsv or .jsonl.", section="output")
    top_k: int = option(1, "So many classes, the likeliest first; at most so many labels, if above 1.", least=1)
    threshold: float | None = option(
        None,
        "Probability from which on a label is predicted; default: 0.5 of several labels, 0 of classes.",
        least=0,
        most=1,
    )
    no_answer: bool = option(False, "Questions may have no answer in their context.")
    overwrite: bool = option(False, "Replace an output that is there already.")

    def __post_init__(self):
        check_bounds(self)
        if not self.output.endswith((".csv", ".tsv", ".jsonl")):
            raise ScriptError(f"--output {self.output}: name a file that ends in .csv, .tsv or .jsonl")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(PredictOptions, argv, __doc__)
    from ordnung.scripts.finetuning.predicting import run

    return run(options)


if __name__ == "__main__":
    run_script(main)
