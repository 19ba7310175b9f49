"""What the model computes: padding, causality, gradients, precision."""

import copy

import torch

from family.base import FamilyBase
from family.batches import VOCAB, masked_batch
from ordnung.modeling.ops import chunks


class Computation(FamilyBase):
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
