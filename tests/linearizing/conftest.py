import json

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from linear_runs import LINFORMER, TINY
from tiny_runs import write_text
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ordnung.scripts import linearize
from ordnung.scripts.common import corpus


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with text.txt, documents.jsonl, pairs.jsonl and the teachers llama, bert and gpt2 (of 40 positions)."""
    folder = tmp_path_factory.mktemp("data")
    sentences = write_text(folder)
    pairs = [
        {"sentence1": a, "sentence2": b, "label": i % 6} for i, (a, b) in enumerate(zip(sentences, sentences[9:30]))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenizer = corpus.train_tokenizer(sentences, 300, masked=True)
    torch.manual_seed(0)
    teachers = {
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, initializer_range=0.2, **TINY)),
        "bert": BertModel(BertConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.2, **TINY)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=40, n_embd=16, n_layer=2, n_head=2)),
    }
    for name, teacher in teachers.items():
        teacher.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def arguments(data, tmp_path, monkeypatch):
    """Words for the program: a LinformerLM of the decoder; keyword arguments are further options, None removes one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def arguments(output="out", **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            "source": data / "llama",
            "model_type": "linformer_lm",
            "config_overrides": LINFORMER,
            "train_file": data / "text.txt",
            "output_dir": tmp_path / output,
            "block_size": 32,
            "max_eval_blocks": 4,
            "transfer_steps": 4,
            "distill_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "eval_steps": 2,
            "save_steps": 3,
            "decode_lengths": 8,
            "use_cpu": True,
            **options,
        }
        return [f"--{name}={value}" for name, value in options.items() if value is not None]

    return arguments


@pytest.fixture
def run(arguments, tmp_path):
    def run(output="out", status=0, **options):
        assert linearize.main(arguments(output, **options)) == status
        return tmp_path / output

    return run
