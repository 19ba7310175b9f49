"""A user's own labelled data: files or a data set of the Hub, their columns, checked rows, splits."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ordnung.scripts.common.corpus import find_files
from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.rows import load_rows, row_name
from ordnung.scripts.finetuning import structured
from ordnung.scripts.finetuning.labels import Labels, as_flag, as_number, find_labels, is_missing
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.tasks import THRESHOLD, Task

logger = logging.getLogger("ordnung.finetune")

TEXT_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"),
)  # fmt: skip
TEXTS = "text sentence review content body message comment document tweet utterance description".split()
LABELS = "label labels class category target y score rating stars sentiment topic tags intent similarity".split()
NUMBERS = ("id", "idx", "index", "")  # a column of row numbers is written without a name
HELD_OUT = 0.1
LARGE = 10  # of a regression: larger values are told
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}


def check_text(value: Any, column: str) -> str:
    """A cell that is a text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, not a text; write it as text")
    return value


@dataclass(frozen=True)
class Form:
    """What rows of a user's data are.

    Args:
        columns: those of the text.
        used: all that are read.
        read: a row's label, of the row, or a ValueError with reason and cure.
        cell: what a cell of the text becomes, of the cell and its column, or such a ValueError.
    """

    columns: tuple[str, ...]
    problem_type: str
    labels: tuple[str, ...]
    used: tuple[str, ...]
    read: Callable[[dict[str, Any]], Any]
    cell: Callable[[Any, str], Any] = check_text


def read_task(options: FinetuneOptions) -> Task:
    """The task that a user's data make: what is said of them is logged, what is wrong is told by row.

    Without a validation split, a tenth of the training rows is split off, of each class a tenth.

    Raises:
        ScriptError: data that cannot be read, columns that cannot be guessed, rows that cannot be used.
    """
    found, sources, name = _load(options)
    kind = {"classify": _classification, "token": _tags, "qa": _questions}[options.task]
    form = kind(options, found["train"], sources["train"])
    columns, labels, used = form.columns, form.labels, form.used
    splits = {}
    for split, data in found.items():
        if split == "test" and not options.test_file and _unlabelled(data, set(used) - set(columns)):
            logger.info(f"{sources[split]} has no labels and is left out: `ordnung predict` labels it afterwards")
            continue
        missing = [column for column in used if column not in data.column_names]
        if missing and split == "test" and set(missing).isdisjoint(columns):
            raise ScriptError(
                f"{sources[split]} has no labels (column {missing[0]!r}), and a test split is scored: leave it out, "
                "and predict it by `ordnung predict` afterwards"
            )
        if missing:
            raise ScriptError(f"{sources[split]} has no column {missing[0]!r}, only {', '.join(data.column_names)}")
        splits[split] = _checked(data.select_columns(list(used)), sources[split], form, options.skip_bad_rows)
    classes = form.problem_type == "single_label_classification"
    split_off = "validation" not in splits
    if split_off:
        fraction = HELD_OUT if options.validation_fraction is None else options.validation_fraction
        if not fraction:
            raise ScriptError(
                "without --validation_file, --validation_fraction must be above 0: nothing else is scored"
            )
        train, held_out = hold_out(splits["train"]["label"][:] if classes else [0] * len(splits["train"]), fraction)
        if not len(held_out):
            raise ScriptError(f"{sources['train']} has {len(splits['train'])} rows, too few to hold some out: add rows")
        splits["validation"] = splits["train"].select(held_out)
        splits["train"] = splits["train"].select(train)
        logger.info(f"{len(held_out):,} of the training rows are held out to score models on (--validation_fraction)")
    if classes:
        _tell_classes(splits, sources["train"], labels)
    _tell_shared(splits, columns)
    if options.threshold and form.problem_type != "multi_label_classification":
        kind = form.problem_type.replace("_", " ")
        raise ScriptError(f"--threshold {options.threshold} is for texts with several labels, and this is {kind}")
    return Task(
        name=name,
        dataset=options.dataset_name or name,
        config_name=options.dataset_config_name,
        columns=columns,
        labels=labels,
        evaluation=tuple(split for split in ("validation", "test") if split in splits),
        problem_type=form.problem_type,
        splits=splits,
        split_off=split_off,
        value=used[-1],
        unanswerable=options.task == "qa" and not all(splits["train"]["label"]),
        threshold=None if options.threshold == "best" else float(options.threshold or THRESHOLD),
    )


def _unlabelled(data: datasets.Dataset, columns: set[str]) -> bool:
    """Whether a split has no label at all; data sets of the Hub often write -1 for it."""
    return any(
        column not in data.column_names or all(is_missing(value) or value == -1 for value in data[column][:])
        for column in columns
    )


def _load(options: FinetuneOptions) -> tuple[dict[str, datasets.Dataset], dict[str, str], str]:
    """The splits, where each is from, and a name for the whole."""
    if options.dataset_name:
        name = options.dataset_name
        try:
            whole = datasets.load_dataset(name, options.dataset_config_name)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            cure = "; name one by --dataset_config_name" if "Config name is missing" in reason else ""
            raise ScriptError(f"{name} cannot be loaded: {reason}{cure}") from error
        found = {SPLITS[split]: whole[split] for split in whole if split in SPLITS}
        if "train" not in found:
            raise ScriptError(f"{name} has no train split, only {', '.join(whole)}")
        return found, {split: f"{name} ({split})" for split in found}, Path(name).name
    given = {"train": options.train_file, "validation": options.validation_file, "test": options.test_file}
    folder = Path(options.train_file[0])
    if len(options.train_file) == 1 and folder.is_dir():
        by_split: dict[str, list[str]] = {}
        for path in find_files([str(folder)], "train_file"):
            by_split.setdefault(SPLITS.get(Path(path).name.partition(".")[0].partition("-")[0], ""), []).append(path)
        if "train" in by_split:  # else all files of the folder hold training rows
            given = {
                split: given[split] if split != "train" and given[split] else by_split.get(split) for split in given
            }
    found = {split: load_rows(files, f"{split}_file") for split, files in given.items() if files}
    sources = {split: ", ".join(Path(name).name for name in given[split]) for split in found}
    return found, sources, Path(options.train_file[0]).name.partition(".")[0] or "data"


def _classification(options: FinetuneOptions, train: datasets.Dataset, source: str) -> Form:
    """Columns, problem type and labels of texts with labels, found in the training rows, and what reads a row."""
    columns, label_columns = choose_columns(train, source, options.text_column, options.label_column)
    several = len(label_columns) > 1
    if several:
        labels = Labels("multi_label_classification", "several columns of 0 and 1", tuple(label_columns))
        if options.problem_type not in (None, labels.problem_type):
            raise ScriptError(f"--problem_type {options.problem_type} has one --label_column, not {len(label_columns)}")
    else:
        (column,) = label_columns
        feature = train.features[column]
        try:
            labels = find_labels(
                train[column][:], options.problem_type, options.label_separator, getattr(feature, "names", None)
            )
        except ScriptError as error:
            raise ScriptError(f"{source}, column {column!r}: {error}") from None
        if hasattr(feature, "names"):  # the numbers of the data set's own labels, of which -1 is none
            own = labels

            def encode(value):
                return own.encode(own.names[value] if value is not None and value >= 0 else None)
        else:
            encode = labels.encode
    kinds = {"single_label_classification": f"{len(labels.names)} classes", "regression": "regression"}
    kind = kinds.get(labels.problem_type, f"multi-label, {len(labels.names)} labels")
    logger.info(
        f"{source}: {len(train):,} rows; text: {' and '.join(columns)}; label: {', '.join(label_columns)}; {kind} "
        f"({labels.why}){': ' + ', '.join(labels.names[:20]) if labels.names else ''}"
    )
    if labels.problem_type == "regression":
        numbers = [number for value in train[label_columns[0]][:] if (number := as_number(value)) is not None]
        if max(map(abs, numbers), default=0) > LARGE:
            logger.warning(
                f"{label_columns[0]} has values from {min(numbers):g} to {max(numbers):g}: a model begins near 0 and "
                "is slow to reach far ones; scale them to about -1 to 1, and what is predicted back"
            )

    def read(row: dict[str, Any]) -> Any:
        if not several:
            return encode(row[label_columns[0]])
        flags = [as_flag(row[column]) for column in label_columns]
        odd = next((column for column, flag in zip(label_columns, flags) if flag is None), None)
        if odd is not None:
            raise ValueError(f"{odd} is {row[odd]!r}, neither 0 nor 1; correct it")
        return flags

    return Form(tuple(columns), labels.problem_type, labels.names, (*columns, *label_columns), read)


def _column(data: datasets.Dataset, source: str, given: Sequence[str] | None, known: Sequence[str], option: str) -> str:
    """The one column that is named, or the first of the known ones."""
    found = list(given or [name for name in known if name in data.column_names])[:1]
    if not found or found[0] not in data.column_names:
        names = ", ".join(data.column_names)
        raise ScriptError(f"{source} has no column {' or '.join(given or known)}, only {names}; name one by --{option}")
    return found[0]


def _tags(options: FinetuneOptions, train: datasets.Dataset, source: str) -> Form:
    """Words and their tags."""
    words = _column(train, source, options.text_column, structured.WORDS, "text_column")
    tags = _column(train, source, options.label_column, structured.TAGS, "label_column")
    names = getattr(getattr(train.features[tags], "feature", None), "names", None)
    try:
        labels = tuple(names or structured.tag_names(train[tags][:], tags))
    except ValueError as error:
        raise ScriptError(f"{source}: {error}") from None
    logger.info(f"{source}: {len(train):,} rows; words: {words}; tags: {tags}, {len(labels)}: {', '.join(labels[:20])}")
    if structured.OUTSIDE in labels and labels.index(structured.OUTSIDE):
        raise ScriptError(f"{source} names the tags {', '.join(labels)}: O must be the first")

    def read(row: dict[str, Any]) -> list[int]:
        found, count = structured.cells(row[tags], tags), len(structured.cells(row[words], words))
        if len(found) != count:
            raise ValueError(f"{count} words and {len(found)} tags; give each word a tag")
        if names:
            return [int(tag) for tag in found]
        odd = next((tag for tag in found if tag not in labels), None)
        if odd is not None:
            raise ValueError(f"tag {odd!r} is none of the training data's{closest(odd, labels)}; correct it")
        return [labels.index(tag) for tag in found]

    return Form((words,), "token_classification", labels, (words, tags), read, structured.cells)


def _questions(options: FinetuneOptions, train: datasets.Dataset, source: str) -> Form:
    """SQuAD's columns."""
    columns = tuple(options.text_column or ("question", "context"))
    if len(columns) != 2:
        raise ScriptError(f"--text_column of --task qa names two columns, question and context, not {len(columns)}")
    for column in columns:
        _column(train, source, [column], (), "text_column")
    answers = _column(train, source, options.label_column, ("answers",), "label_column")
    logger.info(f"{source}: {len(train):,} rows; question: {columns[0]}; context: {columns[1]}; answers: {answers}")

    def read(row: dict[str, Any]) -> list[dict]:
        pairs = structured.gold_answers(row[answers], row[columns[1]])
        return [{"text": text, "start": start} for text, start in pairs]

    return Form(columns, "question_answering", (), (*columns, answers), read)


def choose_columns(
    data: datasets.Dataset, source: str, texts: Sequence[str] | None, labels: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """The text column or two, and the label column or several, as named or guessed.

    Raises:
        ScriptError: a column that there is not, or more than one that may be meant.
    """
    names = data.column_names
    for option, given in (("text_column", texts), ("label_column", labels)):
        for name in given or []:
            if name not in names:
                raise ScriptError(
                    f"{source} has no column {name!r} (--{option}){closest(name, names)}, only {', '.join(names)}"
                )
    if len(texts or []) > 2:
        raise ScriptError(f"--text_column takes one or two columns, not {len(texts)}")
    lower = {name.lower().strip(): name for name in names if name not in {*(texts or []), *(labels or [])}}
    texts = texts or guess_texts(list(lower.values()), source)
    rest = [name for key, name in lower.items() if name not in texts and key not in NUMBERS]
    if not labels:
        labels = [lower[name] for name in LABELS if name in lower and lower[name] not in texts]
        if not labels and texts:
            flags = all(as_flag(value) is not None for name in rest for value in data[name][:])
            labels = rest if flags or len(rest) == 1 else []
        elif len(labels) > 1:
            raise ScriptError(f"{source}: which is the label, {' or '.join(labels)}? Name it by --label_column")
    rest = [name for name in rest if name not in labels]
    if not texts and len(rest) == 1:
        texts = rest
    for option, found in (("text_column", texts), ("label_column", labels)):
        if not found:
            raise ScriptError(
                f"{source} has the columns {', '.join(names)}: name that of the {option[:-7]} by --{option}"
            )
    return list(texts), list(labels)


def guess_texts(names: Sequence[str], source: str) -> list[str]:
    """The columns with a name that texts have: one, the two of a pair, or none.

    Raises:
        ScriptError: several that are no pair.
    """
    lower = {name.lower().strip(): name for name in names}
    pair = next((pair for pair in TEXT_PAIRS if lower.keys() >= set(pair)), None)
    texts = [lower[name] for name in pair or [name for name in TEXTS if name in lower]]
    if len(texts) > 1 and not pair:
        raise ScriptError(f"{source}: which is the text, {' or '.join(texts)}? Name one or two by --text_column")
    return texts


def choose_texts(names: Sequence[str], source: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The text columns of rows without labels, as named or guessed.

    Raises:
        ScriptError: a column that there is not, none or several that may be meant.
    """
    missing = [name for name in given or [] if name not in names]
    if missing:
        raise ScriptError(f"{source} has no column {missing[0]!r}{closest(missing[0], names)}, only {', '.join(names)}")
    texts = given or guess_texts(names, source)
    others = [name for name in names if name.lower().strip() not in NUMBERS]
    texts = texts or (others if len(others) == 1 else [])
    if not 0 < len(texts) < 3:
        raise ScriptError(f"{source} has the columns {', '.join(names)}: name one or two by --text_column")
    return tuple(texts)


def _checked(data: datasets.Dataset, source: str, form: Form, skip: bool) -> datasets.Dataset:
    """The rows that can be used: the columns of the text, "label" and "idx".

    Raises:
        ScriptError: a row that cannot, or none that can.
    """
    columns, bad = form.columns, []
    kept = {"label": [], "idx": []} | {column: [] for column in columns}
    for number, row in enumerate(data):
        try:
            if all(is_missing(value) for value in row.values()):
                raise ValueError("the row is empty; delete it")
            for column in columns:
                if is_missing(row[column]):
                    raise ValueError(f"{column} is empty; fill it in, or delete the row")
            texts = [form.cell(row[column], column) for column in columns]
            kept["label"].append(form.read(row))
        except ValueError as error:
            bad.append((number, str(error)))
            continue
        kept["idx"].append(number)
        for column, text in zip(columns, texts):
            kept[column].append(text)
    if bad and not (skip and kept["idx"]):
        more = f" ({len(bad) - 1:,} more such rows: --skip_bad_rows leaves them out)" if len(bad) > 1 else ""
        raise ScriptError(f"{row_name(source, bad[0][0])}: {bad[0][1]}{more or ', or --skip_bad_rows'}")
    if bad:
        logger.warning(
            f"{source}: {len(bad):,} of {len(data):,} rows left out; {row_name('the first', bad[0][0])}: {bad[0][1]}"
        )
    return datasets.Dataset.from_dict(kept)


def hold_out(strata: Sequence[int], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: of each stratum its share, at least one, but never all."""
    random, strata, chosen = np.random.default_rng(0), np.asarray(strata), [np.zeros(0, dtype=int)]
    for stratum in np.unique(strata):
        rows = random.permutation(np.flatnonzero(strata == stratum))
        chosen.append(rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)])
    held_out = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(strata)), held_out), held_out


def _tell_classes(splits: dict[str, datasets.Dataset], source: str, names: Sequence[str]):
    """Warn of classes that can be learned or scored only by chance."""
    counts = {split: Counter(data["label"]) for split, data in splits.items()}
    for number, name in enumerate(names):
        in_train, in_validation = counts["train"][number], counts["validation"][number]
        if in_train == 1:
            row = splits["train"]["idx"][splits["train"]["label"][:].index(number)]
            logger.warning(
                f"{row_name(source, row)} is the only training row with label {name!r}: add more, or leave it out"
            )
        if in_train and not in_validation:
            logger.warning(
                f"no validation row has label {name!r}, so that it is not scored: add some, or hold out more"
            )
    total = len(splits["train"])
    rare = [name for number, name in enumerate(names) if counts["train"][number] * len(names) * 2 < total]
    if rare:
        shares = ", ".join(f"{name} {counts['train'][number] / total:.1%}" for number, name in enumerate(names[:20]))
        logger.info(
            f"the classes are unbalanced ({shares}): --class_weights balanced helps to find {', '.join(rare[:5])}"
        )


def _tell_shared(splits: dict[str, datasets.Dataset], columns: Sequence[str]):
    """Warn of texts that are scored and were trained on."""

    def texts(split):
        return [repr(row) for row in zip(*(splits[split][column][:] for column in columns))]

    seen = set(texts("train"))
    for split in splits.keys() - {"train"}:
        shared = sum(text in seen for text in texts(split))
        if shared:
            logger.warning(
                f"{shared:,} of {len(splits[split]):,} {split} rows have a text that is also a training row: scores on "
                "them tell nothing of new texts; remove the copies"
            )
