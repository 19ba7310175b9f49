import json
import time

import pytest
from accelerate.state import AcceleratorState
from hub_models import RESULTS, save_model
from hub_server import WRITER, HubServer, take_for_the_hub
from huggingface_hub import constants

from ordnung.scripts import pretrain


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running server that huggingface_hub takes for the Hub, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # retries without their pauses
    with HubServer() as server:
        take_for_the_hub(server, monkeypatch)
        yield server


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A ConvLM checkpoint with results."""
    save_model(tmp_path / "run", tokenizer, kernel_size=4)
    (tmp_path / "run" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path / "run"


@pytest.fixture
def train(tmp_path):
    def train(*more):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "text.txt").write_text("the whale and the sea, a ship and a captain\n" * 60)
        overrides = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,kernel_size=4"
        arguments = ["--model_type", "conv_lm", "--config_overrides", overrides, "--block_size", "16", "--use_cpu"]
        arguments += ["--train_file", str(tmp_path / "text.txt"), "--train_tokenizer_vocab_size", "270"]
        arguments += ["--max_steps", "2", "--output_dir", str(tmp_path / "whale"), *more]
        assert pretrain.main(arguments) == 0
        return tmp_path / "whale"

    return train
