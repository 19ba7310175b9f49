"""Labels that lie inside of a text: tags of its words, and answers to questions about it.

Tags are learned on the first token of each word; words are separated by spaces, so that a pipeline, which is given a
text, sees what was trained on. Contexts that are too long for the model are read in overlapping windows.
"""

import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.finetuning.data import Encoder, Examples
from ordnung.scripts.finetuning.labels import as_class, is_missing

WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels", "pos_tags", "label")
OUTSIDE = "O"  # the tag of words in no entity
# Of a window's likeliest starts and ends so many are combined, to answers of at most so many tokens.
CANDIDATES, LONGEST_ANSWER = 20, 30


def cells(value: Any, column: str) -> list[str]:
    """Words or tags: a list, or a text of them with spaces between.

    Raises:
        ValueError: neither.
    """
    made = value.split() if isinstance(value, str) else value
    if not isinstance(made, list) or not made:
        raise ValueError(f"{column} is {value!r}, neither a list of words nor a text with spaces between; correct it")
    return [as_class(each) for each in made]


def tag_names(values: list[Any], column: str) -> tuple[str, ...]:
    """The tags of training rows, "O" first."""
    found = {tag for value in values if not is_missing(value) for tag in cells(value, column)}
    return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag)))


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity, as its prefixes B, I, E (or L) and S (or U) say.

    An inside tag that follows none of its type begins an entity. A tag without a prefix is one of its word alone.
    """
    found, start, kind = set(), None, None
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, dash, name = tag.partition("-")
        if not dash or len(prefix) != 1:
            prefix, name = ("O", "") if tag == OUTSIDE else ("S", tag)
        if start is not None and (prefix not in "IEL" or name != kind):
            found.add((kind, start, place))
            start = None
        if prefix != "O" and start is None:
            start, kind = place, name
        if prefix in "ELSU" and start is not None:
            found.add((kind, start, place + 1))
            start = None
    return found


@dataclass
class TagEncoder(Encoder):
    """Tokenizes words; each word's tag goes to its first token. Returns besides, by token:

    - places: the number of the word that begins with it, or -1;
    - word_labels: that word's tag, or -100, where rows have labels.
    """

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        texts = [" ".join(words) for words in rows[self.columns[0]]]
        encodings = self.tokenizer(texts, verbose=False).encodings
        made, positions = self.cut(encodings)
        made["places"], labels = [], []
        for text, words, encoding, kept in zip(texts, rows[self.columns[0]], encodings, positions):
            begins = np.cumsum([0, *(len(word) + 1 for word in words)])
            places, seen = np.full(len(encoding.ids), -1, dtype=np.int32), -1
            for token, ((start, end), sequence) in enumerate(zip(encoding.offsets, encoding.sequence_ids)):
                start += len(text[start:end]) - len(text[start:end].lstrip())  # a token may begin with the space
                word = int(np.searchsorted(begins, start, side="right")) - 1
                if sequence is not None and start < end and word > seen:
                    places[token] = seen = word
            made["places"].append(places if kept is None else places[kept])
        if "label" in rows:
            for places, tags in zip(made["places"], rows["label"]):
                labels.append(np.where(places >= 0, np.array(tags, dtype=np.int32)[places], -100).astype(np.int32))
            made["word_labels"] = labels
        return made


def encoder_of(head: str):
    """What tokenizes rows for a head."""
    kinds = {"ForTokenClassification": TagEncoder, "ForQuestionAnswering": QuestionEncoder}
    return kinds.get(head, Encoder)


def tags_of(logits: np.ndarray, examples: Examples, counts: list[int]) -> list[np.ndarray]:
    """The numbers of the tags predicted for the words of each row; 0 ("O") for words that were cut off.

    Args:
        counts: words of each row.
    """
    chosen, made = logits.argmax(-1), []
    for row, count in enumerate(counts):
        part = slice(examples.starts[row], examples.starts[row + 1])
        places, tags = examples.places[part], np.zeros(count, dtype=int)
        tags[places[places >= 0]] = chosen[part][places >= 0]
        made.append(tags)
    return made


def count_entities(labels: tuple[str, ...], truths: list, guesses: list) -> tuple[np.ndarray, dict[str, Counter]]:
    """Entities of each row: (n, 5) found, predicted, true, and words with the right tag, words; and by type."""
    rows, by_type = [], {}
    for truth, guess in zip(truths, guesses):
        true, predicted = ({*entities([labels[tag] for tag in tags])} for tags in (truth, guess))
        right = sum(int(a == b) for a, b in zip(truth, guess))
        rows.append([len(true & predicted), len(predicted), len(true), right, len(truth)])
        for name, some in (("found", true & predicted), ("predicted", predicted), ("true", true)):
            for kind, *_ in some:
                by_type.setdefault(kind, Counter())[name] += 1
    return np.array(rows), by_type


def gold_answers(value: Any, context: str) -> list[tuple[str, int]]:
    """(text, first character) of SQuAD's `answers`; [] of a question without an answer.

    Raises:
        ValueError: an answer that does not stand where it says.
    """
    if not isinstance(value, dict) or not {"text", "answer_start"} <= value.keys():
        raise ValueError(f"answers is {value!r}, not {{'text': [...], 'answer_start': [...]}}; write it as SQuAD does")
    pairs = list(zip(value["text"] or [], value["answer_start"] or []))
    for text, start in pairs:
        found = context[start : start + len(text)]
        if not text or found != text:
            raise ValueError(f"character {start} of the context begins {found!r}, not the answer {text!r}; correct it")
    return pairs


@dataclass
class QuestionEncoder(Encoder):
    """Tokenizes questions with windows of their contexts. Rows of what it returns are windows:

    - idx: the number of the question in its batch's "idx";
    - places: of each token of the context its first and last + 1 character, or -1, in turn: (2 * tokens,);
    - label: first and last token of the answer, 0 and 0 where the window has none.
    """

    truncation: str = "head"

    def __post_init__(self):
        if self.truncation != "head":
            raise ScriptError(f"--truncation {self.truncation}: windows read a long context whole; leave it out")

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        questions, contexts = (list(rows[column]) for column in self.columns)
        sizes = [len(ids) for ids in self.tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]]
        room = self.max_length - max(sizes) - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 4:
            raise ScriptError(f"a question has {max(sizes)} tokens, and --max_length is {self.max_length}: raise it")
        encoded = self.tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=room // 3,
            return_overflowing_tokens=True,
            verbose=False,
        )
        made = {name: [] for name in ("input_ids", "token_type_ids", "cut", "places", "label", "idx")}
        for encoding, row in zip(encoded.encodings, encoded["overflow_to_sample_mapping"]):
            inside = np.array([sequence == 1 for sequence in encoding.sequence_ids])
            places = np.where(inside[:, None], np.array(encoding.offsets), -1)
            made["input_ids"].append(np.array(encoding.ids, dtype=np.int32))
            made["token_type_ids"].append(np.array(encoding.type_ids, dtype=np.int8))
            made["cut"].append(False)
            made["places"].append(places.ravel().astype(np.int32))
            made["idx"].append(rows["idx"][row] if "idx" in rows else row)
            answer = rows["label"][row] if "label" in rows else []
            made["label"].append(_answer_tokens(places, answer))
        return made


def _answer_tokens(places: np.ndarray, answers: list) -> list[int]:
    """First and last token of the first answer, if a window holds all of it; else 0 and 0."""
    if not answers:
        return [0, 0]
    begin = int(answers[0]["start"])
    end = begin + len(answers[0]["text"])
    first = np.flatnonzero((places[:, 0] <= begin) & (places[:, 1] > begin) & (places[:, 0] >= 0))
    last = np.flatnonzero((places[:, 0] < end) & (places[:, 1] >= end) & (places[:, 0] >= 0))
    return [int(first[0]), int(last[-1])] if len(first) and len(last) and first[0] <= last[-1] else [0, 0]


def best_answers(
    logits: np.ndarray, examples: Examples, contexts: list[str], unanswerable: bool
) -> list[tuple[str, float]]:
    """The likeliest answer to each question over all its windows, with its score; "" for none.

    Args:
        logits: (tokens, 2) scores of starts and ends.
        contexts: by number of the question, as `examples.rows` has it.
        unanswerable: whether there may be none: where the first token of every window scores higher.
    """
    best = [("", -np.inf)] * len(contexts)
    none = np.full(len(contexts), np.inf)
    for window, row in enumerate(examples.rows):
        part = slice(examples.starts[window], examples.starts[window + 1])
        scores, places = logits[part], examples.places[2 * part.start : 2 * part.stop].reshape(-1, 2)
        none[row] = min(none[row], scores[0].sum())
        masked = np.where(places[:, :1] >= 0, scores, -np.inf)
        starts, ends = (np.argsort(-masked[:, side], kind="stable")[:CANDIDATES] for side in (0, 1))
        spans = ends[None] - starts[:, None]
        totals = masked[starts, 0][:, None] + masked[ends, 1][None]
        totals = np.where((spans >= 0) & (spans < LONGEST_ANSWER), totals, -np.inf)
        i, j = np.unravel_index(totals.argmax(), totals.shape)
        if totals[i, j] > best[row][1]:
            text = contexts[row][places[starts[i], 0] : places[ends[j], 1]].strip()
            best[row] = (text, float(totals[i, j]))
    if not unanswerable:
        return best
    return [("", -score) if score < none[row] else (text, score) for row, (text, score) in enumerate(best)]


def normal(answer: str) -> list[str]:
    """The words that answers are compared by: without case, punctuation and articles (Rajpurkar et al. 2016)."""
    words = "".join(character for character in answer.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", words).split()


def answer_scores(predicted: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 of words, each the best over the true answers; of none, whether none is predicted."""
    guess, scores = normal(predicted), []
    for answer in answers or [""]:
        true = normal(answer)
        shared = sum((Counter(guess) & Counter(true)).values())
        f1 = 2 * shared / (len(guess) + len(true)) if guess and true else float(guess == true)
        scores.append((float(guess == true), f1))
    return max(exact for exact, _ in scores), max(f1 for _, f1 in scores)
