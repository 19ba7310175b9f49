import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite(
    "family", "family_tester", "tiny_tasks", "convert_sources", "tiny_runs", "linear_runs", "own_data", "launching"
)


def pytest_generate_tests(metafunc):
    """A family's test class names its configurations in `variants`: tests that take `variant` run once for each."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(metafunc.cls.variants))
    if "exported_variant" in metafunc.fixturenames:
        metafunc.parametrize("exported_variant", metafunc.cls.exported_variants or list(metafunc.cls.variants))
    if "compiled_variant" in metafunc.fixturenames:  # compiling takes seconds: the first one and the last
        variants = list(metafunc.cls.variants)
        metafunc.parametrize("compiled_variant", list(dict.fromkeys((variants[0], variants[-1]))))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unrendered(request, monkeypatch):
    """Figures that programs make are rendered in tests marked `draws` only: it takes longer than a tiny run."""
    if request.node.get_closest_marker("draws") is None:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: Path(path).write_bytes(b"not rendered"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level BPE tokenizer with its own padding token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["the whale and the sea, a ship and a captain"] * 3,
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder with tiny data of each task, and checkpoints conv and softmax with their tokenizer."""
    import tiny_tasks

    folder = tmp_path_factory.mktemp("tasks")
    tiny_tasks.write_tasks(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A checkpoint of transformers' own BERT, with three labels."""
    import tiny_tasks

    folder = tmp_path_factory.mktemp("bert")
    tiny_tasks.write_bert(folder)
    return folder


@pytest.fixture
def run_task(tasks, tmp_path, monkeypatch):
    """`tiny_tasks.runner` of the data in `tasks`, which tokenizes them once for all tests."""
    import datasets
    import tiny_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tasks / "cache")
    return tiny_tasks.runner(tasks, tmp_path)
