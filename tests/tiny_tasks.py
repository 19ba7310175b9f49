"""Tiny data of every task, checkpoints to fine-tune on them, and what the runs leave."""

import json

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

import ordnung  # noqa: F401  (its model types enter the Auto classes)
from ordnung.scripts import finetune
from ordnung.scripts.common import corpus
from ordnung.scripts.finetuning import tasks as text_tasks

GOOD, BAD = "fine warm bright calm".split(), "dull cold grim harsh".split()
FILLER = "the voyage of a ship and its captain on that sea was".split()
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def sentences(count, seed, words=(3, 12)):
    """Sentences that hold one telling word; label 1 for a good one."""
    random = np.random.default_rng(seed)
    for label in random.integers(2, size=count):
        chosen = list(random.choice(FILLER, size=random.integers(*words)))
        chosen.insert(random.integers(len(chosen)), str(random.choice(GOOD if label else BAD)))
        yield " ".join(chosen), int(label)


def table(task, count, seed, labelled=True):
    """Rows with a task's columns; both texts of a pair are made alike."""
    texts = [list(sentences(count, seed + i)) for i in range(len(task.columns))]
    rows = {column: [text for text, _ in some] for column, some in zip(task.columns, texts)}
    labels = [label for _, label in texts[0]]
    rows["label"] = [2.5 * label + 0.1 for label in labels] if task.regression else labels
    if not labelled:
        rows["label"] = [-1] * count
    return datasets.Dataset.from_dict({**rows, "idx": list(range(count))})


def write_tasks(folder):
    """A folder for each task, and checkpoints conv and softmax with their tokenizer."""
    for name, task in text_tasks.TASKS.items():
        (folder / name).mkdir()
        table(task, 48, 0).to_parquet(folder / name / "train.parquet")
        for split in task.evaluation:
            table(task, 20, 10).to_parquet(folder / name / f"{split}.parquet")
        for split in task.tests:
            table(task, 10, 20, labelled=False).to_parquet(folder / name / f"{split}.parquet")
    texts = [text for text, _ in sentences(300, 5)]
    tokenizer = corpus.train_tokenizer(texts, 300, masked=True)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    for name, kind, more in (
        ("conv", "conv_lm", {"kernel_size": 8}),
        ("softmax", "softmax_lm", {"position_embedding_type": "learned", "max_position_embeddings": 64}),
    ):
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **TINY, **more, **special)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_bert(folder):
    """A tiny BERT with three labels, as a checkpoint of transformers' own that was fine-tuned on MNLI."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), intermediate_size=32, max_position_embeddings=32, num_labels=3, **TINY)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)


def runner(tasks, outputs):
    """A function that runs a program on a task of the folder `tasks` and returns the folder that it wrote in `outputs`.

    Its keyword arguments are further options, None removes one.
    """

    def run_task(task="sst2", output="out", status=0, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            "model_name_or_path": tasks / "conv",
            "output_dir": outputs / output,
            "dataset_path": tasks / task if task == "imdb" else tasks,
            "task_name": task,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            **options,
        }
        argv = []
        for name, value in options.items():
            if value is not None:
                argv += [f"--{name}", *(value.split() if name == "task_name" else map(str, np.atleast_1d(value)))]
        assert finetune.main(argv) == status
        return outputs / output

    return run_task


def metrics(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def results(folder):
    return json.loads((folder / "results.json").read_text())


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def assert_same_run(a, b):
    for name in ("loss", "learning_rate", "eval_loss"):
        assert metrics(a, name) == metrics(b, name)
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first)
