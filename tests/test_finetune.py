"""The fine-tuning programs from end to end on tiny data: metrics, data, runs, resuming, equalities, bad input."""

import json
import shutil
import signal

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from launching import SCRIPTS, launch, launch_sharded
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import ordnung
from ordnung.scripts import (
    bench_finetune,
    corpus,
    finetune,
    finetune_data,
    finetune_glue,
    finetune_imdb,
    glue_metric,
    limits,
    text_tasks,
)
from ordnung.scripts.common import ScriptError

GOOD, BAD = "fine warm bright calm".split(), "dull cold grim harsh".split()
FILLER = "the voyage of a ship and its captain on that sea was".split()
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def sentences(count, seed, words=(3, 12)):
    """Sentences that hold one telling word; label 1 for a good one."""
    random = np.random.default_rng(seed)
    for label in random.integers(2, size=count):
        chosen = list(random.choice(FILLER, size=random.integers(*words)))
        chosen.insert(random.integers(len(chosen)), str(random.choice(GOOD if label else BAD)))
        yield " ".join(chosen), int(label)


def table(task, count, seed, labelled=True):
    """Rows with a task's columns; both texts of a pair are made alike."""
    texts = [list(sentences(count, seed + i)) for i in range(len(task.columns))]
    rows = {column: [text for text, _ in some] for column, some in zip(task.columns, texts)}
    labels = [label for _, label in texts[0]]
    rows["label"] = [2.5 * label + 0.1 for label in labels] if task.regression else labels
    if not labelled:
        rows["label"] = [-1] * count
    return datasets.Dataset.from_dict({**rows, "idx": list(range(count))})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a folder for each task, checkpoints conv and softmax (bidirectional), and their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    for name, task in text_tasks.TASKS.items():
        (folder / name).mkdir()
        table(task, 48, 0).to_parquet(folder / name / "train.parquet")
        for split in task.evaluation:
            table(task, 20, 10).to_parquet(folder / name / f"{split}.parquet")
        for split in task.tests:
            table(task, 10, 20, labelled=False).to_parquet(folder / name / f"{split}.parquet")
    texts = [text for text, _ in sentences(300, 5)]
    tokenizer = corpus.train_tokenizer(texts, 300, masked=True)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    for name, kind, more in (
        ("conv", "conv_lm", {"kernel_size": 8}),
        ("softmax", "softmax_lm", {"position_embedding_type": "learned", "max_position_embeddings": 64}),
    ):
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **TINY, **more, **special)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Runs a program on a task with a checkpoint of `data`; keyword arguments are further options, None removes one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data / "cache")

    def run(task="sst2", output="out", program=finetune_glue, status=0, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            "model_name_or_path": data / "conv",
            "output_dir": tmp_path / output,
            "dataset_path": data / task if program is finetune_imdb else data,
            "task_name": None if program is finetune_imdb else task,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            **options,
        }
        argv = []
        for name, value in options.items():
            if value is not None:
                argv += [f"--{name}", *(value.split() if name == "task_name" else map(str, np.atleast_1d(value)))]
        assert program.main(argv) == status
        return tmp_path / output

    return run


def metrics(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def results(folder):
    return json.loads((folder / "results.json").read_text())


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def assert_same_run(a, b):
    for name in ("loss", "learning_rate", "eval_loss"):
        assert metrics(a, name) == metrics(b, name)
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first)


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

    def test_as_the_tokenizer_cuts(self, data):
        options = finetune.FinetuneOptions(model_name_or_path=str(data / "conv"), output_dir="any")
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
    def test_pairs_are_separated_and_the_saved_tokenizer_does_the_same(self, data, tmp_path):
        options = finetune.FinetuneOptions(model_name_or_path=str(data / "conv"), output_dir="any")
        tokenizer = finetune_data.prepare_tokenizer(options)
        end = tokenizer.eos_token_id
        a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the ship", "a sea"))
        tokenizer.save_pretrained(tmp_path)
        for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert each("the ship")["input_ids"] == [end, *a, end]
            assert each("the ship", "a sea")["input_ids"] == [end, *a, end, *b, end]

    def test_tokenizers_with_special_tokens_keep_theirs(self, bert):
        options = finetune.FinetuneOptions(model_name_or_path=str(bert), output_dir="any")
        ids = finetune_data.prepare_tokenizer(options)("the ship", "sea")["input_ids"]
        assert (
            AutoTokenizer.from_pretrained(bert).convert_ids_to_tokens(ids) == "[CLS] the ship [SEP] sea [SEP]".split()
        )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT with three labels, as a checkpoint of transformers' own that was fine-tuned on MNLI."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), intermediate_size=32, max_position_embeddings=32, num_labels=3, **TINY)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


class TestBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, data, side):
        names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer = AutoTokenizer.from_pretrained(data / "conv", padding_side=side, model_input_names=names)
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

    def test_every_row_once_an_epoch_and_like_lengths_together(self, data, run, monkeypatch):
        seen = []
        original = finetune.Finetuning.train
        monkeypatch.setattr(finetune.Finetuning, "train", lambda self: seen.append(self) or original(self))
        run(max_train_samples=45, group_by_length=True, num_train_epochs=1, per_device_train_batch_size=8)
        run(output="random", max_train_samples=45, num_train_epochs=1, per_device_train_batch_size=8)
        spreads = []
        for each in seen:
            epochs = [[each.rows(epoch * 6 + step) for step in range(6)] for epoch in range(2)]
            for steps in epochs:
                assert sorted(np.concatenate(steps)) == list(range(45)) and len(steps[-1]) == 5
            assert (np.concatenate(epochs[0]) != np.concatenate(epochs[1])).any()
            spreads.append(np.mean([np.ptp(each.data.train.lengths[rows]) for rows in epochs[0]]))
        assert spreads[0] < spreads[1] / 2


def test_all_tasks(run, data):
    out = run("all", num_train_epochs=1)
    summary = results(out)
    assert list(summary["tasks"]) == list(text_tasks.GLUE)
    assert (out / "results.md").read_text().count("\n| ") == 2 + 10  # MNLI is scored on two splits
    for name, task in text_tasks.GLUE.items():
        run_results = results(out / name / "seed-0")
        scores = [set(metric) - {"loss"} for metric in run_results["metrics"].values()]
        assert scores == [{score.__name__ for score in glue_metric.SCORES[name]}] * len(task.evaluation)
        config = AutoConfig.from_pretrained(out / name / "seed-0")
        assert tuple(config.id2label.values()) == (task.labels or ("similarity",))
        assert config.problem_type == ("regression" if task.regression else "single_label_classification")
        for file in task.tests.values():
            header, *lines = (out / name / "seed-0" / file).read_text().splitlines()
            assert header == "index\tprediction" and [int(line.split("\t")[0]) for line in lines] == list(range(10))
            answers = {line.split("\t")[1] for line in lines}
            if task.regression:
                assert all(0 <= float(answer) <= 5 and len(answer) == 5 for answer in answers)
            else:
                assert answers <= (set(task.labels) if task.submits_names else {"0", "1"})
    scores = [summary["tasks"][name]["score"]["mean"] for name in text_tasks.GLUE]
    assert summary["glue_average"]["mean"] == pytest.approx(np.mean(scores))
    assert f"GLUE average over 9 of 9 tasks: {100 * np.mean(scores):.1f}" in (out / "results.md").read_text()
    mrpc = results(out / "mrpc/seed-0")
    both = mrpc["metrics"]["validation"]
    assert set(both) == {"loss", "accuracy", "f1"} and mrpc["score"] == pytest.approx(
        (both["accuracy"] + both["f1"]) / 2
    )
    accuracies = [split["accuracy"] for split in results(out / "mnli/seed-0")["metrics"].values()]
    assert summary["tasks"]["mnli"]["score"]["mean"] == pytest.approx(np.mean(accuracies))
    assert summary["machine"]["command"] and summary["settings"]["learning_rate"] == 1e-3


def test_seeds_learn_the_task_and_are_summarised(run, data):
    out = run("sst2", num_train_epochs=8, learning_rate=1e-2, seeds=[3, 5])
    task = results(out)["tasks"]["sst2"]
    values = [results(out / f"sst2/seed-{seed}")["metrics"]["validation"]["accuracy"] for seed in (3, 5)]
    accuracy = task["metrics"]["validation"]["accuracy"]
    assert accuracy["values"] == values and accuracy["mean"] == pytest.approx(np.mean(values)) and min(values) > 0.85
    assert accuracy["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert metrics(out / "sst2/seed-3") != metrics(out / "sst2/seed-5")
    # the folder serves a pipeline, labels by name, with the scores that were reported
    rows = datasets.Dataset.from_parquet(str(data / "sst2/validation.parquet"))
    classify = pipeline("text-classification", model=str(out / "sst2/seed-3"), device="cpu")
    named = [answer["label"] for answer in classify(rows["sentence"][:], batch_size=7)]
    assert np.mean([name == ("negative", "positive")[label] for name, label in zip(named, rows["label"])]) == values[0]
    # a further seed is added, the finished ones stay as they are
    before = (out / "sst2/seed-3/results.json").stat().st_mtime_ns
    run("sst2", num_train_epochs=8, learning_rate=1e-2, seeds=[3, 5, 6])
    assert (out / "sst2/seed-3/results.json").stat().st_mtime_ns == before
    assert len(results(out)["tasks"]["sst2"]["score"]["values"]) == 3
    with pytest.raises(ScriptError, match="holds runs with learning_rate 0.01, not 0.002"):
        run("sst2", num_train_epochs=8, learning_rate=2e-3)


@pytest.mark.parametrize("model", ["softmax", "bert"])
def test_other_checkpoints(run, data, bert, model):
    name = bert if model == "bert" else data / model
    options = {"ignore_mismatched_sizes": True, "truncation": "tail", "num_train_epochs": 12, "learning_rate": 1e-2}
    out = run("mrpc", model_name_or_path=name, **options)
    model = AutoModelForSequenceClassification.from_pretrained(out / "mrpc/seed-0")
    assert results(out)["tasks"]["mrpc"]["parameters"] == model.num_parameters()
    losses = list(metrics(out / "mrpc/seed-0").values())
    assert sum(losses[-6:]) < sum(losses[:6]) - 0.5


def test_a_masked_language_model(run, data, tmp_path):
    config = AutoConfig.from_pretrained(data / "softmax", is_decoder=False)
    from transformers import AutoModelForMaskedLM

    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "masked")
    AutoTokenizer.from_pretrained(data / "softmax").save_pretrained(tmp_path / "masked")
    out = run("rte", model_name_or_path=tmp_path / "masked", num_train_epochs=1)
    assert AutoConfig.from_pretrained(out / "rte/seed-0").is_decoder is False


def test_remote_code(run, data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(data / "conv")
    ordnung.save_standalone(model, tmp_path / "remote", AutoTokenizer.from_pretrained(data / "conv"))
    out = run(model_name_or_path=tmp_path / "remote", trust_remote_code=True, num_train_epochs=1)
    same = run(output="same", num_train_epochs=1)
    assert metrics(out / "sst2/seed-0") == metrics(same / "sst2/seed-0")


def test_imdb_is_chosen_on_held_out_reviews_and_cut(run, data):
    out = run("imdb", program=finetune_imdb, max_length=8, truncation="head_tail", load_best_model_at_end=True)
    run_results = results(out / "imdb/seed-0")
    assert run_results["training_rows"] == 44 and run_results["best"]["step"] in (6, 12)
    rows = datasets.Dataset.from_parquet(str(data / "imdb/test.parquet"))
    tokenizer = AutoTokenizer.from_pretrained(out / "imdb/seed-0")
    longer = sum(len(ids) > 8 for ids in tokenizer(rows["text"][:])["input_ids"])
    assert run_results["truncated"]["test"] == {"rows": 20, "cut": longer, "to": 8} and longer > 0
    with pytest.raises(ScriptError, match="test split only"):
        run("imdb", "else", finetune_imdb, load_best_model_at_end=True, validation_fraction=0)


def test_best_model_and_early_stopping(run):
    options = {"learning_rate": 0.3, "num_train_epochs": 30, "eval_steps": 2, "lr_scheduler_type": "constant"}
    out = run(early_stopping_patience=3, **options)
    folder = out / "sst2/seed-0"
    scores = metrics(folder, "eval_accuracy")
    best = results(folder)["best"]
    first = min(step for step, score in scores.items() if score == max(scores.values()))
    assert best["step"] == first and max(scores) == first + 6 < 180
    assert results(folder)["metrics"]["validation"]["accuracy"] == max(scores.values())
    assert not list(folder.glob("checkpoint-*")) and not (folder / "best").exists()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(run, monkeypatch, kind):
    options = {
        "config_overrides": "hidden_dropout=0.1",
        "early_stopping_patience": 9,
        "num_train_epochs": 3,
        "logging_steps": 4,
    }
    options |= {"use_peft": True} if kind == "adapter" else {"gradient_accumulation_steps": 2}
    steps = []
    original = finetune.Finetuning.train_step

    def stopping(self):
        steps.append(self.step)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGTERM)
        original(self)

    whole = run("cola", "whole", **options) / "cola/seed-0"
    monkeypatch.setattr(finetune.Finetuning, "train_step", stopping)
    run("cola", "stopped", status=128 + signal.SIGTERM, **options)
    stopped = run("cola", "stopped", **options) / "cola/seed-0"
    assert steps == list(range(len(steps)))  # step 5 was not taken twice
    assert metrics(whole) == pytest.approx({k: v for k, v in metrics(stopped).items() if k in metrics(whole)})
    assert metrics(whole, "eval_loss") == metrics(stopped, "eval_loss")
    name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    assert (whole / name).read_bytes() == (stopped / name).read_bytes()


@pytest.fixture
def failed_at_its_end(run, tmp_path):
    """The checkpoint that a run left whose training was over when it failed."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune.Finetuning, "_finish", lambda self: 1 / 0)
        run()
    (checkpoint,) = (tmp_path / "out/sst2/seed-0").glob("checkpoint-*")
    return checkpoint


def test_nothing_is_lost_where_the_end_fails(run, failed_at_its_end, monkeypatch):
    whole = run(output="whole")
    monkeypatch.setattr(finetune.Finetuning, "train_step", None)  # nothing is trained again
    assert_same_run(run() / "sst2/seed-0", whole / "sst2/seed-0")
    assert not failed_at_its_end.exists()


def test_a_damaged_checkpoint_is_passed_over(run, failed_at_its_end, caplog):
    whole = run(output="whole")
    (failed_at_its_end / "optimizer.pt").write_bytes(b"half")
    assert_same_run(run() / "sst2/seed-0", whole / "sst2/seed-0")
    assert "optimizer.pt is not what was written" in caplog.text


def test_accumulation_changes_nothing(run):
    split = run("stsb", "split", per_device_train_batch_size=3, gradient_accumulation_steps=3, max_steps=1)
    whole = run("stsb", "nine", per_device_train_batch_size=9, max_steps=1)
    assert metrics(split / "stsb/seed-0")[1] == pytest.approx(metrics(whole / "stsb/seed-0")[1], rel=1e-5)
    a, b = weights(split / "stsb/seed-0"), weights(whole / "stsb/seed-0")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


# Fine-tunes where the model is sharded. Each evaluation seems worse than those before, so that the first is the best.
SHARDED = """
from ordnung.scripts import finetune, finetune_glue
from ordnung.scripts.finetune import Finetuning
scores = iter(range(0, -100, -1))
finetune.mean_score = lambda _: next(scores)
train = Finetuning.train
Finetuning.train = lambda self: check_sharded(self) or train(self)
sys.exit(finetune_glue.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_two_processes_equal_one(run, data, tmp_path, monkeypatch, kind):
    """41 rows in steps of 8: the last step leaves the second process without a row of its own.

    The sharded run also goes back to its best model.
    """
    best = {"load_best_model_at_end": True, "eval_steps": 3} if kind == "sharded" else {}
    if best:
        scores = iter(range(0, -100, -1))
        monkeypatch.setattr(finetune, "mean_score", lambda _: next(scores))
    single = run("mrpc", "single", per_device_train_batch_size=8, max_train_samples=41, num_train_epochs=1, **best)
    arguments = ["--model_name_or_path", data / "conv", "--output_dir", tmp_path / "two", "--dataset_path", data]
    arguments += ["--task_name", "mrpc", "--per_device_train_batch_size", 4, "--max_train_samples", 41]
    arguments += ["--num_train_epochs", 1, "--learning_rate", 1e-3, "--logging_steps", 1]
    cache = {"HF_DATASETS_CACHE": str(data / "cache")}
    arguments += [part for name, value in best.items() for part in (f"--{name}", value)]
    if kind == "whole":
        printed = launch("accelerate_cpu.yaml", SCRIPTS / "finetune_glue.py", [*arguments, "--use_cpu"], **cache)
    else:
        printed = launch_sharded(SHARDED, tmp_path, arguments, **cache)
    two, single = tmp_path / "two/mrpc/seed-0", single / "mrpc/seed-0"
    assert results(two)["num_processes"] == 2 and results(two)["best"]["step"] == (3 if best else 6)
    for name in ("loss", "eval_loss", "eval_f1"):
        assert metrics(two, name) == pytest.approx(metrics(single, name), rel=2e-5)
    first, second = weights(two), weights(single)
    assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4) for name in second)
    assert printed.count("Written: results.json") == 1  # one process prints the table


def test_trainer_follows_the_same_path(run, data, tmp_path):
    """Trainer on the same rows in the same order gives the same losses and weights."""
    out = run("sst2", "ours", learning_rate=2e-3, weight_decay=0.1) / "sst2/seed-0"
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = datasets.Dataset.from_parquet(str(data / "sst2/train.parquet"))
    orders = [np.random.default_rng((0, epoch)).permutation(len(rows)) for epoch in range(2)]
    rows = rows.select(np.concatenate(orders)).map(lambda row: tokenizer(row["sentence"]), remove_columns=["sentence"])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(data / "conv", num_labels=2)
    # the new classifier is drawn after the program has seeded; take the very one
    finetune.set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(data / "conv", num_labels=2)
    arguments = TrainingArguments(
        tmp_path / "trainer",
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup_steps=0.06,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows.remove_columns("idx"), processing_class=tokenizer)
    # Trainer decays kernel_logits, which the family exempts
    from ordnung.scripts.pretrain_setup import parameter_groups

    trainer.create_optimizer = lambda *_: (
        setattr(trainer, "optimizer", torch.optim.AdamW(parameter_groups(model, 0.1), lr=2e-3)) or trainer.optimizer
    )
    trainer.train()
    theirs = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    assert theirs == pytest.approx(metrics(out), rel=1e-5)
    for name, value in weights(out).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_tokenized_data_are_cached(run, monkeypatch):
    run()
    monkeypatch.setattr(finetune_data.Encoder, "__call__", None)
    run(output="again")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_local_files(run, data, tmp_path, kind):
    folder = tmp_path / "files"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_parquet(str(data / "rte" / f"{split}.parquet")).to_pandas()
        rows.loc[0, "sentence1"] = "null" if kind != "tsv" else 'a "bare quote'
        if kind == "jsonl":
            rows.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
        elif kind == "csv":
            rows.to_csv(folder / f"{split}.csv", index=False)
        else:
            rows.to_csv(folder / f"{split}.tsv", index=False, sep="\t", quoting=3)
    out = run("rte", dataset_path=folder, max_steps=2)
    same = run("rte", "same", max_steps=2)
    assert list(metrics(out / "rte/seed-0")) == list(metrics(same / "rte/seed-0"))
    assert not (out / "rte/seed-0/RTE.tsv").exists()


def rewrite(data, tmp_path, task, split, change):
    folder = tmp_path / "changed"
    shutil.copytree(data / task, folder)
    rows = datasets.Dataset.from_parquet(str(data / task / f"{split}.parquet")).to_dict()
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
def test_bad_data(run, data, tmp_path, task, split, change, message):
    with pytest.raises(ScriptError, match=message):
        run(task, dataset_path=rewrite(data, tmp_path, task, split, change))
    assert not (tmp_path / "out").exists()


def test_labels_in_another_order(run, data, tmp_path):
    folder = tmp_path / "swapped"
    shutil.copytree(data / "rte", folder)
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    rows.cast_column("label", datasets.ClassLabel(names=["not_entailment", "entailment"])).to_parquet(
        folder / "train.parquet"
    )
    with pytest.raises(ScriptError, match="has the labels not_entailment, entailment; rte has entailment, not_"):
        run("rte", dataset_path=folder)


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
        ({"lora_rank": 4}, "--lora_rank: adapters need --use_peft"),
        ({"lora_alpha": 8}, "--lora_alpha: adapters need --use_peft"),
        ({"lora_dropout": 0.1}, "--lora_dropout: adapters need --use_peft"),
        ({"lora_target_modules": "all-linear"}, "--lora_target_modules: adapters need --use_peft"),
        ({"pad_token": "<none>"}, "--pad_token <none> is no token"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, "the loss is .* try a lower --learning_rate"),
        ({"validation_fraction": 1}, "must be below 1"),
    ],
)
def test_bad_options(run, options, message):
    with pytest.raises(ScriptError, match=message):
        run(**options)


def test_a_length_beyond_the_positions(run, data):
    with pytest.raises(ScriptError, match=r"--max_length 65 is above .*max_position_embeddings \(64\)"):
        run(model_name_or_path=data / "softmax", max_length=65)


@pytest.mark.parametrize("kind, free", [("none", False), ("rope", False), ("learned", False), ("none", True)])
def test_a_length_beyond_a_projection(kind, free):
    """A bidirectional Linformer has weights for so many positions, except where it fits segments to each row."""
    projection = "adaptive_mean_pool" if free else "linear"
    shape = {"position_embedding_type": kind, "max_position_embeddings": 32, "projected_size": 8}
    config = AutoConfig.for_model("linformer_lm", vocab_size=50, **TINY, **shape, projection_type=projection)
    model = AutoModelForSequenceClassification.from_config(config).eval()
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


def test_no_pad_token(run, data, tmp_path):
    shutil.copytree(data / "conv", tmp_path / "unpadded")
    tokenizer = AutoTokenizer.from_pretrained(data / "conv")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ScriptError, match=r"no pad token.*--pad_token '<\|endoftext\|>'"):
        run(model_name_or_path=tmp_path / "unpadded")
    out = run(model_name_or_path=tmp_path / "unpadded", pad_token="<|endoftext|>", max_steps=1)
    config = AutoConfig.from_pretrained(out / "sst2/seed-0")
    assert config.pad_token_id == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(out / "sst2/seed-0").pad_token == "<|endoftext|>"


def test_another_label_count(run, bert):
    with pytest.raises(ScriptError, match="classifier of 3 labels .* rte needs 2; --ignore_mismatched_sizes"):
        run("rte", model_name_or_path=bert)


def test_a_damaged_split_is_told(run, data, tmp_path):
    shutil.copytree(data / "rte", tmp_path / "rte")
    (tmp_path / "rte/validation.parquet").write_bytes(b"half a file")
    with pytest.raises(ScriptError, match="validation.parquet cannot be read"):
        run("rte", dataset_path=tmp_path)
    (tmp_path / "rte/validation.parquet").unlink()
    with pytest.raises(ScriptError, match="has no split 'validation', only train, test"):
        run("rte", dataset_path=tmp_path)


def test_the_benchmark_runs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--model_name_or_path", data / "conv", "--dataset_path", data, "--task_name", "rte", "--steps", 2]
    argv += ["--rounds", 2, "--per_device_train_batch_size", 8, "--output_file", tmp_path / "bench.json", "--use_cpu"]
    assert bench_finetune.main(list(map(str, argv))) == 0
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert len(measured["ratios"]) == 2 and min(measured["ratios"]) > 0
    assert min(measured["examples_per_second"].values()) > 0
