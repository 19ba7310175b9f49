"""The generation state."""

import copy

import pytest
import torch
import transformers
from packaging import version
from transformers import DynamicCache

from family.base import FamilyBase
from family.batches import VOCAB, cache_tensors, masked_batch


class States(FamilyBase):
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

    @torch.no_grad()
    def test_a_long_state_is_as_exact_as_one_pass(self, variant):
        """In bfloat16, tokens one at a time lose no more than all at once: sums over many are kept in more digits."""
        if not self.mixes_each_token_once:
            pytest.skip("this family's first layer is computed for many passes at a time")
        model = self.model(variant, dtype=torch.bfloat16, max_position_embeddings=160)
        ids, taken = torch.randint(1, VOCAB, (1, 160)), []

        def mixed(model, steps):
            """What the first layer's mixer makes of the last tokens, before its output projection."""
            taken.clear()
            hook = model.model.layers[0].mixer.out_proj.register_forward_pre_hook(
                lambda _, args: taken.append(args[0].float())
            )
            past = None
            for part in ids.split(steps, dim=1):
                past = model(part, past_key_values=past, use_cache=steps == 1).past_key_values
            hook.remove()
            return torch.cat(taken, 1)[:, -40:]

        exact = mixed(copy.deepcopy(model).float(), 160)
        at_once, one_by_one = ((mixed(model, steps) - exact).norm() for steps in (160, 1))
        assert one_by_one < 1.2 * at_once
