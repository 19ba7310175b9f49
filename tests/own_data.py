"""Made-up data as users bring them: support tickets of three kinds, labels by the dozen, prices; and a runner."""

import csv
import json

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForMaskedLM

import ordnung  # noqa: F401  (its model types enter the Auto classes)
from ordnung.scripts import finetune
from ordnung.scripts.common import corpus

KINDS = {
    "other": "hello question thanks order hours".split(),
    "billing": "invoice refund charge card paid".split(),
    "outage": "down offline crash timeout error".split(),
}
FILLER = "the a my please we you on in it was is and today".split()


def tickets(count, seed, shares=(0.85, 0.10, 0.05), mixed=0.0):
    """Rows of text and kind, of which each text holds one telling word; every kind has exactly its share.

    With `mixed`, so much of the first kind holds a word of the second, and so much one of the third.
    """
    random, kinds = np.random.default_rng(seed), list(KINDS)
    counts = [round(share * count) for share in shares]
    for kind in random.permutation(np.repeat(kinds, counts)):
        words = list(random.choice(FILLER, size=random.integers(4, 10)))
        told = random.choice(kinds, p=[1 - 2 * mixed, mixed, mixed]) if kind == kinds[0] else kind
        words.insert(random.integers(len(words)), str(random.choice(KINDS[told])))
        yield {"text": " ".join(words), "label": str(kind)}


def several(count, seed):
    """Rows of text and the kinds named in it, `a;b`, which may be none."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        chosen = [kind for kind in KINDS if random.random() < 0.4]
        words = list(random.choice(FILLER, size=6)) + [str(random.choice(KINDS[kind])) for kind in chosen]
        yield {"text": " ".join(random.permutation(words)), "tags": ";".join(chosen)}


def prices(count, seed):
    """Rows of text and a number: a quarter for each word `good`."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        good = int(random.integers(5))
        words = random.permutation(["good"] * good + list(random.choice(FILLER, size=8 - good)))
        yield {"review": " ".join(words), "score": good / 4 + 0.01}


def tagged(count, seed):
    """Rows of words and tags: a `customer` is followed by a name of one or two words, `at` by a city."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        words = list(random.choice(FILLER, size=4))
        tags = ["O"] * len(words)
        for trigger, kind, names in (("customer", "PER", "thanks order hours"), ("at", "LOC", "crash timeout error")):
            if random.random() < 0.6:
                size = int(random.integers(1, 3))
                words += [trigger, *random.choice(names.split(), size=size)]
                tags += ["O", f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
        yield {"tokens": list(map(str, words)), "ner_tags": tags}


def asked(count, seed, length=10):
    """Rows of SQuAD's columns: which word of a kind stands in the context?"""
    random = np.random.default_rng(seed)
    for number in range(count):
        kind = str(random.choice(list(KINDS)[1:]))
        words, place = list(random.choice(FILLER, size=length)), int(random.integers(length))
        words[place] = answer = str(random.choice(KINDS[kind]))
        start = len(" ".join(words[:place])) + bool(place)
        answers = {"text": [answer], "answer_start": [start]}
        yield {"id": str(number), "question": kind, "context": " ".join(words), "answers": answers}


def write_csv(path, rows, delimiter=","):
    rows = list(rows)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(folder):
    """A small encoder whose tokenizer knows the words."""
    words = [*FILLER, "good", "customer", "at", *KINDS, *(word for kind in KINDS.values() for word in kind)]
    tokenizer = corpus.train_tokenizer([" " + " ".join(words)] * 20, 450, masked=True)
    config = AutoConfig.for_model(
        "softmax_lm",
        vocab_size=len(tokenizer),
        is_decoder=False,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        position_embedding_type="learned",
        max_position_embeddings=48,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tune(model, train_file, output_dir, status=0, **options):
    """Run the program on data of one's own, by default for a few steps; returns the folder of the first seed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {
        "model_name_or_path": model,
        "train_file": train_file,
        "output_dir": output_dir,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "use_cpu": True,
        **options,
    }
    argv = [
        word
        for name, value in options.items()
        if value is not None
        for word in [f"--{name}", *map(str, np.atleast_1d(value))]
    ]
    assert finetune.main(argv) == status
    return output_dir / f"seed-{np.atleast_1d(options.get('seeds', 0))[0]}"
