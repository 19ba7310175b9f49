"""The model of a pretraining run: new, or from a checkpoint."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.models import build_config
from ordnung.scripts.pretraining.options import PretrainOptions


def build_run_config(options: PretrainOptions, tokenizer=None):
    """The config that the options ask for; a new model takes vocabulary and special tokens from the tokenizer.

    Raises:
        ScriptError: as `models.build_config`.
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
            code = {"trust_remote_code": options.trust_remote_code}
            model = auto_class.from_config(config, dtype=torch.float32, **code)  # whatever the config names
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
