import math

import pytest
import torch
from family_tester import MODERN, VOCAB, FamilyTester, masked_batch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
)

from ordnung import SoftmaxLMConfig


class TestSoftmaxLM(FamilyTester):
    model_type = "softmax_lm"
    variants = {
        "default": {},
        "learned-post": {"position_embedding_type": "learned", "norm_position": "post"},
        "none": {"position_embedding_type": "none", "tie_word_embeddings": False, "lm_head_bias": True},
        "eager": {"attn_implementation": "eager"},
        "modern": MODERN,
    }
    counted_variant = "eager"  # torch does not count its fused CPU kernel
    mixing_exponent = 2
    state_grows = True
    single_precision = ("eager",)


def test_attention_equals_the_formula():
    """softmax(Q K^T / sqrt(d)) V, written out with loops over heads and queries."""
    for is_decoder in (True, False):
        config = SoftmaxLMConfig(
            vocab_size=VOCAB,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=3,
            position_embedding_type="none",
            is_decoder=is_decoder,
        )
        auto = AutoModelForCausalLM if is_decoder else AutoModelForMaskedLM
        mixer = auto.from_config(config).double().model.layers[0].mixer
        x = torch.randn(2, 7, 12, dtype=torch.float64)
        q, k, v = (p(x).view(2, 7, 3, 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        expected = torch.zeros(2, 7, 3, 4, dtype=torch.float64)
        for h in range(3):
            for i in range(7):
                seen = slice(0, i + 1) if is_decoder else slice(0, 7)
                scores = torch.einsum("bd,bnd->bn", q[:, i, h], k[:, seen, h]) / math.sqrt(4)
                expected[:, i, h] = torch.einsum("bn,bnd->bd", scores.softmax(-1), v[:, seen, h])
        torch.testing.assert_close(mixer(x)[0], mixer.out_proj(expected.reshape(2, 7, 12)), rtol=0, atol=1e-12)


class TestBidirectional:
    arguments = {**FamilyTester.base_arguments, "is_decoder": False}

    def model(self, auto=AutoModelForMaskedLM, dtype=torch.float64, **overrides):
        return auto.from_config(SoftmaxLMConfig(**self.arguments, **overrides)).eval().to(dtype)

    @pytest.mark.parametrize("position_embedding_type", ["rope", "learned"])
    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_padded_rows_equal_rows_alone(self, position_embedding_type, attn_implementation):
        model = self.model(
            # transformers' eager attention works in float32 only
            dtype=torch.float64 if attn_implementation == "sdpa" else torch.float32,
            position_embedding_type=position_embedding_type,
            attn_implementation=attn_implementation,
        )
        ids, mask = masked_batch()
        logits = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row][mask[row] == 1][None]).logits[0]
            atol = 1e-10 if attn_implementation == "sdpa" else 1e-5
            torch.testing.assert_close(logits[row][mask[row] == 1], alone, rtol=0, atol=atol)

    def test_sees_the_future(self):
        model = self.model()
        ids = torch.randint(1, VOCAB - 1, (1, 9))
        other = ids.clone()
        other[0, -1] += 1
        assert not torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])

    def test_masked_head_is_tied(self):
        model = self.model()
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_classification_reads_the_first_real_token(self):
        model = self.model(AutoModelForSequenceClassification)
        ids, mask = masked_batch()
        expected = model.score(model.model(ids, attention_mask=mask)[0][torch.arange(3), [6, 0, 0]])
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)

    def test_heads_of_the_other_direction_are_refused(self):
        with pytest.raises(ValueError, match="`is_decoder` is False"):
            self.model(AutoModelForCausalLM)
        with pytest.raises(ValueError, match="set `is_decoder` to False"):
            AutoModelForMaskedLM.from_config(SoftmaxLMConfig(**FamilyTester.base_arguments))


class TestMultipleChoice:
    def model(self, **overrides):
        arguments = {**FamilyTester.base_arguments, "is_decoder": False, "type_vocab_size": 2, **overrides}
        return AutoModelForMultipleChoice.from_config(SoftmaxLMConfig(**arguments)).eval().double()

    def test_each_choice_is_scored_as_if_alone(self):
        model = self.model()
        ids, mask = (x.repeat(2, 1).view(2, 3, 19) for x in masked_batch())
        types = torch.randint(2, ids.shape)
        labels = torch.tensor([2, 0])
        outputs = model(ids, attention_mask=mask, token_type_ids=types, labels=labels)
        for b in range(2):
            for c in range(3):
                real = mask[b, c] == 1
                states = model.model(ids[b, c][real][None], token_type_ids=types[b, c][real][None])[0]
                torch.testing.assert_close(outputs.logits[b, c], model.score(states[0, 0])[0], rtol=0, atol=1e-10)
        chosen = outputs.logits.log_softmax(-1)[torch.arange(2), labels]
        torch.testing.assert_close(outputs.loss, -chosen.mean())
        embeds = model.get_input_embeddings()(ids)
        got = model(inputs_embeds=embeds, attention_mask=mask, token_type_ids=types, return_dict=False)
        torch.testing.assert_close(got[0], outputs.logits)

    def test_one_sequence_a_row_is_refused_in_words(self):
        with pytest.raises(ValueError, match=r"`input_ids` has shape \(2, 9\).*\(batch, choices, tokens\)"):
            self.model()(torch.ones(2, 9, dtype=torch.long))
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            self.model()()


@pytest.mark.parametrize(
    "model_type, own",
    [("softmax_lm", {}), ("linformer_lm", {"projected_size": 8}), ("sparse_attention_lm", {"sliding_window": 32})],
)
def test_attention_of_small_heads_is_derived_in_float32(monkeypatch, model_type, own):
    """In bfloat16 on a CPU, where that is faster; what is not trained stays as it is."""
    fused, dtypes = torch.nn.functional.scaled_dot_product_attention, []

    def recording(query, *args, **kwargs):
        automatic = torch.is_autocast_enabled("cpu")
        dtypes.append(torch.get_autocast_dtype("cpu") if automatic else query.dtype)
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    config = AutoConfig.for_model(model_type, **FamilyTester.base_arguments | {"is_decoder": False} | own)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).train()
    ids, mask = masked_batch()
    gradient = model.model.layers[0].mixer.q_proj.weight
    expected = model(input_ids=ids, attention_mask=mask).logits
    expected.square().sum().backward()
    exact, expected = gradient.grad.clone(), expected.detach()
    for automatic in (True, False):
        dtypes.clear()
        if not automatic:
            model = model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            logits = model(input_ids=ids, attention_mask=mask).logits
            model.zero_grad()
            logits.float().square().sum().backward()
            found = model.model.layers[0].mixer.q_proj.weight.grad.float()
            assert (found - exact).norm() < 0.05 * exact.norm()
            assert dtypes == [torch.float32] * config.num_hidden_layers
            torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02)
            dtypes.clear()
            model.eval()(input_ids=ids, attention_mask=mask)
            assert dtypes == [torch.bfloat16] * config.num_hidden_layers
        model.train()


def test_packed_rows_are_causal_with_flex_attention(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    def plain(query, key, value, training=False, **kwargs):  # not compiled, as a test has no time for it
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    torch.manual_seed(0)
    fields = {**FamilyTester.base_arguments, "position_embedding_type": "rope", "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(SoftmaxLMConfig(**fields)).eval()
    ids, places = torch.randint(1, VOCAB, (1, 12)), torch.tensor([[*range(7), *range(5)]])
    with torch.no_grad():
        wanted = model(ids, position_ids=places, use_cache=False).logits
        model.set_attn_implementation("flex_attention")
        found = model(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_a_transform_loads_as_trainer_loads_it(tmp_path):
    fields = {**FamilyTester.base_arguments, "lm_head_transform": True}
    models = [AutoModelForCausalLM.from_config(SoftmaxLMConfig(**fields)) for _ in range(2)]
    models[0].save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("lm_transform.") for name in saved)
    problems = models[1].load_state_dict(saved, strict=False)
    assert not problems.unexpected_keys and set(problems.missing_keys) <= {"lm_head.weight"}
    for a, b in zip(*(model.model.lm_transform.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
