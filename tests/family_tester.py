"""The tests that every family passes. A family's test class inherits `FamilyTester` and says what to build."""

import copy
import math
import warnings

import pytest
import torch
import transformers
from packaging import version
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto import modeling_auto

import ordnung
from ordnung.modeling.mixers.mixer import linear_flops
from ordnung.modeling.ops import chunks
from ordnung.modeling.registration import heads_of

VOCAB = 50
PAD = 0


# What Llama, Qwen and their like are made of.
MODERN = {
    "norm_type": "rms_norm",
    "mlp_type": "gated",
    "hidden_act": "silu",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": True,
    "position_embedding_type": "rope",
}


def masked_batch():
    """Three rows of 19: padded on the left, on the right, and in the middle (with one pad at the end)."""
    ids = torch.randint(1, VOCAB, (3, 19))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, -7:] = 0
    mask[2, [3, 4, 9, 18]] = 0
    return ids.masked_fill(mask == 0, PAD), mask


class OnlyLogits(torch.nn.Module):
    """A model as a graph takes it: ids and mask to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def graph_batches():
    """Batches of other shapes than a graph was made from, padded on the left, on the right and in the middle."""
    yield masked_batch()
    for rows, tokens in ((2, 5), (4, 37), (1, 64)):
        ids = torch.randint(1, VOCAB, (rows, tokens))
        mask = torch.ones_like(ids)
        mask[0, : tokens // 3] = 0
        mask[-1, -1 - tokens // 4 : -1] = 0
        yield ids, mask


# Tokens of the documents in each row of a packed batch.
PACKED = ((7, 1, 4, 9), (3, 12, 6))


def packed_batch():
    """Two rows of several documents each, and the places of each document: (row, slice)."""
    ids = torch.randint(1, VOCAB, (2, 21))
    places = []
    for row, lengths in enumerate(PACKED):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        places += [(row, slice(end - length, end)) for length, end in zip(lengths, ends)]
    return ids, places


def marks_of(mark, places):
    """What says where the documents of `packed_batch` lie, in one of the ways that clients use."""
    lengths = torch.tensor([place.stop - place.start for _, place in places])
    if mark == "position_ids":
        return {mark: torch.cat([torch.arange(n) for n in lengths]).view(2, 21)}
    if mark == "seq_idx":
        return {mark: torch.repeat_interleave(torch.arange(len(places)), lengths).int().view(2, 21)}
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def cache_tensors(cache):
    """Every floating-point tensor of the generation state; the others count tokens."""
    for layer in cache.layers:
        for value in vars(layer).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]
            yield from (x for x in held if isinstance(x, torch.Tensor) and x.is_floating_point())


class FamilyTester:
    model_type: str
    # name -> config arguments on top of `base_arguments`
    variants: dict[str, dict] = {"default": {}}
    counted_variant = "default"  # one whose mixing torch's FLOP counter sees
    mixing_exponent: int  # of the number of tokens, in the FLOPs of mixing
    state_grows: bool
    # variants that transformers computes in float32 only
    single_precision: tuple[str, ...] = ()
    exports_to_onnx = True
    # what has the base model of a causal head do what it does alone
    encodes: dict = {}
    base_arguments = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "eos_token_id": VOCAB - 1,
        "is_decoder": True,
    }

    def config(self, variant="default", **overrides):
        arguments = {**self.base_arguments, **self.variants[variant], **overrides}
        return AutoConfig.for_model(self.model_type, **arguments)

    def model(self, variant="default", head="AutoModelForCausalLM", dtype=None, **overrides):
        if dtype is None:
            dtype = torch.float32 if variant in self.single_precision else torch.float64
        model = getattr(modeling_auto, head).from_config(self.config(variant, **overrides)).eval().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # away from the initial zeros, where mistakes hide
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def heads(self, is_decoder=True):
        """Auto class names that work for a causal or for a bidirectional config of this family."""
        without = "AutoModelForMaskedLM" if is_decoder else "AutoModelForCausalLM"
        return [head for head in heads_of(self.model_type) if head != without]

    def assert_equal(self, got, expected, variant="default"):
        """Equal up to the rounding of float64, or of float32 where that is what the variant computes in."""
        atol = 1e-5 if variant in self.single_precision else 1e-10
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)

    # registration, saving, loading

    def test_auto_classes_know_every_head(self, tmp_path):
        for head, name in heads_of(self.model_type).items():
            model = self.model(head=head, dtype=torch.float32, is_decoder=head != "AutoModelForMaskedLM")
            assert type(model) is getattr(ordnung, name)
            ids = torch.randint(1, VOCAB, (2, 3, 9) if head == "AutoModelForMultipleChoice" else (2, 9))
            expected = model(ids, attention_mask=torch.ones_like(ids))[0]
            model.save_pretrained(tmp_path / name)
            loaded = getattr(modeling_auto, head).from_pretrained(tmp_path / name).eval()
            assert type(loaded) is type(model)
            assert torch.equal(loaded(ids, attention_mask=torch.ones_like(ids))[0], expected)

    def test_config_survives_saving(self, variant, tmp_path):
        config = self.config(variant)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()

    def test_causal_names_are_in_the_table_that_trainer_reads(self):
        name = heads_of(self.model_type)["AutoModelForCausalLM"]
        assert name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def test_base_model_loads_from_a_head_checkpoint(self, tmp_path):
        model = self.model(dtype=torch.float32)
        model.save_pretrained(tmp_path)
        ids = torch.randint(1, VOCAB, (1, 7))
        expected = model.model(ids, **self.encodes)[0]
        assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(ids)[0], expected)

    @pytest.mark.parametrize("transform", [False, True])
    def test_backbone_and_head_apart_give_the_logits(self, variant, transform, tmp_path):
        """trl and others run the base model and multiply by the output embeddings themselves."""
        model = self.model(variant, lm_head_transform=transform, lm_head_bias=transform)
        normed = []
        ids, mask = masked_batch()
        for more in ({}, {"attention_mask": mask}):
            states = model.base_model(ids, **more).last_hidden_state
            expected = model(ids, **more).logits
            real = mask == 1 if more else torch.ones_like(mask) == 1
            self.assert_equal(model.get_output_embeddings()(states)[real], expected[real], variant)
            if transform:  # once, between the last norm and the vocabulary
                hook = model.model.norm.register_forward_hook(lambda *call: normed.append(call[2]))
                model(ids, **more)
                hook.remove()
                self.assert_equal(states[real], model.model.lm_transform(normed[-1])[real], variant)
                assert not torch.equal(states[real], normed[-1][real])

    def test_embeddings_resize(self, variant):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB, (1, 7))
        before = model(ids).logits
        model.resize_token_embeddings(VOCAB + 6)
        after = model(ids).logits
        assert after.shape[-1] == VOCAB + 6
        torch.testing.assert_close(after[..., :VOCAB], before)

    # what the model computes

    def test_pieces_of_long_inputs_equal_the_whole(self, variant, monkeypatch):
        model = self.model(variant)
        ids, mask = masked_batch()
        whole = model(ids, attention_mask=mask).logits  # with gradients: in one piece
        assert whole.requires_grad
        monkeypatch.setattr(chunks, "ELEMENTS", 16 * model.config.hidden_size)  # 16 tokens
        for feed_forward in (0, 5):
            for layer in model.model.layers:
                layer.mlp.chunk_size = feed_forward
            with torch.no_grad():
                self.assert_equal(model(ids, attention_mask=mask).logits, whole.detach(), variant)

    def test_future_tokens_change_nothing(self, variant):
        model = self.model(variant, dtype=torch.float32)
        ids = torch.randint(1, VOCAB - 1, (2, 37))
        for changed in (1, 20, 36):
            other = ids.clone()
            other[:, changed] += 1
            first, second = model(ids).logits, model(other).logits
            assert torch.equal(first[:, :changed], second[:, :changed])
            assert not torch.equal(first[:, changed:], second[:, changed:])

    def test_padded_rows_equal_rows_alone(self, variant):
        model = self.model(variant)
        ids, mask = masked_batch()
        logits = model(ids, attention_mask=mask).logits
        for row in range(len(ids)):
            real = mask[row] == 1
            alone = model(ids[row][real][None]).logits[0]
            self.assert_equal(logits[row][real], alone, variant)
            one_row = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
            self.assert_equal(one_row[real], alone, variant)

    def test_garbage_under_the_mask_changes_nothing(self, variant):
        model = self.model(variant)
        ids, mask = masked_batch()
        other = torch.where(mask == 1, ids, torch.randint_like(ids, 1, VOCAB))
        real = mask == 1
        self.assert_equal(
            model(ids, attention_mask=mask).logits[real], model(other, attention_mask=mask).logits[real], variant
        )

    def test_gradient_checkpointing_changes_no_gradient(self, variant):
        model = self.model(variant).train()
        ids = torch.randint(1, VOCAB, (2, 21))

        def gradients():
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        plain = gradients()
        model.gradient_checkpointing_enable()
        for a, b in zip(plain, gradients(), strict=True):
            self.assert_equal(a, b, variant)

    def test_every_parameter_learns(self, variant):
        model = self.model(variant).train()
        ids = torch.randint(1, VOCAB, (2, 21))
        model(ids, labels=ids).loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # a key bias shifts all scores of a query alike: its true gradient is zero
        assert [name for name in without if not name.endswith("k_proj.bias")] == []

    def test_token_types_are_added_to_the_embeddings(self):
        model = self.model(type_vocab_size=3)
        ids, mask = masked_batch()
        types = torch.randint(3, ids.shape)
        embeddings = model.model.embed_tokens(ids) + model.model.embed_token_types(types)
        zeros = model.model.embed_token_types.weight[0]
        expected = model(inputs_embeds=embeddings - zeros, attention_mask=mask).logits
        self.assert_equal(model(ids, attention_mask=mask, token_type_ids=types).logits, expected)
        assert not torch.equal(model(ids, attention_mask=mask).logits, expected)
        got = self.generate(model, ids, token_type_ids=types)  # goes on with the last token's type
        assert torch.equal(got, self.generate(model, ids, token_type_ids=types, use_cache=False))
        without = self.model()
        assert torch.equal(without(ids, token_type_ids=torch.ones_like(ids)).logits, without(ids).logits)

    def test_position_offset_skips_rows_of_the_table(self):
        model = self.model(position_embedding_type="learned")
        shifted = self.model(position_embedding_type="learned", position_offset=3, max_position_embeddings=67)
        state = model.state_dict()
        rows = state["model.embed_positions.weight"]
        state["model.embed_positions.weight"] = torch.cat([torch.randn(3, 32, dtype=rows.dtype), rows])
        shifted.load_state_dict(state)
        ids, mask = masked_batch()
        assert torch.equal(shifted(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
        assert shifted(torch.randint(1, VOCAB, (1, 64))).logits.isfinite().all()

    def test_bfloat16_stays_near_float32(self, variant):
        model = self.model(variant, dtype=torch.float32)
        ids = torch.randint(1, VOCAB, (2, 33))
        expected = model(ids).logits
        error = (copy.deepcopy(model).bfloat16()(ids).logits.float() - expected).norm() / expected.norm()
        assert error < 0.05

    def test_chunked_feed_forward_is_equal(self, variant):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB, (2, 21))
        expected = model(ids).logits
        for layer in model.model.layers:
            layer.mlp.chunk_size = 8
        self.assert_equal(model(ids).logits, expected, variant)

    def test_graph_captures_whole_forward(self, variant):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB, (2, 21))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        self.assert_equal(compiled(ids, use_cache=False).logits, model(ids).logits, variant)

    def test_exports_with_dynamic_length(self, variant):
        model = self.model(variant)
        length = torch.export.Dim("length", min=2, max=64)
        with torch.no_grad():
            program = torch.export.export(
                model,
                (torch.randint(1, VOCAB, (1, 24)),),
                {"use_cache": False},
                dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
                strict=False,
            )
        for tokens in (5, 40):
            ids = torch.randint(1, VOCAB, (1, tokens))
            self.assert_equal(program.module()(ids, use_cache=False).logits, model(ids).logits, variant)

    def test_traced_graph_takes_padding_and_other_shapes(self, variant):
        """torch.jit.trace, which records shapes as the exporters do."""
        model = self.model(variant)
        ids, mask = masked_batch()
        for example in (mask, torch.ones_like(mask)):  # a graph made without padding takes it too
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of shapes that are read, which is what is tested
                traced = torch.jit.trace(OnlyLogits(model), (ids, example), check_trace=False)
            for other, padded in graph_batches():
                expected = model(other, attention_mask=padded, use_cache=False).logits
                self.assert_equal(traced(other, padded)[padded == 1], expected[padded == 1], variant)

    def test_onnx_takes_padding_and_other_shapes(self, tmp_path):
        """torch.onnx's exporter, run by onnxruntime."""
        if not self.exports_to_onnx:
            pytest.skip("this family's plan of passes has no ONNX form")
        pytest.importorskip("onnxscript", reason="needs ordnung[onnx]")
        runtime = pytest.importorskip("onnxruntime", reason="needs ordnung[onnx]")
        model = self.model(dtype=torch.float32)
        ids, mask = masked_batch()
        shape = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                OnlyLogits(model),
                (ids, mask),
                tmp_path / "model.onnx",
                dynamo=True,
                verbose=False,
                dynamic_shapes={"ids": shape, "mask": shape},
            )
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        names = [argument.name for argument in session.get_inputs()]
        for ids, mask in graph_batches():
            expected = model(ids, attention_mask=mask, use_cache=False).logits.detach()
            got = torch.from_numpy(session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()))))[0])
            torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)

    # packed documents

    @pytest.mark.parametrize("mark", ["position_ids", "seq_idx", "cu_seq_lens"])
    def test_packed_documents_equal_documents_alone(self, variant, mark):
        model = self.model(variant)
        ids, places = packed_batch()
        logits = model(ids, **marks_of(mark, places)).logits
        for row, place in places:
            self.assert_equal(logits[row, place], model(ids[row : row + 1, place]).logits[0], variant)

    @pytest.mark.parametrize("recompute", [False, True])
    def test_packed_loss_and_gradients_equal_those_alone(self, variant, recompute):
        model = self.model(variant).train()
        ids, places = packed_batch()

        def gradients(loss):
            model.zero_grad()
            loss.backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        def score(logits, labels):  # transformers' loss is computed in float32
            return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")

        alone, losses = 0.0, 0.0
        for row, place in places:
            outputs = model(ids[row : row + 1, place], labels=ids[row : row + 1, place])
            alone = alone + score(outputs.logits[0], ids[row, place])
            if place.stop - place.start > 1:
                losses = losses + outputs.loss.detach() * (place.stop - place.start - 1)
        expected = gradients(alone)
        if recompute:
            model.gradient_checkpointing_enable()
        outputs = model(ids, labels=ids, **marks_of("seq_idx", places))
        torch.testing.assert_close(outputs.loss.detach(), losses / (ids.numel() - len(places)))
        got = gradients(sum(score(outputs.logits[row, place], ids[row, place]) for row, place in places))
        for a, b in zip(got, expected, strict=True):
            self.assert_equal(a, b, variant)

    def test_packed_documents_with_padding(self, variant):
        model = self.model(variant)
        ids, places = packed_batch()
        # padding on the left, on the right, and between and inside of documents
        columns = torch.tensor([*range(2, 9), 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24])
        padded, mask = torch.zeros(2, 27, dtype=torch.long), torch.zeros(2, 27, dtype=torch.long)
        number = torch.zeros(2, 27, dtype=torch.long)
        padded[:, columns], mask[:, columns] = ids, 1
        number[:, columns] = marks_of("seq_idx", places)["seq_idx"].long()
        logits = model(padded, attention_mask=mask, seq_idx=number).logits[:, columns]
        for row, place in places:
            self.assert_equal(logits[row, place], model(ids[row : row + 1, place]).logits[0], variant)

    @pytest.mark.parametrize("is_decoder", [True, False])
    def test_heads_take_packed_documents(self, is_decoder):
        if not is_decoder and "AutoModelForMaskedLM" not in heads_of(self.model_type):
            pytest.skip("this family is causal")
        ids, places = packed_batch()
        marks = marks_of("position_ids", places)
        for head in self.heads(is_decoder):
            if head == "AutoModelForMultipleChoice":
                continue
            model = self.model(head=head, is_decoder=is_decoder, num_labels=3)
            outputs = model(ids, **marks)[0]
            if head == "AutoModelForSequenceClassification":
                labels = torch.randint(3, (len(places),))
                loss = model(ids, labels=labels, **marks).loss
                self.assert_equal(loss, torch.nn.functional.cross_entropy(outputs, labels))
            for number, (row, place) in enumerate(places):
                alone = model(ids[row : row + 1, place])[0][0]
                got = outputs[number] if head == "AutoModelForSequenceClassification" else outputs[row, place]
                self.assert_equal(got, alone)

    def test_packed_eager_attention_and_weights(self):
        model = self.model(attn_implementation="eager")
        ids, places = packed_batch()
        outputs = model(ids, output_attentions=True, **marks_of("position_ids", places))
        for row, place in places:
            alone = model(ids[row : row + 1, place]).logits[0]
            torch.testing.assert_close(outputs.logits[row, place], alone, rtol=0, atol=1e-5)  # its softmax is float32

    def test_packed_documents_under_compile(self, variant):
        """Where documents lie is in the data: that part runs outside of the graphs."""
        model = self.model(variant)
        ids, places = packed_batch()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        for mark in ("position_ids", "seq_idx"):
            marks = marks_of(mark, places)
            got, expected = compiled(ids, use_cache=False, **marks).logits, model(ids, use_cache=False, **marks).logits
            self.assert_equal(got, expected, variant)

    def test_packed_documents_are_refused_where_they_cannot_be(self):
        model = self.model()
        ids, places = packed_batch()
        past = model(ids, use_cache=True).past_key_values
        for mark in ("position_ids", "seq_idx", "cu_seq_lens"):
            marks = marks_of(mark, places)
            name = next(iter(marks))
            for cache in (past, DynamicCache(config=model.config)):
                with pytest.raises(ValueError, match=f"`{name}` puts several documents.*`past_key_values`"):
                    model(ids, past_key_values=cache, use_cache=True, **marks)
        assert model(ids, use_cache=True, **marks).past_key_values is None
        with pytest.raises(ValueError, match=r"`cu_seq_lens_q` \(\[0, 5\]\) must rise from 0 to the 42 tokens"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 5]))
        with pytest.raises(ValueError, match=r"`cu_seq_lens_k` .*differs from `cu_seq_lens_q`"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 5, 42]), cu_seq_lens_k=torch.tensor([0, 6, 42]))
        with pytest.raises(ValueError, match=r"`seq_idx` has shape \(2, 5\), but the tokens have \(2, 21\)"):
            model(ids, seq_idx=torch.zeros(2, 5))
        with pytest.raises(ValueError, match="`seq_idx` cannot be followed in an exported or traced graph"):
            torch.export.export(model, (ids,), {"use_cache": False, **marks_of("seq_idx", places)}, strict=False)

    # the generation state

    def test_gradients_flow_through_a_returned_state(self, variant):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB, (2, 19))
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        whole = model(inputs_embeds=inputs, use_cache=False).logits[:, 15:]
        (expected,) = torch.autograd.grad(whole.square().sum(), inputs)
        for cuts in ((0, 15, 19), (0, 1, 6, 15, 19)):
            past = None
            for start, stop in zip(cuts, cuts[1:]):
                outputs = model(inputs_embeds=inputs[:, start:stop], past_key_values=past, use_cache=True)
                past = outputs.past_key_values
            (got,) = torch.autograd.grad(outputs.logits.square().sum(), inputs)
            self.assert_equal(got / expected.abs().max(), expected / expected.abs().max(), variant)

    @pytest.mark.parametrize("split", [[19], [1] * 19, [7, 12], [12, 1, 6], [3, 3, 3, 10]])
    def test_steps_equal_one_pass(self, variant, split):
        model = self.model(variant)
        ids, mask = masked_batch()
        expected = model(ids, attention_mask=mask).logits
        state, logits, done = None, [], 0
        for tokens in split:
            outputs = model(
                ids[:, done : done + tokens],
                attention_mask=mask[:, : done + tokens],
                past_key_values=state,
                use_cache=True,
            )
            state, done = outputs.past_key_values, done + tokens
            logits.append(outputs.logits)
        real = mask == 1
        self.assert_equal(torch.cat(logits, 1)[real], expected[real], variant)

    def test_decoding_after_right_padding(self, variant):
        model = self.model(variant)
        ids, mask = masked_batch()
        more = torch.randint(1, VOCAB, (3, 4))
        outputs = model(ids, attention_mask=mask, use_cache=True)
        for step in range(4):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            outputs = model(
                more[:, step : step + 1],
                attention_mask=mask,
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
            for row in range(3):
                whole = torch.cat([ids[row][mask[row, : ids.shape[1]] == 1], more[row, : step + 1]])
                alone = model(whole[None]).logits[0, -1]
                self.assert_equal(outputs.logits[row, -1], alone, variant)

    def test_state_operations(self, variant):
        model = self.model(variant)
        layer_types = model.config.layer_types
        ids = torch.randint(1, VOCAB, (3, 15))
        token = torch.randint(1, VOCAB, (3, 1))

        def state(rows=slice(None), tokens=15):
            return model(ids[rows, :tokens], use_cache=True).past_key_values

        def step(past, rows=slice(None)):
            return model(token[rows], past_key_values=past, use_cache=True).logits

        expected = step(state())
        past, order = state(), torch.tensor([2, 0, 0])
        past.reorder_cache(order)
        self.assert_equal(step(past, order), expected[order], variant)
        past, chosen = state(), torch.tensor([2, 1])
        past.batch_select_indices(chosen)
        self.assert_equal(step(past, chosen), expected[chosen], variant)
        past, repeated = state(), torch.tensor([0, 0, 1, 1, 2, 2])
        past.batch_repeat_interleave(2)
        self.assert_equal(step(past, repeated), expected[repeated], variant)
        if version.parse(transformers.__version__) >= version.parse("5.23") or "full_attention" not in layer_types:
            past = state()  # earlier versions of transformers' own attention layers keep their length
            past.reset()
            self.assert_equal(model(ids, past_key_values=past, use_cache=True).logits, model(ids).logits, variant)
        past = DynamicCache(config=model.config)
        past.activate_past_recording()
        model(ids, past_key_values=past, use_cache=True)
        model(token, past_key_values=past, use_cache=True)
        past.crop(-4)
        assert past.get_seq_length() == 12
        self.assert_equal(step(past), step(state(tokens=12)), variant)
        for change, rows in (
            (lambda past: past.reorder_cache(order), order),
            (lambda past: past.batch_select_indices(chosen), chosen),
            (lambda past: past.batch_repeat_interleave(2), repeated),
        ):  # what is recorded goes along
            past = DynamicCache(config=model.config)
            past.activate_past_recording()
            model(ids, past_key_values=past, use_cache=True)
            change(past)
            past.crop(-3)
            self.assert_equal(step(past, rows), step(state(tokens=12))[rows], variant)

    def test_state_bytes_are_as_predicted(self, variant):
        model = self.model(variant, dtype=torch.float32, vocab_size=VOCAB)
        for tokens in (40, 60):
            past = model(torch.randint(1, VOCAB, (1, tokens)), use_cache=True).past_key_values
            held = sum(t.numel() * t.element_size() for t in cache_tensors(past))
            assert held == model.cache_bytes(tokens)
        if variant == "default":
            assert (model.cache_bytes(60) > model.cache_bytes(40)) == self.state_grows

    # generation: every mode equals the model without a state

    def generate(self, model, ids, **arguments):
        # a padding token, if one were generated, would be taken for padding in the next call
        fixed = {"min_new_tokens": 9, "do_sample": False, "suppress_tokens": [PAD]}
        arguments = {"max_new_tokens": 9, **fixed, **arguments}
        return model.generate(ids, pad_token_id=PAD, **arguments)

    @pytest.mark.parametrize(
        "mode",
        [
            {},
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
            {"repetition_penalty": 1.3},
        ],
        ids=["greedy", "beam", "beam-returns", "sampling", "penalty"],
    )
    def test_generation_modes(self, variant, mode):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB - 1, (2, 11))
        torch.manual_seed(1)
        expected = self.generate(model, ids, use_cache=False, **mode)
        torch.manual_seed(1)
        assert torch.equal(self.generate(model, ids, **mode), expected)

    @pytest.mark.parametrize(
        "mode",
        [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}],
        ids=["prompt-lookup", "chunked-prefill", "static-cache"],
    )
    def test_cached_modes_equal_greedy(self, variant, mode):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB - 1, (1, 5)).repeat(1, 4)  # repetitive, so that look-ups hit
        expected = self.generate(model, ids, use_cache=False)
        assert torch.equal(self.generate(model, ids, disable_compile=True, **mode), expected)

    def test_assisted_decoding_equals_greedy(self, variant):
        model = self.model(variant)
        assistant = copy.deepcopy(model)
        with torch.no_grad():  # an assistant that is sometimes wrong
            for parameter in assistant.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        ids = torch.randint(1, VOCAB - 1, (1, 11))
        expected = self.generate(model, ids, use_cache=False, max_new_tokens=20, min_new_tokens=20)
        got = self.generate(model, ids, assistant_model=assistant, max_new_tokens=20, min_new_tokens=20)
        assert torch.equal(got, expected)

    def test_left_padded_batch_generates_as_rows_alone(self, variant):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB - 1, (3, 12))
        mask = torch.ones_like(ids)
        mask[0, :5], mask[1, :1] = 0, 0
        for mode in ({}, {"num_beams": 2}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
            got = self.generate(model, ids, attention_mask=mask, disable_compile=True, **mode)
            for row in range(3):
                prompt = ids[row][mask[row] == 1][None]
                alone = self.generate(model, prompt, use_cache=False, num_beams=mode.get("num_beams", 1))
                assert torch.equal(got[row, 12:], alone[0, prompt.shape[1] :]), mode

    def test_continues_from_a_returned_state(self, variant):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB - 1, (2, 11))
        first = self.generate(model, ids, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, torch.randint(1, VOCAB - 1, (2, 3))], 1)
        expected = self.generate(model, longer, use_cache=False)
        assert torch.equal(self.generate(model, longer, past_key_values=first.past_key_values), expected)

    def test_static_cache_prefill_and_steps(self, variant):
        model = self.model(variant)
        ids = torch.randint(1, VOCAB, (2, 17))
        past = StaticCache(config=model.config, max_cache_len=24)
        positions = torch.arange(17)[None]
        parts = [
            model(ids[:, a:b], past_key_values=past, position_ids=positions[:, a:b], use_cache=True).logits
            for a, b in ((0, 9), (9, 10), (10, 17))
        ]
        self.assert_equal(torch.cat(parts, 1), model(ids).logits, variant)

    def test_text_generation_pipeline(self, tokenizer):
        model = self.model(dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=None)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts = ["the whale", "a"]
        outputs = generator(texts, max_new_tokens=5, do_sample=False, batch_size=2)
        for text, output in zip(texts, outputs, strict=True):
            alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
            assert output[0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)

    # cost

    @staticmethod
    def count(module, *inputs, **arguments):
        """Counted FLOPs: of the linear layers, and of the rest."""
        with FlopCounterMode(display=False) as counter:
            module(*inputs, **arguments)
        by_module = counter.get_flop_counts()
        counts = by_module["Global"]
        linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
        # the angles of rotary embeddings, which older transformers multiply as matrices
        angles = sum(sum(each.values()) for name, each in by_module.items() if name.endswith(".rotary_emb"))
        return linear, sum(counts.values()) - linear - angles

    def test_counted_flops_are_as_predicted(self, variant):
        model = self.model(variant, dtype=torch.float32)
        for tokens in (33, 64):
            linear, _ = self.count(model, torch.randint(1, VOCAB, (1, tokens)), use_cache=False)
            mixing = sum(self.mixing_flops(layer.mixer, tokens) for layer in model.model.layers)
            assert linear == model.flops(tokens) - mixing

    @staticmethod
    def mixing_flops(mixer, tokens):
        return mixer.flops(tokens) - linear_flops(mixer) * tokens

    def test_mixing_grows_as_claimed(self):
        """The exponent of N, as counted from what is computed and as predicted."""
        mixer = self.model(self.counted_variant, dtype=torch.float32).model.layers[0].mixer
        lengths = (512, 2048)
        counted = [self.count(mixer, torch.randn(1, n, 32))[1] for n in lengths]
        predicted = [self.mixing_flops(mixer, n) for n in lengths]
        for flops in (counted, predicted):
            exponent = math.log(flops[1] / flops[0]) / math.log(lengths[1] / lengths[0])
            assert abs(exponent - self.mixing_exponent) < 0.02

    # training

    @pytest.mark.parametrize(
        "head",
        [
            "AutoModelForCausalLM",
            "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification",
            "AutoModelForQuestionAnswering",
        ],
    )
    def test_accumulated_gradients_equal_one_batch(self, head, tmp_path):
        """Trainer with 16 x 1 and with 4 x 4 examples takes the same step."""
        start = self.model(head=head, num_labels=3)
        ids = torch.randint(1, VOCAB, (16, 12))
        labels = {
            "AutoModelForCausalLM": {"labels": ids},
            "AutoModelForSequenceClassification": {"labels": torch.randint(3, (16,))},
            "AutoModelForTokenClassification": {"labels": torch.randint(3, (16, 12))},
            "AutoModelForQuestionAnswering": {
                "start_positions": torch.randint(12, (16,)),
                "end_positions": torch.randint(12, (16,)),
            },
        }[head]
        examples = [
            {"input_ids": ids[i], "attention_mask": torch.ones_like(ids[i]), **{k: v[i] for k, v in labels.items()}}
            for i in range(16)
        ]
        trained = []
        for batch, steps in ((16, 1), (4, 4)):
            model = copy.deepcopy(start)
            Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=str(tmp_path),
                    per_device_train_batch_size=batch,
                    gradient_accumulation_steps=steps,
                    max_steps=1,
                    learning_rate=1.0,
                    optim="sgd",
                    lr_scheduler_type="constant",
                    max_grad_norm=1e9,
                    report_to=[],
                    save_strategy="no",
                    use_cpu=True,
                    disable_tqdm=True,
                ),
                train_dataset=examples,
            ).train()
            trained.append(model)
        moved = 0.0
        for before, a, b in zip(start.parameters(), trained[0].parameters(), trained[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
            moved = max(moved, (a - before).abs().max().item())
        assert moved > 1e-3

    @pytest.mark.parametrize("is_decoder", [True, False])
    def test_trainer_resumes_where_it_stopped(self, is_decoder, tmp_path):
        """With accumulated gradients and recomputed activations, to the bit."""
        is_decoder = is_decoder or "AutoModelForMaskedLM" not in heads_of(self.model_type)
        start = self.model(
            head="AutoModelForSequenceClassification", dtype=torch.float32, is_decoder=is_decoder, hidden_dropout=0.1
        )
        rows = torch.randint(1, VOCAB, (16, 12))
        examples = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in rows]

        def train(name, **stop):
            arguments = TrainingArguments(
                output_dir=str(tmp_path / name),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                gradient_checkpointing=True,
                max_steps=4,
                save_steps=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            model = copy.deepcopy(start)
            Trainer(model=model, args=arguments, train_dataset=examples).train(**stop)
            return model

        whole = train("whole")
        resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        for before, a, b in zip(start.parameters(), whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b) and not torch.equal(a, before)

    # classification

    @pytest.mark.parametrize("pooling", ["first", "last", "mean"])
    @pytest.mark.parametrize("is_decoder", [True, False])
    def test_pooling_reads_real_tokens_alone(self, pooling, is_decoder):
        """Padded anywhere, packed, and as choices: each sequence gives what it gives alone."""
        encoders = "AutoModelForMultipleChoice" in heads_of(self.model_type)
        if not is_decoder and not encoders:
            pytest.skip("this family is causal")
        fields = {"classifier_pooling": pooling, "is_decoder": is_decoder}
        model = self.model(head="AutoModelForSequenceClassification", num_labels=3, **fields)
        states = getattr(model, model.base_model_prefix)

        def expected(ids):
            hidden = states(ids[None]).last_hidden_state[0]
            return model.score({"first": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[pooling])

        ids, mask = masked_batch()
        logits = model(ids, attention_mask=mask).logits
        for row in range(3):
            self.assert_equal(logits[row], expected(ids[row][mask[row] == 1]))
        packed, places = packed_batch()
        logits = model(packed, **marks_of("position_ids", places)).logits
        for number, (row, place) in enumerate(places):
            self.assert_equal(logits[number], expected(packed[row, place]))
        if encoders:
            choice = self.model(head="AutoModelForMultipleChoice", **fields)
            got = choice(ids[None], attention_mask=mask[None]).logits[0]
            for row in range(3):
                self.assert_equal(got[row], choice(ids[row][mask[row] == 1][None, None]).logits[0, 0])

    def test_pooling_of_earlier_tokens_is_refused_in_words(self):
        model = self.model(head="AutoModelForSequenceClassification", classifier_pooling="mean")
        ids = torch.randint(1, VOCAB, (2, 8))
        past = model(ids, use_cache=True).past_key_values
        if past is None:
            pytest.skip("this family classifies without a state")
        with pytest.raises(ValueError, match="classifier_pooling='mean' reads: give all tokens"):
            model(ids[:, :1], past_key_values=past)

    # unusual input

    def test_unusual_input_has_an_answer(self, variant):
        model = self.model(variant)
        ids, mask = masked_batch()
        expected = model(ids).logits
        self.assert_equal(model(ids, attention_mask=dict.fromkeys(model.config.layer_types)).logits, expected, variant)
        self.assert_equal(model(ids[:, :1], attention_mask=mask[:, :1] | 1).logits, expected[:, :1], variant)
        mask[1] = 0  # a row of padding alone leaves the others as they are
        outputs = model(ids, attention_mask=mask, use_cache=True)
        assert outputs.logits.isfinite().all()
        alone = model(ids[:1], attention_mask=mask[:1]).logits[0]
        self.assert_equal(outputs.logits[0][mask[0] == 1], alone[mask[0] == 1], variant)
        more = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = model(ids[:, :1], attention_mask=more, past_key_values=outputs.past_key_values, use_cache=True).logits
        self.assert_equal(step[1], model(ids[1:2, :1]).logits[0], variant)

    # bad input

    def test_wrong_input_is_refused_in_words(self):
        model = self.model()
        ids = torch.randint(1, VOCAB, (2, 8))
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model()
        with pytest.raises(ValueError, match="There are 0 rows of 8 tokens: give at least one row"):
            model(ids[:0], attention_mask=torch.ones(0, 8))
        with pytest.raises(ValueError, match="There are 2 rows of 0 tokens"):
            model(ids[:, :0])
        if set(model.config.layer_types) != {"full_attention"}:
            with pytest.raises(ValueError, match=r"shape \(2, 1, 8, 8\).*do not look at pairs: give \(B, N\)"):
                model(ids, attention_mask=torch.zeros(2, 1, 8, 8))
        with pytest.raises(ValueError, match=r"\(2, 5\).*need \(2, 8\)"):
            model(ids, attention_mask=torch.ones(2, 5))
        with pytest.raises(ValueError, match=r"shape \(2, 8, 8\)"):
            model(ids, attention_mask=torch.ones(2, 8, 8))
        with pytest.raises(ValueError, match=r"Position 64 .*`max_position_embeddings` \(64\)"):
            self.model(position_embedding_type="learned")(torch.randint(1, VOCAB, (1, 65)))
        with pytest.raises(ValueError, match="Position 62 .* table of 60 positions"):
            self.model(position_embedding_type="learned", position_offset=4)(torch.randint(1, VOCAB, (1, 63)))
        with pytest.raises(ValueError, match="`token_type_ids` holds 2, but `type_vocab_size` is 2"):
            self.model(type_vocab_size=2)(ids, token_type_ids=torch.full_like(ids, 2))
        two = self.model(head="AutoModelForSequenceClassification", pad_token_id=None)
        with pytest.raises(ValueError, match="cannot tell the real tokens of 2 rows"):
            two(ids)

    def test_wrong_config_is_refused_in_words(self):
        for overrides, message in (
            ({"hidden_size": 30}, r"`hidden_size` \(30\) must be a multiple of `num_attention_heads` \(4\)"),
            ({"num_key_value_heads": 3}, r"`num_key_value_heads` \(3\) must divide `num_attention_heads` \(4\)"),
            ({"num_key_value_heads": 0}, r"`num_key_value_heads` \(0\) must be at least 1"),
            ({"head_dim": 0}, r"`head_dim` \(0\) must be at least 1"),
            ({"head_dim": 7, "position_embedding_type": "rope"}, r"even head size, but `head_dim` \(7\)"),
            ({"norm_type": "group_norm"}, "norm_type"),
            ({"mlp_type": "mixture"}, "mlp_type"),
            ({"classifier_pooling": "max"}, "classifier_pooling"),
            ({"attention_bias": "out"}, "attention_bias"),
            ({"num_hidden_layers": 0}, r"`num_hidden_layers` \(0\) must be at least 1"),
            ({"hidden_act": "gelo"}, r"`hidden_act` \('gelo'\)"),
            ({"norm_position": "middle"}, "norm_position"),
            ({"hidden_dropout": 1.0}, r"`hidden_dropout` \(1.0\)"),
            ({"type_vocab_size": -1}, r"`type_vocab_size` \(-1\)"),
            ({"position_offset": 64}, r"`position_offset` \(64\) .*`max_position_embeddings` \(64\)"),
            ({"layer_types": self.config().layer_types[:1]}, "1 entries for `num_hidden_layers`"),
            ({"layer_types": ["lstm"] * 3}, r"\['lstm'\]"),
            (
                {"hidden_size": 12, "position_embedding_type": "rope"},
                r"rope needs an even head size.*\(12\).*\(4\)",
            ),
        ):
            with pytest.raises(Exception, match=message):  # huggingface_hub wraps some in its own class
                self.config(**overrides)

    def test_classification_reads_the_last_real_token(self):
        model = self.model(head="AutoModelForSequenceClassification")
        ids, mask = masked_batch()
        logits = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row][mask[row] == 1][None]).logits[0]
            self.assert_equal(logits[row], alone)
