"""Measure the perplexity of a causal language model on a text.

    ordnung evaluate --model_name_or_path out/demo --text_file book.txt --stride 128

The text's documents follow one another, each closed by the end-of-text token, as in pretraining. Without --stride they
are cut into blocks, as pretrain.py evaluates, so that the two agree to the digit on the same text; the first token of
a block is not predicted. With --stride, a window of --block_size tokens slides over the text by so many tokens, and
every token but the first is predicted once, from at least block_size - stride tokens before it where there are so many.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import option, program, required


@dataclass(kw_only=True)
class EvaluateOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.", section="model")
    tokenizer_name: str | None = option(None, "Default: model_name_or_path.")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Of the weights.")
    use_cpu: bool = option(False, "Stay on the CPU even where there is an accelerator.")
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    text_file: list[str] | None = option(
        None, "Files, folders or glob patterns: .txt (a document each), .jsonl, .parquet, .csv or .tsv.", section="data"
    )
    dataset_name: str | None = option(None, "Or a data set of the Hub.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    split: str = option("test", "Its split.")
    text_column: str = option("text", "Column that holds a document's text.")
    block_size: int | None = option(None, "Tokens in a window; default: the model's length.", least=2)
    stride: int | None = option(None, "Slide the window by so many tokens; default: blocks.", least=1)
    max_tokens: int | None = option(None, "Evaluate on the first so many tokens.", least=2)
    per_device_eval_batch_size: int = option(8, "Windows in a batch.", least=1)
    output_file: str | None = option(None, "JSON file for the results.", section="output")

    def __post_init__(self):
        if (self.text_file is None) == (self.dataset_name is None):
            raise ScriptError("give one of --text_file and --dataset_name")
        for name, default in (("dataset_config_name", None), ("split", "test")):
            if self.text_file and getattr(self, name) != default:
                raise ScriptError(f"--{name} is of a data set: give --dataset_name, or leave it out")
        if self.output_file is not None and not Path(self.output_file).parent.is_dir():
            raise ScriptError(f"--output_file {self.output_file}: its folder does not exist")


main = program(EvaluateOptions, "pretraining.perplexity", __doc__)

if __name__ == "__main__":
    run_script(main)
