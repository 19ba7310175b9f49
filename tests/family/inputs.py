"""Classification, and unusual and wrong input."""

import pytest
import torch

from family.base import FamilyBase
from family.batches import VOCAB, marks_of, masked_batch, packed_batch
from ordnung.modeling.registration import heads_of


class Inputs(FamilyBase):
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
            (
                {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
                r"`rope_type` \(.spiral.\) is not known: it must be one of",
            ),
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
                {"hidden_size": 12, "position_embedding_type": "rope", "head_dim": None},
                "head_dim" if self.has_own_head_dim else r"rope needs an even head size.*\(12\).*\(4\)",
            ),
        ):
            with pytest.raises(Exception, match=message):  # huggingface_hub wraps some in its own class
                self.config(**overrides)

    def test_padding_changes_no_loss_of_an_answer(self):
        model = self.model(head="AutoModelForQuestionAnswering")
        ids, mask = masked_batch()
        for row in range(3):
            real = (mask[row] == 1).nonzero()[:, 0]
            ends = {"start_positions": torch.tensor([2]), "end_positions": torch.tensor([5])}
            alone = model(ids[row][real][None], **ends).loss
            there = {name: real[place] for name, place in ends.items()}
            self.assert_equal(model(ids[row][None], attention_mask=mask[row][None], **there).loss, alone)

    def test_classification_reads_the_last_real_token(self):
        model = self.model(head="AutoModelForSequenceClassification")
        ids, mask = masked_batch()
        logits = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row][mask[row] == 1][None]).logits[0]
            self.assert_equal(logits[row], alone)
