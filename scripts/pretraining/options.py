"""The options of pretrain.py."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_utils import SchedulerType

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import MergeKeyValues, option, required
from ordnung.scripts.hub.options import NOT_RECORDED, HubOptions


@dataclass
class PretrainOptions(HubOptions):
    """Every option, in the order of --help. Names follow transformers' TrainingArguments where it has one."""

    output_dir: str = required("Folder for checkpoints, the model, metrics.jsonl and results.json.")
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left in output_dir and start again.")

    # model
    model_type: str | None = option(None, "A new model of this type, e.g. conv_lm or softmax_lm.")
    config_name: str | None = option(None, "A new model with this config: JSON file, folder or Hub name.")
    model_name_or_path: str | None = option(None, "Continue from these weights: folder or Hub name.")
    config_overrides: str | None = option(
        None, "Config fields to change: hidden_size=256,num_hidden_layers=4.", action=MergeKeyValues
    )
    objective: Literal["causal", "masked"] = option("causal", "Predict the next token, or masked tokens.")
    mlm_probability: float = option(0.15, "Share of tokens that the masked objective hides.")
    trust_remote_code: bool = option(False, "Run code that comes with a checkpoint or tokenizer.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = option(False, "Compile the model with torch.compile.")
    mixed_precision: Literal["no", "bf16"] | None = option(None, "Default: what `accelerate launch` says, else no.")
    use_cpu: bool = option(False, "Train on the CPU even where there is an accelerator.")

    # data
    train_file: list[str] | None = option(
        None, "Files or glob patterns: .txt (a document each), .json, .jsonl or .parquet."
    )
    validation_file: list[str] | None = option(None, "Held-out files, as train_file.")
    dataset_name: str | None = option(None, "A data set of the Hub, or a folder `datasets` can load.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    text_column: str = option("text", "Column that holds a document's text.")
    streaming: bool = option(False, "Read and tokenize while training, for data larger than memory.")
    validation_fraction: float = option(
        0.05, "Share held out of the training data if there is no validation data; 0: no evaluation."
    )
    max_eval_blocks: int | None = option(None, "Evaluate on at most this many blocks.")
    tokenizer_name: str | None = option(None, "Tokenizer folder or Hub name; default: model_name_or_path.")
    train_tokenizer_vocab_size: int | None = option(
        None, "Train a byte-level BPE tokenizer of this size on the training data instead."
    )
    block_size: int = option(512, "Tokens in a training sequence.")
    respect_document_boundaries: bool = option(
        False, "No block holds parts of two documents; a document's last block is padded."
    )

    # optimisation
    per_device_train_batch_size: int = option(8, "Blocks in a batch, per process.")
    per_device_eval_batch_size: int | None = option(None, "Default: per_device_train_batch_size.")
    gradient_accumulation_steps: int = option(1, "Batches in an optimizer step.")
    num_train_epochs: float = option(1.0, "Passes over the data, if max_steps is not given.")
    max_steps: int | None = option(None, "Optimizer steps; needed with streaming.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.")
    weight_decay: float = option(0.1, "Not for biases, norms, other 1-D parameters and what the model exempts.")
    adam_beta1: float = option(0.9, "AdamW's beta 1.")
    adam_beta2: float = option(0.95, "AdamW's beta 2.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: no clipping.")
    lr_scheduler_type: SchedulerType = option(SchedulerType.COSINE, "Shape of the decay after the warm-up.")
    lr_scheduler_kwargs: str | None = option(None, "Its further settings, e.g. min_lr_rate=0.1.", action=MergeKeyValues)
    warmup_steps: int = option(0, "Steps of linear warm-up.")
    seed: int = option(0, "Seed of initial weights, data order, masking and dropout.")

    # logging, evaluation, checkpoints
    logging_steps: int = option(10, "Steps between two lines of metrics.jsonl.")
    eval_steps: int = option(100, "Steps between evaluations; one more follows the last step.")
    save_steps: int = option(500, "Steps between checkpoints; one more follows the last step.")
    save_total_limit: int | None = option(2, "Checkpoints to keep beside the best; the oldest go first.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder, or auto: the newest in output_dir.")
    report_to: list[str] | None = option(None, "Trackers: trackio, tensorboard, wandb, ...")
    run_name: str | None = option(None, "The run's name in the trackers; default: output_dir's name.")

    def __post_init__(self):
        if sum(value is not None for value in (self.model_type, self.config_name, self.model_name_or_path)) != 1:
            raise ScriptError("give one of --model_type, --config_name and --model_name_or_path")
        if (self.train_file is None) == (self.dataset_name is None):
            raise ScriptError("give one of --train_file and --dataset_name")
        if self.tokenizer_name and self.train_tokenizer_vocab_size:
            raise ScriptError("give --tokenizer_name or --train_tokenizer_vocab_size, not both")
        if not (self.tokenizer_name or self.train_tokenizer_vocab_size or self.model_name_or_path):
            raise ScriptError("give --tokenizer_name, or --train_tokenizer_vocab_size to train one on the data")
        if self.streaming and self.max_steps is None:
            raise ScriptError("--streaming needs --max_steps: the length of a stream is not known")
        for name, least in (
            ("block_size", 2), ("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1), ("max_steps", 1), ("logging_steps", 1), ("eval_steps", 1),
            ("save_steps", 1), ("save_total_limit", 1), ("max_eval_blocks", 1), ("warmup_steps", 0),
            ("learning_rate", 0), ("weight_decay", 0), ("max_grad_norm", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ScriptError(f"--{name} must be at least {least}, not {value}")
        for name in ("validation_fraction", "mlm_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ScriptError(f"--{name} must be in [0, 1), not {getattr(self, name)}")
        if self.num_train_epochs <= 0:
            raise ScriptError(f"--num_train_epochs must be above 0, not {self.num_train_epochs}")
        self.config_overrides = self.config_overrides or {}
        self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or {}
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or self.per_device_train_batch_size
        if not isinstance(self.lr_scheduler_type, SchedulerType):
            self.lr_scheduler_type = SchedulerType(self.lr_scheduler_type)

    def record(self) -> dict[str, Any]:
        """The options as plain values that make the same run again when given as a --config file."""
        values = {name: getattr(value, "value", value) for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if name not in _NOT_RECORDED}


# How a run began is not part of what it is: repeated from the file, these would delete or continue the first run.
_NOT_RECORDED = ("overwrite_output_dir", "resume_from_checkpoint", *NOT_RECORDED)


@dataclass(kw_only=True)
class EvaluateOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.")
    tokenizer_name: str | None = option(None, "Default: model_name_or_path.")
    text_file: list[str] | None = option(
        None, "Files or glob patterns: .txt (a document each), .json, .jsonl or .parquet."
    )
    dataset_name: str | None = option(None, "Or a data set of the Hub.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    split: str = option("test", "Its split.")
    text_column: str = option("text", "Column that holds a document's text.")
    block_size: int | None = option(None, "Tokens in a window; default: the model's length.")
    stride: int | None = option(None, "Slide the window by so many tokens; default: blocks.")
    max_tokens: int | None = option(None, "Evaluate on the first so many tokens.")
    per_device_eval_batch_size: int = option(8, "Windows in a batch.")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Of the weights.")
    use_cpu: bool = option(False, "Stay on the CPU even where there is an accelerator.")
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    output_file: str | None = option(None, "JSON file for the results.")

    def __post_init__(self):
        if (self.text_file is None) == (self.dataset_name is None):
            raise ScriptError("give one of --text_file and --dataset_name")
        for name, default in (("dataset_config_name", None), ("split", "test")):
            if self.text_file and getattr(self, name) != default:
                raise ScriptError(f"--{name} is of a data set: give --dataset_name, or leave it out")
        for name, least in (("block_size", 2), ("stride", 1), ("max_tokens", 2), ("per_device_eval_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ScriptError(f"--{name} must be at least {least}, not {value}")
        if self.output_file is not None and not Path(self.output_file).parent.is_dir():
            raise ScriptError(f"--output_file {self.output_file}: its folder does not exist")
