"""Small random models of transformers' own classes, and holding them against what they become."""

import torch
import transformers
from family_tester import masked_batch
from transformers import (
    BertConfig,
    BigBirdConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    LongformerConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from ordnung.modeling.sources import SOURCES

SMALL = {"vocab_size": 50, "max_position_embeddings": 40}
ENCODER = {
    **SMALL,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "type_vocab_size": 2,
    "attention_probs_dropout_prob": 0.2,
    "classifier_dropout": 0.3,
}
DECODER = {
    **SMALL,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "attention_dropout": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "distilbert": lambda **fields: DistilBertConfig(
        **{**SMALL, "dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "attention_dropout": 0.2, **fields}
    ),
    "llama": lambda **fields: LlamaConfig(**{**DECODER, **fields}),
    "mistral": lambda **fields: MistralConfig(**{**DECODER, "sliding_window": None, **fields}),
    "qwen2": lambda **fields: Qwen2Config(**{**DECODER, **fields}),
    "qwen3": lambda **fields: Qwen3Config(**{**DECODER, "head_dim": 10, **fields}),
    "bert": lambda **fields: BertConfig(**{**ENCODER, **fields}),
    "roberta": lambda **fields: RobertaConfig(**{**ENCODER, "pad_token_id": 0, "bos_token_id": 1, **fields}),
    "big_bird": lambda **fields: BigBirdConfig(**{**ENCODER, "attention_type": "original_full", **fields}),
    "longformer": lambda **fields: LongformerConfig(
        **{**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "attention_window": [4, 4, 8], **fields}
    ),
    "gpt2": lambda **fields: GPT2Config(
        **{
            **SMALL,
            "n_embd": 24,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 40,
            "attn_pdrop": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **fields,
        }
    ),
}


def make(class_name, **fields):
    """A random model in float64, away from the initial zeros and ones where mistakes hide."""
    model_class = getattr(transformers, class_name)
    model = model_class(CONFIGS[model_class.config_class.model_type](**fields)).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def run(model, ids, mask, position_ids=True, **inputs):
    """Outputs with hidden states; the originals get the positions of each row's real tokens, counted their way."""
    if position_ids and model.config.model_type in SOURCES:
        offset = 1 if model.config.model_type == "roberta" else 0
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + offset
    return model(ids, attention_mask=mask, output_hidden_states=True, **inputs)


def assert_same(source, model, tensors):
    """`tensors` (names of outputs) and all hidden states agree on the real tokens of every kind of padding."""
    ids, mask = masked_batch()
    kinds = model.config.type_vocab_size
    types = {"token_type_ids": torch.randint(kinds, ids.shape)} if kinds else {}
    expected, got = run(source, ids, mask, **types), run(model, ids, mask, **types)
    assert len(got.hidden_states) == len(expected.hidden_states) == 4
    # the last state of a causal head is what its logits are a product of: behind the transform
    same = 3 if type(model).__name__.endswith("ForCausalLM") and model.config.lm_head_transform else 4
    states = zip(got.hidden_states[:same], expected.hidden_states)
    pairs = [*states, *((got[name], expected[name]) for name in tensors)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], rtol=0, atol=1e-10)


DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3")
