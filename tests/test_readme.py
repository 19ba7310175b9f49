"""What README.md and the guides show works: Python blocks run, commands parse and start, links exist."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from ordnung.scripts import cli
from ordnung.scripts.common import options as common_options
from ordnung.scripts.common.options import parse_key_values, parse_options

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "scripts/README.md", "modeling/README.md")}


def blocks(language):
    """(page, number in it, code)"""
    return [
        (name, number, code)
        for name, text in PAGES.items()
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", text, re.S), 1)
    ]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, tokenizer):
    """A folder in which `out/demo` holds a tiny checkpoint with its tokenizer, as `make demo` leaves a larger one."""
    config = AutoConfig.for_model(
        "conv_lm",
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        kernel_size=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "out/demo")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    for folder in ("out/demo", "bert"):
        tokenizer.save_pretrained(tmp_path / folder)
    # data with the columns of the Hub's
    columns = {"sst2": ("sentence",), "rte": ("sentence1", "sentence2"), "imdb": ("text",)}
    for task, names in columns.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "test" if task == "imdb" else "validation"):
            rows = [{**dict.fromkeys(names, f"a whale of {i} tons"), "label": i % 2} for i in range(20)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "data" / task / f"{split}.jsonl").write_text(lines)
    # a user's own, and the classifier that is made of them
    rows = [f"a whale of {i} tons,{'ab'[i % 2]}" for i in range(20)]
    (tmp_path / "tickets.csv").write_text("\n".join(["text,label", *rows, ""]))
    (tmp_path / "new.csv").write_text("number,text\n007,a whale\n")
    (tmp_path / "my_book.txt").write_text("a whale swims by and a man rows away.\n" * 40)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "out/tickets")
    tokenizer.save_pretrained(tmp_path / "out/tickets")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page, number, code", blocks("python"))
def test_python_blocks_run(page, number, code, checkpoint):
    if "from trl" in code:
        pytest.importorskip("trl", reason="needs ordnung[trl]")
    exec(compile(code, f"{page}, Python block {number}", "exec"), {"__name__": "readme"})
    if "save_standalone" in code:
        assert (checkpoint / "out/whale-conv/modeling_conv_lm.py").exists()


def commands(start):
    text = "\n".join(code for _, _, code in blocks("bash")).replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in text.splitlines() if line.startswith(start)]
    return list(dict.fromkeys(" ".join(line.split()) for line in lines))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {command.split()[1] for command in commands("make ")}
    assert {"demo", "test"} <= named <= targets


def test_readme_is_short():
    written = re.sub(r"<!-- table: .*?<!-- end -->", "", PAGES["README.md"], flags=re.S)
    assert len(written.splitlines()) <= 150


@pytest.mark.parametrize("command", commands("ordnung "))
def test_commands_start(command, checkpoint, monkeypatch):
    # the last of two equal options wins: the same commands at a size for a test
    smaller = {
        "convert": "--source bert",
        "evaluate": "--max_tokens 400 --block_size 32 --stride 16 --use_cpu",
        "linearize": "--source bert --block_size 16 --transfer_steps 2 --distill_steps 2 --max_eval_blocks 4 --use_cpu",
        "finetune": "--max_steps 2 --seeds 0 --max_length 16 --use_cpu",
        "predict": "--use_cpu",
        "plot-mixing": "--max_length 16",
        "share": "--license apache-2.0",
        "generate": "--max_new_tokens 3",
        "pretrain": "--max_steps 2 --train_tokenizer_vocab_size 300 --block_size 32 --max_eval_blocks 4 "
        "--config_overrides hidden_size=16,num_hidden_layers=1,num_attention_heads=2,kernel_size=4 --use_cpu",
    }
    program, *options = shlex.split(command)[1:]
    if "--config_overrides" in options:  # its own sizes, which a test's take the place of
        own = parse_key_values(options[options.index("--config_overrides") + 1])
        AutoConfig.for_model(options[options.index("--model_type") + 1], **own)
    if program == "finetune":
        options += ["--output_dir", "out/tuned"] if "--train_file" in options else ["--dataset_path", "data"]
    words = [program, *options, *smaller[program].split()]
    monkeypatch.setattr(sys, "argv", ["ordnung", *words])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", checkpoint / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(words) in (0, None)
    if program == "predict":
        assert (checkpoint / "predictions.csv").read_text().startswith("number,text,predicted_label,")
    if program == "pretrain":
        model = AutoModelForCausalLM.from_pretrained("out/conv")
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def all_commands():
    """Commands of all pages and cards, but for claims.md: what made its results files is history."""
    pages = [ROOT / name for name in PAGES]
    pages += [path for path in (ROOT / "model_cards").rglob("*.md") if path.name != "claims.md"]
    found = []
    for page in pages:
        text = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(), flags=re.S).replace("\\\n", " ")
        found += re.findall(r"^(?: {4})?(?:taskset -c \S+ )?ordnung ([a-z-]+ [^#\n`]*)", text, re.M)
    experiments = yaml.safe_load((ROOT / "scripts/configs/claims.yaml").read_text())["experiments"]
    for one in experiments.values():
        words = f"{one['command']} {one.get('cuda') or ''}"
        inputs = {"books": "a.jsonl", "one_book": "b.jsonl", "encoder": "c", "reviews": "d.parquet"}
        found.append(words.format(out="out", **inputs, glue=".", imdb="."))
    return sorted({" ".join(line.split()) for line in found})


@pytest.mark.parametrize("command", all_commands())
def test_options_of_every_page_and_card_exist(command, monkeypatch):
    class Parsed(Exception):
        pass

    def parse(*args):
        parse_options(*args)
        raise Parsed

    # a variable of the shell stands for pairs
    program, *options = shlex.split(re.sub(r"\$\w+", "train_file=texts.jsonl", command.partition("&&")[0]))
    if program in cli.OTHERS:
        pytest.skip("the options are another package's")
    module = importlib.import_module(f"ordnung.scripts.{cli.PROGRAMS[program]}")
    monkeypatch.setattr(common_options, "parse_options", parse)
    monkeypatch.setattr(module, "parse_options", parse, raising=False)
    with pytest.raises(Parsed):
        module.main(options)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if not link.startswith("http")]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
