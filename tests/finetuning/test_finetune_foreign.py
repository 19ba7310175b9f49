"""Fine-tuning of transformers' own models: what they are trained with is what their users get."""

import json

import datasets
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from tiny_tasks import results
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MPNetConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    XLNetConfig,
)

from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.finetuning import model as finetune_model


def assert_reported_scores_hold(run_folder, tasks, folder=None, auto=AutoModelForSequenceClassification):
    """A run on mrpc reports the scores that its saved model has with its own tokenizer, a pair at a time."""
    folder = folder or run_folder
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = datasets.Dataset.from_parquet(str(tasks / "mrpc/validation.parquet"))
    pairs, labels = zip(rows["sentence1"], rows["sentence2"]), torch.tensor(rows["label"][:])
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(*pair, return_tensors="pt")).logits for pair in pairs])
    reported = results(run_folder)["metrics"]["validation"]
    assert reported["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert reported["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


@pytest.fixture
def gpt2(tasks, tmp_path):
    """A tiny GPT-2, whose forward takes token types; its tokenizer gives none."""
    kept = AutoTokenizer.from_pretrained(tasks / "conv")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=kept.backend_tokenizer,
        pad_token=kept.pad_token,
        eos_token=kept.eos_token,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_token_types_come_from_the_tokenizer(run_task, tasks, gpt2):
    out = run_task("mrpc", model_name_or_path=gpt2, num_train_epochs=1)
    assert_reported_scores_hold(out / "mrpc/seed-0", tasks)


@pytest.fixture
def roberta(tasks, tmp_path):
    """A tiny RoBERTa of 20 rows, 18 of them positions; its tokenizer does not say how long a text may be."""
    kept = AutoTokenizer.from_pretrained(tasks / "conv")
    kept.save_pretrained(tmp_path / "roberta")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    special = {f"{name}_token_id": getattr(kept, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = RobertaConfig(vocab_size=len(kept), max_position_embeddings=20, **sizes, **special)
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


def test_rows_that_are_no_positions(run_task, roberta):
    folder = run_task("mrpc", model_name_or_path=roberta, max_steps=2) / "mrpc/seed-0"
    cut = results(folder)["truncated"]["train"]
    assert cut["to"] == 20 - 1 - AutoTokenizer.from_pretrained(roberta).pad_token_id == 18 and cut["cut"] > 0
    with pytest.raises(ScriptError, match=r"--max_length 19 is above the model's max_position_embeddings \(18\)"):
        run_task("mrpc", "longer", model_name_or_path=roberta, max_length=19)


@pytest.mark.parametrize("config, number", [(XLNetConfig(), None), (OPTConfig(), 2048), (MPNetConfig(), 510)])
def test_positions(config, number):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert limits.positions(model) == number


@pytest.mark.parametrize("config, bound", [(GPT2Config(), True), (OPTConfig(), True), (LlamaConfig(), False)])
def test_a_table_of_positions_is_a_bound(config, bound):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    longer = config.max_position_embeddings + 1
    limits.check_length(model, longer - 1, "block_size", extrapolate=True)
    for extrapolate in (True, False):
        if bound or not extrapolate:
            with pytest.raises(ScriptError, match=f"--block_size {longer} is above"):
                limits.check_length(model, longer, "block_size", extrapolate)
        else:
            limits.check_length(model, longer, "block_size", extrapolate)


def test_adapters_bring_all_that_is_new(run_task, tasks, bert, tmp_path):
    """BertForMaskedLM saves no pooler: the classifier reads one that is drawn anew."""
    BertForMaskedLM.from_pretrained(bert, num_labels=2).save_pretrained(tmp_path / "masked")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "masked")
    options = {"use_peft": True, "model_name_or_path": tmp_path / "masked", "learning_rate": 0.1, "eval_steps": 1}
    folder = run_task("mrpc", early_stopping_patience=2, merge_adapter=True, **options) / "mrpc/seed-0"
    summary = results(folder)
    assert summary["best"]["step"] < summary["steps"]
    assert summary["metrics"]["validation"]["loss"] == pytest.approx(summary["best"]["loss"], rel=1e-5)
    assert_reported_scores_hold(folder, tasks, auto=AutoPeftModelForSequenceClassification)
    assert_reported_scores_hold(folder, tasks, folder / "merged")
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert set(adapter["modules_to_save"]) == {"bert.pooler.dense", "classifier", "score"}


def test_a_new_parameter_that_adapters_cannot_train(bert):
    model = BertForMaskedLM.from_pretrained(bert)
    names = ["bert.pooler.dense.weight", "classifier.dense.weight", "score.weight"]
    model.bert.pooler = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2)})
    assert finetune_model.new_modules(model, names) == ["bert.pooler.dense"]
    with pytest.raises(ScriptError, match="bert.cls_token is new in the model, .* leave --use_peft out"):
        finetune_model.new_modules(model, [*names, "bert.cls_token"])
