"""A Llama becomes each family by one command, and is then what any checkpoint is; what does not fit is refused."""

import subprocess
import sys

import peft
import pytest
import torch
from family_tester import masked_batch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ordnung
from ordnung.modeling.registration import FAMILIES
from ordnung.scripts import cli
from ordnung.scripts.common.errors import ScriptError

SIZES = {
    "conv_lm": "kernel_size=4",
    "linformer_lm": "projected_size=8,local_block_size=4,num_global_tokens=2",
    "cubic_prefix_lm": "prefix_stride=4",
    "sparse_attention_lm": "sliding_window=5",
}
# Loads each folder where this package is not imported.
STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(model(torch.arange(3, 15)[None]).logits, folder + ".pt")
assert "ordnung" not in sys.modules
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    """A folder with what one command makes of it by each family's name, and with a stranger's logits of that."""
    folder = tmp_path_factory.mktemp("converted")
    for model_type in FAMILIES:
        overrides = ["--config_overrides", SIZES[model_type]] if model_type in SIZES else []
        command = ["convert", "--source", llama, "--model_type", model_type, "--output_dir", folder / model_type]
        assert cli.main([*map(str, command), *overrides]) in (0, None)
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    stranger = [sys.executable, "-c", STRANGER, *(str(folder / model_type) for model_type in FAMILIES)]
    done = subprocess.run(stranger, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_command_makes_a_model_of_each_family(model_type, llama, converted):
    output = converted / model_type
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.model_type == model_type
    source = LlamaForCausalLM.from_pretrained(llama)
    for ours, theirs in zip(model.model.layers, source.model.layers, strict=True):
        assert torch.equal(ours.mlp.gate_proj.weight, theirs.mlp.gate_proj.weight)
    if model_type == "softmax_lm":
        ids, mask = masked_batch()
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # of real tokens
        expected = source(ids, attention_mask=mask, position_ids=positions).logits[mask == 1]
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected)

    inputs = tokenizer(["the whale and the sea", "a ship"], return_tensors="pt", padding=True)
    kept = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    again = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)
    assert kept.shape[1] == inputs["input_ids"].shape[1] + 8 and torch.equal(kept, again)

    # written with its code, it loads where this package is not imported
    assert torch.equal(torch.load(converted / f"{model_type}.pt"), model(torch.arange(3, 15)[None]).logits)

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(any(f"{part}_proj" in name for name in trained) for part in ("v", "out", "gate", "up", "down"))
    ids = torch.randint(2, 60, (2, 12))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids, labels=ids).loss, adapted(ids, labels=ids).loss)


def small(**fields):
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
    return LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **fields})


def test_what_does_not_fit_is_refused_with_value_and_cure(tmp_path, tokenizer):
    source = LlamaForCausalLM(small(tie_word_embeddings=False))
    for overrides, message in (
        ({"num_key_value_heads": 3}, r"`num_key_value_heads` \(3\) must divide `num_attention_heads` \(4\)"),
        ({"head_dim": 5}, r"even head size, but `head_dim` \(5\).*change one"),
        ({"hidden_size": 26, "head_dim": None}, r"`hidden_size` \(26\) must be a multiple of `num_attention_heads`"),
        ({"tie_word_embeddings": True}, r"`tie_word_embeddings` \(True\).*of its own.*leave it out"),
    ):
        with pytest.raises(Exception, match=message):
            ordnung.convert(source, "softmax_lm", **overrides)
    source.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(ValueError, match=r"`rope_type` \('spiral'\) is not known: it must be one of \['default', "):
        ordnung.convert(source, "softmax_lm")

    folder = tmp_path / "small-vocabulary"
    LlamaForCausalLM(small()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ["convert", "--source", str(folder), "--model_type", "softmax_lm", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ScriptError, match=rf"{len(tokenizer)}.*50"):
        cli.main(command)
    assert not (tmp_path / "out").exists()
