"""Tiny runs of the linearization program: their options, and what they leave."""

import json

import torch
from transformers import AutoModel

from ordnung.scripts.common.options import parse_options
from ordnung.scripts.linearizing import run as running
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.linearizing.stages import SCALE
from ordnung.scripts.training.accelerator import make_accelerator

TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
LINFORMER = "projected_size=4,local_block_size=8"
LAYER = "causal_linformer_attention"
POOLED = "projected_size=4,projection_type=adaptive_mean_pool"
SPARSE = {"model_type": "sparse_attention_lm", "config_overrides": "sliding_window=4,num_global_tokens=1"}
ENCODER = {"config_overrides": POOLED}


def encoder(data, **more):
    return {"source": data / "bert", "train_file": data / "documents.jsonl", "block_size": 24, **ENCODER, **more}


def built(words):
    """The run that these words ask for, measured before training."""
    options = parse_options(LinearizeOptions, words)
    made = running.Linearization(options, make_accelerator(options))
    made.before = made.measure_before()
    return made


def scaled(stage, batch):
    """A batch as a stage's step has it alone."""
    counts = stage.counts(batch)
    return batch | {SCALE + name: torch.tensor(1 / counts[name]) for name in stage.weights}


def results(folder):
    return json.loads((folder / "linearize_results.json").read_text())


def metrics(folder, name="loss"):
    """Values by step, over both stages."""
    found = {}
    for stage in ("transfer", "distill"):
        path = folder / stage / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found |= {(stage, line["step"]): line[name] for line in lines if name in line}
    return found


def weights(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def assert_same(a, b):
    """Bit-equal losses, evaluations, results and weights."""
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        assert metrics(a, name) == metrics(b, name)
    assert [{**p, "seconds": 0} for p in results(a)["curve"]] == [{**p, "seconds": 0} for p in results(b)["curve"]]
    for name in ("tokens", "teacher", "student", "floor", "layers", "converted"):
        assert results(a)[name] == results(b)[name]
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first | second)
