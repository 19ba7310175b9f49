"""Variants small enough to train in a test, and the table of options that names them."""

import yaml

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VARIANTS = {
    "conv": {"model_type": "conv_lm", "kernel_size": 4},
    "softmax": {"model_type": "softmax_lm", "position_embedding_type": "rope"},
}


def write_config(path, **own):
    """Write a table of the variants, two seeds and options of the test's own; returns the words that name it."""
    shared = {"output_dir": str(path.parent / "out"), "variants": VARIANTS, "config_overrides": TINY, "seeds": [0, 1]}
    options = {**shared, **own}
    path.write_text(yaml.safe_dump(options))
    return ["--config", str(path)]
