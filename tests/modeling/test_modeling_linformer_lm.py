import itertools

import pytest
import torch
import torch._dynamo.testing
from family_tester import MODERN, PAD, VOCAB, FamilyTester, masked_batch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)
from transformers.models.auto import modeling_auto

import ordnung
from ordnung import LinformerLMConfig, SoftmaxLMConfig
from ordnung.modeling.ops import causal_linformer_blocks, chunks
from ordnung.modeling.ops.causal_linformer_state import CausalState
from ordnung.modeling.ops.linformer import LEARNED, linformer_naive
from ordnung.modeling.registration import heads_of

SHARINGS = ("none", "headwise", "key_value", "layerwise")
TYPES = ("linear", "mean_pool", "max_pool", "conv", "adaptive_mean_pool")


class TestCausalLinformerLM(FamilyTester):
    model_type = "linformer_lm"
    variants = {
        "default": {"projected_size": 8, "local_block_size": 4},
        "own-weights": {
            "projected_size": [8, 4, 16],
            "projection_sharing": "none",
            "local_block_size": 8,
            "local_blocks_back": 0,
            "position_embedding_type": "rope",
        },
        "mean-pool": {
            "projection_type": "mean_pool",
            "projected_size": 16,
            "local_block_size": 4,
            "local_blocks_back": 2,
            "position_embedding_type": "none",
        },
        "conv-post": {
            "projection_type": "conv",
            "projection_sharing": "headwise",
            "projected_size": 16,
            "local_block_size": 4,
            "norm_position": "post",
        },
        "hybrid": {
            "projected_size": 8,
            "local_block_size": 4,
            "layer_types": ["causal_linformer_attention", "full_attention", "causal_linformer_attention"],
            "position_embedding_type": "rope",
        },
        "last-layer-without-slots": {
            "projected_size": [8, 8, 0],
            "projection_sharing": "key_value",
            "local_block_size": 4,
            "position_embedding_type": "rope",
        },
        # longer rows use the slots again
        "short-table": {
            "projected_size": 4,
            "projection_sharing": "key_value",
            "local_block_size": 4,
            "max_position_embeddings": 16,
            "position_embedding_type": "none",
        },
        "eager": {
            "projected_size": 8,
            "projection_sharing": "headwise",
            "local_block_size": 4,
            "attn_implementation": "eager",
        },
        "modern": {**MODERN, "projected_size": 8, "projection_sharing": "none", "local_block_size": 4},
        "sinks": {
            "projected_size": 8,
            "local_block_size": 4,
            "num_global_tokens": 6,  # more than a block
            "position_embedding_type": "rope",
        },
        "sinks-without-slots": {
            "projected_size": 0,
            "local_block_size": 2,
            "local_blocks_back": 0,
            "num_global_tokens": 3,
            "projection_sharing": "key_value",
        },
    }
    exported_variants = ("own-weights", "mean-pool", "conv-post", "short-table", "sinks", "sinks-without-slots")
    counted_variant = "eager"  # torch does not count its fused CPU kernel
    mixing_exponent = 1
    state_grows = False

    def test_weights_times_values_are_what_is_projected(self, variant):
        """Slots hold sums over many tokens, and no token has a value: the weights of each token share out one."""
        for ids, real, inputs in self.mixing_batches():
            for mixer, hidden_states, kwargs, *_ in self.mixer_calls(variant, ids, **inputs):
                shares = mixer.mixing_weights(hidden_states, **kwargs).transpose(1, 2)[real]  # (tokens, H, keys)
                assert shares.min() >= 0 and shares.shape[-1] > 1
                torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))

    single_precision = ("eager",)


def build(auto=AutoModelForMaskedLM, dtype=torch.float64, **overrides):
    causal = auto is AutoModelForCausalLM
    arguments = {**FamilyTester.base_arguments, "num_hidden_layers": 2, "is_decoder": causal, "projected_size": 8}
    model = auto.from_config(LinformerLMConfig(**{**arguments, "local_block_size": 4, **overrides})).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def projection_of(model):
    base = getattr(model, "model", model)
    return base.projection or base.layers[0].mixer.projection


# the paper's form


@pytest.mark.parametrize("projection_type, projection_sharing", [*itertools.product(TYPES, SHARINGS)])
class TestBidirectional:
    def test_mixer_equals_the_formula(self, projection_type, projection_sharing):
        model = build(projection_type=projection_type, projection_sharing=projection_sharing)
        mixer, projection = model.model.layers[0].mixer, projection_of(model)
        given = {}
        if projection_type in LEARNED:
            weight = projection.weight.expand(2, 4, *projection.weight.shape[2:])
            given = {"sequence_projection": projection.weight} if projection_sharing == "layerwise" else {}
        for N in (1, 5, 8, 19, 64):
            x = torch.randn(2, N, 32, dtype=torch.float64)
            q, k, v = (p(x).view(2, N, 4, 8) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            expected = torch.empty_like(q)
            for b, h in itertools.product(range(2), range(4)):
                own = weight[:, h] if projection_type in LEARNED else (None, None)
                row = (x[b, :, h] for x in (q, k, v))
                expected[b, :, h] = linformer_naive(*row, projection_type, own, 8, 64)
            got = mixer(x, **given)[0]
            torch.testing.assert_close(got, mixer.out_proj(expected.reshape(2, N, 32)), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("position_embedding_type", ["learned", "rope"])
    def test_padded_rows_equal_rows_alone(self, projection_type, projection_sharing, position_embedding_type):
        model = build(
            projection_type=projection_type,
            projection_sharing=projection_sharing,
            position_embedding_type=position_embedding_type,
        )
        ids, mask = masked_batch()
        ids[:, 7] = torch.tensor([PAD, 3, 4])  # garbage under the mask, too, in the other rows
        mask[0, :15] = 0  # 4 tokens for 8 slots
        garbage = torch.where(mask == 1, ids, torch.randint_like(ids, VOCAB))
        for tokens in (ids, garbage):
            logits = model(tokens, attention_mask=mask).logits
            for row in range(3):
                real = mask[row] == 1
                alone = model(ids[row][real][None]).logits[0]
                torch.testing.assert_close(logits[row][real], alone, rtol=0, atol=1e-12)
                one = model(tokens[row : row + 1], attention_mask=mask[row : row + 1]).logits[0, real]
                torch.testing.assert_close(one, alone, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("position_embedding_type", ["learned", "rope"])
    def test_pieces_equal_the_whole(self, projection_type, projection_sharing, position_embedding_type, monkeypatch):
        model = build(
            projection_type=projection_type,
            projection_sharing=projection_sharing,
            position_embedding_type=position_embedding_type,
        )
        ids, mask = masked_batch()
        whole = model(ids, attention_mask=mask).logits.detach()  # with gradients: in one piece
        for tokens in (8, 40):  # parts of a row, and two rows
            monkeypatch.setattr(chunks, "ELEMENTS", tokens * model.config.hidden_size)
            with torch.no_grad():
                pieces = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(pieces[mask == 1], whole[mask == 1], rtol=0, atol=1e-12)

    def test_flops_are_those_counted(self, projection_type, projection_sharing):
        for position_embedding_type in ("none", "rope"):
            model = build(
                dtype=torch.float32,
                projection_type=projection_type,
                projection_sharing=projection_sharing,
                position_embedding_type=position_embedding_type,
                attn_implementation="eager",
            )
            for N in (5, 33, 64):
                assert sum(FamilyTester.count(model, torch.randint(1, VOCAB, (1, N)))) == model.flops(N)

    def test_saves_loads_and_learns(self, projection_type, projection_sharing, tmp_path):
        model = build(dtype=torch.float32, projection_type=projection_type, projection_sharing=projection_sharing)
        weights = [name for name in model.state_dict() if "projection" in name]
        layers = {"layerwise": 1}.get(projection_sharing, 2)
        assert len(weights) == (layers if projection_type in LEARNED else 0)
        ids, mask = masked_batch()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # rows of positions that no token had
        assert [name for name in without if not name.endswith("k_proj.bias")] == []


def test_mixing_is_linear_in_length():
    for projection_type in ("linear", "adaptive_mean_pool"):  # the others' rows grow up to k with the segments in use
        mixer = build(projection_type=projection_type, max_position_embeddings=8192).model.layers[0].mixer
        constant = mixer.flops(2048) - mixer.flops(1024) - 1024 * (mixer.flops(1025) - mixer.flops(1024))
        assert constant == 0 and mixer.flops(8192) < 8 * mixer.flops(1024)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_adaptive_pooling_is_exact_attention_up_to_k_tokens(norm_position):
    arguments = {**FamilyTester.base_arguments, "is_decoder": False, "norm_position": norm_position}
    arguments["position_embedding_type"] = "learned"
    softmax = AutoModelForMaskedLM.from_config(SoftmaxLMConfig(**arguments)).eval().double()
    config = LinformerLMConfig(**arguments, projected_size=16, projection_type="adaptive_mean_pool")
    model = AutoModelForMaskedLM.from_config(config).eval().double()
    model.load_state_dict(softmax.state_dict())
    ids, mask = masked_batch()
    real = mask[:2] == 1  # 13 and 12 tokens
    expected = softmax(ids[:2], attention_mask=mask[:2]).logits[real]
    torch.testing.assert_close(model(ids[:2], attention_mask=mask[:2]).logits[real], expected, rtol=0, atol=1e-12)


def test_adaptive_pooling_takes_rows_of_any_length():
    model = build(projection_type="adaptive_mean_pool", position_embedding_type="none")
    assert model(torch.randint(1, VOCAB, (1, 200))).logits.isfinite().all()


def test_every_head_of_a_bidirectional_model(tmp_path):
    for head, name in heads_of("linformer_lm").items():
        if head == "AutoModelForCausalLM":
            continue
        ids = torch.randint(1, VOCAB, (2, 3, 9) if head == "AutoModelForMultipleChoice" else (2, 9))
        model = build(getattr(modeling_auto, head), dtype=torch.float32)
        assert type(model) is getattr(ordnung, name)
        model.save_pretrained(tmp_path / name)
        loaded = getattr(modeling_auto, head).from_pretrained(tmp_path / name).eval()
        mask = torch.ones_like(ids)
        assert torch.equal(loaded(ids, attention_mask=mask)[0], model(ids, attention_mask=mask)[0])


def test_masked_head_is_tied_and_classification_reads_the_first_real_token():
    model = build()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = build(AutoModelForSequenceClassification)
    ids, mask = masked_batch()
    expected = model.score(model.model(ids, attention_mask=mask)[0][torch.arange(3), [6, 0, 0]])
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)


def test_bidirectional_graph_and_export():
    model = build()
    ids, mask = masked_batch()
    expected = model(ids, attention_mask=mask).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}}
        program = torch.export.export(model, (ids,), dynamic_shapes=shapes, strict=False)
    ids = torch.randint(1, VOCAB, (3, 40))
    torch.testing.assert_close(program.module()(ids).logits, model(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_checkpointing_reaches_the_shared_projection(is_decoder):
    model = build(AutoModelForCausalLM if is_decoder else AutoModelForMaskedLM).train()
    ids = torch.randint(1, VOCAB, (2, 30))
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.projection.weight.grad.clone())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=1e-10)


def test_initial_projections():
    weight = build(dtype=torch.float32, max_position_embeddings=512, projected_size=64).model.projection.weight.detach()
    assert weight.std() == pytest.approx((1 / 64 + 0.04) ** 0.5, rel=0.05)  # `build` adds noise of 0.2
    config = LinformerLMConfig(**{**FamilyTester.base_arguments, "projected_size": 8, "local_block_size": 4})
    weight = AutoModel.from_config(config).projection.weight[0, 0].softmax(-1).detach()  # (64, 8)
    torch.testing.assert_close(weight[torch.arange(64), torch.arange(64) // 8], torch.full((64,), 0.9))


# the causal form


def test_state_is_small_and_constant():
    """At the width of BERT base with k = 128: 1.6 MB a layer at any length."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LinformerLMConfig(is_decoder=True, vocab_size=100, num_hidden_layers=1, max_position_embeddings=65536)
        )
    assert model.cache_bytes(100) == model.cache_bytes(65536) < 1.6e6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_slabs_of_training_give_the_same_gradients(dropout, monkeypatch):
    """Several slabs, which are computed twice for the backward pass: with what dropout drew, and also in a graph."""
    model = build(AutoModelForCausalLM, attention_dropout=dropout).train()
    ids = torch.randint(1, VOCAB, (2, 60))
    calls = []

    def gradients(compute):
        torch.manual_seed(0)
        model.zero_grad()
        compute(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    def assert_equal(got, expected):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    if not dropout:  # which other slabs draw otherwise
        whole = gradients(model)
    elements = dict.fromkeys(causal_linformer_blocks.SLAB_ELEMENTS, 16 * 32)
    monkeypatch.setattr(causal_linformer_blocks, "SLAB_ELEMENTS", elements)
    recomputed = gradients(model)
    if not dropout:
        assert_equal(recomputed, whole)
        torch._dynamo.reset()
        assert_equal(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), whole)
    count = lambda f, *args, **_: calls.append(f.__name__) or f(*args)  # noqa: E731
    monkeypatch.setattr(causal_linformer_blocks, "checkpoint", count)
    assert_equal(recomputed, gradients(model))
    assert calls.count("attend_slabs") == 2 and calls.count("attend_next_slab") == 2 * 8  # two layers; 60 tokens


def test_attention_weights_are_those_of_window_and_slots():
    model = build(AutoModelForCausalLM, dtype=torch.float32, attn_implementation="eager")
    ids, mask = masked_batch()
    for weights in model(ids, attention_mask=mask, output_attentions=True).attentions:
        assert weights.shape == (3, 4, 19, 8 + 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 19))
        assert (weights[1, :, 0, :-8] > 0).sum() == 4 and not weights[1, :, 0, -8:].any()  # the first token sees itself
        assert weights[1, :, 11, -8:].all()


def test_sinks_are_attended_by_every_later_token():
    fields = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = build(AutoModelForCausalLM, num_global_tokens=3, **fields)
    ids, mask = masked_batch()
    for weights in model(ids, attention_mask=mask, output_attentions=True).attentions:
        assert weights.shape == (3, 4, 19, 8 + 3 + 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 19))
        row = weights[1]  # of 12 tokens from the left
        assert not row[:, :8, 8:].any()  # the window has all
        assert (row[:, 8:12, 8:11] > 0).all() and (row[:, 8:12, 11:].sum(-1) > 0).all()
    # what the model computes with blocks that all fit is softmax attention, whatever the sinks are
    model = build(AutoModelForCausalLM, num_global_tokens=16, projected_size=0, local_blocks_back=1)
    assert model.config.receptive_field is None
    exact = build(AutoModelForCausalLM, local_block_size=32, projected_size=0)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(1, VOCAB, (2, 24))  # 16 sinks and the last 8 or fewer tokens: everything
    torch.testing.assert_close(model(ids).logits, exact(ids).logits, rtol=0, atol=1e-12)


def test_rows_of_a_batch_have_their_own_counts():
    model = build(AutoModelForCausalLM)
    ids, mask = masked_batch()
    past = model(ids, attention_mask=mask, use_cache=True).past_key_values
    assert past.get_seq_length() == 19
    assert CausalState(*past.layers[0].state).count.tolist() == mask.sum(1).tolist()


def test_receptive_field_without_slots_is_exact():
    model = build(AutoModelForCausalLM, projected_size=0)
    assert model.config.receptive_field == (2 * 1 + 1) * 4
    ids = torch.randint(1, VOCAB - 1, (1, 40))
    base = model(ids).logits[0, -1]
    for back, seen in ((11, True), (12, False)):
        other = ids.clone()
        other[0, -1 - back] += 1
        assert torch.equal(model(other).logits[0, -1], base) is not seen
    assert build(AutoModelForCausalLM).config.receptive_field is None


def test_crop_without_recording_is_refused():
    model = build(AutoModelForCausalLM)
    past = model(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="Cannot remove 2 tokens: 0 are recorded"):
        past.crop(-2)
    with pytest.raises(ValueError, match="got 3"):
        past.crop(3)


@pytest.mark.parametrize("removed", range(1, 20))
def test_crop_across_blocks_and_steps(removed):
    """Steps of 6, 1, 9 and 3 tokens with padding in them: any number of them can be removed."""
    model = build(AutoModelForCausalLM)
    ids, mask = masked_batch()
    past = DynamicCache(config=model.config)
    past.activate_past_recording()
    for start, end in ((0, 6), (6, 7), (7, 16), (16, 19)):
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
    past.batch_select_indices(torch.tensor([2, 0]))
    past.crop(-removed)
    kept = 19 - removed
    assert past.get_seq_length() == kept
    ids, mask = ids[[2, 0]], mask[[2, 0]]
    expected = model(ids, attention_mask=mask).logits[:, kept:]
    got = model(ids[:, kept:], attention_mask=mask, past_key_values=past, use_cache=True).logits
    real = mask[:, kept:] == 1
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-12)


def test_state_of_another_kind_is_refused():
    model = build(AutoModelForCausalLM)
    with pytest.raises(ValueError, match="no state of causal_linformer_attention for layer 0"):
        model(torch.randint(1, VOCAB, (1, 5)), past_key_values=DynamicCache(), use_cache=True)


def test_compiled_decoding_does_not_recompile():
    model = build(AutoModelForCausalLM, eos_token_id=None)
    ids = torch.randint(1, VOCAB, (1, 20))
    past = model(ids[:, :9], use_cache=True).past_key_values
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    logits = []
    with torch.no_grad():
        for t in range(9, 20):
            logits.append(step(ids[:, t : t + 1], past_key_values=past, use_cache=True).logits)
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits[:, 9:], rtol=0, atol=1e-12)


# bad input


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"projected_size": 65}, r"`projected_size` \(65\) must be from 1 to `max_position_embeddings` \(64\)"),
        ({"projected_size": 0}, r"`projected_size` \(0\) must be from 1"),
        ({"projected_size": [8, 8]}, r"\(\[8, 8\]\) differs by layer.*layerwise.*set projection_sharing='key_value'"),
        ({"projected_size": [8] * 3, "projection_sharing": "none"}, r"3 entries for `num_hidden_layers` \(2\)"),
        ({"projected_size": 24, "projection_type": "conv"}, r"'conv' cuts `max_position_embeddings` \(64\).*\(24\)"),
        ({"projection_type": "dct"}, "projection_type"),
        ({"projection_sharing": "all"}, "projection_sharing"),
        ({"is_decoder": True, "local_block_size": 24}, r"\(64\) must be a multiple of `local_block_size` \(24\)"),
        ({"local_block_size": 0}, r"`local_block_size` \(0\) must be at least 1"),
        ({"is_decoder": True, "projection_type": "max_pool"}, "'max_pool' cannot be causal"),
        ({"is_decoder": True, "num_global_tokens": -1}, r"`num_global_tokens` \(-1\) must be 0"),
        ({"num_global_tokens": 4}, r"`num_global_tokens` \(4\) is of causal models.*set it to 0, or is_decoder=True"),
        ({"layer_types": ["causal_linformer_attention"] * 2}, "linformer_lm takes .'linformer_attention'"),
    ],
)
def test_wrong_configuration_is_refused_in_words(overrides, message):
    arguments = {**FamilyTester.base_arguments, "num_hidden_layers": 2, "is_decoder": False, "projected_size": 8}
    with pytest.raises(Exception, match=message):
        LinformerLMConfig(**{**arguments, "local_block_size": 4, **overrides})


def test_rows_longer_than_the_projection_are_refused_in_words():
    model = build(position_embedding_type="none")
    ids = torch.randint(1, VOCAB, (2, 70))
    with pytest.raises(ValueError, match=r"row of 70 tokens is longer than `max_position_embeddings` \(64\)"):
        model(ids)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with pytest.raises(ValueError, match="row of 65 tokens"):
        model(ids, attention_mask=mask)
    mask[:, :6] = 0  # what is too long is padding
    expected = model(ids[:, 6:]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 6:], expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(2, 70, 70\)"):
        model(ids, attention_mask=torch.ones(2, 70, 70))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    ids, mask = masked_batch()
    for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model = build(auto, dtype=torch.float32)
        expected = model(ids, attention_mask=mask).logits[mask == 1]
        got = model.to("cuda", dtype)(ids.cuda(), attention_mask=mask.cuda()).logits.float().cpu()[mask == 1]
        assert (got - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float32 else 5e-2)
    assert model.generate(ids[2:, :3].cuda(), max_new_tokens=20, pad_token_id=PAD).shape == (1, 23)


@pytest.mark.parametrize("projection_type", ["linear", "mean_pool", "max_pool", "conv", "adaptive_mean_pool"])
def test_a_row_of_padding_alone_is_finite_with_eager_attention(projection_type):
    fields = {**FamilyTester.base_arguments, "projected_size": 4, "projection_type": projection_type}
    config = LinformerLMConfig(**fields | {"is_decoder": False}, attn_implementation="eager")
    model = AutoModelForMaskedLM.from_config(config)
    ids, mask = torch.randint(1, VOCAB, (2, 9)), torch.tensor([[1], [0]]).expand(2, 9)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
