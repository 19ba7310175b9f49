"""Perplexity of a causal language model on a text."""

import logging
import math
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import ordnung  # noqa: F401  (its model types enter the Auto classes)
from ordnung.scripts.common import corpus, limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.models import check_whole, check_writes_text
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.pretraining.losses import position_buckets, token_losses


def windows(tokens: np.ndarray, block_size: int, stride: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Windows over a text, and where in each the tokens begin that it predicts.

    Args:
        tokens: (total,) token ids.
        stride: tokens between two windows, or None for blocks that do not overlap, the rest of the text left out.
    Returns:
        (n, N) token ids; (n,) the first predicted token of each window, from 1. N is block_size, or the whole of a
        shorter text with a stride.
    Raises:
        ScriptError: a text that is too short, or a stride that would skip tokens.
    """
    total = len(tokens)
    if total < 2 or (stride is None and total < block_size):
        raise ScriptError(
            f"the text holds {total} tokens, less than one block of {block_size}; give more text, a smaller "
            "--block_size, or a --stride"
        )
    if stride is None:
        count = total // block_size
        return tokens[: count * block_size].reshape(count, block_size), np.ones(count, dtype=int)
    if stride >= block_size:
        raise ScriptError(f"--stride {stride} must be below the --block_size ({block_size}), or tokens are skipped")
    size = min(block_size, total)
    # the last window ends with the text and predicts what is left
    ends = np.minimum(np.arange(size, total + stride, stride), total)
    ends = ends[: np.searchsorted(ends, total) + 1]
    places = ends[:, None] - size + np.arange(size)
    return tokens[places], np.concatenate([[1], size - np.diff(ends)])


def evaluate(model: torch.nn.Module, tokens: np.ndarray, block_size: int, stride: int | None, batch_size: int) -> dict:
    """Loss in nats per predicted token, perplexity, and the loss by position in the window.

    Raises:
        ScriptError: as `windows`.
    """
    blocks, firsts = windows(tokens, block_size, stride)
    nll, counts, done = np.zeros(blocks.shape[1]), np.zeros(blocks.shape[1], dtype=int), 0
    for losses in token_losses(model, blocks, batch_size):
        positions = np.arange(1, blocks.shape[1])
        scored = positions >= firsts[done : done + len(losses), None]
        nll[1:] += (losses * scored).sum(0, dtype=np.float64)
        counts[1:] += scored.sum(0)
        done += len(losses)
    loss = nll.sum() / counts.sum()
    by_position = [
        {"first": first, "last": last, "tokens": int(count), "loss": float(nll[first : last + 1].sum() / count)}
        for first, last in position_buckets(blocks.shape[1])
        if (count := counts[first : last + 1].sum())
    ]
    return {
        "loss": float(loss),
        "perplexity": math.exp(min(loss, 700)),
        "predicted_tokens": int(counts.sum()),
        "loss_by_position": by_position,
    }


def encode(documents: corpus.Documents, tokenizer, max_tokens: int | None) -> tuple[np.ndarray, float]:
    """The documents' tokens one after the other, at most `max_tokens`, and the tokens per UTF-8 byte of their text."""
    found = list(corpus.tokenize(corpus.texts(documents), tokenizer, math.inf if max_tokens is None else max_tokens))
    tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(ids for ids, _ in found)])
    return tokens, len(tokens) / max(sum(size for _, size in found), 1)


def load_documents(options) -> corpus.Documents:
    """The documents of the files or the data set.

    Raises:
        ScriptError: as `corpus.load_files` and `corpus.load_split`; a column of text files, which have none.
    """
    if options.dataset_name:
        return corpus.load_split(options.dataset_name, options.dataset_config_name, options.split, options.text_column)
    files = corpus.find_files(options.text_file, "text_file")
    if options.text_column != "text" and corpus.file_reader(files, "text_file")[0] == "text":
        raise ScriptError(f"--text_column {options.text_column}: {files[0]} has no columns, leave it out")
    return corpus.load_files(options.text_file, "text_file", options.text_column, streaming=False)


def load_model(options) -> torch.nn.Module:
    """The causal language model, on the accelerator if there is one and it is wanted.

    Raises:
        ScriptError: it cannot be loaded, or is not causal.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            options.model_name_or_path,
            dtype=getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ScriptError(
            f"no causal language model can be loaded from {options.model_name_or_path}: {error}"
        ) from error
    check_writes_text(model.config, options.model_name_or_path)
    check_whole(report, options.model_name_or_path)
    if not options.use_cpu and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def run(options) -> int:
    """Evaluate as evaluate_lm.py's options say, print and write the results; returns the exit status."""
    logging.basicConfig(format="%(message)s")
    tokenizer = corpus.load_tokenizer(options.tokenizer_name or options.model_name_or_path, options.trust_remote_code)
    tokens, tokens_per_byte = encode(load_documents(options), tokenizer, options.max_tokens)
    model = load_model(options)
    limits.check_vocabulary(tokenizer, model.config)
    block_size = options.block_size or limits.model_length(model, tokenizer)
    limits.check_length(model, block_size, "block_size", extrapolate=True)
    start = time.perf_counter()
    scores = evaluate(model, tokens, block_size, options.stride, options.per_device_eval_batch_size)
    results = {
        "model": options.model_name_or_path,
        "text": options.text_file or [options.dataset_name, options.dataset_config_name, options.split],
        "block_size": block_size,
        "stride": options.stride,
        "tokens": len(tokens),
        **scores,
        "bits_per_byte": scores["loss"] / math.log(2) * tokens_per_byte,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": options.dtype,
        "seconds": time.perf_counter() - start,
        "machine": machine_info("cpu" if options.use_cpu else None),
    }
    shown = [f"{results[name]:,.4f}" for name in ("loss", "perplexity", "bits_per_byte")]
    header = ["loss", "perplexity", "bits per byte", "predicted tokens"]
    print(markdown_table(header, [[*shown, f"{results['predicted_tokens']:,}"]]))
    buckets = results["loss_by_position"]
    print("\nLoss (nats per token) by position, which is the number of tokens before it in the window:\n")
    header = [f"{bucket['first']}-{bucket['last']}" for bucket in buckets]
    print(markdown_table(header, [[f"{bucket['loss']:.4f}" for bucket in buckets]]))
    if options.output_file:
        write_json(options.output_file, results)
        print(f"\nWritten: {options.output_file}")
    return 0
