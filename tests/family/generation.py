"""Generation: every mode equals the model without a state."""

import copy

import pytest
import torch
from transformers import StaticCache, pipeline
from transformers.masking_utils import create_masks_for_generate

from family.base import FamilyBase
from family.batches import PAD, VOCAB, masked_batch


class Generation(FamilyBase):
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
        prompts = [ids[row][mask[row] == 1][None] for row in range(3)]
        alone = {
            beams: [self.generate(model, prompt, use_cache=False, num_beams=beams)[0, -9:] for prompt in prompts]
            for beams in (1, 2)
        }
        for mode in ({}, {"num_beams": 2}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
            got = self.generate(model, ids, attention_mask=mask, disable_compile=True, **mode)
            for row, expected in zip(got, alone[mode.get("num_beams", 1)]):
                assert torch.equal(row[12:], expected), mode

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

    def test_masks_made_ahead_are_taken(self, variant):
        """As generate() makes them for caches that can be compiled: without one of a layer type it makes none."""
        model = self.model(variant)
        ids, mask = masked_batch()
        past = StaticCache(config=model.config, max_cache_len=24)
        if not past.is_compileable:
            pytest.skip("generate() makes no masks ahead for this family's cache, which cannot be compiled")
        embeds = model.get_input_embeddings()(ids)
        ahead = create_masks_for_generate(model.config, embeds, mask, past)
        assert isinstance(ahead, dict) and ahead.keys() == set(model.config.layer_types)
        places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() gives them too
        got = model(ids, attention_mask=ahead, position_ids=places, past_key_values=past, use_cache=True).logits
        self.assert_equal(got[mask == 1], model(ids, attention_mask=mask).logits[mask == 1], variant)
