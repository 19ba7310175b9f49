"""Mixing weights are what the layers compute with, and the figures are those of their singular values."""

import json

import datasets
import own_data
import pytest
import torch
import transformers
from family_tester import VOCAB, FamilyTester, masked_batch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LongformerConfig,
    LongformerModel,
    pipeline,
    set_seed,
)

import ordnung  # noqa: F401
from ordnung.scripts import plot_mixing
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.reports import mixing

HYBRID = {"kernel_size": 5, "layer_types": ["conv", "full_attention", "conv"], "position_embedding_type": "rope"}
MODELS = {
    "softmax": ("softmax_lm", {}),
    "encoder": ("softmax_lm", {"is_decoder": False, "position_embedding_type": "learned"}),
    "conv": ("conv_lm", {"kernel_size": 5, "dilation": [1, 2, 3]}),
    "conv-free": ("conv_lm", {"kernel_size": 40, "kernel_normalization": "none"}),
    "hybrid": ("conv_lm", HYBRID),
    "cubic": ("cubic_prefix_lm", {}),
    "sparse": ("sparse_attention_lm", {"sliding_window": 4, "num_global_tokens": 2, "global_stride": 5}),
    "sparse-encoder": (
        "sparse_attention_lm",
        {"is_decoder": False, "sliding_window": 3, "num_random_blocks": 1, "random_block_size": 2},
    ),
    "quadratic": ("quadratic_kernel_lm", {"short_conv_kernel": 0, "sliding_window": 4, "centering": "prefix"}),
}
SLOTS = {
    "linformer": ("linformer_lm", {"is_decoder": False, "projected_size": 4}),
    "linformer-causal": ("linformer_lm", {"projected_size": 8, "local_block_size": 4}),
}


def make(model_type, **fields):
    arguments = {**FamilyTester.base_arguments, "attn_implementation": "eager", **fields}
    return AutoModel.from_config(AutoConfig.for_model(model_type, **arguments)).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_weights_times_values_are_what_the_mixer_computes(name):
    """On every kind of padding: out_proj(weights @ v_proj(x)), head by head, is the mixer's output."""
    model_type, fields = MODELS[name]
    model = make(model_type, **fields)
    ids, mask = masked_batch()
    calls = []
    for layer in model.layers:
        layer.mixer.register_forward_hook(
            lambda mixer, args, kwargs, output: calls.append((mixer, args[0], kwargs, output[0])), with_kwargs=True
        )
    model(ids, attention_mask=mask, use_cache=False)
    for mixer, x, kwargs, output in calls[:3]:
        weights = mixer.mixing_weights(x, **kwargs)
        assert weights.shape == (3, 4, 19, 19)
        values = mixer.v_proj(x).view(3, 19, 4, 8).transpose(1, 2)
        mixed = mixer.out_proj((weights @ values).transpose(1, 2).reshape(3, 19, 32))
        torch.testing.assert_close(mixed[mask == 1], output[mask == 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SLOTS)
@torch.no_grad()
def test_weights_of_slots_share_out_one(name):
    model_type, fields = SLOTS[name]
    for weights in mixing.mixing_weights(make(model_type, **fields), torch.randint(1, VOCAB, (1, 19))):
        # k slots; in the causal form after the tokens of two blocks
        assert weights.shape == (4, 19, {"linformer": 4, "linformer-causal": 16}[name])
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 19))


def test_a_channel_kernel_is_drawn_as_the_mean_of_its_head():
    model = make("conv_lm", kernel_size=5, kernel_sharing="channel")
    with torch.no_grad():
        model.layers[0].mixer.kernel_logits.normal_()
    weights = mixing.mixing_weights(model, torch.randint(1, VOCAB, (1, 9)))[0]
    kernel = model.layers[0].mixer.kernel()
    assert weights.shape == (4, 9, 9)
    torch.testing.assert_close(weights[1, 8, 4:], kernel[8:16].mean(0).flip(0))
    assert not weights[:, 2, 3:].any()


def test_fused_attention_is_refused_in_words():
    model = make("softmax_lm", attn_implementation="sdpa")
    with pytest.raises(ValueError, match="attn_implementation='sdpa': set 'eager'"):
        mixing.mixing_weights(model, torch.randint(1, VOCAB, (1, 9)))


def test_shares_of_known_matrices():
    identity, constant = torch.eye(8), torch.full((8, 8), 0.125)
    shares = mixing.cumulative_share(torch.stack([identity, constant]))
    torch.testing.assert_close(shares[0], torch.arange(1, 9) / 8.0, check_dtype=False)
    torch.testing.assert_close(shares[1], torch.ones(8), check_dtype=False)
    [row] = mixing.spectrum([shares], ["full_attention"], 2)
    assert row.pop("curve") == [round((i / 8 + 1) / 2, 4) for i in range(1, 9)]
    assert row == {"layer": 0, "layer_type": "full_attention", "mean": 0.625, "least": 0.25, "heads": [0.25, 1.0]}


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    def write(name):
        set_seed(0)
        if name == "bert":
            sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
            model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=30, **sizes))
        elif name == "longformer":
            sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
            config = LongformerConfig(
                vocab_size=len(tokenizer), max_position_embeddings=30, attention_window=4, **sizes
            )
            model = LongformerModel(config)
        else:
            model_type, fields = {**MODELS, **SLOTS}[name]
            model = make(model_type, **{**fields, "vocab_size": len(tokenizer)})
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    [
        ("hybrid", 3, 4),
        ("bert", 2, 3),
        ("longformer", 2, 3),
        ("linformer", 3, 4),
        ("linformer-causal", 3, 4),
        ("cubic", 3, 4),
    ],
)
@pytest.mark.draws
def test_program_draws_and_writes_figures(name, layers, heads, checkpoint, tmp_path, capsys):
    text = "the whale and the sea, a ship and a captain"
    arguments = ["--model_name_or_path", checkpoint(name), "--text", text, "--max_length", "8"]
    plot_mixing.main([*arguments, "--output_dir", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert (figures["tokens"], figures["rank"]) == (8, 2)
    assert [row["layer"] for row in figures["layers"]] == list(range(layers))
    assert all(len(row["heads"]) == heads and 0 < row["least"] <= row["mean"] <= 1 for row in figures["layers"])
    if name == "hybrid":
        assert [row["layer_type"] for row in figures["layers"]] == ["causal_conv", "full_attention", "causal_conv"]
    assert (tmp_path / "out" / "kernels.png").exists() == (name == "hybrid")
    for image in ("mixing.png", "spectrum.png", *(["kernels.png"] if name == "hybrid" else [])):
        assert (tmp_path / "out" / image).read_bytes()[:4] == b"\x89PNG"
    assert "at rank 2 of 8 tokens" in capsys.readouterr().out


def test_weights_are_written_where_they_are_asked_for(checkpoint, tmp_path):
    folder, text = checkpoint("hybrid"), "the whale and the sea"
    words = ["--model_name_or_path", folder, "--text", text, "--output_dir", str(tmp_path / "out")]
    assert plot_mixing.main(words) == 0 and not (tmp_path / "out" / "mixing.json").exists()
    assert plot_mixing.main([*words, "--weights"]) == 0
    written = json.loads((tmp_path / "out" / "mixing.json").read_text())
    assert (written["model_type"], written["text"]) == ("conv_lm", text)
    model, tokenizer, _ = mixing.load(folder)
    expected = mixing.mixing_weights(model, tokenizer(text, return_tensors="pt")["input_ids"])
    assert [layer["layer_type"] for layer in written["layers"]] == model.config.layer_types
    for layer, weights in zip(written["layers"], expected, strict=True):
        told = torch.tensor([[[float(word) for word in row.split()] for row in head] for head in layer["weights"]])
        torch.testing.assert_close(told, weights.abs(), rtol=6e-3, atol=0)


def test_kernels_are_the_mixers_weights_by_lag():
    model = make("conv_lm", **HYBRID)
    with torch.no_grad():
        for number in (0, 2):
            model.layers[number].mixer.kernel_logits.normal_()
    found = mixing.kernels(model)
    assert list(found) == ["0: causal_conv", "2: causal_conv"]
    weights = mixing.mixing_weights(model, torch.randint(1, VOCAB, (1, 9)))[2]  # (H, 9, 9)
    lags, kernel = found["2: causal_conv"]
    torch.testing.assert_close(kernel, weights[:, 8, 8 - lags], check_dtype=False)
    # of an encoder, tokens that follow too
    model = make("conv_lm", is_decoder=False, kernel_size=5, dilation=2)
    with torch.no_grad():
        model.layers[0].mixer.kernel_logits.normal_()
    lags, kernel = mixing.kernels(model)["0: centred_conv"]
    assert lags.tolist() == [-4, -2, 0, 2, 4]
    weights = mixing.mixing_weights(model, torch.randint(1, VOCAB, (1, 9)))[0]
    torch.testing.assert_close(kernel, weights[:, 4, 4 - lags], check_dtype=False)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.draws
def test_a_classifier_is_drawn_on_given_texts(adapted, tmp_path, monkeypatch, capsys):
    """By the folder of its runs; an adapter with what it learned."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train = own_data.write_csv(tmp_path / "tickets.csv", own_data.tickets(60, 0))
    model = own_data.write_model(tmp_path / "model")
    folder = own_data.tune(model, train, tmp_path / "out", max_steps=3, use_peft=adapted)
    titles, draw = [], mixing.draw_weights
    monkeypatch.setattr(mixing, "draw_weights", lambda *given: titles.append(given[3]) or draw(*given))
    texts = ["my invoice is paid", "hello we on today"]
    words = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "drawn"), "--text", *texts]
    assert plot_mixing.main(words) == 0
    said = pipeline("text-classification", model=str(folder), device="cpu")(texts)
    assert titles == [f"{folder}: {text} → {each['label']} {each['score']:.2f}" for text, each in zip(texts, said)]
    assert (tmp_path / "drawn/mixing_2.png").read_bytes()[:4] == b"\x89PNG"
    if not adapted:
        base = AutoModel.from_pretrained(folder, attn_implementation="eager")
        ids = AutoTokenizer.from_pretrained(folder)(texts[0], return_tensors="pt")["input_ids"]
        drawn = mixing.mixing_weights(mixing.load(str(folder))[0], ids)
        torch.testing.assert_close(drawn, mixing.mixing_weights(base, ids))


def test_program_refuses_in_words(checkpoint, tmp_path, tokenizer):
    common = ["--output_dir", str(tmp_path / "out"), "--text"]
    bert = checkpoint("bert")
    config = AutoConfig.for_model("opt", hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=1)
    config.num_attention_heads = 1
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    for arguments, message in (
        (["--model_name_or_path", bert, *common, "a"], "the text has 1 tokens: give a longer one"),
        (["--model_name_or_path", bert, *common, "the whale " * 40], "set --max_length: Position .* is outside"),
        (["--model_name_or_path", str(tmp_path / "opt"), *common, "a"], "architecture 'opt': draw one of ordnung's"),
        (["--model_name_or_path", str(tmp_path / "none"), *common, "a"], "no such checkpoint folder"),
    ):
        with pytest.raises(ScriptError, match=message):
            plot_mixing.main(arguments)
