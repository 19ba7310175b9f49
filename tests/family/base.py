"""What to build for a family, and how exactly to compare."""

import torch
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from family.batches import PAD, VOCAB
from ordnung.modeling.registration import heads_of


class FamilyBase:
    model_type: str
    # name -> config arguments on top of `base_arguments`
    variants: dict[str, dict] = {"default": {}}
    # those that torch.export takes seconds for, where they hold all that is in the others; by default all
    exported_variants: tuple[str, ...] = ()
    counted_variant = "default"  # one whose mixing torch's FLOP counter sees
    mixing_exponent: int  # of the number of tokens, in the FLOPs of mixing
    state_grows: bool
    # variants that transformers computes in float32 only
    single_precision: tuple[str, ...] = ()
    exports_to_onnx = True
    # whether queries and keys have a size that `hidden_size` and the number of heads do not give
    has_own_head_dim = False
    # whether the first layer sees each token once, so that what it mixed can be watched token by token
    mixes_each_token_once = True
    # whether layers of one type do the same, wherever they stand in the stack
    layers_are_alike = True
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

    def shallow(self, variant="default"):
        """`model` with one layer of each kind, for graphs: they take seconds a layer to make."""
        if not self.layers_are_alike:
            return self.model(variant)
        config = self.config(variant)
        by_layer = {
            name: value
            for name, value in self.variants[variant].items()
            if isinstance(value, list) and len(value) == config.num_hidden_layers
        }
        kinds = zip(config.layer_types, *by_layer.values())
        kept = sorted({kind: number for number, kind in enumerate(kinds)}.values())
        by_layer = {name: [value[number] for number in kept] for name, value in by_layer.items()}
        return self.model(variant, num_hidden_layers=len(kept), **by_layer)

    def heads(self, is_decoder=True):
        """Auto class names that work for a causal or for a bidirectional config of this family."""
        without = "AutoModelForMaskedLM" if is_decoder else "AutoModelForCausalLM"
        return [head for head in heads_of(self.model_type) if head != without]

    def assert_equal(self, got, expected, variant="default"):
        """Equal up to the rounding of float64, or of float32 where that is what the variant computes in."""
        atol = 1e-5 if variant in self.single_precision else 1e-10
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)
