"""Tokenizers know their models: how long a text may be, which token ends it, and how to load without ordnung."""

import copy
import json
import logging
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from strangers import REFUSE
from tiny_tasks import TINY
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import convert, pretrain
from ordnung.scripts.common import limits
from ordnung.scripts.hub import sharing

LONG = "the voyage of a ship and its captain on that sea was warm " * 40
every_family = pytest.mark.parametrize("model_type", FAMILIES)


def causal(model_type, **fields):
    config = AutoConfig.for_model(model_type, **{"vocab_size": 300, "is_decoder": True, **TINY, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


def length_of(folder):
    return AutoTokenizer.from_pretrained(folder).model_max_length


@pytest.mark.parametrize(
    ("fields", "bound", "trained", "expected"),
    [
        ({"position_embedding_type": "learned"}, True, 48, 64),
        ({"position_embedding_type": "learned"}, True, None, 64),
        ({"position_embedding_type": "rope"}, False, 48, 48),
        ({"position_embedding_type": "none"}, False, 48, 48),
        ({"position_embedding_type": "none"}, False, None, 64),
        (BertConfig(max_position_embeddings=64, vocab_size=300, intermediate_size=8, **TINY), True, 48, 64),
        (LlamaConfig(max_position_embeddings=64, vocab_size=300, intermediate_size=8, **TINY), False, 48, 48),
        (LlamaConfig(max_position_embeddings=64, vocab_size=300, intermediate_size=8, **TINY), False, None, 64),
    ],
)
def test_the_longest_row_or_that_of_training(fields, bound, trained, expected, tokenizer):
    if isinstance(fields, dict):
        model = causal("conv_lm", kernel_size=4, max_position_embeddings=64, **fields)
    else:
        model = (BertForSequenceClassification if isinstance(fields, BertConfig) else LlamaForCausalLM)(fields)
    fitted = limits.fit_tokenizer(copy.deepcopy(tokenizer), model, trained)
    assert fitted.model_max_length == expected
    # what a tokenizer says already stays where the model takes any
    fitted.model_max_length = 7
    assert limits.fit_tokenizer(fitted, model).model_max_length == (64 if bound else 7)


@pytest.mark.parametrize(("source", "expected"), [("softmax", 64), ("conv", 24)])
def test_a_pipeline_cuts_a_long_text(run_task, tasks, source, expected):
    folder = run_task(model_name_or_path=tasks / source, max_length=24, max_steps=1) / "sst2/seed-0"
    assert length_of(folder) == expected
    classify = pipeline("text-classification", str(folder))
    long, cut = classify(LONG, truncation=True), classify.tokenizer(LONG, truncation=True, return_tensors="pt")
    assert cut["input_ids"].shape == (1, expected)
    with torch.no_grad():
        scores = classify.model(cut["input_ids"], cut["attention_mask"]).logits.softmax(-1)
    assert long[0]["score"] == pytest.approx(scores.max().item(), rel=1e-5)


@pytest.mark.parametrize(("positions", "expected"), [("learned", 32), ("none", 16)])
def test_pretraining_and_sharing(positions, expected, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "text.txt").write_text(LONG * 4)
    overrides = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,kernel_size=4,max_position_embeddings=32"
    overrides += f",position_embedding_type={positions}"
    arguments = ["--model_type", "conv_lm", "--config_overrides", overrides, "--block_size", "16", "--use_cpu"]
    arguments += ["--train_file", str(tmp_path / "text.txt"), "--train_tokenizer_vocab_size", "270"]
    assert pretrain.main([*arguments, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]) == 0
    assert length_of(tmp_path / "run") == length_of(tmp_path / "run/checkpoint-2") == expected
    # a tokenizer that somebody saved without
    file = tmp_path / "run/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": None}))
    assert length_of(tmp_path / "run") > 1e6
    shared = sharing.write_folder(tmp_path / "run", sharing.Target("ahab/whale"))
    assert length_of(shared) == 32


@pytest.mark.parametrize("plain", [False, True])
def test_conversion(bert, plain, tmp_path):
    assert length_of(bert) > 1e6
    arguments = ["--source", str(bert), "--model_type", "softmax_lm", "--output_dir", str(tmp_path / "out")]
    assert convert.main(arguments + ["--plain"] * plain) == 0
    assert length_of(tmp_path / "out") == 32


# generation


def warned(model, prompt_length, **kwargs):
    """The warnings of a greedy generation, by `warnings` and by transformers' log, and the tokens that it wrote."""
    heard, handler = [], logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    transformers_logging.warning_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ids = model.generate(torch.ones(1, prompt_length, dtype=torch.long), do_sample=False, **kwargs)
    finally:
        logger.removeHandler(handler)
    return [*heard, *(str(warning.message) for warning in caught)], ids.shape[1] - prompt_length


def test_no_positions_no_bound():
    free = causal("conv_lm", kernel_size=4, max_position_embeddings=16, position_embedding_type="none")
    assert warned(free, 12, max_new_tokens=8) == ([], 8)
    assert warned(free, 20, max_new_tokens=8) == ([], 8)
    heard, count = warned(free, 20)  # transformers' default length
    assert count == 20 and not [text for text in heard if "predefined maximum length" in text]
    heard, count = warned(free, 4, max_length=9)
    assert count == 5
    rotary = causal("conv_lm", kernel_size=4, max_position_embeddings=16, position_embedding_type="rope")
    assert any("predefined maximum length (16)" in text for text in warned(rotary, 12, max_new_tokens=8)[0])


# the end of a text


@every_family
def test_where_eos_pads_its_embedding_learns(model_type):
    """With untied embeddings an index of padding would keep it at zero for ever."""
    ids = torch.tensor([[5, 6, 2, 7, 8, 2], [9, 5, 2, 2, 2, 2]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    fields = {"tie_word_embeddings": False, "eos_token_id": 2}
    shared, own = (causal(model_type, pad_token_id=pad, **fields) for pad in (2, 0))
    assert shared.model.embed_tokens.padding_idx is None and own.model.embed_tokens.padding_idx == 0
    own.load_state_dict(shared.state_dict())
    for model in (shared, own):
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    gradients = [model.model.embed_tokens.weight.grad for model in (shared, own)]
    assert torch.equal(*gradients) and gradients[0][2].any()
    assert shared.lm_head.weight.grad[2].any()


def test_the_end_is_learned_with_eos_as_padding(tasks, tmp_path):
    shutil.copytree(tasks / "conv", tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the ship"}) + "\n")
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--model_type", "conv_lm", "--config_overrides", "hidden_size=16,num_hidden_layers=1,kernel_size=4"]
    arguments[-1] += ",num_attention_heads=2"
    arguments += ["--tokenizer_name", str(tmp_path / "source"), "--train_file", str(tmp_path / "text.jsonl")]
    arguments += ["--block_size", "16", "--respect_document_boundaries", "--validation_fraction", "0", "--use_cpu"]
    arguments += ["--max_steps", "60", "--learning_rate", "0.05", "--per_device_train_batch_size", "2"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--warmup_steps", "0"]
    assert pretrain.main(arguments) == 0
    model, kept = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run"),
        AutoTokenizer.from_pretrained(tmp_path / "run"),
    )
    assert model.config.pad_token_id == model.config.eos_token_id == kept.eos_token_id
    ids = kept("the ship", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likelihood = model(ids).logits[0, -1].softmax(-1)[kept.eos_token_id]
    assert likelihood > 0.9


# without ordnung


LOAD = (
    REFUSE
    + """
import json
from transformers import AutoTokenizer
print(json.dumps([AutoTokenizer.from_pretrained(name)("a ship")["input_ids"] for name in sys.argv[1:]]))
"""
)


def test_tokenizers_load_without_ordnung(tokenizer, tmp_path):
    for name in FAMILIES:
        causal(name).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    names = [str(tmp_path / name) for name in FAMILIES]
    result = subprocess.run([sys.executable, "-c", LOAD, *names], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [tokenizer("a ship")["input_ids"]] * len(names)


@every_family
def test_a_config_with_layer_types_is_read(model_type, tmp_path):
    """As the first version wrote them."""
    more = {"layer_types": ["causal_conv", "full_attention"]} if model_type == "conv_lm" else {}
    model = causal(model_type, **more)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert "layer_types" not in fields
    fields["layer_types"] = fields.pop("mixers")
    file.write_text(json.dumps(fields))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == more.get("layer_types", model.config.layer_types)
    assert torch.equal(
        loaded(torch.ones(1, 5, dtype=torch.long)).logits, model(torch.ones(1, 5, dtype=torch.long)).logits
    )
