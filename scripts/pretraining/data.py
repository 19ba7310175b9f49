"""The data of a pretraining run: documents, tokenizer, blocks to train and to evaluate on."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.pretraining.blocks import MemoryBlocks, StreamedBlocks, pack
from ordnung.scripts.pretraining.options import PretrainOptions


def load_documents(options: PretrainOptions):
    """Training and held-out documents: lists of str, or streams if `options.streaming`; None for no held-out text.

    Raises:
        ScriptError: as `corpus.load_files`; a stream without validation data.
    """
    if options.train_file:
        train = corpus.load_files(options.train_file, "train_file", options.text_column, options.streaming)
        held_out = None
    else:
        train, held_out = corpus.load_named(
            options.dataset_name, options.dataset_config_name, options.text_column, options.streaming
        )
    if options.validation_file:
        held_out = corpus.load_files(options.validation_file, "validation_file", options.text_column, options.streaming)
    if held_out is not None or options.validation_fraction == 0:
        return train, held_out
    if options.streaming:
        raise ScriptError(
            "nothing can be held out of a stream: give --validation_file, or --validation_fraction 0 for no evaluation"
        )
    return corpus.hold_out(train, options.validation_fraction, options.seed)


def texts_of(documents):
    """The texts of documents, be they a list or a stream of rows."""
    return documents if isinstance(documents, list) else (row["text"] for row in documents)


@dataclass
class HeldOut:
    """Blocks to evaluate on: blocks (n, block_size), lengths (n,), tokens per UTF-8 byte of the text they come from."""

    blocks: np.ndarray
    lengths: np.ndarray
    tokens_per_byte: float


def training_blocks(
    options: PretrainOptions, documents, tokenizer, several: bool = False
) -> MemoryBlocks | StreamedBlocks:
    """The endless sequence of training blocks.

    Args:
        several: where documents are kept apart, let a block hold several; see `pack`.

    Raises:
        ScriptError: not one block of text (a stream tells when it is read).
    """
    separate = options.respect_document_boundaries
    if options.streaming:
        return StreamedBlocks(documents, tokenizer, options.block_size, separate, options.seed, several)
    encoded = [ids for ids, _ in corpus.tokenize(documents, tokenizer)]
    blocks, lengths, _ = pack(encoded, options.block_size, separate, several=several)
    if len(blocks) == 0:
        raise ScriptError(
            f"the training data holds {sum(map(len, encoded))} tokens, less than one block of {options.block_size}; "
            "give more text or a smaller --block_size"
        )
    return MemoryBlocks(blocks, lengths, options.seed)


def held_out_blocks(options: PretrainOptions, documents, tokenizer, several: bool = False) -> HeldOut:
    """The first `max_eval_blocks` blocks of held-out text, or all.

    Raises:
        ScriptError: not one block of text.
    """
    wanted = math.inf if options.max_eval_blocks is None else options.max_eval_blocks * options.block_size
    encoded, tokens, size = [], 0, 0.0
    for ids, part in corpus.tokenize(texts_of(documents), tokenizer, wanted):
        encoded.append(ids)
        tokens, size = tokens + len(ids), size + part
    blocks, lengths, _ = pack(encoded, options.block_size, options.respect_document_boundaries, several=several)
    if len(blocks) == 0:
        raise ScriptError(
            f"the held-out text holds {tokens} tokens, less than one block of {options.block_size}; raise "
            "--validation_fraction, give --validation_file, or set --validation_fraction 0 for no evaluation"
        )
    return HeldOut(blocks[: options.max_eval_blocks], lengths[: options.max_eval_blocks], tokens / size)


def load_tokenizer(options: PretrainOptions, checkpoint: Path | None, documents, accelerator: Accelerator):
    """The tokenizer of the checkpoint, the one named, or one trained on the documents (by the main process)."""
    if checkpoint is None and options.train_tokenizer_vocab_size:
        trained = None
        if accelerator.is_main_process:
            trained = corpus.train_tokenizer(
                texts_of(documents), options.train_tokenizer_vocab_size, options.objective == "masked"
            )
        return broadcast_object_list([trained])[0]
    name = checkpoint or options.tokenizer_name or options.model_name_or_path
    return corpus.load_tokenizer(str(name), options.trust_remote_code)
