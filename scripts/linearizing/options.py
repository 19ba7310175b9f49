"""The options of linearize.py."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.options import MergeKeyValues, option, other_default, required
from ordnung.scripts.hub.options import NOT_RECORDED, HubOptions
from ordnung.scripts.training.options import COURSE, LoopOptions, TextOptions

# What the loop knows and this program has no use for.
UNUSED = {
    "max_steps": "the stages' lengths are --transfer_steps and --distill_steps",
    "num_train_epochs": "the stages' lengths are --transfer_steps and --distill_steps",
    "trust_remote_code": "teachers are of architectures that transformers knows",
    "streaming": "each pass is over the same blocks",
    "torch_compile": "the first stage looks into the teacher's layers, which compiling takes away",
}


@dataclass(kw_only=True)
class LinearizeOptions(LoopOptions, TextOptions, HubOptions):
    """The loop's options, those of its text, and these, named as in finetune.py and convert.py where they have them."""

    source: str = required("The teacher: a checkpoint that `convert` reads, folder or Hub name.", section="model")
    gguf_file: str | None = option(None, "GGUF file of the teacher to read instead of its own weights.")
    model_type: str = required(f"Family of the student: {', '.join(FAMILIES)}.")
    config_overrides: str | None = option(
        None, "Config fields to change: sliding_window=64,layer_types=[...].", action=MergeKeyValues
    )
    keep_attention: int | None = option(
        None, "Keep full attention in so many layers: those that lose most when replaced alone.", least=0
    )

    validation_fraction: float = option(
        0.05, "Share held out of the training data if there is no validation data.", above=0, below=1
    )
    max_eval_blocks: int | None = other_default(TextOptions, "max_eval_blocks", 16)
    eval_block_size: int | None = option(None, "Tokens in a held-out sequence; default: block_size.", least=2)
    tokenizer_name: str | None = option(None, "Tokenizer folder or Hub name; default: the teacher's.")
    respect_document_boundaries: bool = option(
        False, "No token sees another document. An encoder's rows are always so, each document with special tokens."
    )
    mlm_probability: float = option(0.0, "Share of an encoder's tokens that are hidden or changed.", least=0, below=1)

    output_dir: str = required("Folder for the student, its results and the stages.", section="output")
    teacher_outputs: str | None = option(
        None, "Folder to keep the teacher's outputs in, for later passes and runs; default: not kept.", section="output"
    )

    transfer_steps: int = option(
        50, "Steps that match each mixer to the attention it replaces.", least=0, section="stages"
    )
    transfer_learning_rate: float = option(1e-3, "Their peak learning rate.", least=0)
    distill_steps: int = option(100, "Steps that match the whole student to the teacher.", least=0)
    new_learning_rate: float = option(
        3.0, "What the rates are multiplied by for parameters that the teacher does not have.", above=0
    )
    trainable: Literal["all", "layers", "mixers"] = option("layers", "What distillation trains.")
    use_peft: bool = option(False, "Train LoRA adapters of those layers in their place; they are merged in the end.")
    lora_rank: int = option(32, "Rank of the adapters.", least=1)
    lora_alpha: float = option(32.0, "Adapters are scaled by lora_alpha / lora_rank.")
    temperature: float = option(1.0, "Of the logits that are matched.", above=0)
    kl_weight: float = option(1.0, "Weight of the divergence from the teacher's next-token predictions.", least=0)
    lm_weight: float = option(0.0, "Weight of the loss on the text itself.", least=0)
    hidden_weight: float | None = option(
        None, "Weight of the error of each layer's states; default: 1 for an encoder, else 0.", least=0
    )
    cosine_weight: float = option(1.0, "Weight of 1 - cosine of an encoder's mean state of each document.", least=0)

    per_device_train_batch_size: int = other_default(LoopOptions, "per_device_train_batch_size", 1)
    learning_rate: float = other_default(LoopOptions, "learning_rate", 5e-4)
    weight_decay: float = other_default(LoopOptions, "weight_decay", 0.0)
    adam_beta2: float = other_default(LoopOptions, "adam_beta2", 0.95)
    warmup_steps: float = other_default(LoopOptions, "warmup_steps", 0.1)
    seed: int = option(0, "Seed of new weights, data order and masking.", least=0, section="optimisation")

    eval_steps: int | None = other_default(LoopOptions, "eval_steps", 50)
    save_steps: int = option(100, "Steps between checkpoints; one more follows each stage.", least=1, section=COURSE)
    similarity_file: str | None = option(
        None, "Pairs of texts to measure an encoder on: columns sentence1, sentence2 and label, how similar they are."
    )
    long_file: list[str] | None = option(
        None, "A long text, read beyond the teacher's length too: files, as train_file."
    )
    long_tokens: int = option(16384, "Tokens of it.", least=2)
    decode_lengths: list[int] = option([512, 2048], "Tokens before those whose time is measured.", least=1)

    not_recorded = ("output_dir", "report_to", "run_name", "teacher_outputs", "decode_lengths", "similarity_file")
    not_recorded += ("long_file", "long_tokens")
    not_recorded += ("logging_steps", *NOT_RECORDED)

    def __post_init__(self):
        super().__post_init__()
        for name, why in UNUSED.items():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ScriptError(f"--{name} {getattr(self, name)}: {why}; leave it out")
        if self.model_type not in FAMILIES:
            hint = closest(self.model_type, FAMILIES)
            raise ScriptError(f"--model_type {self.model_type!r} is none of {', '.join(FAMILIES)}{hint}")
        self.check_text()
        self.config_overrides = self.config_overrides or {}
        self.eval_block_size = self.eval_block_size or self.block_size
        if self.keep_attention is not None and "layer_types" in self.config_overrides:
            raise ScriptError(
                f"--keep_attention {self.keep_attention} and layer_types in --config_overrides both say which layers "
                "stay: give one of them"
            )
        for name in ("lora_rank", "lora_alpha"):
            if getattr(self, name) != self.__dataclass_fields__[name].default and not self.use_peft:
                raise ScriptError(f"--{name}: adapters need --use_peft")
        if not self.kl_weight and not self.lm_weight and not self.hidden_weight and self.distill_steps:
            raise ScriptError("--kl_weight, --lm_weight and --hidden_weight are 0: nothing is left to train on")

    def for_stage(self, name: str) -> "LinearizeOptions":
        """The options as a stage's loop takes them: `learning_rate` is the stage's."""
        if name == "distill":
            return self
        return dataclasses.replace(self, learning_rate=self.transfer_learning_rate)
