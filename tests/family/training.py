"""Training by Trainer."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from family.base import FamilyBase
from family.batches import VOCAB
from ordnung.modeling.registration import heads_of


class Training(FamilyBase):
    @pytest.mark.parametrize(
        "head",
        [
            "AutoModelForCausalLM",
            "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification",
            "AutoModelForQuestionAnswering",
        ],
    )
    def test_accumulated_gradients_equal_one_batch(self, head, tmp_path):
        """Trainer with 4 x 4 examples takes the step of one batch of 16."""
        start = self.model(head=head, num_labels=3)
        ids = torch.randint(1, VOCAB, (16, 12))
        labels = {
            "AutoModelForCausalLM": {"labels": ids},
            "AutoModelForSequenceClassification": {"labels": torch.randint(3, (16,))},
            "AutoModelForTokenClassification": {"labels": torch.randint(3, (16, 12))},
            "AutoModelForQuestionAnswering": {
                "start_positions": torch.randint(12, (16,)),
                "end_positions": torch.randint(12, (16,)),
            },
        }[head]
        examples = [
            {"input_ids": ids[i], "attention_mask": torch.ones_like(ids[i]), **{k: v[i] for k, v in labels.items()}}
            for i in range(16)
        ]
        model = copy.deepcopy(start)
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,
                max_steps=1,
                learning_rate=1.0,
                optim="sgd",
                lr_scheduler_type="constant",
                max_grad_norm=1e9,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=examples,
        ).train()
        start.train()(ids, attention_mask=torch.ones_like(ids), **labels).loss.backward()
        moved = 0.0
        for before, after in zip(start.parameters(), model.parameters(), strict=True):
            step = torch.zeros_like(before) if before.grad is None else before.grad
            torch.testing.assert_close(after, before - step, rtol=1e-6, atol=1e-8)
            moved = max(moved, step.abs().max().item())
        assert moved > 1e-3

    @pytest.mark.parametrize("is_decoder", [True, False])
    def test_trainer_resumes_where_it_stopped(self, is_decoder, tmp_path):
        """With accumulated gradients and recomputed activations, to the bit."""
        if not is_decoder and "AutoModelForMaskedLM" not in heads_of(self.model_type):
            pytest.skip("this family is causal")
        start = self.model(
            head="AutoModelForSequenceClassification", dtype=torch.float32, is_decoder=is_decoder, hidden_dropout=0.1
        )
        rows = torch.randint(1, VOCAB, (16, 12))
        examples = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in rows]

        def train(name, **stop):
            arguments = TrainingArguments(
                output_dir=str(tmp_path / name),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                gradient_checkpointing=True,
                max_steps=4,
                save_steps=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            model = copy.deepcopy(start)
            Trainer(model=model, args=arguments, train_dataset=examples).train(**stop)
            return model

        whole = train("whole")
        resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        for before, a, b in zip(start.parameters(), whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b) and not torch.equal(a, before)
