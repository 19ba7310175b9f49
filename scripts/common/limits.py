"""What a model can take: the positions and tokens that it has."""

import math

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ordnung.scripts.common.errors import ScriptError

# A tokenizer without a limit names a huge one as its `model_max_length`.
NO_LENGTH = 1e6


def positions(model: torch.nn.Module) -> int | None:
    """The positions that a transformers model has, or None. Rows of its table may be none."""
    number = getattr(model.config, "num_positions", None) or getattr(model.config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the row after that of the padding token
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            number = min(number, module.num_embeddings - module.padding_idx - 1)
    return number if number > 0 else None


def check_length(model: torch.nn.Module, length: int, option: str, extrapolate: bool = False, cure: str = "shorten it"):
    """Raise a ScriptError where a model has fewer positions than `length`, the value of `option`.

    Args:
        extrapolate: let a model without a table of positions, as a rotary one, go beyond those that it is made for.
        cure: what the error says can be done.
    """
    number, config = positions(model), model.config
    if hasattr(config, "longest_row"):  # an ordnung model
        free = config.longest_row is None and (extrapolate or config.position_embedding_type == "none")
    else:
        free = extrapolate and not _has_position_table(model)
    if number is not None and number < length and not free:
        raise ScriptError(f"--{option} {length} is above the model's max_position_embeddings ({number}); {cure}")


def _has_position_table(model: torch.nn.Module) -> bool:
    words, rows = model.get_input_embeddings(), getattr(model.config, "max_position_embeddings", None) or 0
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words)
    return any(table.num_embeddings in (rows, rows + 2) for table in tables)  # OPT's has two more


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, cure: str = "take the model's own tokenizer"
):
    """Raise a ScriptError where a tokenizer has more tokens than the model.

    Args:
        cure: what the error says can be done.
    """
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ScriptError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {size}; {cure}")


def model_length(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that model and tokenizer are made for."""
    if hasattr(model.config, "longest_row"):  # its tokenizer may name the length of its training, which is no bound
        return positions(model)
    shortest = min(tokenizer.model_max_length, positions(model) or math.inf)
    if shortest > NO_LENGTH:
        raise ScriptError("neither the model nor its tokenizer says how long a text may be: give --max_length")
    return int(shortest)


def fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module, trained: int | None = None
) -> PreTrainedTokenizerBase:
    """Tell a tokenizer the model's length, which `truncation=True` cuts texts to; every tokenizer is saved with it.

    It is that of the longest row that the model takes. Where it takes any, that of the rows it was trained on.

    Args:
        trained: tokens of a row in training; if None, what the tokenizer says already, or else the config.
    Returns:
        the tokenizer.
    """
    if hasattr(model.config, "longest_row"):
        longest = model.config.longest_row
    else:
        longest = positions(model) if _has_position_table(model) else None
    own = tokenizer.model_max_length if tokenizer.model_max_length < NO_LENGTH else None
    tokenizer.model_max_length = longest or trained or own or positions(model) or tokenizer.model_max_length
    return tokenizer
