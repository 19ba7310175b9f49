"""Encoders as sentence embeddings: mean pooling through sentence-transformers, whatever the padding."""

import pytest
import torch
from own_data import write_model
from transformers import AutoConfig, AutoModel, AutoTokenizer

import ordnung  # noqa: F401  (its model types enter the Auto classes)

TEXTS = ["my invoice is paid", "hello", "we on today in the outage and a crash"]
ENCODERS = {
    "softmax_lm": {},
    "linformer_lm": {"projected_size": 4},
    "conv_lm": {"kernel_size": 4},
}


@pytest.fixture(params=ENCODERS)
def encoder(request, tmp_path):
    """A checkpoint with its tokenizer, saved as a classifier's or language model's base is."""
    folder = write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 48}
    fields = {**sizes, **ENCODERS[request.param], "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(
        request.param, vocab_size=len(tokenizer), is_decoder=request.param == "conv_lm", **fields
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def test_mean_pooling_through_sentence_transformers(encoder, tmp_path):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed: pip install sentence-transformers"
    )
    # a folder that is none of its own is pooled by the mean
    embedder = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    embedded = embedder.encode(TEXTS, convert_to_tensor=True)
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():  # each alone, so that no padding is in it
        alone = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    torch.testing.assert_close(embedded.cpu(), torch.stack(alone), rtol=1e-4, atol=1e-5)
    embedder.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True).cpu(), embedded.cpu())
