"""The options of finetune.py and predict.py."""

from dataclasses import dataclass
from typing import Literal

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import MergeKeyValues, check_bounds, option, other_default, required
from ordnung.scripts.finetuning.labels import as_number
from ordnung.scripts.finetuning.tasks import TASKS
from ordnung.scripts.hub.options import NOT_RECORDED, HubOptions
from ordnung.scripts.training.options import COURSE, LoopOptions, Schedule
from ordnung.scripts.training.runs import check_seeds

# Of a model of BERT's width.
LEARNING_RATE, WIDTH = 5e-5, 768


@dataclass(kw_only=True)
class FinetuneOptions(LoopOptions, HubOptions):
    """The loop's options and these."""

    model_name_or_path: str = required("Checkpoint to fine-tune: folder or Hub name.", section="model")
    tokenizer_name: str | None = option(None, "Tokenizer folder or Hub name; default: model_name_or_path.")
    pad_token: str | None = option(None, "Token to pad with, for a tokenizer that names none.")
    config_overrides: str | None = option(
        None, "Config fields to change: hidden_dropout=0.1,classifier_dropout=0.2.", action=MergeKeyValues
    )
    ignore_mismatched_sizes: bool = option(False, "Start a new classifier where the checkpoint's has other labels.")
    pooling: Literal["first", "last", "mean"] | None = option(
        None, "What an ordnung classifier reads; default: the last token of causal, the first of bidirectional models."
    )

    task_name: list[str] | None = option(
        None, f"One or more of {', '.join(TASKS)}; all: GLUE's. Or give data of your own.", section="data"
    )
    dataset_name: str | None = option(None, "Data set of the Hub: your own, or with --task_name in place of its own.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    dataset_path: str | None = option(
        None, "Local folder with the same columns: <split>.parquet, .json, .jsonl, .csv or .tsv."
    )
    train_file: list[str] | None = option(
        None,
        "Your own labelled data: CSV, TSV, JSON lines or Parquet, or a folder with train, validation, test of these.",
    )
    validation_file: list[str] | None = option(None, "What models are scored and compared on; default: training rows.")
    test_file: list[str] | None = option(None, "What is scored besides, at the end only.")
    text_column: list[str] | None = option(None, "Column of the text, or the two of a pair; guessed where it is plain.")
    label_column: list[str] | None = option(
        None, "Column of the label, or several of 0 and 1 for a multi-label task; guessed where it is plain."
    )
    task: Literal["classify", "token", "qa"] = option(
        "classify",
        "classify: texts, by classes, several labels each or a number. token: words, by tags (columns of words and of "
        "tags). qa: answers found in a context (SQuAD's columns).",
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = option(
        None, "What the labels are; default: found from them and said."
    )
    label_separator: str | None = option(None, "Between the labels of a multi-label text; default: found.")
    threshold: str | None = option(
        None,
        "Probability from which on a label of a multi-label text is predicted, kept with the model for `ordnung "
        "predict`; best: that with the highest macro F1 on the rows that checkpoints are compared on, whose scores it "
        "flatters. Default: 0.5.",
    )
    skip_bad_rows: bool = option(False, "Leave out rows that cannot be used, and say how many.")
    max_length: int | None = option(None, "Tokens of an example; default: as many as the model takes.", least=4)
    truncation: Literal["head", "tail", "head_tail"] = option(
        "head",
        "What is kept of a longer text: head, tail, or head_tail, a quarter from the head and the rest from the tail.",
    )
    max_train_samples: int | None = option(None, "Train on so many examples, chosen at random.", least=1)
    max_eval_samples: int | None = option(None, "Score on so many of each split, chosen at random.", least=1)
    validation_fraction: float | None = option(
        None,
        "Share of the training data that checkpoints are compared on; default: 0 (the validation split) for GLUE, 0.1 "
        "for IMDB, which has a test split only, and for data of your own without --validation_file.",
        least=0,
        below=1,
    )
    preprocessing_num_workers: int | None = option(
        None, "Processes that tokenize; default: by size of the data.", least=1
    )

    use_peft: bool = option(
        False,
        section="adapters",
        help="Train LoRA adapters and what is new, as the classifier; the other weights stay as they are.",
    )
    lora_rank: int = option(8, "Rank of the adapters.", least=1)
    lora_alpha: float = option(16.0, "Adapters are scaled by lora_alpha / lora_rank.")
    lora_dropout: float = option(0.0, "Dropout before the adapters.", least=0, below=1)
    lora_target_modules: list[str] | None = option(
        None, "Modules to adapt, or all-linear; default: every projection of mixers and MLP."
    )
    merge_adapter: bool = option(False, "Also write the model with the adapters merged in, to merged/.")

    output_dir: str = required("Folder for results.json, results.md and a folder for each run.", section="output")

    per_device_train_batch_size: int = other_default(LoopOptions, "per_device_train_batch_size", 32)
    per_device_eval_batch_size: int = option(64, "Examples in an evaluation batch, per process.", least=1)
    num_train_epochs: float = other_default(LoopOptions, "num_train_epochs", 3.0)
    learning_rate: float | None = option(
        None,
        "Peak learning rate of AdamW; default: 5e-5 for GLUE and IMDB, and for data of your own what is that for a "
        "model 768 wide, and more the narrower it is: 5e-5 * 768 / hidden_size.",
        least=0,
    )
    weight_decay: float = other_default(LoopOptions, "weight_decay", 0.01)
    adam_beta2: float = other_default(LoopOptions, "adam_beta2", 0.999)
    lr_scheduler_type: Schedule = other_default(LoopOptions, "lr_scheduler_type", "linear")
    warmup_steps: float = other_default(LoopOptions, "warmup_steps", 0.06)
    group_by_length: bool = option(
        False, "Batches of examples of about the same length: less padding.", section="optimisation"
    )
    packing: bool | None = option(
        None,
        "A batch's examples side by side in one row, without padding, for ordnung's models: the same loss, faster. "
        "Default: for data of your own.",
    )
    class_weights: Literal["balanced"] | None = option(
        None, "balanced: labels count in the loss as if each were as frequent as the others."
    )
    seeds: list[int] = option(
        [0],
        "A run with each: the new classifier, data order and dropout. Scores are means with 95 % t-intervals.",
    )

    logging_steps: int = other_default(LoopOptions, "logging_steps", 20)
    eval_steps: int | None = option(None, "Steps between evaluations and checkpoints; default: each epoch.", least=1)
    load_best_model_at_end: bool = option(
        False, "Keep the best evaluated model in place of the last one.", section=COURSE
    )
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better one; keeps the best model.", least=1
    )

    # Tasks and seeds may be added to a folder of runs; the others do not change a run's outcome.
    not_recorded = ("output_dir", "seeds", "task_name", "report_to", "run_name", "preprocessing_num_workers")
    not_recorded += NOT_RECORDED

    def __post_init__(self):
        super().__post_init__()
        if bool(self.task_name) + bool(self.train_file) + bool(self.dataset_name and not self.task_name) != 1:
            raise ScriptError("give one of --task_name, --train_file and, for data of your own, --dataset_name")
        if self.threshold not in (None, "best"):
            number = as_number(self.threshold)
            if number is None or not 0 < number < 1:
                raise ScriptError(f"--threshold {self.threshold} must be between 0 and 1, or best")
        if self.packing and self.task == "qa":
            raise ScriptError(
                "--packing: an answer's place is told by row, so that --task qa needs a row for each window"
            )
        for name in OWN_DATA:
            if self.task_name and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ScriptError(f"--{name} is for data of your own: leave out --task_name, or it")
        if self.dataset_config_name and self.task_name:
            raise ScriptError(
                f"--dataset_config_name {self.dataset_config_name} is for data of your own; a task is the "
                "configuration of its name: leave it out"
            )
        if self.dataset_config_name and not self.dataset_name:
            raise ScriptError(f"--dataset_config_name {self.dataset_config_name} is of --dataset_name: leave it out")
        if self.dataset_path and not self.task_name:
            raise ScriptError("--dataset_path is for --task_name; data of your own go to --train_file")
        if self.dataset_name and self.dataset_path:
            raise ScriptError("give --dataset_name or --dataset_path, not both")
        adapters = ("merge_adapter", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")
        given = [name for name in adapters if getattr(self, name) != self.__dataclass_fields__[name].default]
        if given and not self.use_peft:
            raise ScriptError(f"--{given[0]}: adapters need --use_peft")
        check_seeds(self.seeds)
        if self.learning_rate is None and self.task_name:
            self.learning_rate = LEARNING_RATE
        self.config_overrides = self.config_overrides or {}
        self.load_best_model_at_end = self.load_best_model_at_end or self.early_stopping_patience is not None


OWN_DATA = ("train_file", "validation_file", "test_file", "text_column", "label_column", "task", "problem_type")
OWN_DATA += ("label_separator", "threshold", "skip_bad_rows")


@dataclass(kw_only=True)
class PredictOptions:
    """The options of predict.py."""

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
        "Probability from which on a label is predicted; default: of several labels that of training, 0 of classes.",
        least=0,
        most=1,
    )
    version_2_with_negative: bool = option(False, "Questions may have no answer in their context.")
    overwrite: bool = option(False, "Replace an output that is there already.")

    def __post_init__(self):
        check_bounds(self)
        if not self.output.endswith((".csv", ".tsv", ".jsonl")):
            raise ScriptError(f"--output {self.output}: name a file that ends in .csv, .tsv or .jsonl")
