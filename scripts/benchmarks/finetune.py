"""The fine-tuning loop against a bare accelerate loop around the same model."""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_scheduler

from ordnung.scripts.benchmarks.measure import in_turns, timed
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.finetuning.data import prepare_tokenizer
from ordnung.scripts.finetuning.model import build_model
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.run import Finetuning, prepare_task
from ordnung.scripts.finetuning.tasks import choose_tasks
from ordnung.scripts.training.accelerator import make_accelerator


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


def run(bench) -> int:
    """Time both loops by bench_finetune.py's options and write the results; returns the exit status."""
    (task,) = choose_tasks([bench.task_name])
    with tempfile.TemporaryDirectory() as folder:
        names = ("model_name_or_path", "dataset_path", "max_length", "per_device_train_batch_size", "use_cpu")
        shared = {name: getattr(bench, name) for name in names}
        options = FinetuneOptions(output_dir=folder, task_name=[task.name], max_steps=10**6, **shared)
        accelerator = make_accelerator(options)
        tokenizer = prepare_tokenizer(options)
        data = prepare_task(task, options, tokenizer)
        finetuning = Finetuning(accelerator, options, data, tokenizer, 0, Path(folder) / "run")
        bare = bare_loop(accelerator, options, data, tokenizer, [finetuning.rows(step) for step in range(bench.steps)])

        finetuning.max_steps, finetuning.eval_steps, finetuning.save_steps = bench.steps, None, None

        def ours():
            finetuning.loop.step = 0
            finetuning.loop.run()

        device = accelerator.device.type
        loops = {name: partial(timed, loop, device=device) for name, loop in (("ours", ours), ("bare", bare))}
        seconds = in_turns(loops, bench.rounds)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare"])]
    examples = sum(len(finetuning.rows(step)) for step in range(bench.steps))
    results = {
        "model": bench.model_name_or_path,
        "task": task.name,
        "ratio": median(ratios),
        "ratios": ratios,
        "examples_per_second": {name: examples / median(times) for name, times in seconds.items()},
        "steps": bench.steps,
        "machine": machine_info(),
    }
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in results["examples_per_second"].items())
    print(f"time of ours / bare: {results['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); examples/s: {speeds}")
    if bench.output_file:
        write_json(bench.output_file, results)
    return 0
