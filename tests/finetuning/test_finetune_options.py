"""Options of the fine-tuning programs, and what becomes of the results."""

import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
from tiny_tasks import results

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.finetuning import data as finetune_data
from ordnung.scripts.finetuning import glue_metric
from ordnung.scripts.finetuning import report as finetune_report
from ordnung.scripts.finetuning import run as finetune
from ordnung.scripts.finetuning import tasks as text_tasks
from ordnung.scripts.finetuning.options import FinetuneOptions


@pytest.mark.parametrize(
    "task, labels, scores",
    [
        ("cola", "unacceptable acceptable", "matthews_correlation"),
        ("sst2", "negative positive", "accuracy"),
        ("mrpc", "not_equivalent equivalent", "accuracy f1"),
        ("stsb", "", "pearson spearmanr"),
        ("qqp", "not_duplicate duplicate", "accuracy f1"),
        ("mnli", "entailment neutral contradiction", "accuracy"),
        ("qnli", "entailment not_entailment", "accuracy"),
        ("rte", "entailment not_entailment", "accuracy"),
        ("wnli", "not_entailment entailment", "accuracy"),
    ],
)
def test_labels_and_scores_are_those_of_glue(task, labels, scores):
    assert text_tasks.GLUE[task].labels == tuple(labels.split())
    assert [score.__name__ for score in glue_metric.SCORES[task]] == scores.split()


@pytest.mark.parametrize(
    "task, files, answers",
    [
        ("cola", "CoLA.tsv", "0 1"),
        ("sst2", "SST-2.tsv", "0 1"),
        ("mrpc", "MRPC.tsv", "0 1"),
        ("stsb", "STS-B.tsv", "2.346 0.000 5.000"),
        ("qqp", "QQP.tsv", "0 1"),
        ("mnli", "MNLI-m.tsv MNLI-mm.tsv", "entailment neutral contradiction"),
        ("qnli", "QNLI.tsv", "entailment not_entailment"),
        ("rte", "RTE.tsv", "entailment not_entailment"),
        ("wnli", "WNLI.tsv", "0 1"),
    ],
)
def test_predictions_are_as_the_server_takes_them(tmp_path, task, files, answers):
    task, answers = text_tasks.GLUE[task], answers.split()
    assert list(task.tests.values()) == files.split()
    logits = np.array([[2.3456], [-1.0], [7.0]]) if task.regression else np.eye(len(answers))
    numbers = np.array([10, 9, 2])[: len(answers)]  # which texts would sort otherwise
    finetune_report.write_submission(task, tmp_path / "file.tsv", logits, numbers)
    expected = [f"{number}\t{answer}\n" for number, answer in zip(numbers.tolist(), answers)]
    assert (tmp_path / "file.tsv").read_text() == "index\tprediction\n" + "".join(reversed(expected))


def prepare(tasks, **options):
    options = FinetuneOptions(
        model_name_or_path=str(tasks / "conv"), output_dir="any", task_name=["sst2"], dataset_path=str(tasks), **options
    )
    tokenizer = finetune_data.prepare_tokenizer(options)
    return finetune.prepare_task(text_tasks.GLUE["sst2"], options, tokenizer).train, tokenizer


def test_the_tail_is_kept(tasks):
    (whole, tokenizer), (tail, _) = prepare(tasks), prepare(tasks, max_length=6, truncation="tail")
    assert tail.cut == sum(whole.lengths > 6) > 0
    for row in range(len(whole)):
        ids, kept = (each.ids[each.starts[row] : each.starts[row + 1]].tolist() for each in (whole, tail))
        assert kept == (ids if len(ids) <= 6 else [ids[0], *ids[-5:]]) and ids[0] == tokenizer.eos_token_id


def test_processes_that_tokenize_change_nothing(tasks, monkeypatch, tmp_path):
    found = []
    for workers, cache in ((1, "one"), (2, "two"), (2, "two")):  # the last finds what is cached
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / cache)
        found.append(prepare(tasks, preprocessing_num_workers=workers)[0])
    assert list((tmp_path / "two").rglob("cache-*_00001_of_00002.arrow"))
    for name, value in vars(found[0]).items():
        assert all(np.array_equal(value, getattr(other, name)) for other in found[1:]), name


@pytest.fixture
def mirror(tasks, tmp_path):
    """A data set with a configuration for each of two tasks, as glue has on the Hub."""
    entries = []
    for task in ("sst2", "rte"):
        shutil.copytree(tasks / task, tmp_path / "mirror" / task)
        files = [{"split": split, "path": f"{task}/{split}.parquet"} for split in ("train", "validation", "test")]
        entries.append({"config_name": task, "data_files": files})
    (tmp_path / "mirror/README.md").write_text(f"---\n{json.dumps({'configs': entries})}\n---\n")
    return tmp_path / "mirror"


def test_a_data_set_of_several_tasks(run_task, mirror):
    options = {"dataset_path": None, "max_steps": 2}
    out = run_task("sst2", dataset_name=mirror, **options)
    same = run_task("sst2", "same", max_steps=2)
    assert results(out / "sst2/seed-0")["metrics"] == results(same / "sst2/seed-0")["metrics"]
    with pytest.raises(ScriptError, match=r"cannot be loaded for cola: Config name is missing.*\['sst2', 'rte'\]"):
        run_task("cola", "cola", dataset_name=mirror, **options)
    # one task alone needs no configuration of its name
    out = run_task("sst2", "alone", dataset_name=mirror / "sst2", **options)
    assert results(out / "sst2/seed-0")["metrics"] == results(same / "sst2/seed-0")["metrics"]


@pytest.mark.parametrize("task, meaning", [("sst2", "none of 0 negative, 1 positive"), ("stsb", "no similarity")])
def test_a_missing_label_of_a_csv_file(run_task, tasks, tmp_path, task, meaning):
    rows = datasets.Dataset.from_parquet(str(tasks / task / "train.parquet")).to_pandas().astype({"label": object})
    rows.loc[2, "label"] = ""
    shutil.copytree(tasks / task, tmp_path / task)
    (tmp_path / task / "train.parquet").unlink()
    rows.to_csv(tmp_path / task / "train.csv", index=False)
    with pytest.raises(ScriptError, match=rf"\(train\), row 2: label '' is {meaning}"):
        run_task(task, dataset_path=tmp_path)


def test_a_task_is_added(run_task):
    run_task("sst2", max_steps=2, seeds=[0, 1])
    out = run_task("rte", max_steps=2, seeds=[0])
    summary = results(out)
    assert list(summary["tasks"]) == ["sst2", "rte"] and summary["seeds"] == [0]
    assert summary["glue_average"]["tasks"] == ["sst2", "rte"]
    assert "| sst2 " in (out / "results.md").read_text()
    summary = results(run_task("sst2", max_steps=2, seeds=[0, 1]))
    assert list(summary["tasks"]) == ["sst2"] and summary["seeds"] == [0, 1]  # rte lacks seed 1


def test_a_run_that_fails_leaves_the_others_results(run_task, tmp_path, monkeypatch):
    original = finetune.Finetuning.loss

    def loss(self, model, batch):
        return original(self, model, batch) * (float("nan") if self.name == failing else 1)

    monkeypatch.setattr(finetune.Finetuning, "loss", loss)
    failing = "sst2/seed-0"
    with pytest.raises(ScriptError, match="sst2/seed-0: loss nan, gradient norm nan at step 1"):
        run_task("sst2 rte", max_steps=2, seeds=[0, 1])
    assert not (tmp_path / "out/results.json").exists()  # nothing is finished
    failing = "rte/seed-1"
    with pytest.raises(ScriptError, match="rte/seed-1: loss nan, gradient norm nan at step 1"):
        run_task("sst2 rte", max_steps=2, seeds=[0, 1])
    summary = results(tmp_path / "out")
    assert list(summary["tasks"]) == ["sst2", "rte"] and summary["seeds"] == [0]


def test_each_run_has_its_own_tracker(run_task, tmp_path, monkeypatch):
    started = {}

    def init_trackers(self, project_name, config):
        assert not self.trackers and project_name == "out"
        name = Path(self.logging_dir).relative_to(tmp_path / "out/logs").as_posix()
        assert name == config["run"] and name not in started
        started[name] = MagicMock()
        self.trackers.append(started[name])

    monkeypatch.setattr(finetune.Accelerator, "init_trackers", init_trackers)
    run_task("sst2 rte", max_steps=2, seeds=[0, 1])
    assert list(started) == ["sst2/seed-0", "rte/seed-0", "sst2/seed-1", "rte/seed-1"]
    for tracker in started.values():
        losses = [call for call in tracker.log.call_args_list if "loss" in call.args[0]]
        assert [call.kwargs["step"] for call in losses] == [1, 2] and tracker.finish.call_count == 1
