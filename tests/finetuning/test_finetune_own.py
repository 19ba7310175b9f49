"""Fine-tuning on a user's own data: what is found in it, what is wrong with it, and that rare classes are found."""

import json

import datasets
import numpy as np
import pytest
from hub_server import File, HubServer, Repository, take_for_the_hub
from huggingface_hub import constants
from own_data import prices, several, tickets, tune, write_csv, write_json_lines, write_model
from sklearn import metrics as sklearn_metrics
from tiny_tasks import metrics, results
from transformers import AutoConfig, pipeline

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.finetuning import labels as labelling
from ordnung.scripts.finetuning import own, scores
from ordnung.scripts.finetuning.data import Examples
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.tasks import Task


def read(path, **options):
    return own.read_task(FinetuneOptions(model_name_or_path="any", output_dir="any", train_file=[str(path)], **options))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.draws
def test_rare_classes_are_found(model, tmp_path):
    """Where a rare class's words are more often in texts of the frequent one, only weights find it."""
    train = write_csv(tmp_path / "tickets.csv", tickets(800, 0, mixed=0.2))
    check = write_csv(tmp_path / "check.csv", tickets(200, 1, mixed=0.2))
    options = {"validation_file": check, "num_train_epochs": 5, "pooling": "mean", "learning_rate": 5e-3}
    plain = results(tune(model, train, tmp_path / "plain", **options))
    assert plain["metrics"]["validation"]["accuracy"] == pytest.approx(0.85, abs=0.05)
    assert plain["details"]["validation"]["per_class"]["outage"]["recall"] <= 0.2
    folder = tune(model, train, tmp_path / "out", class_weights="balanced", **options)
    run = results(folder)
    details, scored = run["details"]["validation"], run["metrics"]["validation"]
    assert details["per_class"]["outage"]["recall"] >= 0.5 and details["per_class"]["billing"]["recall"] >= 0.8
    of_a_guess = {"accuracy": 0.85, "macro_f1": 0.3063, "macro_precision": 0.2833, "macro_recall": 1 / 3}
    assert details["baseline"] == pytest.approx({"what": "always other", **of_a_guess}, abs=1e-4)
    assert run["score"] == scored["macro_f1"] > plain["score"] + 0.1
    low, high = details["intervals"]["macro_f1"]
    assert low <= scored["macro_f1"] <= high <= 1 and high - low < 0.4
    # the same from the outside: a pipeline of the folder, and scikit-learn
    rows = list(tickets(200, 1, mixed=0.2))
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    named = [answer["label"] for answer in classify([row["text"] for row in rows], batch_size=20)]
    truth = [row["label"] for row in rows]
    assert sklearn_metrics.f1_score(truth, named, average="macro") == pytest.approx(scored["macro_f1"])
    order = ["billing", "other", "outage"]
    assert sklearn_metrics.confusion_matrix(truth, named, labels=order).tolist() == details["confusion"]
    for image in ("confusion_validation.png", "curves.png"):
        assert (folder / image).read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / "out/results.md").read_text()
    assert "95 % by bootstrap" in table and "always other" in table and "| outage" in table
    assert "Not better than to guess" not in table


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_samples_are_scored_as_one_by_one(problem):
    """Also those that lack a class, as samples of rare ones do."""
    random = np.random.default_rng(0)
    if problem == "regression":
        arrays = random.random(12), random.random(12)
    elif problem == "multi_label_classification":
        arrays = random.random((12, 3)) < 0.5, random.random((12, 3)) < 0.3
    else:
        arrays = random.choice(4, 12, p=[0.5, 0.3, 0.1, 0.1]), random.choice(4, 12, p=[0.6, 0.3, 0.1, 0])
    times = random.multinomial(12, np.full(12, 1 / 12), size=20)
    many = scores.resampled(problem, arrays, times)
    for sample, row in enumerate(times):
        one = scores.measure(problem, *(np.repeat(array, row, axis=0) for array in arrays))
        assert {name: values[sample] for name, values in many.items()} == pytest.approx(one)


def test_the_learning_rate_follows_the_width_and_a_run_that_learned_nothing_says_so(model, tmp_path):
    train = write_csv(tmp_path / "tickets.csv", tickets(100, 0))
    for given, used in ((None, 1.2e-3), (0, 0)):  # 32 wide
        tune(model, train, tmp_path / f"out{used}", learning_rate=given, max_steps=1)
        assert results(tmp_path / f"out{used}")["settings"]["learning_rate"] == used
    said = "Not better than to guess (always other): train longer (--num_train_epochs) or by another --learning_rate"
    assert f"{said} than 0." in (tmp_path / "out0/results.md").read_text()
    options = FinetuneOptions(model_name_or_path="any", output_dir="any", task_name=["sst2"])
    assert options.learning_rate == 5e-5


def test_seeds_have_an_interval(model, tmp_path):
    train = write_csv(tmp_path / "tickets.csv", tickets(100, 0))
    tune(model, train, tmp_path / "out", seeds=[0, 1, 2])
    summary = results(tmp_path / "out")["tasks"]["tickets"]
    values = np.array(summary["metrics"]["validation"]["macro_f1"]["values"])
    reach = 4.302653 * values.std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    expected = [values.mean() - reach, values.mean() + reach]
    assert summary["intervals"]["validation"]["macro_f1"] == pytest.approx(expected)
    assert "95 % by Student's t" in (tmp_path / "out/results.md").read_text()
    assert results(tmp_path / "out")["tasks"]["tickets"]["runs"] == ["seed-0", "seed-1", "seed-2"]


def test_several_labels_and_numbers_are_learned(model, tmp_path):
    folder = tune(
        model, write_csv(tmp_path / "tags.csv", several(500, 0)), tmp_path / "tags", num_train_epochs=8, pooling="mean"
    )
    config = AutoConfig.from_pretrained(folder)
    assert config.problem_type == "multi_label_classification" and [*config.label2id] == ["billing", "other", "outage"]
    run = results(folder)
    assert run["metrics"]["validation"]["micro_f1"] > 0.9 > run["details"]["validation"]["baseline"]["micro_f1"]
    # to name all labels is right in their share of cases, and misses none
    shares = [row["examples"] / 50 for row in run["details"]["validation"]["per_class"].values()]
    all_named = np.mean([2 * share / (1 + share) for share in shares])
    assert run["details"]["validation"]["baseline"]["macro_f1"] == pytest.approx(all_named)
    folder = tune(
        model,
        write_csv(tmp_path / "prices.csv", prices(400, 0)),
        tmp_path / "prices",
        num_train_epochs=8,
        pooling="mean",
    )
    run = results(folder)
    assert AutoConfig.from_pretrained(folder).problem_type == "regression"
    assert AutoConfig.from_pretrained(folder).id2label == {0: "score"}
    scored, baseline = run["metrics"]["validation"], run["details"]["validation"]["baseline"]
    assert scored["spearmanr"] > 0.8 and scored["mean_absolute_error"] < baseline["mean_absolute_error"] / 2


@pytest.mark.parametrize(
    "values, problem, names",
    [
        (["b", "a", "b"], "single_label_classification", ("a", "b")),
        (["10", "9", "9"], "single_label_classification", ("9", "10")),
        ([1.0, 2, 2], "single_label_classification", ("1", "2")),
        ([True, False], "single_label_classification", ("False", "True")),
        (["1.5", "2", "nan"], "regression", ()),
        ([*range(40)], "regression", ()),
        ([*map(str, range(40)), "n/a"], "regression", ()),
        ([["x"], [], ["y", "x"]], "multi_label_classification", ("x", "y")),
        (["x;y", "y", "x", "z;x"], "multi_label_classification", ("x", "y", "z")),
        (["x, y", "y", "x", "y, z", "z, x"], "multi_label_classification", ("x", "y", "z")),
        (
            ["Cork, Ireland", "Bath, England", "Bath, England"],
            "single_label_classification",
            ("Bath, England", "Cork, Ireland"),
        ),
        (["None", "some", None], "single_label_classification", ("None", "some")),
        ([[0, 1, 1], [1, 0, 0], [0, 0, 0]], "multi_label_classification", ("label_0", "label_1", "label_2")),
        ([[0], [1], [0, 1]], "multi_label_classification", ("0", "1")),
    ],
)
def test_problem_types_are_found(values, problem, names):
    found = labelling.find_labels(values, None, None)
    assert (found.problem_type, found.names) == (problem, names)


def test_lists_of_flags_are_of_one_length():
    found = labelling.find_labels([[0, 1], [1, 1], [0, 0], [1, 1, 1]], None, None)
    assert found.encode([1, 0]) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"label \[1, 1, 1\] is no list of 2 zeros and ones; correct it"):
        found.encode([1, 1, 1])
    assert labelling.find_labels([f"{i},1" for i in range(30)], None, ",").names[-1] == "29"
    with pytest.raises(ScriptError, match="labels such as '0,1' seem to be numbers with a decimal comma: write a"):
        labelling.find_labels([f"{i},1" for i in range(30)], None, None)


def test_a_problem_type_is_set():
    assert labelling.find_labels(["1", "2", "3"], "regression", None).names == ()
    assert labelling.find_labels([*map(str, range(21))] * 3, "single_label_classification", None).names[-1] == "20"
    assert labelling.find_labels(["a/b", "b"], None, "/").encode("b/a") == [1.0, 1.0]


@pytest.mark.parametrize(
    "columns, options, texts, labels",
    [
        ("id text label", {}, "text", "label"),
        ("Review Rating", {}, "Review", "Rating"),
        ("premise hypothesis label", {}, "premise hypothesis", "label"),
        ("text what", {}, "text", "what"),
        ("what label", {}, "what", "label"),
        ("a b c", {"text_column": ["b"], "label_column": ["a"]}, "b", "a"),
        ("text urgent paid", {}, "text", "urgent paid"),
    ],
)
def test_columns_are_guessed(columns, options, texts, labels):
    data = datasets.Dataset.from_dict({name: ["1", "0"] for name in columns.split()})
    found = own.choose_columns(data, "x.csv", options.get("text_column"), options.get("label_column"))
    assert found == (texts.split(), labels.split())


GOOD = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(20)]


def with_row(row, **cells):
    rows = [dict(each) for each in GOOD]
    rows[row] |= cells
    return rows


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (with_row(4, text=" "), {}, r"a.csv, row 5: text is empty; fill it in, or delete the row, or --skip_bad_rows"),
        (with_row(4, text="", label=""), {}, "row 5: the row is empty; delete it"),
        (with_row(4, label="nan"), {}, "row 5: the label is missing; give it one"),
        (
            [{**row, "label": "a"} for row in GOOD],
            {},
            "every training row has the label a: there is nothing to tell apart",
        ),
        ([{**row, "label": ""} for row in GOOD], {}, "all labels are missing: is --label_column the right one"),
        (
            [{**row, "label": f"x{i}"} for i, row in enumerate(GOOD * 2)],
            {},
            "40 different labels in 40 rows.*--label_column",
        ),
        (with_row(4, label="x"), {"problem_type": "regression"}, "row 1: label 'a' is no finite number; correct it"),
        ([{"a": "x", "b": "y", "c": "z"}], {}, "has the columns a, b, c: name that of the text by --text_column"),
        ([{"text": "x", "body": "y", "label": "z"}], {}, "which is the text, text or body"),
        ([{"text": "x", "class": "y", "label": "z"}], {}, "which is the label, label or class"),
        (GOOD, {"label_column": ["lable"]}, "no column 'lable'.*did you mean 'label'"),
        (
            [{"text": "w", "x": "1", "y": "0"}, {"text": "v", "x": "2", "y": "0"}],
            {"label_column": ["x", "y"]},
            "row 2: x is '2'",
        ),
        (GOOD[:1] + [{"text": "b", "label": "b"}], {}, "2 rows, too few to hold some out"),
        (GOOD, {"dataset_config_name": "en"}, "--dataset_config_name en is of --dataset_name: leave it out"),
        (GOOD, {"threshold": "best"}, "--threshold best is for texts with several labels, and this is single label"),
        (GOOD, {"validation_fraction": 0}, "--validation_fraction must be above 0|without --validation_file"),
    ],
)
def test_bad_rows_are_told_with_their_cure(rows, options, message, tmp_path):
    with pytest.raises(ScriptError, match=message):
        read(write_csv(tmp_path / "a.csv", rows), **options)


def test_bad_files_are_told_with_their_cure(tmp_path):
    for name, text, message in (
        ("twice.csv", "text,label,label\nx,a,b\n", "2 columns named 'label': rename all but one"),
        ("wide.csv", "text,label\nx,a\ny,b,c\n", "Expected 2 fields in line 3, saw 3: quote the cells"),
        ("empty.csv", "", "no header"),
        ("head.csv", "text,label\n", "there is no row"),
        ("a.txt", "text", "is no table: give CSV"),
        ("blank.csv", "text,label\nx,a\n\ny,b\n", "row 2: the row is empty; delete it"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ScriptError, match=message):
            read(tmp_path / name)
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    with pytest.raises(ScriptError, match="not UTF-8.*save it as UTF-8"):
        read(tmp_path / "latin.csv")


def test_a_label_of_the_validation_split_alone(tmp_path):
    train = write_csv(tmp_path / "a.csv", GOOD)
    other = write_csv(tmp_path / "b.csv", with_row(2, label="c"))
    message = r"b.csv, row 3: label 'c' is none of the training data's \(a, b\); correct it, or add training rows"
    with pytest.raises(ScriptError, match=message):
        read(train, validation_file=[str(other)])
    with pytest.raises(ScriptError, match="has no labels .column 'label'.*ordnung predict"):
        read(train, test_file=[str(write_csv(tmp_path / "c.csv", [{"text": "x"}]))])


def test_far_values_are_told(tmp_path, caplog):
    for last, told in ((9, False), (250_000, True)):
        rows = [{"text": f"word {i}", "price": i / 7} for i in range(20)] + [{"text": "last", "price": last}]
        caplog.clear()
        assert read(write_csv(tmp_path / f"{last}.csv", rows)).regression
        assert ("price has values from 0 to 250000: a model begins near 0" in caplog.text) == told


def test_bad_rows_are_left_out_and_counted(tmp_path, caplog):
    rows = with_row(3, text="")
    rows[7]["label"] = ""
    caplog.set_level("INFO")
    with pytest.raises(ScriptError, match="row 4: text is empty.*1 more such rows: --skip_bad_rows leaves them out"):
        read(write_csv(tmp_path / "a.csv", rows))
    task = read(tmp_path / "a.csv", skip_bad_rows=True)
    assert sum(len(task.splits[split]) for split in ("train", "validation")) == 18
    assert "2 of 20 rows left out" in caplog.text
    assert {3, 7}.isdisjoint(task.splits["train"]["idx"][:] + task.splits["validation"]["idx"][:])


def test_what_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [*GOOD * 5, {"text": "word 0", "label": "rare"}]
    read(write_csv(tmp_path / "a.csv", rows))
    said = caplog.text
    assert "a.csv: 101 rows; text: text; label: label; 3 classes (texts): a, b, rare" in said
    assert "a.csv, row 101 is the only training row with label 'rare'" in said
    assert "no validation row has label 'rare'" in said
    assert "--class_weights balanced helps to find rare" in said
    assert "validation rows have a text that is also a training row" in said


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "semicolon", "parquet", "folder"])
def test_kinds_of_files(kind, tmp_path):
    rows = [{**row, "text": f'{row["text"]}, "quoted'} for row in GOOD]
    if kind == "jsonl":
        path = write_json_lines(tmp_path / "a.jsonl", rows)
    elif kind == "tsv":
        path = tmp_path / "a.tsv"
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    elif kind == "semicolon":
        path = write_csv(tmp_path / "a.csv", rows, ";")
    elif kind == "parquet":
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        write_csv(path / "train.csv", rows)
        write_csv(path / "valid.csv", rows[:5])
    task = read(path)
    assert task.labels == ("a", "b") and set(task.splits) == {"train", "validation"}
    assert sum(map(len, task.splits.values())) == (25 if kind == "folder" else 20)
    assert task.splits["train"]["text"][0] in {row["text"] for row in rows}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    with HubServer() as server:
        take_for_the_hub(server, monkeypatch)
        yield server


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_data_sets_by_name(model, hub, tmp_path, caplog, where):
    """With names of the labels, a split by another name, and a test split whose labels were taken off."""
    caplog.set_level("INFO")
    files = {}
    for split, rows in (("train", GOOD), ("dev", GOOD[:5]), ("test", GOOD[:3])):
        labels = [-1 if split == "test" else i % 2 for i in range(len(rows))]
        data = datasets.Dataset.from_dict({"text": [row["text"] for row in rows], "label": labels})
        data = data.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
        (tmp_path / "tickets").mkdir(exist_ok=True)
        data.to_parquet(path := tmp_path / "tickets" / f"{split}.parquet")
        files[path.name] = File(path.read_bytes(), False)
    hub.repositories["ahab/tickets"] = Repository(private=False)
    hub.repositories["ahab/tickets"].commit("main", files, "data")
    name = "ahab/tickets" if where == "hub" else str(tmp_path / "tickets")
    folder = tune(model, None, tmp_path / "out", dataset_name=name, max_steps=2)
    run = results(folder)
    assert run["task"] == "tickets" and AutoConfig.from_pretrained(folder).id2label == {0: "neg", 1: "pos"}
    assert set(run["metrics"]) == {"validation"} and run["truncated"]["validation"]["rows"] == 5
    assert "(test) has no labels and is left out" in caplog.text
    assert run["datasets"] == ([name] if where == "hub" else [])
    assert {each["dataset_type"] for each in run["eval_results"]} == {name if where == "hub" else "local"}
    assert bool(hub.seen("train.parquet")) == (where == "hub")


def test_data_sets_that_cannot_be_had(hub, tmp_path):
    hub.repositories["ahab/parts"] = Repository(private=False)
    configs = b"---\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n---\n"
    rows = File("".join(["text,label\n", *(f"{row['text']},{row['label']}\n" for row in GOOD)]).encode(), False)
    hub.repositories["ahab/parts"].commit("main", {"README.md": File(configs, False), "a.csv": rows, "b.csv": rows}, "")
    options = {"model_name_or_path": "any", "output_dir": "any"}
    for name, message in (("ahab/parts", "pick one.*'a', 'b'.*--dataset_config_name"), ("ahab/none", "doesn't exist")):
        with pytest.raises(ScriptError, match=message):
            own.read_task(FinetuneOptions(**options, dataset_name=name))
    task = own.read_task(FinetuneOptions(**options, dataset_name="ahab/parts", dataset_config_name="b"))
    assert task.labels == ("a", "b") and len(task.splits["train"]) == 18


def test_held_out_rows_are_of_every_class():
    strata = np.repeat([0, 1, 2], [85, 10, 5])
    train, held_out = own.hold_out(strata, 0.1)
    assert np.bincount(strata[held_out]).tolist() == [8, 1, 1] and len(train) + len(held_out) == 100
    assert np.intersect1d(train, held_out).size == 0
    assert own.hold_out([0, 0, 1], 0.5)[1].tolist()[-1] < 2  # a class of one row is trained on


def examples(labels):
    return Examples(np.zeros(0), np.zeros(0), np.arange(len(labels) + 1), np.asarray(labels), np.arange(len(labels)), 0)


def test_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [85, 10, 5])
    task = Task("own", "own", None, ("text",), ("a", "b", "c"))
    weights = scores.class_weights(task, examples(labels))
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert weights[labels].mean() == pytest.approx(1)


def test_options_of_own_data_are_checked(tmp_path):
    common = {"model_name_or_path": "any", "output_dir": "any"}
    for options, message in (
        ({}, "give one of --task_name, --train_file"),
        ({"task_name": ["sst2"], "train_file": ["a.csv"]}, "give one of"),
        ({"task_name": ["sst2"], "label_column": ["x"]}, "--label_column is for data of your own"),
        ({"train_file": ["a.csv"], "dataset_path": "x"}, "--dataset_path is for --task_name"),
        ({"task_name": ["sst2"], "threshold": "best"}, "--threshold is for data of your own"),
        ({"train_file": ["a.csv"], "threshold": "1"}, "--threshold 1 must be between 0 and 1, or best"),
        ({"train_file": ["a.csv"], "task": "qa", "packing": True}, "--packing: an answer's place is told by row"),
    ):
        with pytest.raises(ScriptError, match=message):
            FinetuneOptions(**common, **options)


def test_a_finished_folder_is_kept_and_other_data_refused(model, tmp_path):
    train = write_csv(tmp_path / "a.csv", GOOD)
    folder = tune(model, train, tmp_path / "out")
    assert results(folder)["packing"] and not results(tune(model, train, tmp_path / "rows", packing=False))["packing"]
    before = (folder / "results.json").stat().st_mtime_ns
    tune(model, train, tmp_path / "out")
    assert (folder / "results.json").stat().st_mtime_ns == before
    write_csv(train, with_row(0, text="changed"))
    with pytest.raises(ScriptError, match="holds runs with sha256 of the data of a"):
        tune(model, train, tmp_path / "out")
    assert metrics(folder) and json.loads((folder / "results.json").read_text())["task"] == "a"
