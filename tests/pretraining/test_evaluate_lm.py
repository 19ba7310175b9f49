"""Evaluation of language models: against one window at a time, against pretrain.py, and through the harness."""

import json
import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tiny_tasks import FILLER, TINY
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ordnung.scripts import cli, evaluate_lm, pretrain
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.pretraining import perplexity


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny pretrained model, and beside it held_out.jsonl, which its results.json tells the loss of."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(FILLER, size=random.integers(3, 60))) + " é" for _ in range(80)]
    for name, some in (("train", texts[:60]), ("held_out", texts[60:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    corpus.train_tokenizer(texts, 300, masked=False).save_pretrained(folder / "tokenizer")
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {
        "model_type": "softmax_lm",
        "config_overrides": ",".join(f"{name}={value}" for name, value in TINY.items()) + ",max_position_embeddings=64",
        "train_file": folder / "train.jsonl",
        "validation_file": folder / "held_out.jsonl",
        "tokenizer_name": folder / "tokenizer",
        "block_size": 24,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "output_dir": folder / "model",
    }
    assert pretrain.main([*(f"--{name}={value}" for name, value in options.items()), "--use_cpu"]) == 0
    return folder


@pytest.fixture
def run(checkpoint, tmp_path):
    def run(**options):
        options = {
            "model_name_or_path": checkpoint / "model",
            "text_file": checkpoint / "held_out.jsonl",
            "output_file": tmp_path / "results.json",
            "block_size": 24,
            **options,
        }
        argv = [f"--{name}={value}" for name, value in options.items() if value is not None]
        assert evaluate_lm.main([*argv, "--use_cpu"]) == 0
        return json.loads((tmp_path / "results.json").read_text())

    return run


def test_blocks_are_scored_as_pretraining_does(run, checkpoint):
    results, trained = run(), json.loads((checkpoint / "model/results.json").read_text())["evaluation"]
    assert results["loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)
    assert results["perplexity"] == pytest.approx(trained["eval_perplexity"], rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(trained["eval_bits_per_byte"], rel=1e-6)
    assert results["predicted_tokens"] == results["tokens"] // 24 * 23
    assert [(bucket["first"], bucket["last"]) for bucket in results["loss_by_position"]] == [(1, 15), (16, 23)]
    total = sum(bucket["loss"] * bucket["tokens"] for bucket in results["loss_by_position"])
    assert total / results["predicted_tokens"] == pytest.approx(results["loss"])


@pytest.mark.parametrize("stride", [1, 5, 23])
def test_a_sliding_window_predicts_every_token_once(run, checkpoint, stride):
    results = run(stride=stride, max_tokens=150, per_device_eval_batch_size=3)
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "model")
    texts = [json.loads(line)["text"] for line in (checkpoint / "held_out.jsonl").read_text().splitlines()]
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]][:150]
    nll, end = 0.0, 1
    while end < 150:
        # the window that first reaches past `end` predicts what it has new
        last = min(24 if end == 1 else end + stride, 150)
        first = max(last - 24, 0)
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:last]])).logits[0].log_softmax(-1)
        nll -= sum(float(logits[place - 1 - first, ids[place]]) for place in range(end, last))
        end = last
    assert results["predicted_tokens"] == 149
    assert results["loss"] == pytest.approx(nll / 149, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(nll / 149), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [100, 101, 112])
def test_bytes_are_those_of_the_tokens(run, checkpoint, tmp_path, max_tokens):
    """Bits per byte of the first tokens of a document whose second half has other characters."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "model")
    first, text = "the ship was on that sea", "a captain and the voyage " * 3 + "и" * 300
    ids = tokenizer(text)["input_ids"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in (first, text)))
    results = run(text_file=tmp_path / "texts.jsonl", max_tokens=max_tokens)
    before = len(tokenizer(first)["input_ids"]) + 1
    # in this tokenizer's tokens a character stands for a byte
    size = len(first) + sum(map(len, tokenizer.convert_ids_to_tokens(ids[: max_tokens - before])))
    assert before < max_tokens < len(ids) and results["tokens"] == max_tokens
    expected = results["loss"] / math.log(2) * max_tokens / size
    # a cut inside a character counts two bytes too many
    assert results["bits_per_byte"] == pytest.approx(expected, rel=2 / size)


def test_windows():
    tokens = np.arange(11)
    blocks, firsts = perplexity.windows(tokens, 4, None)
    assert blocks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and firsts.tolist() == [1, 1]
    blocks, firsts = perplexity.windows(tokens, 4, 2)
    assert blocks[:, -1].tolist() == [3, 5, 7, 9, 10] and firsts.tolist() == [1, 2, 2, 2, 3]
    blocks, firsts = perplexity.windows(tokens, 20, 3)
    assert blocks.tolist() == [tokens.tolist()] and firsts.tolist() == [1]
    blocks, firsts = perplexity.windows(tokens, 11, 3)
    assert len(blocks) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 100_000}, "less than one block of 100000; give more text"),
        ({"stride": 24}, r"--stride 24 must be below the --block_size \(24\)"),
        ({"text_file": "nowhere.txt"}, "no such file"),
        ({"dataset_name": "some/text"}, "one of --text_file and --dataset_name"),
        ({"text_file": None, "dataset_name": "some/text"}, "some/text cannot be loaded"),
        ({"model_name_or_path": "nowhere"}, "no tokenizer can be loaded from nowhere"),
        ({"output_file": "nowhere/results.json"}, "its folder does not exist"),
        ({"max_tokens": 1}, "--max_tokens must be at least 2"),
        ({"split": "dev"}, "--split is of a data set: give --dataset_name"),
        ({"dataset_config_name": "en"}, "--dataset_config_name is of a data set"),
        ({"text_file": __file__, "text_column": "body"}, "--text_column body: .* has no columns"),
    ],
)
def test_bad_input(run, options, message):
    with pytest.raises(ScriptError, match=message):
        run(**options)


def test_windows_are_as_long_as_the_model(run):
    results = run(block_size=None)
    assert results["block_size"] == 64 and results["predicted_tokens"] == results["tokens"] // 64 * 63


def remade(checkpoint, folder, **fields):
    """The checkpoint's model made anew with other config fields, and its tokenizer."""
    config = AutoConfig.from_pretrained(checkpoint / "model", **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint / "model").save_pretrained(folder)
    return folder


def test_more_tokens_than_positions(run, checkpoint, tmp_path):
    learned = remade(checkpoint, tmp_path / "learned", position_embedding_type="learned")
    with pytest.raises(ScriptError, match=r"--block_size 96 is above the model's max_position_embeddings \(64\)"):
        run(model_name_or_path=learned, block_size=96)
    assert run(block_size=96)["block_size"] == 96  # rotary positions go on


def test_more_tokens_than_the_vocabulary(run, checkpoint, tmp_path):
    texts = [json.loads(line)["text"] for line in (checkpoint / "train.jsonl").read_text().splitlines()]
    corpus.train_tokenizer(texts, 320, masked=False).save_pretrained(tmp_path / "larger")
    with pytest.raises(ScriptError, match=r"the tokenizer has \d+ tokens, the model's vocabulary \d+"):
        run(tokenizer_name=tmp_path / "larger")


def test_a_split_of_a_data_set(run, checkpoint, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/test.jsonl").write_bytes((checkpoint / "held_out.jsonl").read_bytes())
    results = run(text_file=None, dataset_name=tmp_path / "texts")
    assert results["loss"] == run()["loss"]
    with pytest.raises(ScriptError, match="has no split 'dev', only test"):
        run(text_file=None, dataset_name=tmp_path / "texts", split="dev")


@pytest.mark.parametrize(
    "auto_class, field, message",
    [
        (AutoModelForMaskedLM, {"is_decoder": False}, "no causal language model.*is_decoder"),
        (AutoModel, {"tie_word_embeddings": False}, "is no causal language model checkpoint: it has no lm_head"),
    ],
)
def test_a_model_without_next_token_predictions(run, checkpoint, tmp_path, auto_class, field, message):
    config = AutoConfig.from_pretrained(checkpoint / "model", **field)
    auto_class.from_config(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(checkpoint / "model").save_pretrained(tmp_path / "other")
    with pytest.raises(ScriptError, match=message):
        run(model_name_or_path=tmp_path / "other")


def test_a_classifier_has_no_perplexity(checkpoint, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(checkpoint / "model").save_pretrained(tmp_path)
    argv = ["--model_name_or_path", tmp_path, "--tokenizer_name", checkpoint / "model", "--use_cpu"]
    with pytest.raises(ScriptError, match="is a SoftmaxLMForSequenceClassification, which writes no text"):
        evaluate_lm.main([*map(str, argv), "--text_file", str(checkpoint / "held_out.jsonl")])


class TestHarness:
    @pytest.fixture
    def task(self, tmp_path):
        """A task folder as a user of the harness would write it: which of two words ends the sentence."""
        rows = [{"question": "the ship and its", "choices": ["captain", "xyzzy"], "answer": 0}] * 6
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "endings",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        }
        (tmp_path / "endings.yaml").write_text(yaml.safe_dump(task))
        return tmp_path

    def words(self, checkpoint, task):
        words = ["--model", "hf", "--model_args", f"pretrained={checkpoint / 'model'}", "--device", "cpu"]
        return [*words, "--tasks", "endings", "--include_path", str(task), "--output_path", str(task / "out")]

    @pytest.mark.slow
    def test_a_local_task(self, checkpoint, task, capsys):
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'ordnung[harness]'")
        cli.main(["lm-eval", *self.words(checkpoint, task)])
        assert "|endings|" in capsys.readouterr().out
        (written,) = (task / "out").rglob("results_*.json")
        assert json.loads(written.read_text())["results"]["endings"]["acc,none"] == 1.0

    def test_its_own_command_line_runs_with_the_families_known(self, checkpoint, task, monkeypatch):
        """With a stand-in for the harness."""
        seen = []

        def cli_evaluate():
            seen.extend([sys.argv[1:], AutoConfig.from_pretrained(checkpoint / "model").model_type])

        for name in ("lm_eval", "lm_eval.__main__"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lm_eval.__main__"].cli_evaluate = cli_evaluate
        monkeypatch.setattr(sys, "argv", ["ordnung"])
        cli.main(["lm-eval", *self.words(checkpoint, task)])
        assert seen == [self.words(checkpoint, task), "softmax_lm"]

    def test_without_the_harness(self, checkpoint, task, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(ScriptError, match=r'pip install "ordnung\[harness\]"'):
            cli.main(["lm-eval", "--tasks", "endings"])
