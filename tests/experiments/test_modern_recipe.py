"""The recipe `modern.yaml`, as it stands but for the number of steps and the sizes."""

import pytest
from transformers import AutoModelForCausalLM

from ordnung.scripts import pretrain

MORE = {"softmax_lm": "", "conv_lm": ",kernel_size=8", "linformer_lm": ",projected_size=8,local_block_size=16"}


@pytest.mark.parametrize("model_type", MORE)
def test_recipe_trains_a_modern_model(model_type, tmp_path):
    sizes = "hidden_size=48,num_hidden_layers=2,intermediate_size=64" + MORE[model_type]
    text = tmp_path / "text.txt"
    text.write_text("the whale and the ship, a captain and the white sea. " * 200)
    data = ["--train_file", str(text)]
    short = ["--max_steps", "4", "--eval_steps", "4", "--save_steps", "4", "--warmup_steps", "1", "--block_size", "32"]
    small = ["--train_tokenizer_vocab_size", "300", "--validation_fraction", "0.1", "--use_cpu"]
    arguments = ["--config", "modern.yaml", "--model_type", model_type, "--config_overrides", sizes]
    assert pretrain.main([*arguments, "--output_dir", str(tmp_path / "run"), *data, *short, *small]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.model_type == model_type
    layer = model.model.layers[0]
    assert layer.mlp.gate_proj.weight.shape == (64, 48) and layer.mlp.gate_proj.bias is None
    assert type(layer.mixer_norm).__name__ == "RMSNorm" and layer.mixer.v_proj.bias is None
    if model_type != "conv_lm":  # which has no keys
        assert layer.mixer.k_proj.weight.shape == (16, 48) and type(layer.mixer.k_norm).__name__ == "RMSNorm"
    assert (tmp_path / "run/results.json").exists()
