"""What a pretraining run is made of, built from its options: accelerator, documents, tokenizer, model."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, get_scheduler

from ordnung.scripts import corpus, limits
from ordnung.scripts.blocks import MemoryBlocks, StreamedBlocks, pack
from ordnung.scripts.common import ScriptError, build_config
from ordnung.scripts.model_card import HELD_OUT
from ordnung.scripts.pretrain_options import PretrainOptions


def make_accelerator(options, compiled: bool = False) -> Accelerator:
    """The accelerator of this process.

    Args:
        options: `PretrainOptions` or others with report_to, use_cpu, mixed_precision and output_dir.
        compiled: compile the model with torch.compile.
    Raises:
        ScriptError: a tracker that is unknown or not installed; FSDP on a machine without an accelerator device.
    """
    for name in options.report_to or []:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ScriptError(
                f"--report_to {name}: unknown tracker; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
    # Without an accelerator device Accelerator() would run launched processes side by side, each on its own.
    cpu = options.use_cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=options.mixed_precision,
        dynamo_backend="inductor" if compiled else None,
        log_with=options.report_to,
        project_dir=options.output_dir,
    )
    missing = set(options.report_to or []) - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise ScriptError(f"--report_to {missing.pop()}: its package is not installed; pip install it")
    if cpu and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ScriptError("FSDP needs an accelerator device; on the CPU use configs/accelerate_cpu.yaml")
    return accelerator


def load_documents(options: PretrainOptions):
    """Training and held-out documents: lists of str, or streams if `options.streaming`; None for no held-out text.

    Raises:
        ScriptError: as `corpus.load_files`; a stream without validation data.
    """
    if options.train_file:
        train = corpus.load_files(options.train_file, "train_file", options.text_column, options.streaming)
        held_out = None
    else:
        train, held_out = corpus.load_named(
            options.dataset_name, options.dataset_config_name, options.text_column, options.streaming
        )
    if options.validation_file:
        held_out = corpus.load_files(options.validation_file, "validation_file", options.text_column, options.streaming)
    if held_out is not None or options.validation_fraction == 0:
        return train, held_out
    if options.streaming:
        raise ScriptError(
            "nothing can be held out of a stream: give --validation_file, or --validation_fraction 0 for no evaluation"
        )
    return corpus.hold_out(train, options.validation_fraction, options.seed)


def texts_of(documents):
    """The texts of documents, be they a list or a stream of rows."""
    return documents if isinstance(documents, list) else (row["text"] for row in documents)


@dataclass
class HeldOut:
    """Blocks to evaluate on: blocks (n, block_size), lengths (n,), tokens per UTF-8 byte of the text they come from."""

    blocks: np.ndarray
    lengths: np.ndarray
    tokens_per_byte: float


def training_blocks(options: PretrainOptions, documents, tokenizer) -> MemoryBlocks | StreamedBlocks:
    """The endless sequence of training blocks.

    Raises:
        ScriptError: not one block of text (a stream tells when it is read).
    """
    separate = options.respect_document_boundaries
    if options.streaming:
        return StreamedBlocks(documents, tokenizer, options.block_size, separate, options.seed)
    encoded = [ids for ids, _ in corpus.tokenize(documents, tokenizer)]
    blocks, lengths, _ = pack(encoded, options.block_size, separate)
    if len(blocks) == 0:
        raise ScriptError(
            f"the training data holds {sum(map(len, encoded))} tokens, less than one block of {options.block_size}; "
            "give more text or a smaller --block_size"
        )
    return MemoryBlocks(blocks, lengths, options.seed)


def held_out_blocks(options: PretrainOptions, documents, tokenizer) -> HeldOut:
    """The first `max_eval_blocks` blocks of held-out text, or all.

    Raises:
        ScriptError: not one block of text.
    """
    wanted = math.inf if options.max_eval_blocks is None else options.max_eval_blocks * options.block_size
    encoded, tokens, size = [], 0, 0.0
    for ids, part in corpus.tokenize(texts_of(documents), tokenizer, wanted):
        encoded.append(ids)
        tokens, size = tokens + len(ids), size + part
    blocks, lengths, _ = pack(encoded, options.block_size, options.respect_document_boundaries)
    if len(blocks) == 0:
        raise ScriptError(
            f"the held-out text holds {tokens} tokens, less than one block of {options.block_size}; raise "
            "--validation_fraction, give --validation_file, or set --validation_fraction 0 for no evaluation"
        )
    return HeldOut(blocks[: options.max_eval_blocks], lengths[: options.max_eval_blocks], tokens / size)


def load_tokenizer(options: PretrainOptions, checkpoint: Path | None, documents, accelerator: Accelerator):
    """The tokenizer of the checkpoint, the one named, or one trained on the documents (by the main process)."""
    if checkpoint is None and options.train_tokenizer_vocab_size:
        trained = None
        if accelerator.is_main_process:
            trained = corpus.train_tokenizer(
                texts_of(documents), options.train_tokenizer_vocab_size, options.objective == "masked"
            )
        return broadcast_object_list([trained])[0]
    name = checkpoint or options.tokenizer_name or options.model_name_or_path
    return corpus.load_tokenizer(str(name), options.trust_remote_code)


def build_run_config(options: PretrainOptions, tokenizer=None):
    """The config that the options ask for; a new model takes vocabulary and special tokens from the tokenizer.

    Raises:
        ScriptError: as `common.build_config`.
    """
    defaults = {}
    if options.model_type is not None:
        defaults["is_decoder"] = options.objective == "causal"
    if tokenizer is not None and options.model_name_or_path is None:
        defaults |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        if options.model_type is not None:
            defaults["vocab_size"] = len(tokenizer)
    return build_config(
        options.model_type,
        options.config_name or options.model_name_or_path,
        options.config_overrides,
        defaults,
        trust_remote_code=options.trust_remote_code,
    )


def build_model(options: PretrainOptions, checkpoint: Path | None, tokenizer) -> torch.nn.Module:
    """The model in float32: new, or with the weights of the checkpoint or of `model_name_or_path`.

    Raises:
        ScriptError: model, tokenizer, objective and block size do not fit together.
    """
    config = build_run_config(options, tokenizer)
    override = "set {}={} in --config_overrides or {}".format
    limits.check_vocabulary(tokenizer, config, override("vocab_size", len(tokenizer), "take a smaller tokenizer"))
    auto_class = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}[options.objective]
    source, info = checkpoint or options.model_name_or_path, {}
    try:
        if source is None:
            model = auto_class.from_config(config, trust_remote_code=options.trust_remote_code)
        else:
            model, info = auto_class.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        if "for this kind of AutoModel" in str(error):
            raise ScriptError(f"{config.model_type} has no model for the {options.objective} objective") from error
        raise ScriptError(f"the model cannot be made from {source or config.model_type}: {error}") from error
    longer = override("max_position_embeddings", options.block_size, "shorten the blocks")
    limits.check_length(model, options.block_size, "block_size", cure=longer)
    if checkpoint is not None and (info["missing_keys"] or info["unexpected_keys"]):
        raise ScriptError(
            f"{checkpoint} holds another model than the options describe; resume with the run's own options"
        )
    return model


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: no decay for biases, 1-D parameters (norms) and names matching `model._no_weight_decay`."""
    exempt = [re.compile(pattern) for pattern in getattr(model, "_no_weight_decay", ())]
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim < 2 or name.endswith("bias") or any(pattern.search(name) for pattern in exempt)
            (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def recompute_activations(model: torch.nn.Module):
    """Have a transformers model recompute its layers' activations in the backward pass."""
    # the newer name of the two; transformers before 5.23 knows the older alone
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def make_optimizer(model: torch.nn.Module, options, device: torch.device) -> torch.optim.AdamW:
    """AdamW as the options of pretraining or fine-tuning set it."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=device.type == "cuda" or None,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, options, warmup_steps: int, max_steps: int, **kwargs):
    """The learning rate's schedule; `kwargs` are those of `get_scheduler`.

    Raises:
        ScriptError: a schedule that needs other settings, or does not take those given.
    """
    try:
        return get_scheduler(options.lr_scheduler_type, optimizer, warmup_steps, max_steps, **kwargs)
    except (TypeError, ValueError) as error:
        raise ScriptError(f"--lr_scheduler_type {options.lr_scheduler_type.value}: {error}") from error


def describe_data(options: PretrainOptions) -> dict:
    """What the results say of the data: `data` in words, and `datasets`, its names on the Hub."""
    if options.train_file:
        return {"data": ", ".join(Path(pattern).name for pattern in options.train_file), "datasets": []}
    named = [options.dataset_name] if not Path(options.dataset_name).exists() else []
    return {"data": " ".join(filter(None, (options.dataset_name, options.dataset_config_name))), "datasets": named}


def describe_evaluation(options: PretrainOptions, evaluation: dict[str, float] | None) -> list[dict]:
    """An evaluation as keyword arguments of `huggingface_hub.EvalResult`, one a metric."""
    data = describe_data(options)
    shared = {
        "task_type": {"causal": "text-generation", "masked": "fill-mask"}[options.objective],
        "dataset_type": data["datasets"][0] if data["datasets"] else "text",
        "dataset_name": data["data"],
        "dataset_config": options.dataset_config_name,
        "dataset_split": HELD_OUT,
    }
    names = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_bits_per_byte": "bits_per_byte"}
    return [
        {**shared, "metric_type": kind, "metric_name": kind.replace("_", " "), "metric_value": evaluation[name]}
        for name, kind in names.items()
        if name in (evaluation or {})
    ]
