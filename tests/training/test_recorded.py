"""Runs of the programs as they were before they had one training loop, in recorded.json with their commit.

A run of that commit differs from another of it, by how its memory is aligned, in the last digits: 1e-7 of a loss.
"""

import json
from pathlib import Path

import pytest
import tiny_runs
import tiny_tasks
from accelerate.state import AcceleratorState

from ordnung.scripts import pretrain

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
FIELDS = {
    "softmax_lm": "position_embedding_type=rope",
    "conv_lm": "kernel_size=4",
    "linformer_lm": "projected_size=8,local_block_size=8",
    "cubic_prefix_lm": "max_position_embeddings=32",
}
RUN = (
    "--validation_fraction 0.1 --train_tokenizer_vocab_size 280 --block_size 16 --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 2 --max_steps 6 --eval_steps 3 --logging_steps 1 --save_steps 3 --seed 1 "
    "--learning_rate 0.01 --optim adamw_torch --use_cpu"
).split()


def assert_as_recorded(metrics, folder, recorded):
    for name, values in recorded.items():
        assert list(metrics(folder, name).values()) == pytest.approx(values, rel=2e-6)


@pytest.mark.parametrize("family", FIELDS)
def test_pretraining_is_what_it_was(family, tmp_path):
    tiny_runs.write_text(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    fields = f"{tiny_runs.TINY},{FIELDS[family]},hidden_dropout=0.1"
    argv = ["--model_type", family, "--config_overrides", fields, "--train_file", str(tmp_path / "text.txt"), *RUN]
    assert pretrain.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    assert_as_recorded(tiny_runs.metrics, tmp_path / "out", RECORDED["pretrain"][family])


@pytest.mark.parametrize("task", RECORDED["finetune"])
def test_fine_tuning_is_what_it_was(task, run_task):
    out = run_task(task, num_train_epochs=1, seeds="1", optim="adamw_torch") / task / "seed-1"
    assert_as_recorded(tiny_tasks.metrics, out, RECORDED["finetune"][task])
