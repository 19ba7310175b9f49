import math

import pytest
import torch
from family_tester import MODERN, VOCAB, FamilyTester, masked_batch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    DynamicCache,
)

from ordnung import CubicPrefixLMConfig, SoftmaxLMConfig
from ordnung.modeling.cubic_prefix_passes import Passes
from ordnung.modeling.ops.prefix_attention import prefix_states_naive


class TestCubicPrefixLM(FamilyTester):
    encodes = {"predict_from": False}
    mixes_each_token_once = False
    layers_are_alike = False
    exports_to_onnx = False
    model_type = "cubic_prefix_lm"
    variants = {
        "default": {},
        "rope-stride": {"position_embedding_type": "rope", "prefix_stride": 3},
        "post-two-layers": {"norm_position": "post", "num_hidden_layers": 2, "prefix_group_tokens": 64},
        "stride-post": {"norm_position": "post", "prefix_stride": 8, "attn_implementation": "eager"},
        "causal": {"prefix_stride": None},
        "modern": MODERN,
        "modern-folded": {**MODERN, "qk_norm": False, "position_embedding_type": "learned", "attention_bias": "qkv"},
        "modern-stride": {**MODERN, "prefix_stride": 3},
    }
    exported_variants = ("rope-stride", "post-two-layers", "stride-post", "causal", "modern-folded")
    counted_variant = "stride-post"  # torch does not count its fused CPU kernel
    single_precision = ("stride-post",)
    mixing_exponent = 2  # of the encoder's mixer
    state_grows = True

    def test_counted_flops_are_as_predicted(self, variant):
        eager = {"attn_implementation": "eager"} if variant != "causal" else {}
        model = self.model(variant, dtype=torch.float32, **eager)
        for tokens in (33, 64):
            linear, rest = self.count(model, torch.randint(1, VOCAB, (1, tokens)), use_cache=False)
            unseen = 0 if eager else 4 * 3 * 32 * tokens * (tokens + 1) // 2
            assert linear + rest == model.flops(tokens) - unseen


def build(auto=AutoModelForCausalLM, dtype=torch.float64, **overrides):
    arguments = {**FamilyTester.base_arguments, "hidden_size": 24, **overrides}
    model = auto.from_config(CubicPrefixLMConfig(**arguments)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def naive_logits(model, ids, mask):
    """One encoder pass per prefix, through the model's own layers."""
    base = model.model
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden_states, _ = base.embed(base.embed_tokens(ids), None, position_ids)

    def encode(states, visible):
        rope = base.rope(states, torch.arange(states.shape[1])[None])
        for layer in base.layers:
            states = layer(states, attention_mask=visible[None, None], position_embeddings=rope, is_causal=False)
        return states

    return model.lm_head(base.norm(prefix_states_naive(encode, hidden_states, mask == 1, model.config.prefix_stride)))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 8, 19, 40, None])
@pytest.mark.parametrize(
    "form",
    [
        {"prefix_group_tokens": 40},
        {"position_embedding_type": "rope", "norm_position": "post"},
    ],
    ids=["learned-pre-recomputed", "rope-post"],
)
def test_fast_equals_naive(layers, stride, form):
    """Logits and all gradients, with padding left, right and inside."""
    model = build(num_hidden_layers=layers, prefix_stride=stride, **form).train()
    ids, mask = masked_batch()
    target = torch.randn(*ids.shape, VOCAB, dtype=torch.float64) * mask[..., None]
    parameters = [p for name, p in model.named_parameters() if not (layers == 1 and name.endswith("k_proj.bias"))]
    results = []
    for logits in (model(ids, attention_mask=mask).logits, naive_logits(model, ids, mask)):
        gradients = torch.autograd.grad((logits * target).sum(), parameters, allow_unused=True)
        results.append([logits * mask[..., None], *(torch.zeros(()) if g is None else g for g in gradients)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_stride_beyond_the_input_is_the_causal_transformer():
    causal = build(prefix_stride=None)
    softmax = AutoModelForCausalLM.from_config(
        SoftmaxLMConfig(**{**FamilyTester.base_arguments, "hidden_size": 24, "position_embedding_type": "learned"})
    ).double()
    softmax.load_state_dict(causal.state_dict())
    strided = build(prefix_stride=20)
    strided.load_state_dict(causal.state_dict())
    ids, mask = masked_batch()
    expected = softmax(ids, attention_mask=mask).logits[mask == 1]
    for model in (causal, strided):
        got = model(ids, attention_mask=mask).logits[mask == 1]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_last_prefix_is_the_encoders_pass():
    """With stride 1 the last state is that of the encoder, which ends at the last token."""
    model = build()
    ids, mask = masked_batch()
    encoded = model.lm_head(model.model(ids, attention_mask=mask)[0])
    predicted = model(ids, attention_mask=mask).logits
    for row, last in enumerate((18, 11, 17)):
        torch.testing.assert_close(predicted[row, last], encoded[row, last], rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("shifted", [True, False])
def test_unscored_prefixes_are_not_computed(stride, shifted, monkeypatch):
    model = build(prefix_stride=stride)
    ids = torch.randint(1, VOCAB, (2, 30))
    labels = ids.masked_fill(torch.rand(2, 30) < 0.7, -100)
    full = model(ids)
    arguments = {"labels": labels}
    scored = torch.cat([labels[:, 1:] != -100, torch.ones(2, 1, dtype=torch.bool)], 1)  # and the last token
    if not shifted:
        arguments, scored = {"labels": labels, "shift_labels": labels}, labels != -100
    expected = model.loss_function(full.logits, labels, VOCAB, shift_labels=None if shifted else labels)
    passes, run_group = [], Passes.run_group
    monkeypatch.setattr(
        Passes, "run_group", lambda self, first, g, *a: passes.append(g) or run_group(self, first, g, *a)
    )
    outputs = model(ids, **arguments, use_cache=False)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.logits[scored], full.logits[scored])
    computed = {(row, end) for group in passes for row, end in zip(group.rows.tolist(), group.ends.tolist())}
    ends = stride * ((torch.arange(30) + 1) // stride)
    assert computed == {(row, int(ends[t])) for row, t in scored.nonzero().tolist()}


def test_no_labels_at_all():
    model = build()
    ids = torch.randint(1, VOCAB, (2, 9))
    logits = model(ids, labels=ids, shift_labels=torch.full_like(ids, -100), use_cache=False).logits
    torch.testing.assert_close(logits, logits[:1, :1].expand_as(logits))  # those of a zero state


@pytest.mark.parametrize("layers, exponent", [(2, 2), (3, 3), (4, 3)])
def test_attention_grows_as_claimed(layers, exponent):
    """Without the linear layers, whose rows grow with N^2 whatever the depth. Counted where that is affordable."""
    model = build(
        dtype=torch.float32,
        num_hidden_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=2048,
        attn_implementation="eager",
        prefix_group_tokens=1 << 20,
    )

    def linear(n):
        """Of the layers that act on every token of every pass, and of those that act once a token."""
        [(_, groups)] = Passes(model.model).plan(torch.arange(1, n + 1)[None], torch.ones(1, n, dtype=torch.bool))
        rows = sum(len(group.rows) * group.stop for group in groups)
        mlp, projection = 4 * 8 * 8, 2 * 8 * 8
        passes = (projection + mlp) * rows + (layers - 2) * (4 * projection + mlp) * rows
        return passes + n * (3 * projection + 4 * projection + mlp + 2 * 8 * VOCAB)

    counted = sum(FamilyTester.count(model, torch.randint(1, VOCAB, (1, 100)), use_cache=False))
    assert counted == model.flops(100)
    attention = [model.flops(n) - linear(n) for n in (512, 2048)]
    assert all(flops > 0 for flops in attention)
    assert abs(math.log(attention[1] / attention[0], 4) - exponent) < 0.15


def test_prefill_is_one_pass():
    model = build(dtype=torch.float32, max_position_embeddings=1024, attn_implementation="eager")
    counted = [
        sum(FamilyTester.count(model, torch.randint(1, VOCAB, (1, n)), use_cache=True, logits_to_keep=1))
        for n in (256, 1024)
    ]
    assert counted[1] < 1.3 * model.model.flops(1024)
    assert math.log2(counted[1] / counted[0]) / 2 < 2


def saved_bytes(model, **inputs):
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**inputs, use_cache=False).loss
    return sum(held.values()), loss


def test_activations_are_bounded_by_the_group_budget():
    ids = torch.randint(1, VOCAB, (1, 64))
    held = {}
    for budget in (1 << 20, 512, 64):
        held[budget], loss = saved_bytes(build(prefix_group_tokens=budget).train(), input_ids=ids, labels=ids)
        loss.backward()
    whole = build().train()
    whole.gradient_checkpointing_enable()
    held["checkpointing"], _ = saved_bytes(whole, input_ids=ids, labels=ids)
    assert held[512] < held[1 << 20] / 2
    assert held[64] < held[512]
    assert held["checkpointing"] < held[1 << 20] / 20


def test_cropped_pass_is_made_anew():
    """A state that is cut inside the connected part holds keys that have seen what was removed."""
    model = build(prefix_stride=4).eval()
    ids = torch.randint(1, VOCAB, (2, 12))
    past = model(ids, use_cache=True).past_key_values
    past.crop(-1)
    other = (ids[:, -1:] + 1).clamp(max=VOCAB - 1)
    got = model(other, past_key_values=past, use_cache=True).logits
    expected = model(torch.cat([ids[:, :-1], other], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 3])
def test_given_positions_are_kept_in_the_state(stride):
    model = build(prefix_stride=stride, position_embedding_type="rope").eval()
    ids, positions = torch.randint(1, VOCAB, (1, 11)), torch.arange(11)[None] * 3 + 2
    expected = model(ids, position_ids=positions, use_cache=False).logits
    past = model(ids[:, :7], position_ids=positions[:, :7], use_cache=True).past_key_values
    got = model(ids[:, 7:], position_ids=positions[:, 7:], past_key_values=past).logits
    torch.testing.assert_close(got, expected[:, 7:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 3, None])
def test_hidden_states_are_those_of_the_tokens_in_their_own_pass(stride):
    model = build(prefix_stride=stride).eval()
    ids = torch.randint(1, VOCAB, (2, 10))
    base = model.model
    states = base(ids, predict_from=torch.ones_like(ids, dtype=torch.bool), output_hidden_states=True).hidden_states
    assert len(states) == 4 and all(x.shape == (2, 10, 24) for x in states)
    for t in (0, 4, 9):
        if stride == 1:
            alone = base(ids[:, : t + 1], output_hidden_states=True).hidden_states
        else:
            read = torch.arange(t + 1)[None].expand(2, -1) == t
            alone = base(ids[:, : t + 1], predict_from=read, output_hidden_states=True).hidden_states
        for x, y in zip(states, alone, strict=True):
            torch.testing.assert_close(x[:, t], y[:, t], rtol=0, atol=1e-12)
    some = model(ids, output_hidden_states=[-1, 1]).hidden_states
    assert [x is not None for x in some] == [False, True, False, True]


def test_adapters_are_seen():
    """Folded projections read weights: what replaces a projection must still be called."""
    model = build()
    ids = torch.randint(1, VOCAB, (1, 9))
    before = model(ids).logits
    last = model.model.layers[-1].mixer
    for name in ("k_proj", "v_proj"):
        plain = getattr(last, name)

        class Adapted(torch.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        adapted = Adapted(24, 24).double()
        adapted.load_state_dict(plain.state_dict())
        setattr(last, name, adapted)
        after = model(ids).logits
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, naive_logits(model, ids, torch.ones_like(ids)), rtol=0, atol=1e-12)
        before = after


class TestEncoder:
    def test_padded_rows_equal_rows_alone(self):
        model = build(AutoModelForMaskedLM, is_decoder=False, prefix_stride=3).eval()
        ids, mask = masked_batch()
        logits = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row][mask[row] == 1][None]).logits[0]
            torch.testing.assert_close(logits[row][mask[row] == 1], alone, rtol=0, atol=1e-12)

    def test_sees_the_future_whatever_the_head(self):
        ids = torch.randint(1, VOCAB - 1, (1, 9))
        other = ids.clone()
        other[0, -1] += 1
        for model in (build(AutoModelForMaskedLM, is_decoder=False), build(AutoModelForTokenClassification)):
            assert not torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])

    def test_costs_one_pass(self):
        model = build(AutoModelForTokenClassification, dtype=torch.float32, attn_implementation="eager")
        assert sum(FamilyTester.count(model, torch.randint(1, VOCAB, (1, 40)))) == model.flops(40)

    def test_refuses_a_state(self):
        model = build()
        past = model(torch.randint(1, VOCAB, (1, 5)), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="use CubicPrefixLMForCausalLM, or give `predict_from`"):
            model.model(torch.randint(1, VOCAB, (1, 1)), past_key_values=past, predict_from=False)


def test_dropout_trains_and_rests():
    model = build(hidden_dropout=0.2, attention_dropout=0.2).train()
    ids = torch.randint(1, VOCAB, (2, 20))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"prefix_stride": 0}, r"`prefix_stride` \(0\) must be at least 1"),
        ({"prefix_group_tokens": 0}, r"`prefix_group_tokens` \(0\)"),
        ({"position_embedding_type": "none"}, "have no order without positions"),
        ({"layer_types": ["full_attention"] * 3}, r"takes \['cubic_prefix'\]"),
    ],
)
def test_wrong_config_is_refused_in_words(overrides, message):
    with pytest.raises(Exception, match=message):
        CubicPrefixLMConfig(**{**FamilyTester.base_arguments, **overrides})


@pytest.mark.parametrize("stride", [1, 3])
def test_wrong_input_is_refused_in_words(stride):
    model = build(prefix_group_tokens=20, prefix_stride=stride).eval()
    message = r"A prefix of 21 tokens exceeds `prefix_group_tokens` \(20\).*GiB.*at least 21"
    with pytest.raises(ValueError, match=message):
        model(torch.randint(1, VOCAB, (1, 21)))
    past = model(torch.randint(1, VOCAB, (1, 20)), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        model(torch.randint(1, VOCAB, (1, 1)), past_key_values=past)
    with pytest.raises(ValueError, match="no state of cubic_prefix for layer 0.*DynamicCache\\(config=model.config\\)"):
        model(torch.randint(1, VOCAB, (1, 5)), past_key_values=DynamicCache(), use_cache=True)
    assert AutoModel.from_config(model.config)(torch.randint(1, VOCAB, (1, 21)))[0].shape == (1, 21, 24)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    model = build(dtype=torch.float32).eval()
    ids = torch.randint(1, VOCAB, (2, 50))
    expected = model(ids).logits
    got = model.to("cuda", dtype)(ids.cuda()).logits.float().cpu()
    assert (got - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float32 else 3e-2)
    assert model.generate(ids[:, :9].cuda(), max_new_tokens=5).shape == (2, 14)


def test_flash_attention_is_refused_with_a_stride():
    """It takes no mask of pairs, and would connect tokens to later ones of their group."""
    model = build(prefix_stride=3)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"`prefix_stride` \(3\) needs a mask .* set attn_implementation='sdpa'"):
        model(torch.randint(1, VOCAB, (2, 9)), use_cache=False)


def test_the_head_may_be_told_to_encode():
    model, ids = build().eval(), torch.randint(1, VOCAB, (2, 9))
    encoded = model.model(ids, predict_from=False).last_hidden_state
    torch.testing.assert_close(model(ids, predict_from=False).logits, model.lm_head(encoded))


def test_checkpointing_makes_no_generation_state():
    model = build(prefix_stride=3).train()
    model.gradient_checkpointing_enable()
    assert model(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values is None


def test_whatever_device_is_the_default():
    """What is planned on the CPU stays there."""
    for more in ({}, {"prefix_stride": 3}):
        model, ids = build(**more).eval(), torch.randint(1, VOCAB, (3, 9))
        mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
        with torch.device("meta"):
            found = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
