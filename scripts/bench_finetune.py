"""Time the fine-tuning loop against a bare accelerate loop around the same model.

    ordnung bench-finetune --model_name_or_path out/demo --dataset_path data/glue --task_name sst2

The bare loop is what a user would write: a DataLoader over tokenized data with transformers' padding collator, forward,
backward, clipping, AdamW and the schedule, and nothing else. Both take the same steps on the same rows, one after the
other in each round, and change places from round to round. The ratio is the median over rounds of ours to theirs.

`--recipes` times further ways to train beside them, a token of each against a token of ours: `group_by_length`,
`packing`, `bf16`, `torch_compile`, and `adamw_torch`, AdamW that is not fused. `--beside` fine-tunes another checkpoint
by the same loop.
`--predict_rows` times `ordnung predict` on so many rows beside a loop that reads, tokenizes, pads, predicts and writes
them batch by batch.
"""

from dataclasses import dataclass

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import option, program, required
from ordnung.scripts.finetuning.tasks import TASKS


@dataclass(kw_only=True)
class FinetuneBenchOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.", section="model")
    use_cpu: bool = option(False, "Stay on the CPU even where there is an accelerator.")
    task_name: str = required(f"One of {', '.join(TASKS)}.", section="data")
    dataset_path: str | None = option(None, "Local folder; default: the Hub.")
    max_length: int | None = option(None, "Tokens of an example.")
    per_device_train_batch_size: int = option(32, "Examples in a batch.", section="timing")
    steps: int = option(50, "Steps of a round.")
    recipes: list[str] | None = option(
        None, "Further ways to train: group_by_length, packing, bf16, adamw_torch, torch_compile."
    )
    beside: str | None = option(None, "Another checkpoint, in the same rounds.")
    predict_rows: int = option(0, "Rows to predict.", least=0)
    rounds: int = option(5, "Rounds; one more before them is not counted.")
    output_file: str | None = option(None, "JSON file for the results.", section="output")


main = program(FinetuneBenchOptions, "benchmarks.finetune", __doc__)

if __name__ == "__main__":
    run_script(main)
