"""The fine-tuning loop against a bare accelerate loop around the same model, on the same rows in the same order.

    python scripts/bench_finetune.py --model_name_or_path out/demo --dataset_path data/glue --task_name sst2

The bare loop is what a user would write: a DataLoader over tokenized data with transformers' padding collator, forward,
backward, clipping, AdamW and the schedule, and nothing else. Both take the same steps, one after the other in each
round, and change places from round to round. The ratio is the median over rounds of ours to theirs.
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_scheduler

from ordnung.scripts import finetune, finetune_data, pretrain_setup
from ordnung.scripts.common import StopSignals, option, parse_options, required, run_script, write_json
from ordnung.scripts.finetune_model import build_model
from ordnung.scripts.finetune_options import FinetuneOptions
from ordnung.scripts.machine import machine_info
from ordnung.scripts.text_tasks import TASKS, choose_tasks


@dataclass(kw_only=True)
class BenchOptions:
    model_name_or_path: str = required("Checkpoint: folder or Hub name.")
    task_name: str = required(f"One of {', '.join(TASKS)}.")
    dataset_path: str | None = option(None, "Local folder; default: the Hub.")
    max_length: int | None = option(None, "Tokens of an example.")
    per_device_train_batch_size: int = option(32, "Examples in a batch.")
    steps: int = option(50, "Steps of a round.")
    rounds: int = option(5, "Rounds; one more before them is not counted.")
    use_cpu: bool = option(False, "Stay on the CPU even where there is an accelerator.")
    output_file: str | None = option(None, "JSON file for the results.")


def synchronized_time() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_loop(accelerator, options: FinetuneOptions, data, tokenizer, batches: list[np.ndarray]):
    """A function that takes the steps of `batches`, lists of rows."""
    train, names = data.train, ("input_ids", "labels")
    rows = [
        dict(zip(names, (train.ids[start:end].tolist(), int(label))))
        for start, end, label in zip(train.starts, train.starts[1:], train.labels)
    ]
    loader = DataLoader(
        rows, batch_sampler=[batch.tolist() for batch in batches], collate_fn=DataCollatorWithPadding(tokenizer)
    )
    model = build_model(options, data.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = get_scheduler("linear", optimizer, 0, 10**6)

    def take():
        model.train()
        for batch in loader:
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return take


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    bench = parse_options(BenchOptions, argv, __doc__)
    (task,) = choose_tasks([bench.task_name], TASKS)
    logging.basicConfig(format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        names = ("model_name_or_path", "dataset_path", "max_length", "per_device_train_batch_size", "use_cpu")
        options = FinetuneOptions(output_dir=folder, max_steps=10**6, **{name: getattr(bench, name) for name in names})
        accelerator = pretrain_setup.make_accelerator(options)
        tokenizer = finetune_data.prepare_tokenizer(options)
        data = finetune.prepare_task(task, options, tokenizer)
        run = finetune.Finetuning(accelerator, options, data, tokenizer, 0, Path(folder) / "run")
        bare = bare_loop(accelerator, options, data, tokenizer, [run.rows(step) for step in range(bench.steps)])

        def ours():
            run.step = 0
            run.model.train()
            with StopSignals(False) as signals:
                for _ in range(bench.steps):
                    run.train_step()
                    if run.step % options.logging_steps == 0:
                        run.log_window(signals)

        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        for turn in range(bench.rounds + 1):
            for name, loop in [("ours", ours), ("bare", bare)][:: 1 if turn % 2 else -1]:
                start = synchronized_time()
                loop()
                seconds[name].append(synchronized_time() - start)
    ratios = [a / b for a, b in zip(seconds["ours"][1:], seconds["bare"][1:])]
    examples = sum(len(run.rows(step)) for step in range(bench.steps))
    results = {
        "model": bench.model_name_or_path,
        "task": task.name,
        "ratio": median(ratios),
        "ratios": ratios,
        "examples_per_second": {name: examples / median(times[1:]) for name, times in seconds.items()},
        "steps": bench.steps,
        "machine": machine_info(),
    }
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in results["examples_per_second"].items())
    print(f"time of ours / bare: {results['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); examples/s: {speeds}")
    if bench.output_file:
        write_json(bench.output_file, results)
    return 0


if __name__ == "__main__":
    run_script(main)
