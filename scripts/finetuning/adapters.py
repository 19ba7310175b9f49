"""Adapter folders that load with their labels, by transformers and by PEFT alike.

Both load an adapter's base by `base_model_name_or_path` and its config, which knows nothing of the task. A config.json
beside the adapter does not help: transformers then takes the folder for a whole model and looks for its weights there.
So the adapter names a folder of its own as its base. `base/` holds the run's config, its tokenizer (which a pipeline
loads from there) and, in place of weights, an index that points to the files of the checkpoint that was fine-tuned.
"""

import copy
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.hub.sharing import BASE, BASE_NOTE


def write_base(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: FinetuneOptions):
    """Write `base/` into an adapter's folder and have the adapter name it.

    Args:
        model: the model without its adapters: its config is written.
    """
    base, name = folder.resolve() / BASE, options.model_name_or_path
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # weights of other sizes cannot stay where they are, nor can other formats
    files = [] if options.ignore_mismatched_sizes else weight_files(name)
    if files:
        index = {key: path for path in files for key in tensor_names(path)}
        write_json(base / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": index})
        for path in Path(name).glob("*.py"):  # code that the config refers to
            shutil.copy(path, base)
    else:
        copied = type(model).from_pretrained(
            name,
            config=copy.deepcopy(model.config),
            dtype=torch.float32,
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
        )
        copied.save_pretrained(base)
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_json(base / BASE_NOTE, {"base_model_name_or_path": name})
    adapter = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**adapter, "base_model_name_or_path": str(base)})


def weight_files(name: str) -> list[str]:
    """Absolute paths of the safetensors files of a checkpoint, a folder or what was loaded from the Hub; [] if none."""
    whole, index = (
        cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    files = [whole] if whole else get_checkpoint_shard_files(name, index)[0] if index else []
    return [os.path.abspath(file) for file in files]


def tensor_names(path: str) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
