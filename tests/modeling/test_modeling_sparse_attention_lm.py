import inspect

import pytest
import torch
import torch._dynamo.testing
from family_tester import PAD, VOCAB, FamilyTester, marks_of, masked_batch, packed_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.models.auto import modeling_auto

from ordnung.configuration.configuration_sparse_attention_lm import SparseAttentionLMConfig
from ordnung.modeling.ops.sparse_pattern import mask_naive
from ordnung.modeling.registration import heads_of


class TestSparseAttentionLM(FamilyTester):
    model_type = "sparse_attention_lm"
    variants = {
        "default": {"sliding_window": 5, "num_global_tokens": 2},
        "local": {"sliding_window": [3, 5, 64], "num_global_tokens": 0, "position_embedding_type": "none"},
        "strided": {"sliding_window": 4, "num_global_tokens": [0, 1, 2], "global_stride": [None, 5, 3]},
        "random": {
            "sliding_window": 6,
            "num_global_tokens": 0,
            "num_random_blocks": 2,
            "random_block_size": 4,
            "position_embedding_type": "learned",
            "norm_position": "post",
        },
        "all": {
            "sliding_window": 4,
            "num_global_tokens": 3,
            "global_stride": 4,
            "num_random_blocks": 1,
            "random_block_size": 3,
            "num_key_value_heads": 2,
            "qk_norm": True,
        },
        "hybrid": {
            "sliding_window": 4,
            "layer_types": ["sparse_attention", "full_attention", "sparse_attention"],
        },
        "eager": {
            "sliding_window": 4,
            "num_random_blocks": 1,
            "random_block_size": 4,
            "attn_implementation": "eager",
        },
    }
    exported_variants = ("strided", "all", "eager")
    mixing_exponent = 1
    state_grows = False

    def count(self, module, *inputs, **arguments):
        with sdpa_kernel(SDPBackend.MATH):  # torch does not count its fused CPU kernel
            return super().count(module, *inputs, **arguments)

    @pytest.mark.parametrize(
        "fields, exponent",
        [
            ({"sliding_window": 32}, 1),
            ({"sliding_window": 32, "num_global_tokens": 16}, 1),
            ({"sliding_window": 32, "num_random_blocks": 2, "random_block_size": 16}, 1),
            ({"sliding_window": 32, "global_stride": 4}, 2),
        ],
    )
    def test_each_kind_grows_as_claimed(self, fields, exponent):
        """FLOPs per token are constant but for strided tokens, of which more and more are seen."""
        mixer = self.model("local", dtype=torch.float32, **fields).model.layers[0].mixer
        per_token = [self.count(mixer, torch.randn(1, N, 32))[1] / N for N in (2048, 4096, 8192)]
        predicted = [self.mixing_flops(mixer, N) / N for N in (2048, 4096, 8192)]
        for first, second, third in (per_token, predicted):
            assert (third - second) / first < 0.02 if exponent == 1 else third / second > 1.6


ENCODERS = {
    "default": {"sliding_window": 3, "num_global_tokens": 2},
    "local": {"sliding_window": 2, "num_global_tokens": 0},
    "strided": {"sliding_window": 2, "num_global_tokens": 1, "global_stride": 5},
    "random": {"sliding_window": 4, "num_global_tokens": 0, "num_random_blocks": 2, "random_block_size": 3},
    "separate": {"sliding_window": 2, "num_global_tokens": 2, "global_projections": "separate", "qk_norm": True},
    "learned-post": {"sliding_window": [1, 2, 9], "position_embedding_type": "learned", "norm_position": "post"},
    "eager": {
        "sliding_window": 3,
        "num_random_blocks": 1,
        "random_block_size": 3,
        "global_projections": "separate",
        "attn_implementation": "eager",
    },
}


def build(head="AutoModelForMaskedLM", **fields):
    arguments = {**FamilyTester.base_arguments, "is_decoder": head == "AutoModelForCausalLM", **fields}
    config = AutoConfig.for_model("sparse_attention_lm", **arguments)
    model = getattr(modeling_auto, head).from_config(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


class TestEncoder:
    variants = ENCODERS

    def test_padded_rows_equal_rows_alone(self, variant):
        model = build(**ENCODERS[variant])
        ids, mask = masked_batch()
        logits = model(ids, attention_mask=mask).logits
        for row in range(3):
            real = mask[row] == 1
            assert_equal(logits[row][real], model(ids[row][real][None]).logits[0])

    def test_packed_documents_equal_documents_alone(self, variant):
        model = build(**ENCODERS[variant])
        ids, places = packed_batch()
        logits = model(ids, **marks_of("seq_idx", places)).logits
        for row, place in places:
            assert_equal(logits[row, place], model(ids[row : row + 1, place]).logits[0])

    def test_a_global_mask_goes_with_its_tokens(self, variant):
        """Padded and packed rows are given the part of the mask that is theirs."""
        model = build(**ENCODERS[variant])
        ids, mask = masked_batch()
        chosen = (torch.rand(ids.shape) < 0.3).long()
        logits = model(ids, attention_mask=mask, global_attention_mask=chosen).logits
        for row in range(3):
            real = mask[row] == 1
            alone = model(ids[row][real][None], global_attention_mask=chosen[row][real][None]).logits[0]
            assert_equal(logits[row][real], alone)
        assert not torch.allclose(logits, model(ids, attention_mask=mask).logits)
        ids, places = packed_batch()
        chosen = (torch.rand(ids.shape) < 0.3).long()
        logits = model(ids, global_attention_mask=chosen, **marks_of("seq_idx", places)).logits
        for row, place in places:
            alone = model(ids[row : row + 1, place], global_attention_mask=chosen[row : row + 1, place]).logits[0]
            assert_equal(logits[row, place], alone)

    def test_every_parameter_learns(self, variant):
        model = build(**ENCODERS[variant]).train()
        ids = torch.randint(1, VOCAB, (2, 21))
        model(ids, labels=ids).loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert [name for name in without if not name.endswith(("k_proj.bias", "k_global_proj.bias"))] == []

    @pytest.mark.parametrize("kind", ["random", "separate", "strided"])  # the others are parts of these
    def test_exported_with_dynamic_length_and_padding(self, kind):
        model = build(**ENCODERS[kind], num_hidden_layers=1)
        ids, mask = masked_batch()
        length = {1: torch.export.Dim("length", min=2, max=64)}

        def export():
            shapes = {"input_ids": length, "attention_mask": length}
            return torch.export.export(model, (ids, mask), dynamic_shapes=shapes, strict=False)

        if kind == "strided":  # torch cannot tell the order of strides that depend on the length twice
            with pytest.raises(Exception, match="Constraints violated"):
                export()
            return
        with torch.no_grad():
            program = export()
        for tokens in (5, 40):
            ids, mask = torch.randint(1, VOCAB, (3, tokens)), torch.ones(3, tokens, dtype=torch.long)
            mask[0, :3] = mask[1, -1:] = 0
            expected = model(ids, attention_mask=mask).logits[mask == 1]
            assert_equal(program.module()(ids, mask).logits[mask == 1], expected)


def test_default_global_tokens_are_the_first_ones():
    model = build(sliding_window=2, num_global_tokens=3)
    ids = torch.randint(1, VOCAB, (2, 30))
    mask = torch.zeros_like(ids)
    mask[:, :3] = 1
    assert_equal(model(ids, global_attention_mask=mask).logits, model(ids).logits)
    none = build(sliding_window=2, num_global_tokens=0)
    none.load_state_dict(model.state_dict())
    assert_equal(model(ids, global_attention_mask=0 * mask).logits, none(ids).logits)


@pytest.mark.parametrize("head", [head for head in heads_of("sparse_attention_lm") if head != "AutoModelForCausalLM"])
def test_heads_take_a_global_mask(head):
    model = build(head, sliding_window=2, num_labels=3)
    ids = torch.randint(1, VOCAB, (2, 3, 17) if head == "AutoModelForMultipleChoice" else (2, 17))
    mask = torch.zeros_like(ids)
    mask[..., 9] = 1
    assert not torch.allclose(model(ids, global_attention_mask=mask)[0], model(ids)[0])
    if head != "AutoModel":  # Trainer leaves out the columns that are not named
        assert "global_attention_mask" in inspect.signature(model.forward).parameters


def test_global_mask_that_does_not_fit_is_refused_in_words():
    ids = torch.randint(1, VOCAB, (2, 8))
    with pytest.raises(
        ValueError, match=r"`global_attention_mask` has shape \(2, 5\), but the tokens have \(2, 8\): 1 "
    ):
        build()(ids, global_attention_mask=torch.ones(2, 5))
    causal = build("AutoModelForCausalLM")
    for past in ({}, {"past_key_values": DynamicCache(config=causal.config), "use_cache": True}):
        with pytest.raises(
            ValueError, match=r"for bidirectional models: .*`num_global_tokens` \(4\).*is_decoder=False"
        ):
            causal(ids, global_attention_mask=torch.ones(2, 8), **past)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_weights_are_zero_where_nothing_is_seen_and_mix_the_values(is_decoder):
    fields = {"sliding_window": 4, "global_stride": 5, "num_random_blocks": 1, "random_block_size": 4}
    head = "AutoModelForCausalLM" if is_decoder else "AutoModelForMaskedLM"
    model = build(head, attn_implementation="eager", **fields)
    fast = build(head, **fields)
    fast.load_state_dict(model.state_dict())
    ids = torch.randint(1, VOCAB, (2, 40))
    outputs = model(ids, output_attentions=True, use_cache=False)
    assert_equal(outputs.logits, fast(ids).logits)
    cached = model(ids, output_attentions=True, use_cache=is_decoder)
    assert_equal(cached.attentions, outputs.attentions)
    for layer, weights in zip(model.model.layers, outputs.attentions, strict=True):
        assert torch.equal(weights[0, 0] > 0, mask_naive(layer.mixer.pattern, 40))
    mixer, states = model.model.layers[0].mixer, torch.randn(2, 40, 32, dtype=torch.float64)
    angles = model.model.rotary_emb(states, torch.arange(40)[None])
    weights = mixer.mixing_weights(states, position_embeddings=angles)
    mixed = torch.einsum("bhnm,bmhd->bnhd", weights, mixer.values(states)).flatten(2)
    assert_equal(mixer(states, position_embeddings=angles)[0], mixer.out_proj(mixed))
    with pytest.raises(ValueError, match="set 'eager'"):
        fast.model.layers[0].mixer.mixing_weights(states, position_embeddings=angles)


def test_weights_of_padded_and_packed_rows_lie_where_their_tokens_lie():
    model = build("AutoModelForCausalLM", attn_implementation="eager", sliding_window=3)
    ids, mask = masked_batch()
    weights = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions[1]
    for row in range(3):
        real = mask[row] == 1
        alone = model(ids[row][real][None], output_attentions=True, use_cache=False).attentions[1][0]
        assert_equal(weights[row][:, real][:, :, real], alone)
        assert not weights[row][:, real][:, :, ~real].any()
    ids, places = packed_batch()
    weights = model(ids, output_attentions=True, **marks_of("seq_idx", places)).attentions[1]
    for row, place in places:
        alone = model(ids[row : row + 1, place], output_attentions=True, use_cache=False).attentions[1][0]
        assert_equal(weights[row, :, place, place], alone)
        assert_equal(weights[row, :, place].sum(-1), torch.ones_like(weights[row, :, place, 0]))


@torch.no_grad()
def test_weights_of_steps_are_those_of_the_whole_row():
    """In parts and single tokens, wherever padding lies; after beams have moved and tokens were taken back."""
    fields = {"sliding_window": 4, "num_global_tokens": 2, "global_stride": 5, "num_key_value_heads": 2}
    random = {"num_random_blocks": 1, "random_block_size": 4}
    model = build("AutoModelForCausalLM", attn_implementation="eager", **fields, **random)
    ids = torch.randint(1, VOCAB, (3, 30))
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 3:9] = mask[2, 12:15] = 0
    expected = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    past, order = DynamicCache(config=model.config), torch.tensor([2, 0, 1])
    past.activate_past_recording()
    for start, stop in ((0, 10), (10, 11), (11, 25), (25, 26), (26, 27), (27, 30)):
        part = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, output_attentions=True
        ).attentions
        for got, whole in zip(part, expected, strict=True):
            assert_equal(got, whole[:, :, start:stop, :stop])
        if stop == 27:
            past.crop(-1)
            model(ids[:, 26:27], attention_mask=mask[:, :stop], past_key_values=past)
            past.reorder_cache(order)
            ids, mask, expected = ids[order], mask[order], [x[order] for x in expected]


@pytest.mark.parametrize("training", [True, False])
def test_random_blocks_are_the_same_in_training_and_show_no_later_token(training):
    model = build("AutoModelForCausalLM", sliding_window=8, num_random_blocks=2, random_block_size=8).train(training)
    ids = torch.randint(1, VOCAB - 1, (1, 300))
    logits = model(ids).logits
    assert torch.equal(logits, model.train(not training)(ids).logits)
    other = ids.clone()
    other[:, 200] += 1
    assert torch.equal(model(other).logits[:, :200], logits[:, :200])


def test_layers_draw_blocks_of_their_own():
    model = build("AutoModelForCausalLM", sliding_window=8, num_random_blocks=2, random_block_size=8, random_seed=5)
    assert [layer.mixer.pattern.seed for layer in model.model.layers] == [5, 6, 7]


def test_presets_are_what_they_are_called():
    names = ("num_global_tokens", "global_stride", "num_random_blocks")
    for preset, expected in (
        (SparseAttentionLMConfig.local, (0, None, 0)),
        (SparseAttentionLMConfig.longformer, (16, None, 0)),
        (SparseAttentionLMConfig.strided, (0, 64, 0)),
        (SparseAttentionLMConfig.bigbird, (16, None, 3)),
    ):
        config = preset(hidden_size=24, num_attention_heads=2)
        assert tuple(getattr(config, name) for name in names) == expected and config.hidden_size == 24
        assert preset(sliding_window=[64] * 12).per_layer("sliding_window") == [64] * 12
    assert SparseAttentionLMConfig.local(sliding_window=10).receptive_field == 1 + 12 * 9
    assert SparseAttentionLMConfig().receptive_field is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"sliding_window": 0}, r"`sliding_window` \(0\) must be at least 1"),
        ({"sliding_window": [4, 0, 4]}, r"`sliding_window` \(0\) must be at least 1"),
        ({"sliding_window": [4, 4]}, "`sliding_window` has 2 entries for `num_hidden_layers` \\(3\\)"),
        ({"num_global_tokens": -1}, r"`num_global_tokens` \(-1\) must be from 0 to the 64 positions"),
        ({"num_global_tokens": 65}, r"`num_global_tokens` \(65\) must be from 0 to the 64 positions"),
        ({"global_stride": 1}, r"`global_stride` \(1\) must be at least 2, or None"),
        ({"global_stride": [None, 0, 4]}, r"`global_stride` \(0\) must be at least 2, or None"),
        ({"num_random_blocks": -1}, r"`num_random_blocks` \(-1\) must be at least 0"),
        ({"random_block_size": 0}, r"`random_block_size` \(0\) must be at least 1"),
        ({"random_seed": -1}, r"`random_seed` \(-1\) must be at least 0"),
        (
            {"sliding_window": 8, "num_random_blocks": 1, "random_block_size": 9},
            r"`random_block_size` \(9\) must be at most `sliding_window` \(8\)",
        ),
        ({"global_projections": "separate"}, "global_projections='separate' is for bidirectional models"),
        ({"global_projections": "own"}, "global_projections"),
    ],
)
def test_wrong_pattern_is_refused_in_words(overrides, message):
    with pytest.raises(Exception, match=message):
        SparseAttentionLMConfig(**{**FamilyTester.base_arguments, **overrides})


def test_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no state of sparse_attention for layer 0.*DynamicCache"):
        build("AutoModelForCausalLM")(torch.randint(1, VOCAB, (1, 5)), past_key_values=DynamicCache(), use_cache=True)


def test_crop_without_recording_is_refused():
    model = build("AutoModelForCausalLM", sliding_window=4)
    past = model(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="Cannot remove 2 tokens: 0 are recorded"):
        past.crop(-2)


@pytest.mark.parametrize("fields", [{}, {"num_random_blocks": 2, "random_block_size": 4}])
@torch.no_grad()
def test_compiled_decoding_does_not_recompile(fields):
    model = build("AutoModelForCausalLM", sliding_window=6, **fields)
    ids = torch.randint(1, VOCAB, (1, 40))
    past = model(ids[:, :9], use_cache=True).past_key_values
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    steps = [step(ids[:, n : n + 1], past_key_values=past, use_cache=True).logits for n in range(9, 40)]
    assert counter.frame_count == 1
    assert_equal(torch.cat(steps, 1), model(ids).logits[:, 9:])


@torch.no_grad()
def test_compiled_decoding_with_strided_tokens_needs_a_static_cache():
    model = build("AutoModelForCausalLM", sliding_window=4, global_stride=3)
    ids = torch.randint(1, VOCAB, (1, 40))
    step = torch.compile(model, backend="eager")
    past = model(ids[:, :9], use_cache=True).past_key_values
    with pytest.raises(Exception, match="`global_stride` has the generation state grow.*static cache"):
        step(ids[:, 9:10], past_key_values=past, use_cache=True)
    past = StaticCache(config=model.config, max_cache_len=40)
    model(ids[:, :9], past_key_values=past, use_cache=True)
    address = past.layers[0].state[0].data_ptr()
    steps = [step(ids[:, n : n + 1], past_key_values=past, use_cache=True).logits for n in range(9, 40)]
    assert_equal(torch.cat(steps, 1), model(ids, use_cache=False).logits[:, 9:])
    assert past.layers[0].state[0].data_ptr() == address
    past.reset()
    assert_equal(model(ids, past_key_values=past, use_cache=True).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_decoding_keeps_its_memory():
    model = build("AutoModelForCausalLM", sliding_window=6, num_random_blocks=1, random_block_size=4)
    ids = torch.randint(1, VOCAB, (1, 60))
    past = model(ids[:, :20], use_cache=True).past_key_values
    before = [x.data_ptr() for layer in past.layers for x in layer.state]
    for n in range(20, 60):
        logits = model(ids[:, n : n + 1], past_key_values=past, use_cache=True).logits
    assert [x.data_ptr() for layer in past.layers for x in layer.state] == before
    assert_equal(logits, model(ids).logits[:, -1:])


@torch.no_grad()
def test_a_batch_row_that_begins_with_a_call_of_padding():
    model = build("AutoModelForCausalLM", sliding_window=4)
    ids, mask = torch.randint(1, VOCAB, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :7] = 0
    past, parts = None, []
    for start, stop in ((0, 1), (1, 2), (2, 6), (6, 7), (7, 12)):
        outputs = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True)
        past, parts = outputs.past_key_values, [*parts, outputs.logits]
    logits = torch.cat(parts, 1)
    assert logits.isfinite().all()
    assert_equal(logits[0, 7:], model(ids[:1, 7:]).logits[0])
    assert_equal(logits[1], model(ids[1:]).logits[0])


def test_autocast_takes_rotary_keys():
    model = build("AutoModelForCausalLM", sliding_window=4).float()
    ids = torch.randint(1, VOCAB, (2, 90))
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, labels=ids)
        logits.loss.backward()
    assert (logits.logits.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("is_decoder", [True, False])
def test_cuda_equals_cpu(is_decoder):
    fields = {"sliding_window": 20, "global_stride": 9, "num_random_blocks": 2, "random_block_size": 16}
    model = build("AutoModelForCausalLM" if is_decoder else "AutoModelForMaskedLM", **fields).float()
    ids = torch.randint(1, VOCAB, (2, 300))
    loss = model(ids, labels=ids).loss
    expected = torch.autograd.grad(loss, list(model.parameters()))
    model = model.cuda()
    got = torch.autograd.grad(model(ids.cuda(), labels=ids.cuda()).loss, list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert (a.cpu() - b).norm() <= 1e-3 * b.norm() + 1e-6
    if is_decoder:
        short = ids[:, :30].cuda()
        whole = model.generate(short, max_new_tokens=30, do_sample=False, use_cache=False, pad_token_id=PAD)
        assert torch.equal(model.generate(short, max_new_tokens=30, do_sample=False, pad_token_id=PAD), whole)
