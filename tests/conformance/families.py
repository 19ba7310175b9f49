"""What transformers' common tests run on: one row for each family, or each form of a family that is worth a run."""

from dataclasses import dataclass, field

from ordnung.modeling.registration import HEADS, REGISTERED, heads_of, import_plugins

# what the skip reason of an excluded test starts with
EXCLUDED = "excluded: "
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

STATE_LAYERS = {
    "test_generate_with_quant_cache": "transformers quantizes the keys and values of attention layers; a convolution "
    "state has none, and its `QuantizedCache` refuses other layers in words."
}
PASSES = {
    "test_training_gradient_checkpointing*": "The test has each layer called once in a forward pass and hands all its "
    "calls one mock; here a layer is called for each group of prefixes.",
}
COPIED_WEIGHTS = {
    "test_retain_grad_hidden_states_attentions": "The weights that are returned are put where the padding of a row "
    "leaves their tokens, after the output was made: no gradient comes to that copy."
}


# What Llama, Qwen and their like are made of.
MODERN = {
    "norm_type": "rms_norm",
    "mlp_type": "gated",
    "num_key_value_heads": 1,
    "head_dim": 12,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": True,
    "position_embedding_type": "rope",
}


@dataclass(frozen=True)
class Row:
    """
    Args:
        model_type: a family of `ordnung.modeling.registration`.
        heads: class name endings to test, base model first.
        config: config fields beyond those of `suite.SMALL`.
        flags: attributes of the test class, as test files in transformers set them.
        excluded: test name pattern -> why these tests do not apply. A run skips them and lists them with the reason.
    """

    model_type: str
    heads: tuple[str, ...] = HEADS
    config: dict = field(default_factory=dict)
    flags: dict = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> dict[str, str]:
        """Class name ending -> class name."""
        prefix = REGISTERED[self.model_type].prefix
        return {head: prefix + head for head in self.heads}


ROWS = {
    "conv_lm": Row(
        "conv_lm",
        config={"kernel_size": 4},
        flags={"has_attentions": False},
        excluded={
            **STATE_LAYERS,
            "test_model_rope_scaling_from_config_*": "A stack of convolutions has no rotary embedding to scale; these "
            "tests go by the config field `rope_parameters`, which stacks with attention layers use.",
        },
    ),
    "conv_lm-hybrid": Row(
        "conv_lm",
        config={
            "kernel_size": 4,
            "layer_types": ["causal_conv", "full_attention"],
            "position_embedding_type": "rope",
        },
        excluded=STATE_LAYERS,
    ),
    "conv_lm-modern": Row(
        "conv_lm",
        config={**MODERN, "kernel_size": 4, "layer_types": ["causal_conv", "full_attention"]},
        excluded=STATE_LAYERS,
    ),
    "conv_lm-bidirectional": Row(
        "conv_lm",
        heads=("Model", "ForMaskedLM", "ForMultipleChoice", *CLASSIFIERS),
        config={"is_decoder": False, "kernel_size": 5},
        flags={"has_attentions": False},
        excluded={
            "test_model_rope_scaling_from_config_*": "A stack of convolutions has no rotary embedding to scale; these "
            "tests go by the config field `rope_parameters`, which stacks with attention layers use."
        },
    ),
    "cubic_prefix_lm": Row(
        "cubic_prefix_lm",
        heads=("Model", "ForCausalLM"),
        config={"position_embedding_type": "rope"},
        flags={"has_attentions": False},
        excluded=PASSES,
    ),
    "cubic_prefix_lm-modern": Row(
        "cubic_prefix_lm",
        heads=("Model", "ForCausalLM"),
        config=MODERN,
        flags={"has_attentions": False},
        excluded=PASSES,
    ),
    "cubic_prefix_lm-stride": Row(
        "cubic_prefix_lm",
        heads=("Model", "ForCausalLM"),
        config={"prefix_stride": 3, "position_embedding_type": "rope"},
        flags={"has_attentions": False},
        excluded=PASSES,
    ),
    "cubic_prefix_lm-encoder": Row(
        "cubic_prefix_lm",
        heads=("Model", "ForMaskedLM", "ForMultipleChoice", *CLASSIFIERS),
        config={"is_decoder": False, "position_embedding_type": "rope"},
    ),
    "linformer_lm": Row(
        "linformer_lm",
        config={
            "is_decoder": True,
            "projected_size": 8,
            "local_block_size": 4,
            "position_embedding_type": "rope",
        },
        flags={"has_attentions": False},
        excluded=STATE_LAYERS,
    ),
    "linformer_lm-modern": Row(
        "linformer_lm",
        config={**MODERN, "is_decoder": True, "projected_size": 8, "local_block_size": 4, "num_global_tokens": 2},
        flags={"has_attentions": False},
        excluded=STATE_LAYERS,
    ),
    "linformer_lm-bidirectional": Row(
        "linformer_lm",
        heads=("Model", "ForMaskedLM", "ForMultipleChoice", *CLASSIFIERS),
        config={"projected_size": 8},
        flags={"has_attentions": False},
        excluded={
            "test_model_rope_scaling_from_config_*": "These tests go beyond `max_position_embeddings`, where a "
            "bidirectional projection has no weights: the model refuses in words."
        },
    ),
    "sparse_attention_lm": Row(
        "sparse_attention_lm",
        config={
            "sliding_window": 4,
            "num_global_tokens": 2,
            "num_random_blocks": 1,
            "random_block_size": 2,  # the tests set the window to 2
            "position_embedding_type": "rope",
        },
        excluded={**STATE_LAYERS, **COPIED_WEIGHTS},
    ),
    "sparse_attention_lm-modern": Row(
        "sparse_attention_lm",
        config={
            **MODERN,
            "sliding_window": 4,
            "global_stride": 5,
            "layer_types": ["sparse_attention", "full_attention"],
        },
        excluded={**STATE_LAYERS, **COPIED_WEIGHTS},
    ),
    "sparse_attention_lm-bidirectional": Row(
        "sparse_attention_lm",
        heads=("Model", "ForMaskedLM", "ForMultipleChoice", *CLASSIFIERS),
        config={"is_decoder": False, "sliding_window": 3, "num_global_tokens": 2, "global_stride": 5},
        excluded=COPIED_WEIGHTS,
    ),
    "quadratic_kernel_lm": Row(
        "quadratic_kernel_lm",
        config={"head_dim": 4, "chunk_size": 4, "centering": "prefix", "sliding_window": 3},
        flags={"has_attentions": False},
        excluded=STATE_LAYERS,
    ),
    "quadratic_kernel_lm-modern": Row(
        "quadratic_kernel_lm",
        config={**MODERN, "chunk_size": 4},
        flags={"has_attentions": False},
        excluded=STATE_LAYERS,
    ),
    "softmax_lm": Row("softmax_lm"),
    "softmax_lm-modern": Row("softmax_lm", config=MODERN),
    "softmax_lm-bidirectional": Row(
        "softmax_lm",
        heads=("Model", "ForMaskedLM", "ForMultipleChoice", *CLASSIFIERS),
        config={"is_decoder": False},
    ),
}


def default_rows(model_type: str) -> dict[str, Row]:
    """What tests a family that has no rows of its own: each form of it as it comes."""
    rows = {
        model_type: Row(model_type, config={"is_decoder": True}, flags={"has_attentions": False}, excluded=STATE_LAYERS)
    }
    if REGISTERED[model_type].heads:  # those of encoders
        rows[f"{model_type}-bidirectional"] = Row(
            model_type,
            heads=("Model", *REGISTERED[model_type].heads, *CLASSIFIERS),
            config={"is_decoder": False},
            flags={"has_attentions": False},
        )
    return rows


def untested(rows: dict[str, Row]) -> list[str]:
    """Names of the registered classes that no row tests."""
    tested = {name for row in rows.values() for name in row.classes.values()}
    return sorted({name for family in REGISTERED for name in heads_of(family).values()} - tested)


import_plugins()
for family in [name for name in REGISTERED if name not in {row.model_type for row in ROWS.values()}]:
    ROWS |= default_rows(family)
