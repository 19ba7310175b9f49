"""The fine-tuning loop against a bare accelerate loop around the same model."""

import csv
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_scheduler

from ordnung.scripts.benchmarks.measure import in_turns, timed
from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.rows import load_rows
from ordnung.scripts.common.tables import ranged
from ordnung.scripts.finetuning.data import load_splits, prepare_tokenizer
from ordnung.scripts.finetuning.model import build_model
from ordnung.scripts.finetuning.options import FinetuneOptions, PredictOptions
from ordnung.scripts.finetuning.predicting import Predictor, Writer, label, pieces
from ordnung.scripts.finetuning.run import Finetuning, prepare_task
from ordnung.scripts.finetuning.tasks import Task, choose_tasks
from ordnung.scripts.training.accelerator import make_accelerator


def bare_loop(accelerator, options: FinetuneOptions, data, tokenizer, batches: list[np.ndarray]):
    """A function that takes the steps of `batches`, lists of rows."""
    train = data.train
    rows = [
        {"input_ids": train.ids[start:end].tolist(), "labels": int(label)}
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


RECIPES = {
    "group_by_length": {"group_by_length": True},
    "packing": {"packing": True},
    "bf16": {"mixed_precision": "bf16"},
    "adamw_torch": {"optim": "adamw_torch"},
    "torch_compile": {"torch_compile": True},
}


class Recipe:
    """The fine-tuning loop by some options, ready to take `steps` steps again and again."""

    def __init__(self, task: Task, options: FinetuneOptions, folder: Path, steps: int):
        AcceleratorState._reset_state()  # each has a precision and a compiler of its own
        self.options, self.accelerator = options, make_accelerator(options)
        self.tokenizer = prepare_tokenizer(options)
        self.data = prepare_task(task, options, self.tokenizer)
        self.job = Finetuning(self.accelerator, options, self.data, self.tokenizer, 0, folder)
        self.job.max_steps, self.job.eval_steps, self.job.save_steps = steps, None, None
        self.rows = [self.job.rows(step) for step in range(steps)]

    def __call__(self):
        self.job.loop.step = 0
        self.job.loop.run()


def predicting_loops(recipe: Recipe, task: Task, rows: int, folder: Path) -> dict[str, Callable]:
    """`ordnung predict` and a plain loop, which write the labels of the same rows."""
    texts = load_splits(task, recipe.options)["train"].select_columns(list(task.columns))
    file = folder / "rows.csv"
    texts.select(range(min(rows, len(texts)))).to_csv(str(file))
    options = PredictOptions(
        model_name_or_path=recipe.options.model_name_or_path,
        file=[str(file)],
        output=str(folder / "ours.csv"),
        max_length=recipe.data.max_length,
        use_cpu=recipe.options.use_cpu,
    )
    model, tokenizer = recipe.accelerator.unwrap_model(recipe.job.loop.model), recipe.tokenizer
    predictor = Predictor(options, model, tokenizer, task.head, task.columns)

    def ours():
        model.eval()
        writer = Writer(options.output, {})
        label(load_rows([str(file)], "file", streaming=True), predictor, writer)
        writer.close()

    @torch.no_grad()
    def bare():
        model.eval()
        with (
            open(file, encoding="utf-8", newline="") as source,
            open(folder / "bare.csv", "w", encoding="utf-8") as out,
        ):
            reader = csv.DictReader(source)
            writer = csv.DictWriter(out, [*task.columns, "label", "probability"])
            writer.writeheader()
            for batch in pieces(reader, options.per_device_eval_batch_size):
                columns = ([row[name] for row in batch] for name in task.columns)
                shape = {"padding": True, "truncation": True, "max_length": recipe.data.max_length}
                inputs = tokenizer(*columns, **shape, return_tensors="pt", return_token_type_ids=False)
                inputs = {name: value.to(recipe.accelerator.device) for name, value in inputs.items()}
                shares = model(**inputs, **recipe.job.constants).logits.float().softmax(-1).cpu()
                for row, (share, number) in zip(batch, zip(*shares.max(-1))):
                    writer.writerow({**row, "label": model.config.id2label[int(number)], "probability": float(share)})

    return {"predict": ours, "bare_predict": bare}


def run(bench) -> int:
    """Time the loops by bench_finetune.py's options and write the results; returns the exit status."""
    (task,) = choose_tasks([bench.task_name])
    unknown = next((name for name in bench.recipes or [] if name not in RECIPES), None)
    if unknown:
        raise ScriptError(f"--recipes {unknown}: there are {', '.join(RECIPES)}{closest(unknown, RECIPES)}")
    with tempfile.TemporaryDirectory() as folder:
        names = ("model_name_or_path", "dataset_path", "max_length", "per_device_train_batch_size", "use_cpu")
        shared = {name: getattr(bench, name) for name in names}
        recipes = {}
        others = [*(bench.recipes or []), *([bench.beside] if bench.beside else [])]
        for name in ("ours", *others):
            own = {"model_name_or_path": name} if name == bench.beside else RECIPES.get(name, {})
            options = FinetuneOptions(output_dir=folder, task_name=[task.name], max_steps=10**6, **shared | own)
            recipes[name] = Recipe(task, options, Path(folder) / str(len(recipes)), bench.steps)
            if name == "ours":
                plain = recipes[name]
                bare = bare_loop(plain.accelerator, options, plain.data, plain.tokenizer, plain.rows)
        training = {**recipes, "bare": bare}
        predicting = predicting_loops(plain, task, bench.predict_rows, Path(folder)) if bench.predict_rows else {}
        device = plain.accelerator.device.type
        seconds = in_turns({**training, **predicting}, bench.rounds, partial(timed, device=device))
        predicted = min(bench.predict_rows, len(plain.data.train))
    examples = {name: sum(map(len, recipe.rows)) for name, recipe in recipes.items()}
    examples |= {"bare": examples["ours"], "predict": predicted, "bare_predict": predicted}

    # loops that group by length take other rows: what they do is counted in tokens
    tokens = {
        name: sum(int(recipe.data.train.lengths[rows].sum()) for rows in recipe.rows)
        for name, recipe in recipes.items()
    }
    tokens |= {"bare": tokens["ours"], "predict": 1, "bare_predict": 1}

    pairs = {"ours": "bare", **dict.fromkeys(others, "ours"), **({"predict": "bare_predict"} if predicting else {})}
    ratios = {  # time of a token by one loop over that by another, by round
        name: [tokens[other] / tokens[name] * a / b for a, b in zip(seconds[name], seconds[other])]
        for name, other in pairs.items()
    }
    results = {
        "model": bench.model_name_or_path,
        "task": task.name,
        "ratio": median(ratios["ours"]),
        "ratios": ratios["ours"],
        "examples_per_second": {name: examples[name] / median(times) for name, times in seconds.items()},
        "tokens": {name: count for name, count in tokens.items() if name in training},
        "steps": bench.steps,
        "rows_a_step": bench.per_device_train_batch_size,
        "recipes": {name: {"of_ours": median(ratios[name]), "each": ratios[name]} for name in others},
        "machine": machine_info("cpu" if bench.use_cpu else None),
    }
    if predicting:
        each = ratios["predict"]
        results["predict"] = {"ratio": median(each), "ratios": each, "rows": predicted}
    for name, other in pairs.items():
        print(f"time of {name} / {other}: {ranged(ratios[name], 3)}")
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in results["examples_per_second"].items())
    print(f"examples/s: {speeds}")
    if bench.output_file:
        write_json(bench.output_file, results)
    return 0
