import logging

import pytest
import torch
import torch._dynamo.testing
from family.base import FamilyBase
from family_tester import MODERN, PAD, VOCAB, FamilyTester, masked_batch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache
from transformers.utils import logging as transformers_logging

from ordnung import ConvLMConfig
from ordnung.modeling.mixers.rows import Rows
from ordnung.modeling.ops.causal_conv import causal_conv_naive
from ordnung.modeling.ops.centred_conv import centred_conv_naive


class TestConvLM(FamilyTester):
    model_type = "conv_lm"
    variants = {
        "default": {"kernel_size": 5},
        "dilated-gated": {"kernel_size": [3, 4, 2], "dilation": [1, 2, 4], "gate": "input_output"},
        "hybrid": {
            "kernel_size": 4,
            "layer_types": ["conv", "full_attention", "conv"],
            "position_embedding_type": "rope",
        },
        "attention-first": {"kernel_size": 3, "layer_types": ["full_attention", "conv", "conv"]},
        "channel-unnormalised": {"kernel_size": 6, "kernel_sharing": "channel", "kernel_normalization": "none"},
        "one-tap": {"kernel_size": 1, "kernel_normalization": "none"},
        "learned-post": {"kernel_size": 20, "position_embedding_type": "learned", "norm_position": "post"},
        "conv1d": {"kernel_size": 5, "conv_implementation": "conv1d"},
        "modern": {**MODERN, "kernel_size": 4, "layer_types": ["conv", "full_attention", "conv"]},
    }
    mixing_exponent = 1
    state_grows = False

    def mixed(self, mixer, weights, hidden_states, rows):
        """The gates are left out of the weights."""
        if mixer.config.kernel_sharing == "channel":
            pytest.skip("the weights are means over the channels of a head: test_plot_mixing.py has them")
        mixed = super().mixed(mixer, weights, hidden_states, rows)
        gated = hasattr(mixer, "gate_proj")
        return mixed * mixer.gate_proj(hidden_states).chunk(2, dim=-1)[1] if gated else mixed

    def values(self, mixer, hidden_states, rows):
        values, gated = super().values(mixer, hidden_states, rows), hasattr(mixer, "gate_proj")
        return values * mixer.gate_proj(hidden_states).chunk(2, dim=-1)[0] if gated else values


# What of the family's tests says something about a bidirectional model.
ENCODER_TESTS = (
    "config_survives_saving",
    "pieces_of_long_inputs_equal_the_whole",
    "padded_rows_equal_rows_alone",
    "garbage_under_the_mask_changes_nothing",
    "gradient_checkpointing_changes_no_gradient",
    "every_parameter_learns",
    "bfloat16_stays_near_float32",
    "graph_captures_whole_forward",
    "traced_graph_takes_padding_and_other_shapes",
    "onnx_takes_padding_and_other_shapes",
    "packed_documents_equal_documents_alone",
    "packed_documents_with_padding",
    "counted_flops_are_as_predicted",
)


class TestConvLMEncoder(FamilyBase):
    model_type = "conv_lm"
    variants = {
        "default": {"kernel_size": 5},
        "dilated-gated": {"kernel_size": [3, 5, 3], "dilation": [1, 2, 4], "gate": "input_output"},
        "hybrid": {
            "kernel_size": [5, 4, 3],  # the second layer has none
            "layer_types": ["conv", "full_attention", "conv"],
            "position_embedding_type": "rope",
        },
        "channel-unnormalised": {"kernel_size": 7, "kernel_sharing": "channel", "kernel_normalization": "none"},
        "one-tap": {"kernel_size": 1, "kernel_normalization": "none"},
        "learned-post": {"kernel_size": 21, "position_embedding_type": "learned", "norm_position": "post"},
        "conv1d": {"kernel_size": 5, "conv_implementation": "conv1d"},
        "toeplitz": {"kernel_size": 5, "conv_implementation": "toeplitz"},
        "fft": {"kernel_size": 5, "conv_implementation": "fft"},
        "modern": {**MODERN, "kernel_size": 5, "layer_types": ["conv", "full_attention", "conv"]},
    }
    base_arguments = {**FamilyTester.base_arguments, "is_decoder": False}
    count, mixing_flops = staticmethod(FamilyTester.count), staticmethod(FamilyTester.mixing_flops)

    def model(self, variant="default", head="AutoModelForMaskedLM", **more):
        return super().model(variant, head, **more)

    for name in ENCODER_TESTS:
        locals()[f"test_{name}"] = getattr(FamilyTester, f"test_{name}")

    def test_exports_with_dynamic_length(self, variant):
        model, ids = self.shallow(variant), torch.randint(1, VOCAB, (3, 40))
        shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}}
        with torch.no_grad():
            program = torch.export.export(model, (ids[:, :24].clone(),), dynamic_shapes=shapes, strict=False)
        for tokens in (5, 40):
            expected = model(ids[:, :tokens]).logits
            self.assert_equal(program.module()(ids[:, :tokens]).logits, expected, variant)

    def test_tokens_see_both_sides(self):
        model = self.model(kernel_size=[3, 5, 3], dilation=[1, 2, 4])
        assert model.config.receptive_field == 1 + 2 * (1 + 4 + 4)
        ids = torch.randint(1, VOCAB - 1, (1, 41))
        base = model(ids).logits[0, 20]
        for distance, seen in ((9, True), (10, False)):
            for place in (20 - distance, 20 + distance):
                other = ids.clone()
                other[0, place] += 1
                assert torch.equal(model(other).logits[0, 20], base) is not seen

    @pytest.mark.parametrize("kernel_sharing", ["head", "channel"])
    def test_mixing_weights_are_those_of_the_mixer(self, kernel_sharing):
        model = self.model(kernel_size=7, dilation=2, kernel_sharing=kernel_sharing)
        mixer = model.model.layers[0].mixer
        if kernel_sharing == "channel":  # the weights are means over the channels of a head
            with torch.no_grad():
                mixer.kernel_logits.copy_(mixer.kernel_logits[::8].repeat_interleave(8, 0))
        x = torch.randn(3, 19, 32, dtype=torch.float64)
        for rows in (None, Rows.of_mask(masked_batch()[1])):
            values = mixer.v_proj(x).unflatten(-1, (4, 8))
            mixed = torch.einsum("bhnm,bmhd->bnhd", mixer.mixing_weights(x, rows=rows), values).flatten(2)
            real = torch.ones(3, 19, dtype=torch.bool) if rows is None else rows.real
            self.assert_equal(mixer(x, rows=rows)[0][real], mixer.out_proj(mixed)[real])


def build(auto=AutoModelForCausalLM, **overrides):
    config = ConvLMConfig(**{**FamilyTester.base_arguments, **overrides})
    return auto.from_config(config).eval().double()


def test_centred_kernels_start_as_means_around_the_token():
    kernel = build(AutoModelForMaskedLM, is_decoder=False, kernel_size=9).model.layers[0].mixer.kernel()
    torch.testing.assert_close(kernel, kernel.flip(1))
    past = kernel[:, 4:]
    assert (past[:, :-1] > past[:, 1:]).all() and ((past * torch.arange(5)).sum(1).diff() > 0).all()


def test_kernel_size_follows_the_direction():
    assert ConvLMConfig().kernel_size == 64 and ConvLMConfig(is_decoder=False).kernel_size == 63
    assert ConvLMConfig(is_decoder=False, num_hidden_layers=2).layer_types == ["centred_conv"] * 2


@pytest.mark.parametrize("is_decoder, naive", [(True, causal_conv_naive), (False, centred_conv_naive)])
@pytest.mark.parametrize("gate", ["none", "input_output"])
@pytest.mark.parametrize("kernel_sharing", ["head", "channel"])
def test_mixer_equals_the_formula(gate, kernel_sharing, is_decoder, naive):
    fields = {"kernel_size": 7, "dilation": 2, "gate": gate, "kernel_sharing": kernel_sharing}
    auto = AutoModelForCausalLM if is_decoder else AutoModelForMaskedLM
    mixer = build(auto, is_decoder=is_decoder, **fields).model.layers[1].mixer
    with torch.no_grad():
        mixer.kernel_logits.normal_()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    v, after = mixer.v_proj(x), 1.0
    if gate == "input_output":
        before, after = mixer.gate_proj(x).chunk(2, dim=-1)
        v = before * v
    kernel = torch.exp(mixer.kernel_logits) / torch.exp(mixer.kernel_logits).sum(1, keepdim=True)
    expected = mixer.out_proj(after * naive(v, kernel, dilation=2))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


def test_source_preset_reproduces_the_articles_mixer():
    """v_proj, softmax of the head's logits over 64 lags, causal sum with zero left padding, out_proj: term by term."""
    config = ConvLMConfig.source_preset(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (256, 6, 8)
    assert config.per_layer("kernel_size") == [64] * 6 and config.receptive_field == 379
    assert not hasattr(model.model, "embed_positions") and model.lm_head.bias is not None
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    mixer = model.model.layers[0].mixer.double()
    torch.testing.assert_close(mixer.kernel(), torch.full((8, 64), 1 / 64, dtype=torch.float64))
    with torch.no_grad():
        mixer.kernel_logits.normal_()
    x = torch.randn(1, 70, 256, dtype=torch.float64)
    v, kernel = mixer.v_proj(x), mixer.kernel_logits.softmax(-1)
    mixed = torch.zeros_like(v)
    for n in range(70):
        for lag in range(min(n, 63) + 1):
            for head in range(8):
                part = slice(32 * head, 32 * head + 32)
                mixed[0, n, part] += kernel[head, lag] * v[0, n - lag, part]
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(mixed), rtol=0, atol=1e-12)


def test_flops_of_a_model_of_gpt2_size():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ConvLMConfig(vocab_size=50257))
    assert model.flops(2048) == 2 * 2048 * (12 * (10 * 768**2 + 64 * 768) + 768 * 50257)


def test_receptive_field_is_exact():
    model = build(kernel_size=[3, 2, 4], dilation=[1, 3, 2])
    assert model.config.receptive_field == 1 + 2 + 3 + 6
    ids = torch.randint(1, VOCAB - 1, (1, 30))
    base = model(ids).logits[0, -1]
    for back, seen in ((11, True), (12, False)):
        other = ids.clone()
        other[0, -1 - back] += 1
        assert torch.equal(model(other).logits[0, -1], base) is not seen


def test_training_beyond_the_receptive_field_warns(caplog):
    transformers_logging.enable_propagation()
    model = build(kernel_size=3).train()
    with caplog.at_level(logging.WARNING):
        model(torch.randint(1, VOCAB, (1, 7)))
        # documents side by side are as long as they are alone
        model(torch.randint(1, VOCAB, (1, 21)), position_ids=torch.arange(7).repeat(3)[None])
        assert "no output of this stack sees more" not in caplog.text
        model(torch.randint(1, VOCAB, (1, 23)))
    transformers_logging.disable_propagation()
    assert "Training on 23 tokens, but no output of this stack sees more than 7" in caplog.text


def test_kernels_start_as_means_of_the_past():
    for normalization in ("softmax", "none"):
        kernel = build(kernel_size=8, kernel_normalization=normalization).model.layers[0].mixer.kernel()
        torch.testing.assert_close(kernel.sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
        reach = (kernel * torch.arange(8)).sum(1)
        assert (kernel[:, :-1] > kernel[:, 1:]).all() and (reach.diff() > 0).all()
        flat = build(kernel_size=8, kernel_normalization=normalization, kernel_init="uniform")
        torch.testing.assert_close(flat.model.layers[0].mixer.kernel(), torch.full((4, 8), 0.125, dtype=torch.float64))


def test_fft_serves_training_and_not_the_state():
    fft, exact = build(kernel_size=30, conv_implementation="fft"), build(kernel_size=30)
    exact.load_state_dict(fft.state_dict())
    ids = torch.randint(1, VOCAB, (2, 50))
    torch.testing.assert_close(fft(ids, use_cache=False).logits, exact(ids, use_cache=False).logits)
    assert torch.equal(fft(ids, use_cache=True).logits, exact(ids, use_cache=True).logits)


def test_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no state of causal_conv for layer 0.*DynamicCache\\(config=model.config\\)"):
        build(kernel_size=3)(torch.randint(1, VOCAB, (1, 5)), past_key_values=DynamicCache(), use_cache=True)


def test_crop_without_recording_is_refused():
    model = build(kernel_size=3)
    past = model(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="Cannot remove 2 tokens: 0 are recorded"):
        past.crop(-2)
    with pytest.raises(ValueError, match="got 3"):
        past.crop(3)


def test_compiled_decoding_does_not_recompile():
    model = build(kernel_size=5, eos_token_id=None)
    past = model(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():  # with gradients each state keeps its graph
        for _ in range(4):
            step(torch.randint(1, VOCAB, (1, 1)), past_key_values=past, use_cache=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"kernel_size": 0}, r"`kernel_size` \(0\) must be at least 1"),
        ({"dilation": [1, 2]}, "`dilation` has 2 entries for `num_hidden_layers` \\(3\\)"),
        ({"kernel_sharing": "layer"}, "kernel_sharing"),
        ({"gate": "swish"}, "gate"),
        ({"conv_implementation": "unfold"}, "conv_implementation"),
        (
            {"is_decoder": False, "kernel_size": 8},
            r"`kernel_size` \(8\) must be odd in a bidirectional .* set 7 or 9, or is_decoder=True",
        ),
        ({"is_decoder": False, "kernel_size": [3, 3, 4]}, r"`kernel_size` \(\[3, 3, 4\]\) must be odd"),
        ({"is_decoder": False, "layer_types": ["causal_conv"] * 3}, r"conv_lm takes \['centred_conv'"),
    ],
)
def test_wrong_convolution_is_refused_in_words(overrides, message):
    with pytest.raises(Exception, match=message):
        ConvLMConfig(**{**FamilyTester.base_arguments, **overrides})


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    model = build(kernel_size=20).float()
    ids = torch.randint(1, VOCAB, (2, 100))
    expected = model(ids).logits
    got = model.to("cuda", dtype)(ids.cuda()).logits.float().cpu()
    assert (got - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float32 else 3e-2)
    assert model.generate(ids[:, :9].cuda(), max_new_tokens=5, pad_token_id=PAD).shape == (2, 14)
