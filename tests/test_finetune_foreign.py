"""Fine-tuning of transformers' own models: what they are trained with is what their users get."""

import datasets
import pytest
import torch
from test_finetune import data, results, run  # noqa: F401  (fixtures)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)


def logits_of(folder, rows, model=None):
    """What a user of the folder gets: (n, labels) scores of pairs, one at a time, with the folder's own tokenizer."""
    model = model or AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = zip(rows["sentence1"], rows["sentence2"])
    with torch.no_grad():
        return torch.cat([model.eval()(**tokenizer(*pair, return_tensors="pt")).logits for pair in pairs])


def reported_and_found(out, data, model=None):  # noqa: F811
    """The scores that results.json of mrpc reports, and the same of the saved model."""
    rows = datasets.Dataset.from_parquet(str(data / "mrpc/validation.parquet"))
    logits, labels = logits_of(out / "mrpc/seed-0", rows, model), torch.tensor(rows["label"][:])
    found = {"loss": torch.nn.functional.cross_entropy(logits, labels).item()}
    found["accuracy"] = (logits.argmax(-1) == labels).float().mean().item()
    reported = results(out / "mrpc/seed-0")["metrics"]["validation"]
    return {name: reported[name] for name in found}, pytest.approx(found, rel=1e-4)


@pytest.fixture
def gpt2(data, tmp_path):  # noqa: F811
    """A tiny GPT-2, whose forward takes token types; its tokenizer gives none."""
    kept = AutoTokenizer.from_pretrained(data / "conv")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=kept.backend_tokenizer,
        pad_token=kept.pad_token,
        eos_token=kept.eos_token,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_token_types_come_from_the_tokenizer(run, data, gpt2):  # noqa: F811
    out = run("mrpc", model_name_or_path=gpt2, num_train_epochs=1)
    reported, found = reported_and_found(out, data)
    assert reported == found
