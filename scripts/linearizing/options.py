"""The options of linearize.py."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.options import MergeKeyValues, check_bounds, option, required
from ordnung.scripts.hub.options import NOT_RECORDED, HubOptions
from ordnung.scripts.training.options import Schedule


@dataclass(kw_only=True)
class LinearizeOptions(HubOptions):
    """Every option, in the order of --help; names are those of pretrain.py and convert.py where they have them."""

    source: str = required("The teacher: a checkpoint that `convert` reads, folder or Hub name.", section="model")
    gguf_file: str | None = option(None, "GGUF file of the teacher to read instead of its own weights.")
    model_type: str = required(f"Family of the student: {', '.join(FAMILIES)}.")
    config_overrides: str | None = option(
        None, "Config fields to change: sliding_window=64,layer_types=[...].", action=MergeKeyValues
    )
    keep_attention: int | None = option(
        None, "Keep full attention in so many layers: those that lose most when replaced alone.", least=0
    )
    mixed_precision: Literal["no", "bf16"] | None = option(None, "Default: what `accelerate launch` says, else no.")
    use_cpu: bool = option(False, "Train on the CPU even where there is an accelerator.")

    train_file: list[str] | None = option(
        None, "Files, folders or glob patterns: .txt (a document each), .jsonl, .parquet, .csv or .tsv.", section="data"
    )
    train_weights: list[float] | None = option(
        None, "How often documents are drawn from each entry of train_file; default: each document once.", above=0
    )
    validation_file: list[str] | None = option(None, "Held-out files, as train_file.")
    dataset_name: str | None = option(None, "A data set of the Hub, or a folder `datasets` can load.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    text_column: str = option("text", "Column that holds a document's text.")
    validation_fraction: float = option(
        0.05, "Share held out of the training data if there is no validation data.", above=0, below=1
    )
    max_eval_blocks: int | None = option(16, "Measure on at most this many blocks.", least=1)
    tokenizer_name: str | None = option(None, "Tokenizer folder or Hub name; default: the teacher's.")
    block_size: int = option(512, "Tokens in a row.", least=2)
    respect_document_boundaries: bool = option(
        False, "No token sees another document. An encoder's rows are always so, each document with special tokens."
    )
    mlm_probability: float = option(0.0, "Share of an encoder's tokens that are hidden or changed.", least=0, below=1)

    output_dir: str = required("Folder for the student, its results and checkpoints.", section="output")
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left in output_dir and start again.")
    teacher_outputs: str | None = option(
        None, "Folder to keep the teacher's outputs in, for later passes, stages and runs; default: not kept."
    )

    per_device_train_batch_size: int = option(1, "Rows in a batch, per process.", least=1, section="optimisation")
    per_device_eval_batch_size: int | None = option(None, "Default: per_device_train_batch_size.", least=1)
    gradient_accumulation_steps: int = option(1, "Batches in an optimizer step.", least=1)
    transfer_steps: int = option(50, "Steps that match each mixer to the attention it replaces.", least=0)
    transfer_learning_rate: float = option(1e-3, "Their peak learning rate.", least=0)
    distill_steps: int = option(100, "Steps that match the whole student to the teacher.", least=0)
    learning_rate: float = option(5e-4, "Their peak learning rate.", least=0)
    new_learning_rate: float = option(
        3.0, "What the rates are multiplied by for parameters that the teacher does not have.", above=0
    )
    trainable: Literal["all", "layers", "mixers"] = option("layers", "What distillation trains.")
    use_peft: bool = option(False, "Train LoRA adapters of those modules in its place; they are merged in the end.")
    lora_r: int = option(32, "Their rank.", least=1)
    lora_alpha: int = option(64, "Their scale, times the rank.", least=1)
    temperature: float = option(1.0, "Of the logits that are matched.", above=0)
    kl_weight: float = option(1.0, "Weight of the divergence from the teacher's next-token predictions.", least=0)
    lm_weight: float = option(0.0, "Weight of the loss on the text itself.", least=0)
    hidden_weight: float | None = option(
        None, "Weight of the error of each layer's states; default: 1 for an encoder, else 0.", least=0
    )
    cosine_weight: float = option(1.0, "Weight of 1 - cosine of an encoder's mean state of each document.", least=0)
    weight_decay: float = option(
        0.0, "Not for biases, norms, other 1-D parameters and what the model exempts.", least=0
    )
    adam_beta1: float = option(0.9, "AdamW's beta 1.")
    adam_beta2: float = option(0.95, "AdamW's beta 2.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: no clipping.", least=0)
    lr_scheduler_type: Schedule = option("cosine", "Shape of each stage's decay after its warm-up.")
    lr_scheduler_kwargs: str | None = option(None, "Its further settings, e.g. min_lr_rate=0.1.", action=MergeKeyValues)
    warmup_ratio: float = option(0.1, "Share of each stage's steps that warm up.", least=0, below=1)
    seed: int = option(0, "Seed of new weights, data order and masking.", least=0)

    logging_steps: int = option(
        10, "Steps between two lines of metrics.jsonl.", least=1, section="logging, evaluation, checkpoints"
    )
    eval_steps: int = option(50, "Steps between evaluations; one more follows each stage.", least=1)
    save_steps: int = option(100, "Steps between checkpoints; one more follows each stage.", least=1)
    save_total_limit: int | None = option(1, "Checkpoints to keep; the oldest go first.", least=1)
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder, or auto: the newest in output_dir.")
    similarity_file: str | None = option(
        None, "Pairs of texts to measure an encoder on: columns sentence1, sentence2 and label, how similar they are."
    )
    decode_lengths: list[int] = option([512, 2048], "Tokens before those whose time is measured.", least=1)
    report_to: list[str] | None = option(None, "Trackers: trackio, tensorboard, wandb, ...")
    run_name: str | None = option(None, "The run's name in the trackers; default: output_dir's name.")

    def __post_init__(self):
        if self.model_type not in FAMILIES:
            hint = closest(self.model_type, FAMILIES)
            raise ScriptError(f"--model_type {self.model_type!r} is none of {', '.join(FAMILIES)}{hint}")
        if (self.train_file is None) == (self.dataset_name is None):
            raise ScriptError("give one of --train_file and --dataset_name")
        if self.train_weights is not None and len(self.train_weights) != len(self.train_file or []):
            raise ScriptError(
                f"--train_weights has {len(self.train_weights)} numbers and --train_file {len(self.train_file or [])} "
                "entries: give a weight for each"
            )
        check_bounds(self)
        self.config_overrides = self.config_overrides or {}
        self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or {}
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or self.per_device_train_batch_size
        if self.keep_attention is not None and "layer_types" in self.config_overrides:
            raise ScriptError(
                f"--keep_attention {self.keep_attention} and layer_types in --config_overrides both say which layers "
                "stay: give one of them"
            )
        if not self.kl_weight and not self.lm_weight and not self.hidden_weight and self.distill_steps:
            raise ScriptError("--kl_weight, --lm_weight and --hidden_weight are 0: nothing is left to train on")

    # What pretraining's options have and these do not; its data is read by their names.
    streaming = False

    def record(self) -> dict[str, Any]:
        """The options as plain values that make the same run again when given as a --config file."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_RECORDED}


_NOT_RECORDED = ("overwrite_output_dir", "resume_from_checkpoint", *NOT_RECORDED)
