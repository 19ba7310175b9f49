"""What fine-tuning makes of data: texts cut and padded, local files, bad input."""

import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from tiny_tasks import TINY, metrics, table
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.experiments import baselines
from ordnung.scripts.experiments.options import BaselineOptions
from ordnung.scripts.finetuning import data as finetune_data
from ordnung.scripts.finetuning import run as finetune
from ordnung.scripts.finetuning import tasks as text_tasks
from ordnung.scripts.finetuning.options import FinetuneOptions


class TestCutting:
    @pytest.mark.parametrize(
        "truncation, kept",
        [("head", [0, 1, 2, 3, 4, 11]), ("tail", [0, 7, 8, 9, 10, 11]), ("head_tail", [0, 1, 8, 9, 10, 11])],
    )
    def test_one_text(self, truncation, kept):
        segments = np.array([-1, *[0] * 10, -1])
        assert finetune_data.kept_positions(segments, 6, truncation).tolist() == kept

    @pytest.mark.parametrize("first, second, expected", [(10, 3, (5, 3)), (3, 10, (3, 5)), (10, 10, (4, 4))])
    def test_the_longer_of_a_pair_gives_first(self, first, second, expected):
        segments = np.array([-1, *[0] * first, -1, *[1] * second, -1])
        kept = segments[finetune_data.kept_positions(segments, 11, "head")]
        assert ((kept == 0).sum(), (kept == 1).sum(), (kept == -1).sum()) == (*expected, 3)

    def test_as_the_tokenizer_cuts(self, tasks):
        options = finetune.FinetuneOptions(model_name_or_path=str(tasks / "conv"), output_dir="any", task_name=["sst2"])
        tokenizer = finetune_data.prepare_tokenizer(options)
        task = text_tasks.TASKS["mrpc"]
        rows = table(task, 30, 3)
        encoded = finetune_data.Encoder(tokenizer, task.columns, 9, "head")(rows[:])
        expected = tokenizer(
            rows["sentence1"][:], rows["sentence2"][:], truncation=True, max_length=9, return_token_type_ids=True
        )
        assert [len(ids) for ids in encoded["input_ids"]] == [len(ids) for ids in expected["input_ids"]]
        same = [list(a) == b for a, b in zip(encoded["input_ids"], expected["input_ids"])]
        assert sum(same) > 20  # where both give an odd token, either may
        assert [list(types) for types, equal in zip(encoded["token_type_ids"], same) if equal] == [
            types for types, equal in zip(expected["token_type_ids"], same) if equal
        ]
        whole = tokenizer(rows["sentence1"][:], rows["sentence2"][:])["input_ids"]
        assert sum(encoded["cut"]) == sum(len(ids) > 9 for ids in whole) > 0


class TestTemplate:
    def test_pairs_are_separated_and_the_saved_tokenizer_does_the_same(self, tasks, tmp_path):
        options = finetune.FinetuneOptions(model_name_or_path=str(tasks / "conv"), output_dir="any", task_name=["sst2"])
        tokenizer = finetune_data.prepare_tokenizer(options)
        end = tokenizer.eos_token_id
        a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the ship", "a sea"))
        tokenizer.save_pretrained(tmp_path)
        for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert each("the ship")["input_ids"] == [end, *a, end]
            assert each("the ship", "a sea")["input_ids"] == [end, *a, end, *b, end]

    def test_tokenizers_with_special_tokens_keep_theirs(self, bert):
        options = finetune.FinetuneOptions(model_name_or_path=str(bert), output_dir="any", task_name=["sst2"])
        ids = finetune_data.prepare_tokenizer(options)("the ship", "sea")["input_ids"]
        assert (
            AutoTokenizer.from_pretrained(bert).convert_ids_to_tokens(ids) == "[CLS] the ship [SEP] sea [SEP]".split()
        )


class TestBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, tasks, side):
        names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer = AutoTokenizer.from_pretrained(tasks / "conv", padding_side=side, model_input_names=names)
        examples = finetune_data.Examples(
            ids=np.arange(100, 109, dtype=np.int32),
            types=np.array([0, 0, 1, 0, 0, 0, 1, 1, 1], dtype=np.int8),
            starts=np.array([0, 3, 4, 9]),
            labels=np.array([0.5, 1, 2]),
            numbers=np.arange(3),
            cut=0,
        )
        make = finetune_data.Batches(tokenizer, True, {"token_type_ids"}, multiple=4)
        batch = make(examples, np.array([2, 0]))
        rows = tokenizer.pad(
            {"input_ids": [[104, 105, 106, 107, 108], [100, 101, 102]], "token_type_ids": [[0, 0, 1, 1, 1], [0, 0, 1]]},
            pad_to_multiple_of=4,
            return_tensors="pt",
        )
        assert {name: batch[name].tolist() for name in rows} == {name: rows[name].tolist() for name in rows}
        assert batch["labels"].tolist() == [2, 0.5] and batch["labels"].dtype == torch.float32
        part = examples.subset(np.array([0, 2]))
        assert make(part, np.array([1, 0]))["input_ids"].tolist() == batch["input_ids"].tolist()

    def test_every_row_once_an_epoch_and_like_lengths_together(self, tasks, run_task, monkeypatch):
        seen = []
        original = finetune.Finetuning.train
        monkeypatch.setattr(finetune.Finetuning, "train", lambda self: seen.append(self) or original(self))
        run_task(max_train_samples=45, group_by_length=True, num_train_epochs=1, per_device_train_batch_size=8)
        run_task(output="random", max_train_samples=45, num_train_epochs=1, per_device_train_batch_size=8)
        spreads = []
        for each in seen:
            epochs = [[each.rows(epoch * 6 + step) for step in range(6)] for epoch in range(2)]
            for steps in epochs:
                assert sorted(np.concatenate(steps)) == list(range(45)) and len(steps[-1]) == 5
            assert (np.concatenate(epochs[0]) != np.concatenate(epochs[1])).any()
            spreads.append(np.mean([np.ptp(each.task_data.train.lengths[rows]) for rows in epochs[0]]))
        assert spreads[0] < spreads[1] / 2


def test_so_many_rows_are_trained_on_and_scored(tasks):
    options = FinetuneOptions(model_name_or_path="any", output_dir="any", task_name=["rte"], dataset_path=str(tasks))
    whole = finetune_data.load_splits(text_tasks.TASKS["rte"], options)
    some = finetune_data.load_splits(
        text_tasks.TASKS["rte"], replace(options, max_train_samples=11, max_eval_samples=7)
    )
    assert (len(some["train"]), len(some["validation"])) == (11, 7) and len(whole["validation"]) > 7
    order = [list(whole["validation"]["sentence1"]).index(text) for text in some["validation"]["sentence1"]]
    assert order == sorted(order) != list(range(7))  # at random, in their order
    own = {"task_name": ["rte"], "dataset_path": str(tasks), "output_dir": "any", "max_eval_samples": 7}
    scored = baselines.load_splits(text_tasks.TASKS["rte"], BaselineOptions(**own))
    assert scored["validation"].to_dict() == some["validation"].to_dict() and len(scored["train"]) > 11


def test_tokenized_data_are_cached(run_task, monkeypatch):
    run_task()
    monkeypatch.setattr(finetune_data.Encoder, "__call__", None)
    run_task(output="again")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_local_files(run_task, tasks, tmp_path, kind):
    folder = tmp_path / "files"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_parquet(str(tasks / "rte" / f"{split}.parquet")).to_pandas()
        rows.loc[0, "sentence1"] = "null" if kind != "tsv" else 'a "bare quote'
        if kind == "jsonl":
            rows.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
        elif kind == "csv":
            rows.to_csv(folder / f"{split}.csv", index=False)
        else:
            rows.to_csv(folder / f"{split}.tsv", index=False, sep="\t", quoting=3)
    out = run_task("rte", dataset_path=folder, max_steps=2)
    same = run_task("rte", "same", max_steps=2)
    assert list(metrics(out / "rte/seed-0")) == list(metrics(same / "rte/seed-0"))
    assert not (out / "rte/seed-0/RTE.tsv").exists()


def rewrite(tasks, tmp_path, task, split, change):
    folder = tmp_path / "changed"
    shutil.copytree(tasks / task, folder)
    rows = datasets.Dataset.from_parquet(str(tasks / task / f"{split}.parquet")).to_dict()
    change(rows)
    datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    "task, split, change, message",
    [
        ("rte", "train", lambda rows: rows.pop("sentence2"), r"no column 'sentence2', only sentence1, label, idx; rte"),
        ("rte", "validation", lambda rows: rows.pop("label"), "no column 'label'"),
        ("mnli", "train", lambda rows: rows["label"].__setitem__(3, 3), "row 3: label 3 is none of 0 entailment, 1"),
        ("cola", "validation", lambda rows: rows["label"].__setitem__(0, -1), "-1 marks rows without a label"),
        ("stsb", "train", lambda rows: rows["label"].__setitem__(1, 5.5), "label 5.5 is no similarity from 0 to 5"),
        ("sst2", "train", lambda rows: rows["sentence"].__setitem__(2, None), "row 2: sentence is None, not a text"),
        ("sst2", "validation", lambda rows: [rows[name].clear() for name in rows], r"\(validation\) is empty"),
    ],
)
def test_bad_data(run_task, tasks, tmp_path, task, split, change, message):
    with pytest.raises(ScriptError, match=message):
        run_task(task, dataset_path=rewrite(tasks, tmp_path, task, split, change))
    assert not (tmp_path / "out").exists()


def test_labels_in_another_order(run_task, tasks, tmp_path):
    folder = tmp_path / "swapped"
    shutil.copytree(tasks / "rte", folder)
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    rows.cast_column("label", datasets.ClassLabel(names=["not_entailment", "entailment"])).to_parquet(
        folder / "train.parquet"
    )
    with pytest.raises(ScriptError, match="has the labels not_entailment, entailment; rte has entailment, not_"):
        run_task("rte", dataset_path=folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "sst"}, "unknown --task_name 'sst'; did you mean 'sst2'.*cola, sst2, mrpc"),
        ({"dataset_path": "nowhere"}, "nowhere: there is no such folder"),
        ({"dataset_path": None}, "nyu-mll/glue cannot be loaded.*--dataset_path"),
        ({"dataset_name": "some/glue"}, "--dataset_name or --dataset_path"),
        ({"model_name_or_path": "nowhere"}, "no tokenizer can be loaded from nowhere"),
        ({"max_length": 3}, "--max_length must be at least 4"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"merge_adapter": True}, "need --use_peft"),
        ({"dataset_config_name": "sst2"}, "--dataset_config_name sst2 is for data of your own"),
        (
            {"task": "stsb", "class_weights": "balanced", "max_steps": 1},
            "balanced: stsb has numbers, no classes to weigh",
        ),
        ({"lora_rank": 4}, "--lora_rank: adapters need --use_peft"),
        ({"lora_alpha": 8}, "--lora_alpha: adapters need --use_peft"),
        ({"lora_dropout": 0.1}, "--lora_dropout: adapters need --use_peft"),
        ({"lora_target_modules": "all-linear"}, "--lora_target_modules: adapters need --use_peft"),
        ({"pad_token": "<none>"}, "--pad_token <none> is no token"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, "loss .* try a lower --learning_rate"),
        ({"validation_fraction": 1}, "must be below 1"),
    ],
)
def test_bad_options(run_task, options, message):
    with pytest.raises(ScriptError, match=message):
        run_task(**options)


def test_a_length_beyond_the_positions(run_task, tasks):
    with pytest.raises(ScriptError, match=r"--max_length 65 is above .*max_position_embeddings \(64\)"):
        run_task(model_name_or_path=tasks / "softmax", max_length=65)


@pytest.mark.parametrize("kind, free", [("none", False), ("rope", False), ("learned", False), ("none", True)])
def test_a_length_beyond_a_projection(kind, free):
    """A bidirectional Linformer has weights for so many positions, except where it fits segments to each row."""
    projection = "adaptive_mean_pool" if free else "linear"
    shape = {"position_embedding_type": kind, "max_position_embeddings": 32, "projected_size": 8}
    config = AutoConfig.for_model("linformer_lm", vocab_size=50, **TINY, **shape, projection_type=projection)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert config.longest_row == (None if free else 32)
    ids = torch.ones(1, 33, dtype=torch.long)
    if free:
        limits.check_length(model, 33, "max_length")
        model(ids)
        return
    for extrapolate in (False, True):
        with pytest.raises(ScriptError, match=r"--max_length 33 is above .*\(32\)"):
            limits.check_length(model, 33, "max_length", extrapolate)
    with pytest.raises(ValueError, match="33 tokens is longer|Position 32 is outside"):
        model(ids)


def test_no_pad_token(run_task, tasks, tmp_path):
    shutil.copytree(tasks / "conv", tmp_path / "unpadded")
    tokenizer = AutoTokenizer.from_pretrained(tasks / "conv")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ScriptError, match=r"no pad token.*--pad_token '<\|endoftext\|>'"):
        run_task(model_name_or_path=tmp_path / "unpadded")
    out = run_task(model_name_or_path=tmp_path / "unpadded", pad_token="<|endoftext|>", max_steps=1)
    config = AutoConfig.from_pretrained(out / "sst2/seed-0")
    assert config.pad_token_id == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(out / "sst2/seed-0").pad_token == "<|endoftext|>"


def test_another_label_count(run_task, bert):
    with pytest.raises(ScriptError, match="classifier of 3 labels .* rte needs 2; --ignore_mismatched_sizes"):
        run_task("rte", model_name_or_path=bert)


def test_a_damaged_split_is_told(run_task, tasks, tmp_path):
    shutil.copytree(tasks / "rte", tmp_path / "rte")
    (tmp_path / "rte/validation.parquet").write_bytes(b"half a file")
    with pytest.raises(ScriptError, match="validation.parquet cannot be read"):
        run_task("rte", dataset_path=tmp_path)
    (tmp_path / "rte/validation.parquet").unlink()
    with pytest.raises(ScriptError, match="has no split 'validation', only train, test"):
        run_task("rte", dataset_path=tmp_path)
