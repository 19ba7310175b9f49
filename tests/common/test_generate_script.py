"""scripts/generate.py end to end on a tiny checkpoint."""

import io
import re
import shutil
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

import ordnung  # noqa: F401
from ordnung.scripts import generate
from ordnung.scripts.common.errors import ScriptError, run_script

CONFIG = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "kernel_size": 4}


def byte_tokenizer(**special_tokens):
    """One token per byte, and the special tokens asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_tokenizer(bos_token="<bos>", eos_token="<eos>")
    set_seed(0)
    # an initial model this wide repeats itself; a larger spread of weights makes its sampled texts differ
    config = AutoConfig.for_model("conv_lm", vocab_size=len(tokenizer), initializer_range=0.3, **CONFIG)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(checkpoint, capsys):
    """Runs the script and returns what it wrote to standard output and to standard error."""

    def call(*arguments, folder=checkpoint):
        generate.main(["--model_name_or_path", str(folder), "--max_new_tokens", "12", *arguments])
        return capsys.readouterr()

    return call


def test_greedy_text_is_that_of_generate(write, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = byte_tokenizer(bos_token="<bos>", eos_token="<eos>")
    ids = tokenizer("Call me", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12)[0], skip_special_tokens=True)
    out, err = write("--prompt", "Call me")
    assert out == expected + "\n"
    assert re.search(r"^12 tokens in [\d.]+ s: [\d.]+ tokens/s$", err, re.MULTILINE)


def test_seed_repeats_and_changes_a_sampled_text(write):
    first, again, other = (write("--prompt", "Call me", "--temperature", "1", "--seed", s).out for s in "001")
    assert first == again != other


def test_several_prompts_and_texts(write):
    out, err = write("--prompt", "one", "two", "--num_return_sequences", "2", "--top_k", "50", "--seed", "0")
    headings = [f"--- prompt {i}, text {j} ---" for i in (1, 2) for j in (1, 2)]
    assert [line for line in out.split("\n") if line.startswith("--- prompt")] == headings
    texts = re.split(r"--- prompt \d, text \d ---\n", out)[1:]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]
    assert texts[0] != texts[1]
    assert "48 tokens" in err


def test_prompt_from_file_and_standard_input(write, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Call\nme\n", encoding="utf-8")
    expected = write("--prompt", "Call\nme").out
    assert write("--prompt_file", str(tmp_path / "prompt.txt")).out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("Call\nme\n"))
    assert write().out == expected


def test_empty_prompt_begins_with_bos(write):
    assert write("--prompt", "").out == write("--prompt", "<bos>").out


def test_a_classifier_writes_no_text(checkpoint, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    with pytest.raises(ScriptError, match=f"{tmp_path} is a ConvLMForSequenceClassification, which writes no text"):
        generate.main(["--model_name_or_path", str(tmp_path), "--prompt", "x"])


def test_a_terminal_that_lacks_a_character_shows_another(checkpoint, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    words = ["--model_name_or_path", str(checkpoint), "--max_new_tokens", "1", "--prompt", "a’b"]
    with pytest.raises(SystemExit) as end:
        run_script(lambda: generate.main(words))
    terminal.flush()
    assert end.value.code == 0 and terminal.buffer.getvalue().startswith(b"a?b")


def test_runs_as_a_program(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Call me"))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model_name_or_path", str(checkpoint), "--max_new_tokens", "3"])
    with pytest.raises(SystemExit) as end:
        run_script(generate.main)
    out, err = capsys.readouterr()
    assert end.value.code == 0 and out.startswith("Call me") and "3 tokens in" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "--temperature must be above 0, not 0"),
        (["--top_p", "1.5"], "--top_p must be at most 1, not 1.5"),
        (["--max_new_tokens", "-3"], "--max_new_tokens must be at least 1, not -3"),
        (["--prompt_file", "x"], "give --prompt or --prompt_file, not both"),
    ],
)
def test_bad_options(arguments, message, write):
    with pytest.raises(ScriptError, match=message):
        write("--prompt", "x", *arguments)


def test_several_greedy_texts_are_refused(write):
    with pytest.raises(ScriptError, match="--num_return_sequences above 1 needs sampling"):
        write("--prompt", "x", "--num_return_sequences", "2")


def test_unreadable_prompt_file(write, tmp_path):
    with pytest.raises(ScriptError, match="cannot read the prompt file .*none.txt: No such file"):
        write("--prompt_file", str(tmp_path / "none.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScriptError, match="not UTF-8 text"):
        write("--prompt_file", str(tmp_path / "binary"))


def test_wrong_folders(write, tmp_path):
    with pytest.raises(ScriptError, match="no such checkpoint folder: .*missing"):
        write(folder=tmp_path / "missing")
    with pytest.raises(ScriptError, match="holds no config.json"):
        write(folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ScriptError, match="is a file: give the checkpoint's folder"):
        write(folder=tmp_path / "file")


def test_checkpoint_without_tokenizer(write, checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    with pytest.raises(ScriptError, match="cannot load a tokenizer from .*; put one there"):
        write(folder=tmp_path)


def test_empty_prompt_without_a_token_to_begin_with(write, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ScriptError, match="the prompt is empty and the tokenizer has no bos or eos"):
        write("--prompt", "", folder=tmp_path)


def test_tokenizer_of_another_model(write, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("conv_lm", vocab_size=20, **CONFIG)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ScriptError, match="vocabulary has 20: this tokenizer belongs to another model"):
        write("--prompt", "zebra", folder=tmp_path)


def test_checkpoint_without_a_head(write, tmp_path):
    config = AutoConfig.for_model("conv_lm", vocab_size=256, tie_word_embeddings=False, **CONFIG)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ScriptError, match="no causal language model checkpoint: it has no lm_head.weight"):
        write("--prompt", "x", folder=tmp_path)
