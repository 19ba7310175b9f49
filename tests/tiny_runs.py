"""Tiny text and models to pretrain on it, and what the runs leave."""

import json

import numpy as np
import torch
from transformers import AutoModelForCausalLM

TINY = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2"
SOFTMAX = ["--model_type", "softmax_lm", "--config_overrides", TINY + ",position_embedding_type=rope"]
LINFORMER = ["--model_type", "linformer_lm", "--config_overrides", TINY + ",projected_size=8,local_block_size=8"]
CUBIC = ["--model_type", "cubic_prefix_lm", "--config_overrides", TINY + ",max_position_embeddings=32"]
WORDS = "whale ship sea captain the a of and sailed harpoon white wind storm night day mast".split()


def write_text(folder):
    """text.txt (one document) and documents.jsonl (200 documents of many lengths); returns the documents."""
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS, size=random.integers(2, 40))) for _ in range(200)]
    (folder / "text.txt").write_text(".\n".join(sentences))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    return sentences


def metrics(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same_run(a, b):
    """Bit-equal losses, evaluations and weights."""
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "eval_loss"):
        assert metrics(a, name) == metrics(b, name)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
