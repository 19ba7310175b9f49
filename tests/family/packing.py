"""Packed documents."""

import pytest
import torch
from transformers import DynamicCache

from family.base import FamilyBase
from family.batches import marks_of, packed_batch
from ordnung.modeling.registration import heads_of


class Packing(FamilyBase):
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

    def test_packed_documents_under_compile(self, compiled_variant):
        """Where documents lie is in the data: that part runs outside of the graphs."""
        model = self.shallow(compiled_variant)
        ids, places = packed_batch()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        every = ("position_ids", "seq_idx") if compiled_variant == next(iter(self.variants)) else ("position_ids",)
        for mark in every:  # what a mark says is the same in all variants
            marks = marks_of(mark, places)
            got, expected = compiled(ids, use_cache=False, **marks).logits, model(ids, use_cache=False, **marks).logits
            self.assert_equal(got, expected, compiled_variant)

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
