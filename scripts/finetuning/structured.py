"""Data whose labels lie inside of the text: tags of words, and answers to questions."""

from typing import Any


def check_input(value: Any, column: str):
    """Raise a ValueError where a cell is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, not a text; write it as text")


def tokens(options, train, source):
    raise NotImplementedError


def questions(options, train, source):
    raise NotImplementedError
