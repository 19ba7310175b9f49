"""Rows of files that users bring: CSV and TSV as they are written, JSON lines, Parquet."""

import csv
import gzip
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets

from ordnung.scripts.common.corpus import file_reader, find_files
from ordnung.scripts.common.errors import ScriptError


def load_rows(patterns: Sequence[str], option: str, streaming: bool = False):
    """The rows of files of one kind, folders and glob patterns, as a data set.

    Every cell of a CSV or TSV file is a text, as it is written: 007 stays so, and an empty cell is "".

    Raises:
        ScriptError: no such file, no table, files of several kinds, one that cannot be read, no row, a duplicated
            header.
    """
    files = find_files(patterns, option)
    reader, settings = file_reader(files, option)
    if reader == "text":
        raise ScriptError(f"--{option} {files[0]} is no table: give CSV, TSV, JSON lines or Parquet")
    if reader == "csv":
        headers = {name: _header(name, settings.get("delimiter")) for name in files}
        (first, (delimiter, header)), *others = headers.items()
        for name, (_, other) in others:
            if other != header:
                raise ScriptError(
                    f"{first} has the columns {', '.join(header)}, {name} {', '.join(other)}: make them alike"
                )
        features = datasets.Features({name: datasets.Value("string") for name in header})
        # an empty line is a row, of which there is something to tell, and rows keep their numbers
        settings = {**settings, "delimiter": delimiter, "features": features, "skip_blank_lines": False}
    try:
        rows = datasets.load_dataset(reader, data_files={"train": files}, streaming=streaming, **settings)["train"]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise ScriptError(f"--{option} {', '.join(files)}: there is no row") from error
        raise ScriptError(f"--{option} {', '.join(files)} cannot be read: {_reason(error)}") from error
    if not streaming and not len(rows):
        raise ScriptError(f"--{option} {', '.join(files)}: there is no row")
    return rows


def _header(path: str, delimiter: str | None) -> tuple[str, list[str]]:
    """What separates the cells of a CSV or TSV file, and its columns."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            line = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise ScriptError(f"{path} cannot be read: {_reason(error)}") from error
    if not line.strip():
        raise ScriptError(f"{path} has no header: its first line must name the columns")
    if delimiter is None:  # spreadsheets write semicolons where the comma is the decimal sign
        delimiter = max(",;\t", key=lambda sign: (line.count(sign), sign == ","))
    quoting = (
        csv.QUOTE_NONE if delimiter == "\t" and Path(path.removesuffix(".gz")).suffix == ".tsv" else csv.QUOTE_MINIMAL
    )
    header = next(csv.reader([line], delimiter=delimiter, quoting=quoting))
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise ScriptError(f"{path} has {Counter(header)[twice[0]]} columns named {twice[0]!r}: rename all but one")
    return delimiter, header


def _reason(error: Exception) -> str:
    reason = error.__cause__ or error
    words = " ".join(str(reason).split())
    if isinstance(reason, UnicodeDecodeError):
        return f"it is not UTF-8 ({words}): save it as UTF-8"
    if "Error tokenizing data" in words:
        return f"{words.rpartition('C error: ')[2]}: quote the cells that hold a separator"
    return words


def row_name(source: str, row: int) -> str:
    """How errors name a row, given its index: rows are counted from 1, the header apart."""
    return f"{source}, row {row + 1}"
