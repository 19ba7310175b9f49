"""Predictions of files: what every kind of model says, as pipelines say it; columns, resuming, odd rows."""

import csv
import json
import signal

import datasets
import numpy as np
import pytest
from own_data import prices, several, tickets, tune, write_csv, write_json_lines, write_model
from sklearn import metrics
from tiny_tasks import results
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import ordnung
from ordnung.scripts import predict, push_to_hub
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.finetuning import predicting

DATA = {"tickets": tickets, "tags": several, "prices": prices}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with a run on each kind of labels: tickets, tags, prices."""
    folder = tmp_path_factory.mktemp("tuned")
    write_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        for name, make in DATA.items():
            train = write_csv(folder / f"{name}.csv", make(120, 0))
            tune(folder / "model", train, folder / name, max_steps=8, pooling="mean")
    return folder


def run(model, file, output, *more):
    assert (
        predict.main(
            ["--model_name_or_path", str(model), "--file", str(file), "--output", str(output), "--use_cpu", *more]
        )
        == 0
    )
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in output.read_text().splitlines()]
    with open(output, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if output.suffix == ".tsv" else ","))


@pytest.mark.parametrize("name", DATA)
def test_from_labels_to_a_shared_model(name, tuned, tmp_path, capsys):
    """finetune, predict, pipeline and a push: they tell the same labels."""
    rows = [{"number": f"00{i}", **row} for i, row in enumerate(DATA[name](50, 3))]
    made = run(tuned / name, write_csv(tmp_path / "new.csv", rows), tmp_path / "out.csv")
    assert [{key: row[key] for key in rows[0]} for row in made] == [{k: str(v) for k, v in row.items()} for row in rows]
    pipe = pipeline("text-classification", model=str(tuned / name / "seed-0"), device="cpu", top_k=None)
    said = pipe([row.get("text", row.get("review")) for row in rows], batch_size=16)
    for row, answer in zip(made, said):
        answer = {each["label"]: each["score"] for each in answer}
        if name == "prices":
            assert float(row["predicted_value"]) == pytest.approx(answer["score"], abs=1e-5)
        elif name == "tags":
            chosen = {label: score for label, score in answer.items() if score >= 0.5}
            named = row["predicted_labels"].split(";") if row["predicted_labels"] else []
            assert set(named) == set(chosen)
            shares = [float(share) for share in row["predicted_probabilities"].split(";") if share]
            assert shares == pytest.approx([chosen[label] for label in named], abs=1e-5)
        else:
            best = max(answer, key=answer.get)
            assert row["predicted_label"] == best
            assert float(row["predicted_probability"]) == pytest.approx(answer[best], abs=1e-5)
    capsys.readouterr()
    push_to_hub.main(["--model_name_or_path", str(tuned / name), "--hub_model_id", "someone/it", "--dry_run"])
    shown = capsys.readouterr().out
    assert "text-classification" in shown and f"| {name} validation" in shown
    again = run(tuned / name / "seed-0/hub", tmp_path / "new.csv", tmp_path / "again.csv", "--trust_remote_code")
    assert again == made


def test_top_k_and_threshold(tuned, tmp_path):
    file = write_json_lines(tmp_path / "new.jsonl", [{"text": row["text"]} for row in tickets(30, 5)])
    made = run(tuned / "tickets", file, tmp_path / "out.jsonl", "--top_k", "3", "--threshold", "0.5")
    for row in made:
        shares = [row[f"predicted_probability{ending}"] for ending in ("", "_2", "_3")]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)
        assert (row["predicted_label"] is None) == (shares[0] < 0.5) and row["predicted_label_3"] is None
    file = write_json_lines(tmp_path / "tags.jsonl", [{"text": row["text"]} for row in several(30, 5)])
    made = run(tuned / "tags", file, tmp_path / "tags_out.jsonl", "--threshold", "0.3", "--top_k", "2")
    assert all(share >= 0.3 for row in made for share in row["predicted_probabilities"])
    assert {len(row["predicted_labels"]) for row in made} <= {0, 1, 2}
    every = run(tuned / "tags", file, tmp_path / "all.jsonl", "--threshold", "0")
    assert {len(row["predicted_labels"]) for row in every} == {3}


@pytest.mark.parametrize("asked, adapters", [("0.3", False), ("best", True)])
def test_the_threshold_of_training_is_that_of_predictions(tuned, tmp_path, asked, adapters):
    check = write_csv(tmp_path / "check.csv", several(60, 4))
    options = {"validation_file": check, "threshold": asked, "use_peft": adapters, "pooling": "mean"}
    folder = tune(tuned / "model", tuned / "tags.csv", tmp_path / "out", max_steps=8, **options)
    details = results(folder)["details"]["validation"]
    file = write_json_lines(tmp_path / "check.jsonl", several(60, 4))
    names, truth = ["billing", "other", "outage"], [row["tags"].split(";") for row in several(60, 4)]

    def f1(*more):
        made = run(folder, file, tmp_path / "made.jsonl", "--overwrite", *more)
        flags = [
            [[name in row for name in names] for row in rows]
            for rows in (truth, [row["predicted_labels"] for row in made])
        ]
        return metrics.f1_score(*map(np.array, flags), average="macro", zero_division=0)

    scored = results(folder)["metrics"]["validation"]["macro_f1"]
    assert f1() == pytest.approx(scored) == f1("--threshold", str(details["threshold"]))
    assert f1("--threshold", "0.5") < scored
    if asked == "best":
        assert all(f1("--threshold", str(other)) <= scored + 1e-9 for other in (0.1, 0.2, 0.3, 0.4, 0.6))
    else:
        assert details["threshold"] == 0.3
    assert f"from a probability of {details['threshold']:g} on" in (tmp_path / "out/results.md").read_text()


def test_a_stopped_run_goes_on(tuned, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(predicting, "BATCHES_PER_PIECE", 2)
    file = write_csv(tmp_path / "new.csv", tickets(100, 5))
    small = ["--per_device_eval_batch_size", "8"]
    whole = run(tuned / "tickets", file, tmp_path / "whole.csv", *small)
    calls, original = [], predicting.Predictor.__call__

    def stopping(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self, rows)

    monkeypatch.setattr(predicting.Predictor, "__call__", stopping)
    words = ["--model_name_or_path", str(tuned / "tickets"), "--file", str(file), "--output", str(tmp_path / "out.csv")]
    with caplog.at_level("INFO"):
        assert predict.main([*words, "--use_cpu", *small]) == 128 + signal.SIGTERM
        assert not (tmp_path / "out.csv").exists() and "told to stop after row 48" in caplog.text
        # what was cut off in the middle of a row is written again
        with open(tmp_path / ".out.csv.part", "ab") as part:
            part.write(b"half a r")
        assert run(tuned / "tickets", file, tmp_path / "out.csv", *small) == whole
    assert "going on after row 48" in caplog.text and calls == [16, 16, 16, 16, 16, 16, 4]
    assert not list(tmp_path.glob(".out.csv*"))
    # a part of another file is not gone on with
    calls.clear()
    assert predict.main([*words[:-1], str(tmp_path / "two.csv"), "--use_cpu", *small]) == 128 + signal.SIGTERM
    other = write_csv(file, tickets(40, 6))
    assert [row["text"] for row in run(tuned / "tickets", other, tmp_path / "two.csv", *small)] == [
        row["text"] for row in tickets(40, 6)
    ]


def test_rows_without_text_have_no_prediction(tuned, tmp_path, capsys):
    rows = [{"text": row["text"]} for row in tickets(20, 0)][:5]
    rows[2]["text"] = " "
    made = run(tuned / "tickets", write_csv(tmp_path / "new.csv", rows), tmp_path / "out.tsv")
    assert [bool(row["predicted_label"]) for row in made] == [True, True, False, True, True]
    assert "out.tsv: 5 rows; 1 rows without text, and so without prediction" in capsys.readouterr().out


def test_the_first_rows_may_be_without_text(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting, "BATCHES_PER_PIECE", 1)
    rows = [{"text": " "}] * 4 + [{"text": row["text"]} for row in tickets(20, 0)][:5]
    file = write_json_lines(tmp_path / "new.jsonl", rows)
    made = run(tuned / "tickets", file, tmp_path / "out.csv", "--per_device_eval_batch_size", "2", "--top_k", "2")
    assert [bool(row["predicted_label"]) for row in made] == [False] * 4 + [True] * 5
    assert all(row["predicted_probability_2"] for row in made[4:])


def test_adapters_merged_and_stand_alone_folders(tuned, tmp_path):
    train = write_csv(tmp_path / "train.csv", tickets(60, 0))
    tune(tuned / "model", train, tmp_path / "lora", use_peft=True, merge_adapter=True, max_steps=4)
    file = write_csv(tmp_path / "new.csv", tickets(20, 1))
    made = run(tmp_path / "lora", file, tmp_path / "adapter.csv")  # the folder of the runs
    merged = run(tmp_path / "lora/seed-0/merged", file, tmp_path / "merged.csv")
    for a, b in zip(made, merged):
        assert a["predicted_label"] == b["predicted_label"]
        assert float(a["predicted_probability"]) == pytest.approx(float(b["predicted_probability"]), abs=1e-5)
    folder = tuned / "tickets/seed-0"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ordnung.save_standalone(model, tmp_path / "alone", AutoTokenizer.from_pretrained(folder))
    alone = run(tmp_path / "alone", file, tmp_path / "alone.csv", "--trust_remote_code")
    assert alone == run(folder, file, tmp_path / "own.csv")


def test_a_model_of_transformers(bert, tmp_path):
    rows = [{"sentence1": "the ship", "sentence2": "a fine sea"}, {"sentence1": "that voyage of", "sentence2": "cold"}]
    made = run(bert, write_csv(tmp_path / "new.csv", rows), tmp_path / "out.csv")
    pipe = pipeline("text-classification", model=str(bert), device="cpu")
    said = [pipe({"text": row["sentence1"], "text_pair": row["sentence2"]}) for row in rows]
    assert [row["predicted_label"] for row in made] == [answer["label"] for answer in said]
    assert [float(row["predicted_probability"]) for row in made] == pytest.approx([a["score"] for a in said], abs=1e-5)


def test_long_texts_are_cut_as_in_training(tuned, tmp_path, capsys):
    rows = [{"text": "invoice " * 100}]
    made = run(tuned / "tickets", write_csv(tmp_path / "new.csv", rows), tmp_path / "out.csv")
    assert made[0]["text"] == rows[0]["text"] and "1 texts cut to 48 tokens" in capsys.readouterr().out
    with pytest.raises(ScriptError, match=r"--max_length 49 is above the model's max_position_embeddings \(48\)"):
        run(tuned / "tickets", tmp_path / "new.csv", tmp_path / "b.csv", "--max_length", "49")


def test_what_cannot_be_predicted_is_told(tuned, tasks, tmp_path):
    file, out = write_csv(tmp_path / "new.csv", tickets(5, 0)), tmp_path / "out.csv"
    double = write_csv(tmp_path / "double.csv", [{"text": "a", "predicted_label": "b"}])
    nowhere = write_csv(tmp_path / "nowhere.csv", [{"a": "x", "b": "y", "c": "z"}])
    (tmp_path / "there.csv").write_text("")
    for model, given, output, message in (
        (tuned / "model", file, out, "is a SoftmaxLMForMaskedLM: fine-tune it first"),
        (tasks / "nowhere", file, out, "no such checkpoint folder"),
        (tuned / "tickets", double, out, "has a column 'predicted_label', which predictions go to: rename it"),
        (tuned / "tickets", nowhere, out, "has the columns a, b, c: name one or two by --text_column"),
        (tuned / "tickets", file, tmp_path / "there.csv", "is there already: --overwrite replaces it"),
        (tuned / "tickets", file, tmp_path / "out.xlsx", "ends in .csv, .tsv or .jsonl"),
    ):
        with pytest.raises(ScriptError, match=message):
            run(model, given, output)
    assert not out.exists()


def test_a_piece_is_all_that_is_in_memory(tuned, tmp_path, monkeypatch):
    """Rows are read as they are needed: of many, those of two pieces have been read when the first is written."""
    read = []
    original = predicting.load_rows

    def counting(*args, **kwargs):
        rows = original(*args, **kwargs)
        return rows.map(lambda row: read.append(1) or row)

    written, write = [], predicting.Writer.write
    monkeypatch.setattr(predicting, "load_rows", counting)
    monkeypatch.setattr(predicting, "BATCHES_PER_PIECE", 1)
    monkeypatch.setattr(predicting.Writer, "write", lambda self, rows: written.append(len(read)) or write(self, rows))
    file = write_csv(tmp_path / "new.csv", tickets(300, 5))
    run(tuned / "tickets", file, tmp_path / "out.csv", "--per_device_eval_batch_size", "10")
    assert len(written) == 30 and np.all(np.array(written) <= 10 * (np.arange(30) + 2))
