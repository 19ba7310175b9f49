"""The model of a fine-tuning run: a classifier on any checkpoint, whole or with LoRA adapters."""

import copy
import logging
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ordnung.modeling.registration import AUTO_CLASSES
from ordnung.scripts.common import limits, models
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import sha256
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.tasks import Task
from ordnung.scripts.hub.model_card import PIPELINE_TAGS
from ordnung.scripts.hub.sharing import PEFT_HEADS
from ordnung.scripts.training.optimization import recompute_activations

logger = logging.getLogger("ordnung.finetune")


def build_config(task: Task, options: FinetuneOptions, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The checkpoint's config with the task's labels.

    Raises:
        ScriptError: as `models.build_config`; a checkpoint with a classifier of another size; too small a vocabulary.
    """
    pooling = {"classifier_pooling": options.pooling} if options.pooling else {}
    config = models.build_config(
        None,
        options.model_name_or_path,
        options.config_overrides | pooling,
        {"pad_token_id": tokenizer.pad_token_id},
        trust_remote_code=options.trust_remote_code,
    )
    limits.check_vocabulary(tokenizer, config)
    if task.problem_type == "question_answering":
        return config
    labels = list(task.labels) or [task.value]
    classifier = any(name.endswith(task.head) for name in config.architectures or [])
    if classifier and config.num_labels != len(labels) and not options.ignore_mismatched_sizes:
        raise ScriptError(
            f"{options.model_name_or_path} has a classifier of {config.num_labels} labels "
            f"({', '.join(map(str, config.id2label.values()))}), and {task.name} needs {len(labels)}; "
            "--ignore_mismatched_sizes starts a new one"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = None if task.problem_type == "token_classification" else task.problem_type
    return config


def auto_class(head: str):
    """transformers' Auto class for a head."""
    return getattr(transformers, AUTO_CLASSES[head])


def source(name: str, config: PreTrainedConfig) -> dict[str, str | None]:
    """What a run starts from, so that it is not taken for one from something else under the same name.

    Returns:
        a folder's weights and config as digests; of a name on the Hub, the commit.
    """
    folder = Path(name)
    if not folder.is_dir():
        return {"commit of the model": config._commit_hash}
    files = {"weights": ("*.safetensors", "*model*.bin"), "config": ("config.json", "adapter_config.json", "*.py")}
    return {
        f"sha256 of {part}": " ".join(
            sha256(path) for path in sorted(path for pattern in patterns for path in folder.glob(pattern))
        )
        for part, patterns in files.items()
    }


def empty_model(
    options: FinetuneOptions, config: PreTrainedConfig, head: str = "ForSequenceClassification"
) -> torch.nn.Module:
    """The model without its weights, on the meta device: what a config does not tell can be asked of it.

    Raises:
        ScriptError: there is no such classifier.
    """
    with torch.device("meta"), _explained(config, options.model_name_or_path, head):
        return auto_class(head).from_config(copy.deepcopy(config), trust_remote_code=options.trust_remote_code)


@contextmanager
def _explained(config: PreTrainedConfig, source: str | Path, head: str):
    """Turns the errors of making a model into ScriptErrors."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if "for this kind of AutoModel" in str(error):
            kind = PIPELINE_TAGS[head].replace("text-", "sequence-").replace("-", " ")
            raise ScriptError(f"{config.model_type} has no model for {kind}") from error
        raise ScriptError(f"the model cannot be made from {source}: {error}") from error


def build_model(
    options: FinetuneOptions,
    config: PreTrainedConfig,
    folder: Path | None = None,
    head: str = "ForSequenceClassification",
) -> torch.nn.Module:
    """The model in float32, as it was saved to `folder`, or with a new classifier (and new adapters).

    Raises:
        ScriptError: weights that cannot be loaded; a model whose projections PEFT does not know; a new parameter that
            adapters cannot train.
    """
    source = options.model_name_or_path if folder is None or options.use_peft else folder
    with _explained(config, source, head):
        model, info = auto_class(head).from_pretrained(
            source,
            config=copy.deepcopy(config),
            dtype=torch.float32,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            output_loading_info=True,
        )
    new = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if folder is None:
        logger.info(f"new in the model: {', '.join(new) or 'nothing, the checkpoint has its own classifier'}")
    if options.gradient_checkpointing:
        recompute_activations(model)
    if not options.use_peft:
        return model
    if folder is not None:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    modules = new_modules(model, new)
    try:
        return get_peft_model(model, lora_config(options, modules, head))
    except ValueError as error:
        raise ScriptError(
            f"--lora_target_modules for {config.model_type}: {error}; name its linear layers, or all-linear"
        ) from error


def new_modules(model: torch.nn.Module, keys: list[str]) -> list[str]:
    """The modules of a model whose parameters `keys` are new, less those that PEFT takes for the classifier.

    Raises:
        ScriptError: a parameter beside other modules, which would all be trained and saved with it.
    """
    found = set()
    for key in keys:
        name = key.rpartition(".")[0]
        if {"classifier", "score", "qa_outputs"} & set(name.split(".")):
            continue
        if any(True for _ in model.get_submodule(name).children()):
            raise ScriptError(
                f"--use_peft: {key} is new in the model, and adapters cannot train it: leave --use_peft out"
            )
        found.add(name)
    return sorted(found)


def lora_config(options: FinetuneOptions, new: list[str], head: str = "ForSequenceClassification") -> LoraConfig:
    """LoRA on the named modules, or on those that PEFT knows for the model type (see `modeling/registration.py`).

    Args:
        new: modules that are not in the checkpoint: they are trained whole and saved with the adapters.
    """
    targets = options.lora_target_modules
    return LoraConfig(
        task_type=TaskType({head: kind for kind, head in PEFT_HEADS.items()}[head]),
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        modules_to_save=new,
    )


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
