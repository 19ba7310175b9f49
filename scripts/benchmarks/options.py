"""The options of the benchmarks."""

from dataclasses import dataclass

from ordnung.scripts.common.options import option, required
from ordnung.scripts.finetuning.tasks import TASKS


@dataclass(kw_only=True)
class FinetuneBenchOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.")
    task_name: str = required(f"One of {', '.join(TASKS)}.")
    dataset_path: str | None = option(None, "Local folder; default: the Hub.")
    max_length: int | None = option(None, "Tokens of an example.")
    per_device_train_batch_size: int = option(32, "Examples in a batch.")
    steps: int = option(50, "Steps of a round.")
    rounds: int = option(5, "Rounds; one more before them is not counted.")
    use_cpu: bool = option(False, "Stay on the CPU even where there is an accelerator.")
    output_file: str | None = option(None, "JSON file for the results.")
