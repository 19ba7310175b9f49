import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

pytest.register_assert_rewrite("family_tester")


def pytest_generate_tests(metafunc):
    """A family's test class names its configurations in `variants`: tests that take `variant` run once for each."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(metafunc.cls.variants))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


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
