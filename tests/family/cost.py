"""What is computed and held is what the model says."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from family.base import FamilyBase
from family.batches import VOCAB
from ordnung.modeling.mixers.mixer import linear_flops


class Cost(FamilyBase):
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
