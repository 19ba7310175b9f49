"""RMSNorm, gated MLPs, grouped keys, head sizes, biases, QK norm: what they compute, and what they leave as it was."""

import copy

import pytest
import torch
from family_tester import MODERN, PAD, VOCAB, FamilyTester, masked_batch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

import ordnung
from ordnung.modeling.mixers.norms import RMSNorm
from ordnung.modeling.registration import FAMILIES

# (family, fields): each way in which a mixer uses projections
CASES = {
    "softmax": ("softmax_lm", {}),
    "softmax-encoder": ("softmax_lm", {"is_decoder": False}),
    "prefix": ("cubic_prefix_lm", {}),
    "prefix-folded": ("cubic_prefix_lm", {"position_embedding_type": "learned", "qk_norm": False}),
    "prefix-stride": ("cubic_prefix_lm", {"prefix_stride": 4}),
    "causal-linformer": ("linformer_lm", {"is_decoder": True, "projected_size": 8, "local_block_size": 4}),
    "causal-linformer-own": (
        "linformer_lm",
        {"is_decoder": True, "projected_size": 8, "local_block_size": 4, "projection_sharing": "none"},
    ),
    "sparse": ("sparse_attention_lm", {"sliding_window": 4, "num_global_tokens": 2, "global_stride": 5}),
    "sparse-random": ("sparse_attention_lm", {"sliding_window": 4, "num_random_blocks": 1, "random_block_size": 3}),
    "sparse-encoder": (
        "sparse_attention_lm",
        {"is_decoder": False, "sliding_window": 3, "num_global_tokens": 2, "global_projections": "separate"},
    ),
    "quadratic": ("quadratic_kernel_lm", {"centering": "prefix", "sliding_window": 4, "v_head_dim": 12}),
    "linformer": ("linformer_lm", {"projected_size": 8}),
    "linformer-own": ("linformer_lm", {"projected_size": 8, "projection_sharing": "none"}),
    "linformer-first": (
        "linformer_lm",
        {"projected_size": 8, "position_embedding_type": "learned", "qk_norm": False, "projection_sharing": "headwise"},
    ),
}


def build(model_type, **fields):
    config = AutoConfig.for_model(model_type, **{**FamilyTester.base_arguments, "is_decoder": False, **fields})
    head = "AutoModelForCausalLM" if config.is_decoder else "AutoModelForMaskedLM"
    model = getattr(modeling_auto, head).from_config(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", CASES)
def test_grouped_keys_equal_repeated_ones(case):
    """Two heads of keys for four of queries are four, two of which are alike."""
    model_type, fields = CASES[case]
    fields = {**MODERN, "is_decoder": model_type != "linformer_lm", "attention_bias": "qkv", **fields}
    grouped = build(model_type, **fields)
    assert grouped.model.layers[0].mixer.k_proj.weight.shape == (24, 32)
    whole = build(model_type, **{**fields, "num_key_value_heads": 4})
    state = grouped.state_dict()
    for name, value in state.items():
        if any(part in name for part in ("k_proj", "v_proj", "k_global_proj", "v_global_proj")):
            state[name] = value.unflatten(0, (2, 12)).repeat_interleave(2, 0).flatten(0, 1)
        elif name.endswith("conv_kernel"):  # queries, then keys and values
            rest = value[48:].unflatten(0, (2, 2, 12)).repeat_interleave(2, 1).flatten(0, 2)
            state[name] = torch.cat([value[:48], rest])
        elif name.endswith("mixer.projection.weight") and value.shape[1] == 2:
            state[name] = value.repeat_interleave(2, 1)
    whole.load_state_dict(state)
    ids, mask = masked_batch()
    for more in ({}, {"attention_mask": mask}):
        got, expected = grouped(ids, **more).logits, whole(ids, **more).logits
        real = mask == 1 if more else torch.ones_like(mask) == 1
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-10)
    if grouped.config.is_decoder:
        assert grouped.cache_bytes(40) < whole.cache_bytes(40)
    assert grouped.flops(40) < whole.flops(40)


def test_rms_norm_is_the_formula_and_torchs():
    norm = RMSNorm(6, 1e-3).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (6,), norm.weight, 1e-3), rtol=0, atol=1e-14)
    half = copy.deepcopy(norm).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False, "qkv"])
def test_biases_are_where_they_are_asked_for(bias):
    for model_type in FAMILIES:
        fields = {**old_fields(model_type), "mlp_bias": False, "mlp_type": "gated"}
        model = build(model_type, is_decoder=True, attention_bias=bias, **fields)
        mixer, mlp = model.model.layers[0].mixer, model.model.layers[0].mlp
        for name, module in mixer.named_children():
            if name.endswith("_proj"):
                # a gate always has a bias, a decay's level is a parameter of its own
                always = {"gate_proj": True, "decay_proj": False}
                asked = always.get(name, bias is True or (bias == "qkv" and name != "out_proj"))
                assert (module.bias is not None) == asked, name
        assert all(module.bias is None for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def test_new_weights_of_rms_norms_are_ones():
    config = AutoConfig.for_model("softmax_lm", **{**FamilyTester.base_arguments, **MODERN})
    layer = ordnung.SoftmaxLMModel(config).layers[0]
    for norm in (layer.mixer_norm, layer.mlp_norm, layer.mixer.q_norm, layer.mixer.k_norm):
        assert isinstance(norm, RMSNorm) and torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_new_projections_start_alike():
    """Those into the residual stream as the others, whatever the depth: published results began so."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "initializer_range": 0.03}
    layer = ordnung.SoftmaxLMModel(AutoConfig.for_model("softmax_lm", vocab_size=VOCAB, **sizes)).layers[0]
    for projection in (layer.mixer.out_proj, layer.mlp.down_proj, layer.mlp.up_proj, layer.mixer.q_proj):
        assert projection.weight.std().item() == pytest.approx(0.03, rel=0.05) and not projection.bias.any()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_modern_checkpoint_loads_as_a_stand_alone_folder(model_type, tmp_path):
    model = build(model_type, is_decoder=True, **MODERN, **old_fields(model_type)).float()
    ordnung.save_standalone(model, tmp_path)
    loaded = modeling_auto.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    ids = torch.randint(1, VOCAB, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_kernels_of_heads_need_channels_that_divide():
    arguments = {"hidden_size": 30, "num_attention_heads": 4, "head_dim": 8}
    with pytest.raises(Exception, match=r"`hidden_size` \(30\) .*kernel_sharing='channel'"):
        ordnung.ConvLMConfig(**arguments)
    assert ordnung.ConvLMConfig(**arguments, kernel_sharing="channel").head_dim == 8


# A checkpoint written before these fields: names of a layer's parameters, in order, and four logits of weights that
# are sines, computed then.
ATTENTION = [f"{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")]
REST = [
    *(f"mlp.{name}_proj.{kind}" for name in ("up", "down") for kind in ("weight", "bias")),
    *(f"{name}_norm.{kind}" for name in ("mixer", "mlp") for kind in ("weight", "bias")),
]
OLD = {
    "softmax_lm": ({}, ATTENTION, [3.6427444643960514, -1.3420284225370742, -2.17659925745694, 3.7199293038871177]),
    "conv_lm": (
        {"kernel_size": 4, "gate": "input_output"},
        ["kernel_logits", *(f"{n}_proj.{kind}" for n in ("v", "gate", "out") for kind in ("weight", "bias"))],
        [-3.852475375786737, 1.6316216549417821, 2.0699540604716984, -3.893014315022265],
    ),
    "linformer_lm": (
        {"projected_size": 8, "local_block_size": 4},
        ATTENTION,
        [3.060709936296962, -4.18346624327276, 1.5096619559544386, 2.5341840047963613],
    ),
    "cubic_prefix_lm": ({}, ATTENTION, [3.060738944904733, -4.183451428692601, 1.509616762647948, 2.534218563201591]),
    "sparse_attention_lm": (
        {
            "sliding_window": 4,
            "num_global_tokens": 2,
            "global_stride": 5,
            "num_random_blocks": 1,
            "random_block_size": 3,
        },
        ATTENTION,
        [3.6434902228947585, -1.3415410704465345, -2.1778774405449015, 3.7208383469671533],
    ),
}


def old_fields(model_type):
    """Config fields of the family in `OLD`; none for one that is younger."""
    return OLD.get(model_type, ({},))[0]


def old_logits(model_type, fields):
    config = AutoConfig.for_model(model_type, **{**FamilyTester.base_arguments, **fields})
    model = modeling_auto.AutoModelForCausalLM.from_config(config).eval().double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(torch.sin(1.7 * places + number).view_as(parameter) / 2)
    ids = torch.arange(1, 22)[None] * 7 % VOCAB
    mask = torch.ones_like(ids)
    mask[0, :3] = PAD
    return model, model(ids, attention_mask=mask).logits[0, -1, :4]


@pytest.mark.parametrize("model_type", OLD)
def test_checkpoints_from_before_are_the_same(model_type):
    fields, names, expected = OLD[model_type]
    model, logits = old_logits(model_type, fields)
    prefix = "model.layers.0."
    state = [name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)]
    assert state == [*(f"mixer.{name}" for name in names), *REST]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
