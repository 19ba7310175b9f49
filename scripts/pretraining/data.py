"""The data of a pretraining run: documents, tokenizer, blocks to train and to evaluate on."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.pretraining.blocks import PlacedBlocks, ShuffledBlocks, StreamedBlocks, pack
from ordnung.scripts.pretraining.options import PretrainOptions


def load_documents(options: PretrainOptions) -> tuple[corpus.Documents, corpus.Documents | None]:
    """Training and held-out documents, streams if `options.streaming`; None for no held-out text.

    Raises:
        ScriptError: as `corpus.load_files`; a stream without validation data.
    """
    how = {"text_column": options.text_columns, "streaming": options.streaming}
    if options.train_file:
        # with weights, or joined, each pattern is a source of its own
        alone = options.train_weights or options.join_rows
        sources = [[pattern] for pattern in options.train_file] if alone else [options.train_file]
        sources = [corpus.load_files(files, "train_file", **how) for files in sources]
        held_out = None
    else:
        train, held_out = corpus.load_named(options.dataset_name, options.dataset_config_name, **how)
        sources = [train]
    if options.validation_file:
        held_out = corpus.load_files(options.validation_file, "validation_file", **how)
    if options.exclude_file:
        excluded = corpus.load_files(options.exclude_file, "exclude_file", **how)
        sources = [corpus.exclude(source, excluded) for source in sources]
    if options.join_rows:
        sources, held_out = [corpus.join(source) for source in sources], held_out and corpus.join(held_out)
    if held_out is None and options.validation_fraction > 0:
        if options.streaming:
            raise ScriptError(
                "nothing can be held out of a stream: give --validation_file, or --validation_fraction 0 for no "
                "evaluation"
            )
        # before they are mixed, as a mixture may hold a document twice
        parts = [corpus.hold_out(source, options.validation_fraction, options.seed) for source in sources]
        sources, held_out = [train for train, _ in parts], corpus.mix([rest for _, rest in parts])
    return corpus.mix(sources, options.train_weights, options.seed), held_out


@dataclass
class HeldOut:
    """Blocks to evaluate on: blocks (n, block_size), lengths (n,), tokens per UTF-8 byte of the text they come from."""

    blocks: np.ndarray
    lengths: np.ndarray
    tokens_per_byte: float


def encode(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, longest: int | None = None
) -> datasets.Dataset:
    """The token ids of each document, in a memory-mapped column "ids"; `datasets` keeps them for the next run.

    Each is closed by the end-of-document token.

    Args:
        longest: as an encoder reads documents in place of that: with the tokenizer's special tokens, cut off at so
            many, those of less than two tokens left out.
    """
    # by what the tokenizer does, not by the object, whose name is another after a checkpoint
    state = tokenizer
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # set by calls
    end = corpus.end_of_document(tokenizer) if longest is None else f"cut off at {longest}"
    state = datasets.fingerprint.Hasher.hash([documents._fingerprint, state, end])

    def ids_of(rows):
        if longest is None:
            return {"ids": [ids for ids, _ in corpus.tokenize(rows["text"], tokenizer)]}
        texts = [text or "" for text in rows["text"]]
        made = tokenizer(texts, truncation=True, max_length=longest, verbose=False)["input_ids"]
        return {"ids": [ids for ids in made if len(ids) > 1]}

    return documents.map(
        ids_of,
        batched=True,
        batch_size=100 if longest is None else 1000,
        remove_columns=documents.column_names,
        features=datasets.Features({"ids": datasets.Sequence(datasets.Value("int32"))}),
        new_fingerprint=state,
        desc="tokenizing",
    )


def placed(encoded: datasets.Dataset) -> tuple[list[np.ndarray], np.ndarray]:
    """What `encode` gives, as `PlacedBlocks` takes it: arrays of the mapped file, and the tokens of each document."""
    column = encoded.data.column("ids")
    sizes = np.concatenate([np.zeros(0, dtype=int), *map(pc.list_value_length, column.chunks)])
    return [chunk.flatten().to_numpy() for chunk in column.chunks], sizes


def training_blocks(
    options: PretrainOptions, documents: corpus.Documents, tokenizer, several: bool = False
) -> ShuffledBlocks | StreamedBlocks:
    """The endless sequence of training blocks.

    Args:
        several: where documents are kept apart, let a block hold several; see `pack`.

    Raises:
        ScriptError: not one block of text (a stream tells when it is read).
    """
    separate = options.respect_document_boundaries
    if options.streaming:
        return StreamedBlocks(documents, tokenizer, options.block_size, separate, options.seed, several)
    blocks = PlacedBlocks(*placed(encode(documents, tokenizer)), options.block_size, separate, several)
    if len(blocks) == 0:
        raise ScriptError(
            f"the training data holds {blocks.tokens} tokens, less than one block of {options.block_size}; "
            "give more text or a smaller --block_size"
        )
    return ShuffledBlocks(blocks, blocks.lengths, options.seed)


def held_out_blocks(options: PretrainOptions, documents, tokenizer, several: bool = False) -> HeldOut:
    """The first `max_eval_blocks` blocks of held-out text, or all.

    Raises:
        ScriptError: not one block of text.
    """
    wanted = math.inf if options.max_eval_blocks is None else options.max_eval_blocks * options.block_size
    encoded, tokens, size = [], 0, 0.0
    for ids, part in corpus.tokenize(corpus.texts(documents), tokenizer, wanted):
        encoded.append(ids)
        tokens, size = tokens + len(ids), size + part
    blocks, lengths, _ = pack(encoded, options.block_size, options.respect_document_boundaries, several=several)
    if len(blocks) == 0:
        raise ScriptError(
            f"the held-out text holds {tokens} tokens, less than one block of {options.block_size}: give more by "
            "--validation_file or --validation_fraction, or make blocks smaller"
        )
    return HeldOut(blocks[: options.max_eval_blocks], lengths[: options.max_eval_blocks], tokens / size)


def load_tokenizer(options: PretrainOptions, checkpoint: Path | None, documents, accelerator: Accelerator):
    """The tokenizer of the checkpoint, the one named, or one trained on the documents (by the main process)."""
    if checkpoint is None and options.train_tokenizer_vocab_size:
        trained = None
        if accelerator.is_main_process:
            trained = corpus.train_tokenizer(
                corpus.texts(documents), options.train_tokenizer_vocab_size, options.objective == "masked"
            )
        return broadcast_object_list([trained])[0]
    name = checkpoint or options.tokenizer_name or options.model_name_or_path
    return corpus.load_tokenizer(str(name), options.trust_remote_code)
