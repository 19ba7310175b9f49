"""The options of pretrain.py."""

from dataclasses import dataclass
from typing import Literal

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import MergeKeyValues, option, required
from ordnung.scripts.hub.options import NOT_RECORDED, HubOptions
from ordnung.scripts.training.options import COURSE, LoopOptions, TextOptions


@dataclass(kw_only=True)
class PretrainOptions(LoopOptions, TextOptions, HubOptions):
    """The loop's options, those of its text, and these."""

    model_type: str | None = option(None, "A new model of this type, e.g. conv_lm or softmax_lm.", section="model")
    config_name: str | None = option(None, "A new model with this config: JSON file, folder or Hub name.")
    model_name_or_path: str | None = option(None, "Continue from these weights: folder or Hub name.")
    config_overrides: str | None = option(
        None, "Config fields to change: hidden_size=256,num_hidden_layers=4.", action=MergeKeyValues
    )
    objective: Literal["causal", "masked"] = option("causal", "Predict the next token, or masked tokens.")
    mlm_probability: float = option(0.15, "Share of tokens that the masked objective hides.", least=0, below=1)
    train_tokenizer_vocab_size: int | None = option(
        None, "Train a byte-level BPE tokenizer of this size on the training data, in place of tokenizer_name."
    )

    output_dir: str = required("Folder for checkpoints, the model, metrics.jsonl and results.json.", section="output")
    overwrite_output_dir: bool = option(
        False, "Delete what an earlier run left in output_dir and start again.", section="output"
    )

    max_steps: int | None = option(None, "Optimizer steps; needed with streaming.", least=1)
    seed: int = option(0, "Seed of initial weights, data order, masking and dropout.", least=0, section="optimisation")

    save_steps: int = option(500, "Steps between checkpoints; one more follows the last step.", least=1, section=COURSE)
    save_total_limit: int | None = option(2, "Checkpoints to keep beside the best; the oldest go first.", least=1)
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder, or auto: the newest in output_dir.")

    # How a run began is not part of what it is: repeated from the file, these would delete or continue the first run.
    not_recorded = ("overwrite_output_dir", "resume_from_checkpoint", *NOT_RECORDED)

    def __post_init__(self):
        if sum(value is not None for value in (self.model_type, self.config_name, self.model_name_or_path)) != 1:
            raise ScriptError("give one of --model_type, --config_name and --model_name_or_path")
        self.check_text()
        if self.tokenizer_name and self.train_tokenizer_vocab_size:
            raise ScriptError("give --tokenizer_name or --train_tokenizer_vocab_size, not both")
        if not (self.tokenizer_name or self.train_tokenizer_vocab_size or self.model_name_or_path):
            raise ScriptError("give --tokenizer_name, or --train_tokenizer_vocab_size to train one on the data")
        if self.streaming and self.max_steps is None:
            raise ScriptError("--streaming needs --max_steps: the length of a stream is not known")
        super().__post_init__()
        self.config_overrides = self.config_overrides or {}
