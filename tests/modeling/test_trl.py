"""trl as a client: packing, assistant-only loss, LoRA and preferences, with the model's own losses."""

import math

import pytest
import torch
from datasets import Dataset
from tiny_tasks import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ordnung.modeling.registration import FAMILIES

trl = pytest.importorskip("trl", reason="needs ordnung[trl]")

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", *(f"w{i}" for i in range(40))]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}assistant : {% generation %}"
    "{{ message['content'] }} <eos> {% endgeneration %}{% else %}user : {{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
VARIANTS = {"conv_lm": {"kernel_size": 8, "layer_types": ["conv", "full_attention"]}}


def words(start, count):
    return " ".join(f"w{(start + 7 * i) % 40}" for i in range(count))


CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(i, 2 + i % 4)},
            {"role": "assistant", "content": words(3 * i, 1 + i % 6)},
        ]
    }
    for i in range(24)
]
PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": words(i, 3)}],
        "chosen": [{"role": "assistant", "content": words(i, 2)}],
        "rejected": [{"role": "assistant", "content": words(i + 1, 4)}],
    }
    for i in range(8)
]


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    more = {"is_decoder": True, "vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(request.param, **TINY, **more, **VARIANTS.get(request.param, {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def arguments(kind, folder, max_steps=2, **more):
    return kind(
        str(folder / "out"),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        **more,
    )


def documents(batch):
    """The tokens and labels of each document of a flattened batch, from its positions."""
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    for start, stop in zip(starts, [*starts[1:], batch["position_ids"].shape[1]]):
        yield batch["input_ids"][:, start:stop], batch["labels"][:, start:stop]


def test_sft_on_packed_chats_has_the_loss_of_each_alone(checkpoint, tmp_path):
    config = arguments(trl.SFTConfig, tmp_path, packing=True, max_length=32, assistant_only_loss=True)
    trainer = trl.SFTTrainer(checkpoint, args=config, train_dataset=Dataset.from_list(CHATS))
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch and len(list(documents(batch))) > 2
    model = trainer.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
        for ids, labels in documents(batch):
            own = labels[:, 1:] != -100
            scores = torch.nn.functional.cross_entropy(
                model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100
            )
            total, count = total + scores, count + int(own.sum())
    assert 0 < count < batch["input_ids"].numel()  # the assistant's tokens alone
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-6)
    before = [p.clone() for p in model.parameters()]
    assert trainer.train().training_loss > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_sft_with_lora(checkpoint, tmp_path):
    from peft import LoraConfig

    trainer = trl.SFTTrainer(
        checkpoint,
        args=arguments(trl.SFTConfig, tmp_path, max_length=32),
        train_dataset=Dataset.from_list(CHATS),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
    )
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()}
    assert moved and not any(p.requires_grad for name, p in trainer.model.named_parameters() if "lora" not in name)


def test_dpo_without_a_reference_model(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = trl.DPOTrainer(
        model,
        args=arguments(trl.DPOConfig, tmp_path, max_steps=1),
        processing_class=PreTrainedTokenizerFast.from_pretrained(checkpoint),
        train_dataset=Dataset.from_list(PREFERENCES),
    )
    before = [p.clone() for p in model.parameters()]
    # at first model and reference agree: log 2
    torch.testing.assert_close(trainer.train().training_loss, math.log(2), rtol=0, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
