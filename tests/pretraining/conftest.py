import datasets
import pytest
from accelerate.state import AcceleratorState
from tiny_runs import TINY, write_text

from ordnung.scripts import pretrain
from ordnung.scripts.common import corpus


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with text.txt (one document) and documents.jsonl (200 documents of many lengths)."""
    folder = tmp_path_factory.mktemp("data")
    write_text(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(data):
    """Folder of a tokenizer trained on the data, so that most runs need not train one."""
    texts = [(data / "text.txt").read_text()]
    trained = corpus.train_tokenizer(texts, 300, masked=True)
    trained.save_pretrained(data / "tokenizer")
    return data / "tokenizer"


@pytest.fixture
def run(data, tokenizer, tmp_path, monkeypatch):
    """Runs the program on text.txt with a tiny ConvLM; keyword arguments are further options, None removes one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(output="out", model=None, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            "train_file": data / "text.txt",
            "tokenizer_name": tokenizer,
            "output_dir": tmp_path / output,
            "block_size": 32,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "eval_steps": 4,
            "save_steps": 4,
            "use_cpu": True,
            **options,
        }
        argv = (
            model if model is not None else ["--model_type", "conv_lm", "--config_overrides", TINY + ",kernel_size=8"]
        )
        argv = argv + [f"--{name}={value}" for name, value in options.items() if value is not None]
        assert pretrain.main([*argv]) == 0
        return tmp_path / output

    return run


@pytest.fixture
def whole(run, data):
    """The folder of a run with `run`'s options that nothing stopped, which one test makes for all."""
    if not (data / "whole" / "results.json").exists():
        run(output_dir=data / "whole")
    return data / "whole"
