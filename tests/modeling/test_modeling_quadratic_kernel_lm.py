import math

import pytest
import torch
import torch._dynamo.testing
from family_tester import PAD, VOCAB, FamilyTester, marks_of, masked_batch, packed_batch
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid, pad, rms_norm
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import ordnung
from ordnung.configuration.configuration_quadratic_kernel_lm import QuadraticKernelLMConfig
from ordnung.modeling.mixers import rows as rows_module
from ordnung.modeling.mixers.rows import Rows, over_rows
from ordnung.modeling.ops.causal_conv import causal_conv_naive
from ordnung.modeling.ops.quadratic_kernel import Kernel, quadratic_kernel_naive

CSQ = {"qk_norm": False, "decay_gate": False, "short_conv_kernel": 0, "centering": "prefix"}


class TestQuadraticKernelLM(FamilyTester):
    model_type = "quadratic_kernel_lm"
    variants = {
        "default": {"head_dim": 6, "chunk_size": 4},
        "csq": {"head_dim": 4, "score_bound_coef": 1e-3, **CSQ},
        "taylor-window": {"kernel": "taylor", "head_dim": 4, "sliding_window": 5, "short_conv_kernel": 0},
        "square-exclusive": {
            "kernel": "square",
            "head_dim": 6,
            "centering": "exclusive",
            "sliding_window": 3,
            "chunk_size": 8,
            "position_embedding_type": "learned",
            "norm_position": "post",
        },
        "grouped": {
            "head_dim": 4,
            "v_head_dim": 6,
            "num_key_value_heads": 2,
            "attention_bias": False,
            "centering": "prefix",
            "sliding_window": 5,
            "chunk_size": 4,
        },
        "hybrid": {
            "head_dim": 4,
            "chunk_size": 4,
            "layer_types": ["quadratic_kernel", "full_attention", "quadratic_kernel"],
        },
        "attention-first": {
            "head_dim": 12,
            "position_embedding_type": "none",
            "layer_types": ["full_attention", "quadratic_kernel", "quadratic_kernel"],
        },
    }
    exported_variants = ("csq", "taylor-window", "square-exclusive", "grouped")
    has_own_head_dim = True
    mixing_exponent = 1
    state_grows = False

    def values(self, mixer, hidden_states, rows):
        """As they are after the short convolution."""
        values = super().values(mixer, hidden_states, rows)
        if not hasattr(mixer, "conv_kernel"):
            return values
        kernel = mixer.conv_kernel[-values.shape[-1] :]
        return over_rows(rows, lambda x, lengths: causal_conv_naive(x, kernel), values)


def build(head="AutoModelForCausalLM", **overrides):
    """A model in float64 whose parameters are away from their initial values."""
    return TestQuadraticKernelLM().model(head=head, **overrides)


def naive_mixer(mixer, x, cos, sin):
    """The mixer before its output projection and its weights, of one row x (N, D): head by head, by the formulas."""
    config, d, heads = mixer.config, mixer.config.head_dim, mixer.config.num_attention_heads
    joined = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
    if config.short_conv_kernel:
        joined = causal_conv_naive(joined[None], mixer.conv_kernel)[0]
    groups = config.num_key_value_heads
    sizes = [d] * (heads + groups) + [mixer.value_dim] * groups
    parts, outputs, all_weights = joined.split(sizes, -1), [], []
    for h in range(heads):
        g = heads + h * groups // heads
        query, key, value = parts[h], parts[g], parts[g + groups]
        if config.qk_norm:
            query = rms_norm(query, (d,), mixer.q_norm.weight, config.layer_norm_eps)
            key = rms_norm(key, (d,), mixer.k_norm.weight, config.layer_norm_eps)
        local = query, key
        if config.centering:
            of = torch.ones(len(x), len(x), dtype=x.dtype).tril(0 if config.centering == "prefix" else -1)
            mean = of / of.sum(1, keepdim=True).clamp(min=1)
            query, key = query - mean @ query, key - mean @ key
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=0)
        local = apply_rotary_pos_emb(*local, cos, sin, unsqueeze_dim=0)
        decay = logsigmoid(mixer.decay_proj(x)[:, h] + mixer.decay_bias[h]) if config.decay_gate else None
        kernel = Kernel(mixer.alpha[h], mixer.beta[h]) if config.kernel == "shifted" else mixer.kernel()
        weights = quadratic_kernel_naive(query[0], key[0], value, kernel, decay)[1]
        if config.sliding_window:
            lag = torch.arange(len(x))[:, None] - torch.arange(len(x))
            scores = local[0][0] @ local[1][0].T / math.sqrt(d)
            near = scores.masked_fill((lag < 0) | (lag >= config.sliding_window), -torch.inf).softmax(-1)
            weights = torch.lerp(weights, near, mixer.window_logits[h].sigmoid())
        outputs.append(weights @ value)
        all_weights.append(weights)
    return torch.cat(outputs, -1), torch.stack(all_weights)


FORMS = {
    "default": {},
    "csq": CSQ,
    "exclusive": {"centering": "exclusive", "short_conv_kernel": 2},
    "taylor": {"kernel": "taylor", "sliding_window": 6},
    "square": {"kernel": "square", "short_conv_kernel": 1, "centering": "prefix", "sliding_window": 3},
    "grouped": {"num_key_value_heads": 2, "v_head_dim": 6, "centering": "prefix", "sliding_window": 3},
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("form", list(FORMS))
def test_mixer_and_its_weights_equal_the_formula(form, packed):
    """The weights of what is padding or in another document are zero."""
    model = build(head_dim=4, chunk_size=4, **FORMS[form])
    mixer, seen = model.model.layers[1].mixer, {}
    mixer.out_proj.register_forward_pre_hook(lambda module, inputs: seen.update(mixed=inputs[0]))
    if packed:
        ids, places = packed_batch()
        number = marks_of("seq_idx", places)["seq_idx"]
        rows = Rows.of_documents(pad(number.diff() != 0, (1, 0), value=True), None)
        parts = [(row, torch.arange(place.start, place.stop)) for row, place in places]
    else:
        ids, mask = masked_batch()
        rows, parts = Rows.of_mask(mask), [(row, mask[row].nonzero()[:, 0]) for row in range(3)]
    x = torch.randn(*ids.shape, 32, dtype=torch.float64)
    positions = torch.zeros_like(ids)
    for row, at in parts:
        positions[row, at] = torch.arange(len(at))
    angles = model.model.rotary_emb(x, positions)
    mixer(x, position_embeddings=angles, rows=rows)
    expected = torch.zeros(len(ids), 4, ids.shape[1], ids.shape[1], dtype=torch.float64)
    for row, at in parts:
        mixed, weights = naive_mixer(mixer, x[row, at], *(y[row, at] for y in angles))
        torch.testing.assert_close(seen["mixed"][row, at], mixed, rtol=0, atol=1e-10)
        expected[row, :, at[:, None], at] = weights
    got = mixer.mixing_weights(x, position_embeddings=angles, rows=rows)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_csq_preset_reproduces_the_papers_mechanism():
    """Term by term: prefix-centred queries and keys, (alpha z + beta)^2, normalised over the row."""
    config = QuadraticKernelLMConfig.csq_preset(**{**FamilyTester.base_arguments, "position_embedding_type": "none"})
    assert (config.kernel, config.centering, config.score_bound_coef) == ("shifted", "prefix", 1e-3)
    mixer = AutoModelForCausalLM.from_config(config).double().eval().model.layers[0].mixer
    assert not any(hasattr(mixer, name) for name in ("q_norm", "decay_proj", "conv_kernel", "window_logits"))
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    query, key = (p(x)[0].unflatten(-1, (4, 16)) for p in (mixer.q_proj, mixer.k_proj))
    value = mixer.v_proj(x)[0].unflatten(-1, (4, 8))
    mixed = torch.zeros_like(value)
    for h in range(4):
        for i in range(9):
            weights = []
            for j in range(i + 1):
                z = (query[i, h] - query[: i + 1, h].mean(0)) @ (key[j, h] - key[: j + 1, h].mean(0)) / 4
                weights.append((0.5 * z + 1) ** 2)
            mixed[i, h] = sum(w * v for w, v in zip(weights, value[:, h])) / sum(weights)
    expected = mixer.out_proj(mixed.flatten(1))[None]
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-4)  # the least weight


def test_gates_start_as_memories_of_different_length():
    config = QuadraticKernelLMConfig(**{**FamilyTester.base_arguments, "max_position_embeddings": 1024})
    mixer = AutoModelForCausalLM.from_config(config).model.layers[0].mixer
    tau = -1 / logsigmoid(mixer.decay_bias)
    torch.testing.assert_close(tau, torch.tensor([16.0, 64.0, 256.0, 1024.0]), rtol=1e-3, atol=0)
    assert (mixer.conv_kernel[:, 0] - 1).abs().max() < 0.2 and mixer.conv_kernel[:, 1:].abs().max() < 0.2
    assert mixer.alpha.eq(0.5).all() and mixer.beta.eq(1).all()


def test_loaded_parameters_stay_where_others_are_missing(tmp_path):
    model = build(head_dim=4, sliding_window=3, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mixer.alpha"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, expected in model.state_dict().items():
        new = name == "model.layers.1.mixer.alpha"
        assert torch.equal(loaded[name], torch.full_like(expected, 0.5) if new else expected), name


def test_static_cache_of_a_hybrid_is_made_ahead_with_the_right_sizes():
    model = build(head_dim=2, layer_types=["full_attention", "quadratic_kernel", "quadratic_kernel"])
    ids = torch.randint(1, VOCAB - 1, (1, 12))
    fixed = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "disable_compile": True}
    expected = model.generate(ids, use_cache=False, **fixed)
    got = model.generate(ids, cache_implementation="static", prefill_chunk_size=4, **fixed)
    assert torch.equal(got, expected)


# the penalty on scores

BOUNDED = {"head_dim": 4, "chunk_size": 64, "qk_norm": False, "decay_gate": False, "short_conv_kernel": 0}


def pair_excess(model, ids):
    """Sum over layers, heads and pairs of the squared excess of scores beyond 4, and the number of these."""
    outputs = model(ids, output_hidden_states=True)
    total = count = 0
    for layer, states in zip(model.model.layers, outputs.hidden_states):
        x = layer.mixer_norm(states)
        angles = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        query, key = (p(x).unflatten(-1, (4, -1)) for p in (layer.mixer.q_proj, layer.mixer.k_proj))
        query, key = apply_rotary_pos_emb(query, key, *angles, unsqueeze_dim=2)
        scores = torch.einsum("bihc,bjhc->bhij", query, key) / query.shape[-1] ** 0.5
        seen = torch.ones_like(scores).tril()
        total = total + ((scores.abs() - 4).clamp(min=0).square() * seen).sum()
        count = count + seen.sum()
    return torch.stack([total, count])


def test_score_bound_is_added_to_the_loss_of_training():
    model = build(score_bound_coef=0.7, **BOUNDED)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.q_proj.weight.mul_(3)  # so that scores exceed the bound
    ids = torch.randint(1, VOCAB, (3, 20))
    mask = torch.ones_like(ids)
    mask[1:, -8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    total, count = sum(pair_excess(model, row[None, :n]) for row, n in zip(ids, (20, 12, 12)))
    plain = model(ids, attention_mask=mask, labels=labels).loss
    assert total / count > 0.1
    assert all(layer.mixer.excess is None for layer in model.model.layers)
    model.train()
    loss = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, plain + 0.7 * (total / count).float())
    assert all(layer.mixer.excess is None for layer in model.model.layers)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask, labels=labels).loss, plain)


def test_score_bound_of_packed_documents(monkeypatch):
    """Laid out in several groups, it counts the pairs of all."""
    monkeypatch.setattr(rows_module, "GROUP_TOKENS", 1)
    model = build(score_bound_coef=0.7, **BOUNDED)
    ids, places = packed_batch()
    ids = torch.cat([ids, torch.randint(1, VOCAB, (2, 21))], 1)
    number = torch.nn.functional.pad(marks_of("seq_idx", places)["seq_idx"], (0, 21), value=99)
    places += [(row, slice(21, 42)) for row in range(2)]
    total, count = sum(pair_excess(model, ids[row : row + 1, place]) for row, place in places)
    plain = model(ids, labels=ids, seq_idx=number).loss
    got = model.train()(ids, labels=ids, seq_idx=number).loss
    torch.testing.assert_close(got, plain + 0.7 * (total / count).float())


@pytest.mark.parametrize("head", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_every_head_bounds_scores(head):
    model = build(head, score_bound_coef=100.0, num_labels=3, **BOUNDED).train()
    ids = torch.randint(1, VOCAB, (3, 20))
    labels = torch.randint(3, (3,) if "Sequence" in head else (3, 20))
    bounded = model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    plain = model.eval()(ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert bounded > plain + 0.1


def test_score_bound_of_accumulated_batches_is_their_mean():
    model = build(score_bound_coef=5.0, **BOUNDED).train()
    ids = torch.randint(1, VOCAB, (4, 20))

    def gradients(*batches):
        model.zero_grad()
        for batch in batches:
            model(batch, labels=batch, num_items_in_batch=4 * 19).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(ids), gradients(ids[:1], ids[1:])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_score_bound_under_reentrant_checkpointing_is_refused():
    model = build(score_bound_coef=1.0, **BOUNDED).train()
    ids = torch.randint(1, VOCAB, (2, 9))
    expected = model(ids, labels=ids).loss
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(model(ids, labels=ids).loss, expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"`score_bound_coef` \(1.0\).*'use_reentrant': False"):
        model(ids, labels=ids)


# the state


def test_state_of_another_model_is_refused():
    ids = torch.randint(1, VOCAB, (1, 5))
    model = build(head_dim=4)
    with pytest.raises(ValueError, match="no state of quadratic_kernel for layer 0.*DynamicCache\\(config="):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    for other in ({"centering": "prefix"}, {"head_dim": 6}, {"short_conv_kernel": 2}, {"sliding_window": 4}):
        past = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"a state of shapes \[\(4, 9, 15\).*`centering`.*\(sums, conv"):
            build(**{"head_dim": 4, **other})(ids, past_key_values=past, use_cache=True)


def test_state_of_a_bfloat16_model_is_float32():
    model = build(head_dim=4, centering="prefix", sliding_window=3, dtype=torch.bfloat16)
    past = model(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values
    dtypes = dict(zip(model.model.layers[0].mixer.state_shapes(), (x.dtype for x in past.layers[0].state)))
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {"sums", "q_total", "k_total"} and dtypes["count"] == torch.long
    held = sum(x.numel() * x.element_size() for layer in past.layers for x in layer.state if x.is_floating_point())
    assert held == model.cache_bytes(9)


@torch.no_grad()
def test_state_keeps_no_more_memory_than_it_needs():
    model = build(head_dim=4, centering="prefix", sliding_window=3)
    ids, mask = masked_batch()
    for more in ({}, {"attention_mask": mask}):
        past = model(ids, use_cache=True, **more).past_key_values
        for x in past.layers[1].state:
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_compiled_decoding_does_not_recompile():
    model = build(head_dim=4, centering="prefix", sliding_window=3)
    past = model(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(4):
            step(torch.randint(1, VOCAB, (1, 1)), past_key_values=past, use_cache=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", list(FORMS))
def test_autocast_keeps_the_state_in_float32(form):
    model = build(head_dim=4, chunk_size=4, dtype=torch.float32, **FORMS[form]).train()
    ids = torch.randint(1, VOCAB, (2, 21))
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids, use_cache=True)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, expected, rtol=2e-2, atol=0)
    assert all(layer.state[0].dtype == torch.float32 for layer in outputs.past_key_values.layers)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# conversion and bad input


def test_conversion_keeps_queries_and_keys_of_the_sources_size():
    source = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=40, n_embd=24, n_layer=2, n_head=4)).double()
    model, report = ordnung.convert(source, "quadratic_kernel_lm", output_report=True)
    assert model.config.head_dim == 6
    weight = source.transformer.h[1].attn.c_attn.weight.T
    assert torch.equal(model.model.layers[1].mixer.k_proj.weight, weight[24:48])
    own = {"alpha", "beta", "conv_kernel", "decay_proj.weight", "decay_bias", "q_norm.weight", "k_norm.weight"}
    assert {name.split("mixer.")[1] for name in report.new} == own and report.left_out == []
    model, report = ordnung.convert(source, "quadratic_kernel_lm", head_dim=4, output_report=True)
    projections = {f"{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias")}
    assert {name.split("mixer.")[1] for name in report.new} == own | projections
    assert "transformer.h.0.attn.c_attn.weight (q_proj)" in report.left_out
    assert torch.equal(model.model.layers[1].mixer.v_proj.weight, weight[48:])
    with pytest.raises(ValueError, match=r"`model.embed_tokens.weight` is \(60, 24\)"):
        ordnung.convert(source, "quadratic_kernel_lm", head_dim=4, vocab_size=60)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kernel": "cube"}, "kernel"),
        ({"centering": "row"}, "centering"),
        ({"head_dim": 0}, r"`head_dim` \(0\) must be at least 1"),
        ({"head_dim": 5, "position_embedding_type": "none"}, r"`head_dim` \(5\) must be even"),
        ({"chunk_size": 0}, r"`chunk_size` \(0\) must be at least 1"),
        ({"short_conv_kernel": -1}, r"`short_conv_kernel` \(-1\) must be at least 0"),
        ({"score_bound_coef": -0.1}, r"`score_bound_coef` \(-0.1\) must be at least 0"),
        ({"sliding_window": 0}, r"`sliding_window` \(0\) must be at least 1, the current token, or None"),
        ({"is_decoder": False}, "QuadraticKernelLM is causal"),
        (
            {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "head_dim": 128},
            r"`head_dim` \(128\) makes .* 4.1 GiB in 32 layers of 32 heads, more than 1 GiB: set .* at most 62",
        ),
    ],
)
def test_wrong_config_of_the_kernel_is_refused_in_words(overrides, message):
    with pytest.raises(Exception, match=message):  # huggingface_hub wraps some in its own class
        QuadraticKernelLMConfig(**{**FamilyTester.base_arguments, **overrides})


def test_presets_take_other_fields():
    for preset in (QuadraticKernelLMConfig.csq_preset, QuadraticKernelLMConfig.based_preset):
        assert preset(hidden_size=384, decay_gate=True).decay_gate
    assert QuadraticKernelLMConfig.based_preset().kernel == "taylor"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    model = build(head_dim=4, chunk_size=32, sliding_window=7, centering="prefix").float()
    ids = torch.randint(1, VOCAB, (2, 100))
    expected = model(ids).logits
    got = model.to("cuda", dtype)(ids.cuda()).logits.float().cpu()
    assert (got - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float32 else 3e-2)
    assert model.generate(ids[:, :9].cuda(), max_new_tokens=5, pad_token_id=PAD).shape == (2, 14)


@torch.no_grad()
def test_mixing_weights_are_those_of_pairs_without_a_gate():
    """In float32, and where scores are near a zero of the kernel: rows of weights >= 0 that sum to one."""
    model = build(head_dim=16, decay_gate=False, qk_norm=False, kernel="square", dtype=torch.float32).eval()
    mixer = model.model.layers[0].mixer
    weights = mixer.mixing_weights(10 * torch.randn(1, 120, model.config.hidden_size))
    assert (weights >= 0).all() and not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
