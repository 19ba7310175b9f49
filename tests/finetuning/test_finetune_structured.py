"""Fine-tuning on tags of words and on questions: from files to scores and predictions, against naive references."""

import json
import string

import datasets
import numpy as np
import pytest
from launching import launch
from own_data import asked, tagged, tune, write_csv, write_json_lines, write_model
from tiny_tasks import metrics, results
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

from ordnung.scripts import predict
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.finetuning import data as finetune_data
from ordnung.scripts.finetuning import own, structured
from ordnung.scripts.finetuning.options import FinetuneOptions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def read(path, task, **options):
    options = {"model_name_or_path": "any", "output_dir": "any", "train_file": [str(path)], "task": task, **options}
    return own.read_task(FinetuneOptions(**options))


def run_predict(model, file, output, *more):
    words = ["--model_name_or_path", str(model), "--file", str(file), "--output", str(output), "--use_cpu", *more]
    assert predict.main(words) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def spans_of(tags):
    """Entities of IOB2 tags, word by word."""
    found, i = set(), 0
    while i < len(tags):
        if tags[i] == "O":
            i += 1
            continue
        kind, start = tags[i][2:], i
        i += 1
        while i < len(tags) and tags[i] == f"I-{kind}":
            i += 1
        found.add((kind, start, i))
    return found


@pytest.mark.parametrize(
    "tags, spans",
    [
        ("B-A I-A O B-A B-A", {("A", 0, 2), ("A", 3, 4), ("A", 4, 5)}),
        ("I-A I-A I-B", {("A", 0, 2), ("B", 2, 3)}),  # begun by an inside tag
        ("S-A B-A I-A E-A O U-B", {("A", 0, 1), ("A", 1, 4), ("B", 5, 6)}),
        ("B-A L-A I-A", {("A", 0, 2), ("A", 2, 3)}),
        ("NOUN VERB NOUN NOUN O", {("NOUN", 0, 1), ("VERB", 1, 2), ("NOUN", 2, 3), ("NOUN", 3, 4)}),
        ("B-x-y I-x-y", {("x-y", 0, 2)}),
        ("O O", set()),
    ],
)
def test_entities(tags, spans):
    assert structured.entities(tags.split()) == spans


def test_entities_of_random_tags():
    random = np.random.default_rng(0)
    for _ in range(300):
        tags = list(random.choice("O B-A I-A B-B I-B".split(), size=12))
        assert structured.entities(tags) == spans_of(tags)


def test_tags_are_learned_scored_and_predicted(model, tmp_path):
    train, rows = write_json_lines(tmp_path / "names.jsonl", tagged(300, 0)), list(tagged(60, 1))
    check = write_json_lines(tmp_path / "check.jsonl", rows)
    folder = tune(model, train, tmp_path / "out", task="token", validation_file=check, num_train_epochs=6)
    scored = results(folder)["metrics"]["validation"]
    made = run_predict(tmp_path / "out", check, tmp_path / "made.jsonl")
    pairs = [(spans_of(row["ner_tags"]), spans_of(row["predicted_tags"].split())) for row in made]
    assert [len(row["predicted_tags"].split()) for row in made] == [len(row["tokens"]) for row in rows]
    found, true, named = (sum(map(len, some)) for some in ([a & b for a, b in pairs], *zip(*pairs)))
    assert scored["entity_f1"] == pytest.approx(2 * found / (true + named)) and scored["entity_f1"] > 0.8
    assert scored["entity_precision"] == pytest.approx(found / named)
    right = [a == b for row in made for a, b in zip(row["ner_tags"], row["predicted_tags"].split())]
    assert scored["accuracy"] == pytest.approx(np.mean(right))
    details = results(folder)["details"]["validation"]
    assert set(details["per_class"]) == {"PER", "LOC"} and details["baseline"]["entity_f1"] == 0
    assert details["intervals"]["entity_f1"][0] <= scored["entity_f1"] <= details["intervals"]["entity_f1"][1]
    empty = write_json_lines(tmp_path / "empty.jsonl", [{"tokens": []}, {"tokens": rows[0]["tokens"]}])
    assert [row["predicted_tags"] for row in run_predict(tmp_path / "out", empty, tmp_path / "none.jsonl")] == [
        None,
        made[0]["predicted_tags"],
    ]
    # a pipeline reads the text itself
    pipe = pipeline("token-classification", model=str(folder), device="cpu", aggregation_strategy="first")
    text = " ".join(rows[0]["tokens"])
    entities = {(each["entity_group"], each["word"].strip()) for each in pipe(text)}
    words = rows[0]["tokens"]
    named = spans_of(made[0]["predicted_tags"].split())
    assert entities == {(kind, " ".join(words[start:end])) for kind, start, end in named}


def test_the_first_token_of_a_word_has_its_tag(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    words, tags = ["thanks", "zyzzyva", "the", "a-b"], [1, 2, 0, 1]
    made = structured.TagEncoder(tokenizer, ("tokens",), 40, "head")({"tokens": [words], "label": [tags]})
    places, labels = made["places"][0], made["word_labels"][0]
    text = " ".join(words)
    begins = [text.index(word) for word in words]
    seen = {}
    for token, (start, end) in enumerate(tokenizer(text, return_offsets_mapping=True)["offset_mapping"]):
        for word, begin in enumerate(begins):
            if start <= begin < end:
                seen.setdefault(word, token)
    assert [int(place) for place in places if place >= 0] == [0, 1, 2, 3] and len(places) > 8
    assert {int(places[token]): token for token in np.flatnonzero(places >= 0)} == seen
    assert [int(label) for label in labels if label >= 0] == tags and labels[places < 0].max() == -100


def test_words_that_are_cut_off_count_as_missed(model, tmp_path):
    rows = [{"tokens": ["the"] * 60 + ["thanks"], "ner_tags": ["O"] * 60 + ["B-PER"]}, *tagged(30, 0)]
    check = write_json_lines(tmp_path / "check.jsonl", rows[:1])
    train = write_json_lines(tmp_path / "a.jsonl", rows)
    folder = tune(model, train, tmp_path / "out", task="token", validation_file=check, max_steps=2)
    scored = results(folder)["metrics"]["validation"]
    assert results(folder)["truncated"]["validation"] == {"rows": 1, "cut": 1, "to": 48}
    assert scored["entity_recall"] == 0 and scored["accuracy"] <= 60 / 61


def test_tags_in_tables(tmp_path):
    rows = [{"words": " ".join(row["tokens"]), "tags": " ".join(row["ner_tags"])} for row in tagged(20, 0)]
    task = read(write_csv(tmp_path / "a.csv", rows), "token")
    assert task.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER") and task.head == "ForTokenClassification"
    rows[3]["tags"] += " O"
    count = len(rows[3]["words"].split())
    with pytest.raises(ScriptError, match=f"row 4: {count} words and {count + 1} tags; give each word a tag"):
        read(write_csv(tmp_path / "a.csv", rows), "token")
    with pytest.raises(ScriptError, match="no column tokens or words, only text; name one by --text_column"):
        read(write_csv(tmp_path / "b.csv", [{"text": "x"}]), "token")


@pytest.mark.parametrize("side", ["right", "left"])
def test_questions_are_learned_in_windows(model, tmp_path, side):
    """Contexts of twice the model's length, padded on either side."""
    if side == "left":
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    train = write_json_lines(tmp_path / "a.jsonl", asked(240, 0, length=8))
    rows = list(asked(20, 1, length=70))
    check = write_json_lines(tmp_path / "check.jsonl", rows)
    name = tmp_path / "tokenizer" if side == "left" else None
    options = {"task": "qa", "validation_file": check, "num_train_epochs": 8, "learning_rate": 1e-2}
    folder = tune(model, train, tmp_path / "out", tokenizer_name=name, **options)
    scored = results(folder)["metrics"]["validation"]
    made = run_predict(tmp_path / "out", check, tmp_path / "made.jsonl")
    exact = [row["predicted_answer"] == row["answers"]["text"][0] for row in made]
    assert scored["exact_match"] == np.mean(exact) > 0.7 and scored["answer_f1"] >= scored["exact_match"]
    assert results(folder)["truncated"]["validation"]["rows"] > 20  # windows
    # the likeliest span of a text that fits, by the model alone
    short = list(asked(5, 2, length=8))
    made = run_predict(folder, write_json_lines(tmp_path / "short.jsonl", short), tmp_path / "short_made.jsonl")
    tokenizer, answering = AutoTokenizer.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder)
    for row in made:
        inputs = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets, inside = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
        outputs = answering(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        pairs = [(i, j) for i, a in enumerate(inside) for j, b in enumerate(inside) if a == b == 1 and i <= j]
        i, j = max(pairs, key=lambda pair: float(outputs.start_logits[0, pair[0]] + outputs.end_logits[0, pair[1]]))
        assert row["predicted_answer"] == row["context"][offsets[i][0] : offsets[j][1]].strip()


def test_windows_cover_the_context_and_one_holds_the_answer(model):
    tokenizer = finetune_data.prepare_tokenizer(
        FinetuneOptions(model_name_or_path=str(model), output_dir="x", train_file=["x"])
    )
    (row,) = asked(1, 3, length=90)
    (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
    rows = {
        "question": [row["question"]],
        "context": [row["context"]],
        "label": [[{"text": text, "start": start}]],
        "idx": [7],
    }
    made = structured.QuestionEncoder(tokenizer, ("question", "context"), 40)(rows)
    assert len(made["input_ids"]) > 3 and max(map(len, made["input_ids"])) <= 40 and set(made["idx"]) == {7}
    covered = {at for places in made["places"] for a, b in places.reshape(-1, 2) if a >= 0 for at in range(a, b)}
    assert covered == set(range(len(row["context"])))
    held = 0
    for places, (first, last) in zip(made["places"], made["label"]):
        places = places.reshape(-1, 2)
        if first or last:
            assert row["context"][places[first, 0] : places[last, 1]].strip() == text
            held += 1
    assert held >= 1
    with pytest.raises(ScriptError, match="--truncation tail: windows read a long context whole; leave it out"):
        structured.QuestionEncoder(tokenizer, ("question", "context"), 40, "tail")


@pytest.mark.parametrize(
    "predicted, answers, expected",
    [
        ("The Whale!", ["a whale"], (1, 1)),
        ("white whale", ["whale", "the big white whale"], (0, 0.8)),
        ("", [], (1, 1)),
        ("whale", [], (0, 0)),
        ("", ["whale"], (0, 0)),
        ("the", ["an"], (1, 1)),
    ],
)
def test_scores_of_answers(predicted, answers, expected):
    assert structured.answer_scores(predicted, answers) == pytest.approx(expected)
    assert structured.normal(string.punctuation) == []


def test_questions_without_an_answer():
    """Where the first token of all windows scores higher than the best span there is none."""
    examples = finetune_data.Examples(
        ids=np.zeros(6),
        types=np.zeros(6),
        starts=np.array([0, 3, 6]),
        labels=None,
        numbers=np.arange(2),
        cut=0,
        places=np.array([-1, -1, 0, 1, 2, 3] * 2),
        rows=np.array([0, 1]),
    )
    logits = np.array([[2.0, 2], [1, 0], [0, 1], [0, 0], [1, 0], [0, 1]])
    assert [text for text, _ in structured.best_answers(logits, examples, ["a b", "c d"], True)] == ["", "c d"]
    assert [text for text, _ in structured.best_answers(logits, examples, ["a b", "c d"], False)] == ["a b", "c d"]


def test_an_answer_that_is_not_there(tmp_path):
    rows = list(asked(12, 0))
    rows[4]["answers"]["answer_start"][0] += 1
    with pytest.raises(
        ScriptError, match=r"row 5: character \d+ of the context begins .*, not the answer .*correct it"
    ):
        read(write_json_lines(tmp_path / "a.jsonl", rows), "qa")
    rows[4]["answers"] = {"text": [], "answer_start": []}
    assert read(write_json_lines(tmp_path / "b.jsonl", rows), "qa").unanswerable


def test_answers_have_no_classes_to_weigh(model, tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", asked(12, 0))
    with pytest.raises(ScriptError, match="--class_weights balanced: .* has answers in a context, no classes to weigh"):
        tune(model, path, tmp_path / "out", task="qa", class_weights="balanced", max_steps=1)


# Fine-tunes by each of the lists of arguments that a JSON file holds.
EACH = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from ordnung.scripts import finetune
Accelerator.end_training = lambda self: None  # the processes stay together
for words in json.loads(Path(sys.argv[1]).read_text()):
    assert finetune.main(words) == 0
"""


@pytest.mark.slow
def test_two_processes_equal_one(model, tmp_path):
    """Tags and answers, of rows and windows of all lengths, with a number that two processes do not share evenly."""
    data = {"token": (tagged(41, 0), tagged(23, 1)), "qa": (asked(21, 0, length=60), asked(9, 1, length=90))}
    lists, singles = [], {}
    for task, (train, check) in data.items():
        options = {"task": task, "validation_file": write_json_lines(tmp_path / f"{task}_check.jsonl", check)}
        options |= {"per_device_eval_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1}
        train = write_json_lines(tmp_path / f"{task}.jsonl", train)
        singles[task] = tune(model, train, tmp_path / f"{task}_one", per_device_train_batch_size=8, **options)
        options |= {"model_name_or_path": model, "train_file": train, "output_dir": tmp_path / f"{task}_two"}
        options |= {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True}
        lists.append([str(word) for name, value in options.items() for word in (f"--{name}", value)])
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    (tmp_path / "each.py").write_text(EACH)
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    launch("accelerate_cpu.yaml", tmp_path / "each.py", [tmp_path / "lists.json"], **cache)
    for task, single in singles.items():
        two = tmp_path / f"{task}_two/seed-0"
        assert results(two)["num_processes"] == 2 and results(single)["num_processes"] == 1
        assert metrics(two) == pytest.approx(metrics(single), rel=1e-4)
        for name in results(single)["metrics"]["validation"]:
            values = (metrics(folder, f"eval_{name}") for folder in (two, single))
            assert next(values) == pytest.approx(next(values), rel=1e-4)
        assert results(two)["details"] == results(single)["details"]
        file = tmp_path / f"{task}_check.jsonl"
        made = [run_predict(folder, file, tmp_path / f"{task}_{i}.jsonl") for i, folder in enumerate((two, single))]
        assert made[0] == made[1]
