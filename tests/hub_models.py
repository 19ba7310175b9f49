"""Small checkpoints to share, with their results."""

import datasets
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ordnung.scripts.common import machine

TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
RESULTS = {
    "data": "nyu-mll/glue sst2",
    "datasets": ["nyu-mll/glue"],
    "tokens": 1234,
    "seed": 0,
    "eval_results": [
        {
            "task_type": "text-classification",
            "dataset_type": "nyu-mll/glue",
            "dataset_name": "GLUE SST-2",
            "dataset_config": "sst2",
            "dataset_split": "validation",
            "metric_type": metric,
            "metric_value": value,
            "over_seeds": {"mean": 0.5, "standard_deviation": 0.25, "values": [0.25, 0.75]},
        }
        for metric, value in (("accuracy", 0.75), ("f1", 0.625))
    ],
    "machine": {**machine.machine_info(), "command": "python scripts/train.py --seed 0"},
}
STANDARD_FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "configuration_conv_lm.py", "configuration_backbone.py", "modeling_conv_lm.py",
    "backbone.py", "heads.py", "mixer.py", "attention.py", "rows.py", "state.py", "norms.py", "projections.py",
    "pooling.py", "causal_conv.py", "centred_conv.py", "chunks.py",
}  # fmt: skip


def save_model(folder, tokenizer, model_type="conv_lm", auto="AutoModelForCausalLM", **fields):
    config = AutoConfig.for_model(
        model_type, **TINY, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **fields
    )
    model = getattr(modeling_auto, auto).from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_tasks(folder):
    """SST-2 and RTE of a few rows each."""
    for task, columns in (("sst2", ["sentence"]), ("rte", ["sentence1", "sentence2"])):
        (folder / task).mkdir(parents=True)
        for split, rows in (("train", 24), ("validation", 12)):
            table = {column: ["a ship and the sea", "the whale"] * (rows // 2) for column in columns}
            datasets.Dataset.from_dict({**table, "label": [0, 1] * (rows // 2)}).to_json(
                folder / task / f"{split}.jsonl"
            )
    return folder
