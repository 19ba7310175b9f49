"""What the labels of a user's own data are: classes, numbers or several labels each; found from the values."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ordnung.scripts.common.errors import ScriptError, closest

# Whole numbers of more kinds than this are quantities, not classes.
MOST_CLASSES = 20
SEPARATORS = ";|,"
COMMAS = re.compile(r"\s*[+-]?\d+,\d+\s*")


def is_missing(value: Any) -> bool:
    """Whether a cell says nothing: None, NaN, an empty text. A word such as "None" is a label."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def as_flag(value: Any) -> float | None:
    """0 or 1 of a number or truth value, or None."""
    number = float(value) if isinstance(value, bool) else as_number(value)
    return number if number in (0, 1) else None


def as_class(value: Any) -> str:
    """A label's name: 1 and 1.0 are one class, and texts lose the space around them."""
    number = as_number(value) if not isinstance(value, str) else None
    return str(int(number)) if number is not None and number == int(number) else str(value).strip()


def parts(value: Any, separator: str | None) -> list[str]:
    """The labels in a list or in a text of separated labels."""
    if isinstance(value, str):
        value = value.split(separator) if separator else [value]
    return [as_class(part) for part in value if not is_missing(part)]


def as_flags(value: Any) -> list[float] | None:
    """The zeros and ones of a list of numbers or truth values, or None."""
    if not isinstance(value, (list, tuple)) or any(isinstance(part, str) for part in value):
        return None
    found = [as_flag(part) for part in value]
    return None if None in found else found


@dataclass(frozen=True)
class Labels:
    """What labels mean.

    Args:
        problem_type: as transformers names it.
        why: what told so, in words.
        names: of the labels 0, 1, ...; empty for a regression.
        separator: of the labels in a text, where one holds several.
        flags: labels are lists with a 0 or 1 for each name.
    """

    problem_type: str
    why: str
    names: tuple[str, ...] = ()
    separator: str | None = None
    flags: bool = False

    def encode(self, value: Any) -> int | float | list[float]:
        """The number of a label, a quantity, or a 0 or 1 for each label.

        Raises:
            ValueError: a value that is none of them, with the reason and the cure.
        """
        if self.problem_type == "multi_label_classification":
            if value is None:
                raise ValueError("the labels are missing; a row without any has an empty list or text")
            if self.flags:
                found = as_flags(value)
                if found is None or len(found) != len(self.names):
                    raise ValueError(f"label {value!r} is no list of {len(self.names)} zeros and ones; correct it")
                return found
            chosen = parts(value, self.separator)
            for name in chosen:
                self._known(name)
            return [float(name in chosen) for name in self.names]
        if is_missing(value):
            raise ValueError("the label is missing; give it one")
        if self.problem_type == "regression":
            number = as_number(value)
            if number is None:
                raise ValueError(f"label {value!r} is no finite number; correct it")
            return number
        return self._known(as_class(value))

    def _known(self, name: str) -> int:
        if name not in self.names:
            known = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
            raise ValueError(
                f"label {name!r} is none of the training data's ({known}){closest(name, self.names)}; correct it, or "
                "add training rows that have it"
            )
        return self.names.index(name)


def find_labels(
    values: Sequence[Any], problem_type: str | None, separator: str | None, names: Sequence[str] | None = None
) -> Labels:
    """What a column of training labels means.

    Args:
        problem_type: as set by the user, or None.
        separator: as set by the user, or None.
        names: what a data set says of its labels 0, 1, ...
    Raises:
        ScriptError: no labels, or too few or too many kinds of them.
    """
    present = [value for value in values if not is_missing(value)]
    if not present:
        raise ScriptError("all labels are missing: is --label_column the right one?")
    lists = any(isinstance(value, (list, tuple)) for value in present)
    numbers = [as_number(value) for value in present]
    kinds = {as_class(value) for value in present} if not lists else set()
    numeric = sum(number is not None for number in numbers)
    whole = all(number is None or number == int(number) for number in numbers)
    if names is not None and not lists:
        kind, why = "single_label_classification", "the data set names them"
    elif lists and problem_type in (None, "multi_label_classification") and (count := _flags(present)):
        names = tuple(f"label_{number}" for number in range(count))
        return Labels("multi_label_classification", "lists of 0 and 1", names, flags=True)
    elif lists:
        kind, why = "multi_label_classification", "lists"
    elif problem_type is separator is None and len(kinds) > MOST_CLASSES and all(map(COMMAS.fullmatch, kinds)):
        raise ScriptError(f"labels such as {present[0]!r} seem to be numbers with a decimal comma: write a point")
    # a few cells that are no number, as "n/a", do not make classes of many quantities
    elif numeric == len(present) and whole and len(kinds) <= MOST_CLASSES:
        kind, why = "single_label_classification", f"whole numbers, {len(kinds)} different"
    elif numeric and (numeric == len(present) or (numeric >= 0.8 * len(present) and len(kinds) > MOST_CLASSES)):
        kind, why = "regression", "whole numbers of many kinds" if whole else "numbers"
    else:
        found = separator or _find_separator(present, kinds)
        if found:
            separator, kind, why = found, "multi_label_classification", f"texts of labels with {found!r} between"
        else:
            truths = {kind.lower() for kind in kinds} <= {"true", "false"}
            kind, why = "single_label_classification", "truth values" if truths else "texts"
    if problem_type is not None:
        kind, why = problem_type, "--problem_type"
    if kind == "regression":
        return Labels(kind, why)
    if kind == "multi_label_classification":
        separator = separator or _find_separator(present, kinds)
        counts = Counter(part for value in present for part in parts(value, separator))
    else:
        counts = Counter(as_class(value) for value in present)
    # numbers by size, texts by alphabet
    found = tuple(sorted(counts, key=lambda name: (as_number(name) is None, as_number(name) or 0.0, name)))
    if kind == "single_label_classification" and len(found) > max(MOST_CLASSES, len(present) / 2):
        raise ScriptError(
            f"{len(found)} different labels in {len(present)} rows, as {present[0]!r}: name the column of the labels "
            "by --label_column, or say --problem_type regression"
        )
    if names is not None and not lists:
        return Labels(kind, why, tuple(names))
    if not found or (kind == "single_label_classification" and len(found) < 2):
        raise ScriptError(
            f"every training row has the label {', '.join(found) or 'of no name'}: there is nothing to tell apart; add "
            "rows with another label"
        )
    return Labels(kind, why, found, separator)


def _find_separator(present: Sequence[Any], kinds: set[str]) -> str | None:
    """What stands between labels, if fewer kinds of labels are left when texts are split there."""
    for separator in SEPARATORS:
        if any(isinstance(value, str) and separator in value for value in present):
            found = {part for value in present for part in parts(value, separator)}
            if len(found) < len(kinds) + (separator != ","):  # a comma may well be part of a name
                return separator
    return None


def _flags(present: Sequence[Any]) -> int | None:
    """How many labels lists of 0 and 1 tell of, one a place; None of lists of labels, which name each once."""
    found = [as_flags(value) for value in present]
    ((length, count),) = Counter(map(len, present)).most_common(1)
    twice = any(len(set(flags)) < len(flags) for flags in found if flags)
    return length if twice and None not in found and count > len(present) / 2 else None
