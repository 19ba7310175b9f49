"""Mixing weights: what the layers compute with, and what figures are drawn of."""

import torch

from family.base import FamilyBase
from family.batches import marks_of, masked_batch, packed_batch


class Mixing(FamilyBase):
    def values(self, mixer, hidden_states, rows):
        """(B, N, G d): the values that the weights are of. A family that makes more of `v_proj` overrides this."""
        return mixer.v_proj(hidden_states)

    def mixed(self, mixer, weights, hidden_states, rows):
        """What `weights` (B, H, N, keys) make of the values: (B, N, H d), as it goes into `out_proj`.

        A head of values serves several of queries. A family that has no values of tokens overrides the test.
        """
        heads, size = weights.shape[1], mixer.out_proj.in_features // weights.shape[1]
        values = self.values(mixer, hidden_states, rows).unflatten(-1, (-1, size)).transpose(1, 2)  # (B, G, N, d)
        return (weights @ values.repeat_interleave(heads // values.shape[1], 1)).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def mixer_calls(self, variant, ids, **inputs):
        """What each mixer takes and what comes out: mixer, arguments, input of `out_proj` if called once, output."""
        model = self.model(variant, head="AutoModel", dtype=torch.float32, attn_implementation="eager")
        calls, projected, hooks = [], {}, []
        for layer in model.layers:
            projected[layer.mixer] = []
            hooks += [
                layer.mixer.register_forward_hook(
                    lambda mixer, args, kwargs, output: calls.append((mixer, args, kwargs, output[0])), with_kwargs=True
                ),
                layer.mixer.out_proj.register_forward_pre_hook(
                    lambda _, args, taken=projected[layer.mixer]: taken.append(args[0])
                ),
            ]
        model(ids, use_cache=False, **inputs)
        for hook in hooks:
            hook.remove()
        assert [mixer for mixer, *_ in calls] == [layer.mixer for layer in model.layers]
        return [
            (mixer, args[0], kwargs, projected[mixer][0] if len(projected[mixer]) == 1 else None, output)
            for mixer, args, kwargs, output in calls
        ]

    def mixing_batches(self):
        """Ids, which of them are real, and arguments: whole, padded, and packed rows."""
        ids, mask = masked_batch()
        yield ids, torch.ones_like(mask) == 1, {}
        yield ids, mask == 1, {"attention_mask": mask}
        ids, places = packed_batch()
        yield ids, torch.ones_like(ids) == 1, marks_of("position_ids", places)

    @torch.no_grad()
    def test_weights_times_values_are_what_is_projected(self, variant):
        for ids, real, inputs in self.mixing_batches():
            for mixer, hidden_states, kwargs, projected, _ in self.mixer_calls(variant, ids, **inputs):
                weights = mixer.mixing_weights(hidden_states, **kwargs)
                assert weights.shape[:3] == (len(ids), mixer.config.num_attention_heads, ids.shape[1])
                expected = self.mixed(mixer, weights, hidden_states, kwargs.get("rows"))
                scale = projected[real].abs().max()
                torch.testing.assert_close(expected[real] / scale, projected[real] / scale, rtol=0, atol=1e-5)
