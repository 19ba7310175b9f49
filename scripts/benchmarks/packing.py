"""Packed training steps against full rows and padded batches: see `bench_packing.py`."""

import random
import re
from functools import partial
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.benchmarks.measure import in_turns
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.pretraining.blocks import best_fit

VOCABULARY = 1000
PIECES = re.compile(r"\w+|[^\w\s]")
# Families whose defaults are not what one trains with.
SETTINGS = {"linformer_lm": {"is_decoder": True}, "cubic_prefix_lm": {"prefix_stride": 32}}


def lengths_of(file: str, column: str, block_size: int, tokens: int, seed: int) -> list[int]:
    """Lengths of documents, in words and punctuation, that hold about `tokens` tokens together; long ones are cut."""
    documents = corpus.load_files([file], "train_file", column, streaming=False)
    chosen = random.Random(seed).sample(range(len(documents)), min(len(documents), tokens))
    lengths = [min(max(len(PIECES.findall(text)), 2), block_size) for text in documents[chosen]["text"]]
    total = 0
    for number, length in enumerate(lengths):
        total += length
        if total > tokens:
            return lengths[:number]
    raise ScriptError(f"{file} holds {total} tokens, less than a batch of {tokens}: give more text or smaller batches")


def batches(lengths: list[int], block_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """Model inputs of the same number of rows, full and packed, and of the packed documents with a row each."""
    rows = best_fit(lengths, block_size)
    full = torch.randint(1, VOCABULARY, (len(rows), block_size))
    packed = {"input_ids": torch.zeros_like(full), "labels": torch.full_like(full, -100)}
    packed["position_ids"] = torch.zeros_like(full)
    mask = torch.zeros_like(full)
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    real = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        start = 0
        for number in row:
            place, ids = slice(start, start + lengths[number]), torch.randint(1, VOCABULARY, (lengths[number],))
            packed["input_ids"][i, place] = packed["labels"][i, place] = ids
            packed["position_ids"][i, place] = torch.arange(len(ids))
            mask[i, place] = 1
            padded[number, : len(ids)], real[number, : len(ids)] = ids, 1
            start = place.stop
    if not mask.all():
        packed["attention_mask"] = mask
    labels = padded.masked_fill(real == 0, -100)
    return {
        "full": {"input_ids": full, "labels": full},
        "packed": packed,
        "padded": {"input_ids": padded, "attention_mask": real, "labels": labels},
    }


def training_step(model, batch) -> None:
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()


def run(options) -> int:
    """Time the steps by bench_packing.py's options and write the results; returns the exit status."""
    torch.set_num_threads(options.num_threads)
    families = list(FAMILIES) if options.model_type == ["all"] else options.model_type
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ScriptError(f"--model_type {unknown[0]} is no family: choose from {', '.join(FAMILIES)}")
    if len(options.text_column) != len(options.train_file):
        raise ScriptError(
            f"--text_column names {len(options.text_column)} columns for {len(options.train_file)} files: one for each"
        )
    results = {"cases": [], "machine": machine_info("cpu")}
    for file, column in zip(options.train_file, options.text_column):
        tokens = options.per_device_train_batch_size * options.block_size
        lengths = lengths_of(file, column, options.block_size, tokens, options.seed)
        torch.manual_seed(options.seed)
        inputs = batches(lengths, options.block_size)
        counts = {name: int((batch["labels"] != -100).sum()) for name, batch in inputs.items()}
        for family in families:
            torch.manual_seed(options.seed)
            config = AutoConfig.for_model(
                family,
                vocab_size=VOCABULARY,
                hidden_size=options.hidden_size,
                num_hidden_layers=options.num_hidden_layers,
                num_attention_heads=options.hidden_size // 64 or 1,
                **SETTINGS.get(family, {}),
            )
            model = AutoModelForCausalLM.from_config(config).train()
            steps = {name: partial(training_step, model, batch) for name, batch in inputs.items()}
            seconds = in_turns(steps, options.rounds)
            per_token = {name: [second / counts[name] for second in seconds[name]] for name in inputs}
            case = {
                "text": column,
                "model_type": family,
                "documents": len(lengths),
                "mean_length": sum(lengths) / len(lengths),
                "longest": max(lengths),
                "tokens": counts,
                "seconds": seconds,
            }
            ratios = {
                other: [a / b for a, b in zip(per_token["packed"], per_token[other])] for other in ("full", "padded")
            }
            for other, each in ratios.items():
                case[f"packed_per_token_of_{other}"] = {"median": median(each), "each": each}
            results["cases"].append(case)
            shares = (f"{median(ratios[other]):.2f} of a {other} row's" for other in ratios)
            print(f"{column} {family}: a packed token takes {' and '.join(shares)}", flush=True)
            if options.output_file:
                write_json(options.output_file, results)
    return 0
