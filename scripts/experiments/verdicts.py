"""Intervals over seeds, and verdicts that are computed from them: no table types its own.

A verdict is `HOLDS`, `PART` (one of several conditions holds and one does not), `FAILS` or `OPEN` (the interval lies on
both sides of what is claimed, there is but one run, or the measurement cannot tell).
"""

import math
from collections.abc import Sequence

from ordnung.scripts.common.tables import Interval, interval

HOLDS, PART, FAILS, OPEN = "holds", "holds in part", "does not hold", "not decided"
MARGIN = 0.02  # relative: closer than that counts as equal


def changes(own: Sequence[float], reference: Sequence[float]) -> Interval:
    """By how much `own` exceeds `reference`, relative to it, seed by seed.

    Of the logarithms of the ratios, so that a half and a double are equally far from nothing.
    """
    logs = interval([math.log(a / b) for a, b in zip(own, reference)])
    return Interval(*(math.exp(min(value, 700)) - 1 for value in (logs.mean, logs.low, logs.high)), logs.n)


def difference(own: Sequence[float], reference: Sequence[float]) -> Interval:
    """By how much values exceed others of the same seeds."""
    return interval([a - b for a, b in zip(own, reference)])


def at_least(found: Interval, bound: float) -> str:
    """Whether a quantity is `bound` or more: its whole interval must be, or must not."""
    if found.low >= bound:
        return HOLDS
    return FAILS if found.high < bound else OPEN


def at_most(found: Interval, bound: float) -> str:
    return at_least(Interval(-found.mean, -found.high, -found.low, found.n), -bound)


def equal(found: Interval, margin: float = MARGIN) -> str:
    """Whether a difference is nothing but for `margin`: its whole interval lies within, or without."""
    if -margin <= found.low and found.high <= margin:
        return HOLDS
    return FAILS if found.low > margin or found.high < -margin else OPEN


def together(verdicts: Sequence[str]) -> str:
    """Of a claim with several conditions: all hold, none does, or some do."""
    kinds = set(verdicts)
    if len(kinds) == 1:
        return kinds.pop()
    return PART if PART in kinds or {HOLDS, FAILS} <= kinds else OPEN


def everywhere(verdicts: Sequence[str]) -> str:
    """Of a claim about all cases: one that fails is enough."""
    return FAILS if FAILS in verdicts else together(verdicts)


def beyond_counting(verdict: str, perplexities: Sequence[float], trigram: float) -> str:
    """A verdict from language modelling: none unless each model's mean perplexity is below the trigram's."""
    return verdict if max(perplexities) < trigram else OPEN
