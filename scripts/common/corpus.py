"""Text for pretraining: documents from files or data sets, held-out text, tokenizers."""

import glob
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ordnung.scripts.common.errors import ScriptError

logger = logging.getLogger("ordnung.text")

Documents = datasets.Dataset | datasets.IterableDataset
# The readers of local files by their ending. GLUE's own .tsv files hold bare quotation marks, and words such as "null".
READERS = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3, "keep_default_na": False}),
}
DATA = Path(__file__).resolve().parents[1] / "data"
_TEXT = datasets.Features({"text": datasets.Value("large_string")})
# Long documents are tokenized in pieces of about this many characters: many at once, and in bounded memory.
PIECE_CHARACTERS = 2**18
# Documents are tokenized in groups of about this many characters; it is also the range a stream is shuffled over.
GROUP_CHARACTERS = 2**22
# A tokenizer learns from at most this much text, which is far more than its merges need.
TOKENIZER_CHARACTERS = 2**28
# No token of a byte-level BPE or a WordPiece spans these places (before a word's only space, after a line's only
# newline), so that pieces cut there tokenize as the whole.
_SAFE_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


def find_files(patterns: Sequence[str], option: str) -> list[str]:
    """Expand file names, folders and glob patterns; what matches nothing may be the name of a text that is installed.

    Raises:
        ScriptError: a pattern that matches no file.
    """
    files = []
    for pattern in patterns:
        matches = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if Path(pattern).is_dir():
            matches = sorted(str(path) for path in Path(pattern).glob("[!.]*") if path.is_file())
            if not matches:
                raise ScriptError(f"--{option} {pattern}: the folder holds no files")
        if not matches and (DATA / pattern).is_file():
            matches = [str(DATA / pattern)]
        if not matches:
            raise ScriptError(f"--{option} {pattern}: no such file")
        files += matches
    return files


def file_reader(files: Sequence[str], option: str) -> tuple[str, dict]:
    """The reader of `READERS` for files of one kind, or "text" for every other name.

    Raises:
        ScriptError: files of several kinds.
    """
    endings = {Path(name.removesuffix(".gz")).suffix.lower() for name in files}
    readers = {str(reader): reader for reader in (READERS.get(ending, ("text", {})) for ending in endings)}
    if len(readers) > 1:
        kinds = " and ".join(sorted(ending.removeprefix(".") or "text" for ending in endings))
        raise ScriptError(f"--{option} mixes {kinds} files; give files of one kind")
    return next(iter(readers.values()))


def read_text(path: str) -> str:
    """Read a UTF-8 text file.

    Raises:
        ScriptError: an empty or binary file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScriptError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); convert it first") from None
    if "\0" in text:
        raise ScriptError(f"{path} is binary, not text (a zero byte at character {text.index(chr(0))})")
    if not text.strip():
        raise ScriptError(f"{path} is empty; give a file that holds text")
    return text


def _read_texts(files: list[str], stamps: list[tuple]) -> Iterator[dict]:
    for path in files:
        yield {"text": read_text(path)}


def load_files(patterns: Sequence[str], option: str, text_column: str | Sequence[str], streaming: bool) -> Documents:
    """Documents of local files: one a .txt file, one a row of a JSON, Parquet, CSV or TSV file.

    Args:
        text_column: of several, each that a file has gives a document a row.
    Returns:
        a data set with a column "text", memory-mapped, or read while it is used if streaming.
    Raises:
        ScriptError: no such file, unreadable or empty data, no such column.
    """
    files = find_files(patterns, option)
    kind, settings = file_reader(files, option)
    if kind == "text":
        # what is cached is found by these arguments: the same file with another content is another
        stamps = [(os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
        arguments = {"files": files, "stamps": stamps}
        if streaming:
            return datasets.IterableDataset.from_generator(_read_texts, gen_kwargs=arguments)
        try:
            return datasets.Dataset.from_generator(_read_texts, _TEXT, gen_kwargs=arguments)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None
    parts = []
    for some in [files] if isinstance(text_column, str) else [[file] for file in files]:  # each may have others
        data = _load_dataset(kind, data_files={"train": some}, streaming=streaming, **settings)["train"]
        parts.append(_text_of(data, text_column, ", ".join(some)))
    return mix(parts)


def load_named(
    name: str, config_name: str | None, text_column: str | Sequence[str], streaming: bool
) -> tuple[Documents, Documents | None]:
    """Documents of a data set of the Hub (or of a folder that `datasets` can load).

    Args:
        text_column: as `load_files` takes it.
    Returns:
        (train, validation), each as `load_files` returns it; validation is None where the data set has no such split.
    Raises:
        ScriptError: the data set cannot be loaded, has no train split or no such column.
    """
    splits = _load_dataset(name, config_name, streaming=streaming)
    if "train" not in splits:
        raise ScriptError(f"{name} has no train split, only {', '.join(splits)}")
    return tuple(
        _text_of(splits[split], text_column, f"{name} ({split})") if split in splits else None
        for split in ("train", "validation")
    )


def load_split(name: str, config_name: str | None, split: str, text_column: str) -> Documents:
    """Documents of one split of a data set of the Hub (or of a folder that `datasets` can load).

    Raises:
        ScriptError: the data set cannot be loaded, has no such split or column, or no text.
    """
    splits = _load_dataset(name, config_name)
    if split not in splits:
        raise ScriptError(f"{name} has no split {split!r}, only {', '.join(splits)}; name one by --split")
    return _text_of(splits[split], text_column, f"{name} ({split})")


def _load_dataset(*args, **kwargs):
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        source = ", ".join(kwargs["data_files"]["train"]) if "data_files" in kwargs else args[0]
        raise ScriptError(f"{source} cannot be loaded: {error.__cause__ or error}") from error


def _text_of(data: Documents, text_column: str | Sequence[str], source: str) -> Documents:
    columns = data.column_names
    if columns is None:  # a stream learns its columns from its first row
        columns = list(next(iter(data), {}))
    if not isinstance(text_column, str):
        found = [name for name in text_column if name in columns] or [" or ".join(text_column)]
        return mix([_text_of(data, name, source) for name in found])
    if text_column not in columns:
        raise ScriptError(
            f"{source} has no column {text_column!r}, only {', '.join(columns)}; name one by --text_column"
        )
    data = data.select_columns([text_column]).rename_columns({} if text_column == "text" else {text_column: "text"})
    if isinstance(data, datasets.IterableDataset):
        return data
    kind = data.features["text"]
    kind = getattr(kind, "dtype", None) or type(kind).__name__.lower()
    if kind not in ("string", "large_string", "null"):
        raise ScriptError(f"{source}: its column {text_column!r} holds {kind}, not text; name one by --text_column")
    full = np.zeros(0, dtype=int)
    if kind != "null":
        sizes = [pc.fill_null(pc.binary_length(chunk), 0) for chunk in data.data.column("text").chunks]
        full = np.flatnonzero(np.concatenate(sizes))
    if not len(full):
        raise ScriptError(f"{source} holds no text in its column {text_column!r}")
    return data if len(full) == len(data) else data.select(full)


def join(documents: datasets.Dataset) -> datasets.Dataset:
    """One document, whose lines or paragraphs these are."""

    def joined(rows: dict[str, list[str]]) -> dict[str, list[str]]:
        return {"text": ["".join(text if text.endswith("\n") else f"{text}\n" for text in rows["text"])]}

    return documents.map(joined, batched=True, batch_size=None, features=_TEXT, desc="joining rows")


def exclude(documents: Documents, excluded: Documents) -> Documents:
    """The documents that are not among others, whatever their case and white space.

    Raises:
        ScriptError: there are none.
    """
    known = {_mark(text) for text in texts(excluded)}
    if isinstance(documents, datasets.IterableDataset):
        return documents.filter(lambda row: _mark(row["text"]) not in known)
    state = datasets.fingerprint.Hasher.hash([documents._fingerprint, sorted(known)])
    kept = documents.filter(lambda row: _mark(row["text"]) not in known, new_fingerprint=state, desc="excluding")
    logger.info(f"{len(documents) - len(kept):,} of {len(documents):,} documents are in --exclude_file: left out")
    if not len(kept):
        raise ScriptError("every document to train on is in --exclude_file: give other text")
    return kept


def _mark(text: str | None) -> bytes:
    return hashlib.blake2b(" ".join((text or "").casefold().split()).encode(), digest_size=16).digest()


def texts(documents: Documents) -> Iterator[str]:
    """The texts of documents, one after the other.

    Raises:
        ScriptError: one that is no text, which a stream tells only when it comes to it.
    """
    for number, row in enumerate(documents):
        text = row["text"]
        if not isinstance(text, str | None):
            raise ScriptError(f"document {number} is {text!r}, not a text; name a column of texts by --text_column")
        yield text or ""


def hold_out(documents: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split documents into training and held-out text.

    Whole documents, chosen at random, are held out where `fraction` comes to at least one of them; else the last part
    of each document, cut at a line's end where it has one near.
    """
    count = int(len(documents) * fraction)
    if count >= 1:
        chosen = np.zeros(len(documents), dtype=bool)
        chosen[np.random.default_rng(seed).permutation(len(documents))[:count]] = True
        return documents.select(np.flatnonzero(~chosen)), documents.select(np.flatnonzero(chosen))

    def part(row: dict, last: bool) -> dict:
        text = row["text"]
        cut = round(len(text) * (1 - fraction))
        cut = text.rfind("\n", cut // 2, cut) + 1 or cut
        return {"text": text[cut:] if last else text[:cut]}

    train, held_out = (documents.map(part, fn_kwargs={"last": last}, desc="splitting") for last in (False, True))
    return train, held_out


def mix(sources: Sequence[Documents], weights: Sequence[float] | None = None, seed: int = 0) -> Documents:
    """Documents of several sources: one source after the other, or at random by weight.

    By weight they go on until each document was drawn once, so that those of other sources may come again.
    """
    if len(sources) > 1:
        sources = [source.cast_column("text", _TEXT["text"]) for source in sources]
    if weights is None:
        return sources[0] if len(sources) == 1 else datasets.concatenate_datasets(list(sources))
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(sources, shares, seed, stopping_strategy="all_exhausted")


def split_pieces(text: str) -> list[str]:
    """Cut a document into pieces of about `PIECE_CHARACTERS` that together tokenize as the whole."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + PIECE_CHARACTERS)
        if cut is None:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: float = math.inf
) -> Iterator[tuple[np.ndarray, float]]:
    """Token ids of each document, closed by the end-of-document token, and its size in UTF-8 bytes.

    Documents without a token are left out. After `max_tokens` in all, the rest is: the last document is cut, and its
    size is that of the part which is kept.
    """
    end = end_of_document(tokenizer)
    for group in _groups(documents):
        pieces = [split_pieces(text) for text in group]
        flat = tokenizer([piece for some in pieces for piece in some], add_special_tokens=False, verbose=False)
        ids = iter(flat["input_ids"])
        for text, some in zip(group, pieces):
            tokens = np.concatenate([*(np.array(next(ids), dtype=np.int32) for _ in some), [end]], dtype=np.int32)
            if len(tokens) == 1:
                continue
            size = len(text.encode())
            if len(tokens) > max_tokens:
                kept = tokens[: int(max_tokens)]
                # the share of the text that is kept; not its size itself, as a tokenizer may change the text
                part, whole = (len(tokenizer.decode(some).encode()) for some in (kept, tokens[:-1]))
                size, tokens = size * part / max(whole, 1), kept
            yield tokens, size
            max_tokens -= len(tokens)
            if max_tokens <= 0:
                return


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents with text, in lists of about `GROUP_CHARACTERS`."""
    group, characters = [], 0
    for text in documents:
        if text:
            group.append(text)
            characters += len(text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that separates documents: eos, or sep where a tokenizer has no eos.

    Raises:
        ScriptError: the tokenizer has neither.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ScriptError(f"the tokenizer {tokenizer.name_or_path} has no eos or sep token to separate documents by")
    return end


def train_tokenizer(documents: Iterable[str], vocab_size: int, masked: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every text is representable, so that there is no unknown token.

    Special tokens: `<|endoftext|>` (bos and eos), `<|pad|>`, and `<|mask|>` for the masked objective.

    Raises:
        ScriptError: `vocab_size` leaves no room beside the 256 bytes and the special tokens.
    """
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    if masked:
        special["mask_token"] = "<|mask|>"
    names = list(dict.fromkeys(special.values()))
    if vocab_size < 256 + len(names):
        raise ScriptError(f"--train_tokenizer_vocab_size must be at least {256 + len(names)}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited_pieces(documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _limited_pieces(documents: Iterable[str]) -> Iterator[str]:
    seen = 0
    for text in documents:
        for piece in split_pieces(text or ""):
            yield piece
            seen += len(piece)
            if seen >= TOKENIZER_CHARACTERS:
                return


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the Hub.

    Raises:
        ScriptError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScriptError(f"no tokenizer can be loaded from {name}: {error}") from error
