"""The options that all training programs share."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import MergeKeyValues, check_bounds, option, required

# The schedules of transformers' SchedulerType that need no further program. Not that class itself: it imports torch,
# which --help does without.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]

COURSE = "logging, evaluation, checkpoints"  # a section of --help


@dataclass(kw_only=True)
class LoopOptions:
    """What the loop is told. A program derives its options from these, with other defaults by `other_default`.

    Names follow transformers' TrainingArguments where it has one.
    """

    trust_remote_code: bool = option(False, "Run code that comes with a checkpoint or tokenizer.", section="model")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = option(False, "Compile the model with torch.compile.")
    mixed_precision: Literal["no", "bf16", "auto"] | None = option(
        None,
        "auto: bf16 where the processor (avx512_bf16, amx_bf16) or the accelerator computes in it, else no. Default: "
        "what `accelerate launch` says, else no.",
    )
    use_cpu: bool = option(False, "Train on the CPU even where there is an accelerator.")

    output_dir: str = required("Folder for what the program writes.", section="output")

    per_device_train_batch_size: int = option(8, "Rows in a batch, per process.", least=1, section="optimisation")
    per_device_eval_batch_size: int | None = option(None, "Default: per_device_train_batch_size.", least=1)
    gradient_accumulation_steps: int = option(1, "Batches in an optimizer step.", least=1)
    num_train_epochs: float = option(1.0, "Passes over the data, if max_steps is not given.", above=0)
    max_steps: int | None = option(None, "Optimizer steps.", least=1)
    optim: Literal["adamw_torch_fused", "adamw_torch"] = option(
        "adamw_torch_fused", "AdamW in one pass over the parameters, or operation by operation: the last bits differ."
    )
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.", least=0)
    weight_decay: float = option(
        0.1, "Not for biases, norms, other 1-D parameters and what the model exempts.", least=0
    )
    adam_beta1: float = option(0.9, "AdamW's beta 1.")
    adam_beta2: float = option(0.95, "AdamW's beta 2.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: no clipping.", least=0)
    lr_scheduler_type: Schedule = option("cosine", "Shape of the decay after the warm-up.")
    lr_scheduler_kwargs: str | None = option(None, "Its further settings, e.g. min_lr_rate=0.1.", action=MergeKeyValues)
    warmup_steps: float = option(0, "Steps of linear warm-up; below 1: share of all steps.", least=0)

    logging_steps: int = option(10, "Steps between two lines of metrics.jsonl.", least=1, section=COURSE)
    eval_steps: int | None = option(100, "Steps between evaluations; one more follows the last step.", least=1)
    report_to: list[str] | None = option(None, "Trackers: trackio, tensorboard, wandb, ...")
    run_name: str | None = option(None, "The run's name in the trackers; default: output_dir's name.")

    not_recorded = ()  # options that do not change a run's outcome

    def __post_init__(self):
        check_bounds(self)
        self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or {}
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or self.per_device_train_batch_size

    def step_rows(self, processes: int) -> int:
        """Rows of an optimizer step on so many processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    def record(self) -> dict[str, Any]:
        """What a run's outcome depends on, as plain values that make it again when given as a --config file."""
        return {name: value for name, value in asdict(self).items() if name not in self.not_recorded}


@dataclass(kw_only=True)
class TextOptions:
    """What text a language model is trained on and measured on, in rows of tokens."""

    train_file: list[str] | None = option(
        None, "Files, folders or glob patterns: .txt (a document each), .jsonl, .parquet, .csv or .tsv.", section="data"
    )
    train_weights: list[float] | None = option(
        None, "How often documents are drawn from each entry of train_file; default: each document once.", above=0
    )
    validation_file: list[str] | None = option(None, "Held-out files, as train_file.")
    dataset_name: str | None = option(None, "A data set of the Hub, or a folder `datasets` can load.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    text_column: list[str] = option(
        ["text"], "Column that holds a document's text; of several, each that a file has gives a document a row."
    )
    join_rows: bool = option(False, "The rows of each entry of train_file are one document, as WikiText's are.")
    exclude_file: list[str] | None = option(
        None, "Files, as train_file: what is in them is not trained on, whatever its case and white space."
    )
    streaming: bool = option(False, "Read and tokenize while training, and keep nothing on the disk.")
    validation_fraction: float = option(
        0.05, "Share held out of the training data if there is no validation data; 0: no evaluation.", least=0, below=1
    )
    max_eval_blocks: int | None = option(None, "Evaluate on at most this many blocks.", least=1)
    tokenizer_name: str | None = option(None, "Tokenizer folder or Hub name; default: model_name_or_path.")
    block_size: int = option(512, "Tokens in a training sequence.", least=2)
    respect_document_boundaries: bool = option(
        False,
        "No token sees another document. Blocks hold several documents side by side, each where it fits best; for "
        "cubic_prefix_lm, and models of other packages, one, and the rest of its last block is empty.",
    )

    def check_text(self):
        """Raise a ScriptError where the options do not name one text."""
        if (self.train_file is None) == (self.dataset_name is None):
            raise ScriptError("give one of --train_file and --dataset_name")
        if self.dataset_config_name and not self.dataset_name:
            raise ScriptError(f"--dataset_config_name {self.dataset_config_name} is of --dataset_name: leave it out")
        if self.train_weights is not None and len(self.train_weights) != len(self.train_file or []):
            raise ScriptError(
                f"--train_weights has {len(self.train_weights)} numbers and --train_file {len(self.train_file or [])} "
                "entries: give a weight for each"
            )
        if self.join_rows and self.streaming:
            raise ScriptError("--join_rows reads whole files, and --streaming none: leave one of them out")

    @property
    def text_columns(self) -> str | list[str]:
        """The text's column, or columns, as `corpus.load_files` takes them."""
        return self.text_column[0] if len(self.text_column) == 1 else self.text_column
