"""Registration, saving and loading."""

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.models.auto import modeling_auto

import ordnung
from family.base import FamilyBase
from family.batches import VOCAB, masked_batch
from ordnung.modeling.registration import heads_of


class Checkpoints(FamilyBase):
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
