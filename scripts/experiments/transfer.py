"""Variants pretrained on the same text, or started from a checkpoint, then fine-tuned on the same tasks."""

from pathlib import Path
from typing import Any

from ordnung.scripts.common.files import read_json
from ordnung.scripts.common.machine import described, machine_info
from ordnung.scripts.common.options import arguments, parse_options
from ordnung.scripts.common.tables import estimate, markdown_table, paragraphs, seeds_described, write_results
from ordnung.scripts.experiments import baselines, compare, compare_data, starts
from ordnung.scripts.experiments.earlier import EarlierTransfer, trained_earlier
from ordnung.scripts.experiments.options import BaselineOptions, TransferOptions
from ordnung.scripts.experiments.variants import variant_configs
from ordnung.scripts.experiments.verdicts import difference
from ordnung.scripts.finetuning import run as finetuning
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.training.runs import claim_output_dir


def finetune_options(options: TransferOptions, task: str, model: Path, output_dir: Path) -> FinetuneOptions:
    """The options of a variant's runs on a task."""
    own = {"model_name_or_path": str(model), "output_dir": str(output_dir), "seeds": options.seeds}
    own |= {"task_name": [task], "dataset_path": options.data_path(task)}
    words = arguments({**options.finetune, **options.finetune_by_task.get(task, {}), **own})
    return parse_options(FinetuneOptions, words)


# What baselines have of the fine-tuned models' options: which rows there are.
SHARED = ("dataset_name", "max_train_samples", "max_eval_samples")


def baseline(options: TransferOptions, task: str, output_dir: Path) -> dict[str, Any]:
    """The scores of a task without a neural network, computed once for each data."""
    path = output_dir / "results.json"
    own = {"task_name": [task], "dataset_path": options.data_path(task), "output_dir": str(output_dir)}
    shared = {**options.finetune, **options.finetune_by_task.get(task, {})}
    own |= {name: shared[name] for name in SHARED if name in shared}
    parsed = parse_options(BaselineOptions, arguments(own))
    if not path.exists() or read_json(path).get("settings") != baselines.settings_of(parsed):
        baselines.run(parsed)
    return read_json(path)["tasks"][task]


NAMES = {"majority": "majority class", "tfidf": "TF-IDF + logistic regression"}  # the baselines as they are shown


def score_rows(results: dict[str, Any]) -> list[list[str]]:
    """Of each baseline and variant its name and its scores by task, in %."""
    tasks, rows = results["task_name"], []
    for name, shown in NAMES.items():
        rows.append([shown, *(f"{100 * results['baselines'][task][name]['score']:.1f}" for task in tasks)])
    for variant, result in results["variants"].items():
        rows.append([variant, *(estimate(result["tasks"][task]["score"], 1, 100) for task in tasks)])
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The tables of a results dictionary."""
    tasks, scores = results["task_name"], score_rows(results)
    costs, begun, below = [], [], {name: [] for name in NAMES}
    for variant, result in results["variants"].items():
        seconds = sum(sum(t["seconds"]["values"]) for t in result["tasks"].values())
        trained = result.get("pretraining") or result["start"]
        row = [variant, f"{trained['parameters']:,}", f"{trained['tokens']:,}", f"{trained['seconds']:,.0f}"]
        if "pretraining" in result:
            costs.append([*row, f"{trained['evaluation']['eval_bits_per_byte']:.4f}", f"{seconds:,.0f}"])
        else:
            measured = [trained.get("student"), trained.get("teacher"), trained.get("converted", {}).get("floor")]
            shown = [f"{found['similarity']:.3f}" if found and "similarity" in found else "" for found in measured]
            minutes = f"{trained['seconds'] / 60:,.1f}"
            begun.append([variant, trained["source"], *row[1:3], minutes, *shown, f"{seconds:,.0f}"])
        for name, cells in below.items():
            cells += [
                f"{variant} on {task}"
                for task in tasks
                if result["tasks"][task]["score"]["mean"] <= results["baselines"][task][name]["score"]
            ]
    if baseline := results.get("baseline"):
        held = results["variants"][baseline]["tasks"]
        for variant, result in results["variants"].items():
            if variant != baseline:
                pairs = [[one[task]["score"]["values"] for one in (result["tasks"], held)] for task in tasks]
                cells = [difference(*pair).text(1, 100) for pair in pairs]
                scores.append([f"{variant} - {baseline}, points", *cells])
    tables = []
    if costs:
        header = ["model", "parameters", "pretraining tokens", "s", "held-out bits per byte", "fine-tuning s, all runs"]
        tables.append(markdown_table(header, costs))
    if begun:
        header = ["model", "from", "parameters", "distillation tokens", "min"]
        header += ["similarity without training", "its teacher's", "without mixing", "fine-tuning s, all runs"]
        tables.append(markdown_table(header, begun))
    remarks = [f"Not above {NAMES[name]}: {', '.join(cells) or 'none'}." for name, cells in below.items()]
    first = next(iter(results["variants"].values()))["tasks"]
    rows = ", ".join(f"{task} {first[task]['training_rows']:,}" for task in tasks)
    return paragraphs(
        f"Scores in %, the mean of a task's metrics as GLUE averages them; {seeds_described(results['seeds'])} of "
        f"fine-tuning one pretrained model each. Training rows: {rows}. "
        f"{described(results['machine'])}",
        *trained_earlier(results),
        markdown_table(["model", *tasks], scores),
        " ".join(remarks),
        *tables,
    )


def run(options: TransferOptions) -> int:
    """Train, score and write the results; returns the exit status, that of the run that was stopped if one was."""
    output_dir = Path(options.output_dir)
    # wrong tables are told before anything is written
    if options.pretrained:
        shared = compare_data.check_pretrain(options.pretrain)
        variant_configs(options.pretrained, options.config_overrides)
    started = {name: {**options.config_overrides, **variant} for name, variant in options.started.items()}
    for name, variant in started.items():
        starts.options_of(name, variant, options.linearize, Path("any"))
    for task in options.task_name:
        finetune_options(options, task, Path("any"), Path("any"))
    settings = {name: getattr(options, name) for name in ("pretrain", "config_overrides", "finetune")}
    settings |= {"linearize": options.linearize} if options.started else {}
    by_task = {f"finetune {task}": options.finetune_by_task.get(task, {}) for task in options.task_name}
    earlier = EarlierTransfer(options.earlier, settings | by_task | {"seeds": options.seeds}, options.variants)
    claim_output_dir(output_dir, settings | by_task, options.variants)
    # first of all, as this reads every task's data: what is wrong with them is told before anything is trained
    scores = {task: baseline(options, task, output_dir / "baselines" / task) for task in options.task_name}
    earlier.check_data(scores)
    taken = earlier.finished(options.variants, options.task_name)
    variants, folders = {name: {"tasks": {}} for name in options.variants}, {}
    if set(options.pretrained) - set(taken):
        data = compare_data.prepare_data(output_dir, shared)
        own = {name: value for name, value in options.pretrain.items() if name not in compare_data.DATA_OPTIONS}
        common = own | data
    for name, variant in options.variants.items():
        if name in taken:
            print(f"{options.earlier}: {name} taken over")
            variants[name] = taken[name]
            continue
        if name in options.started:
            folders[name] = output_dir / "start" / name
            status = starts.start(name, started[name], options.linearize, folders[name])
        else:
            folders[name] = output_dir / "pretrain" / name
            status = compare.pretrain(options, variant, common, folders[name])
        if status:
            return status
        if name in options.started:
            variants[name]["start"] = starts.read(folders[name])
        else:
            variants[name]["pretraining"] = read_json(folders[name] / "results.json")
    for task in options.task_name:
        for name in folders:
            folder = output_dir / "finetune" / name / task
            status = finetuning.run(finetune_options(options, task, folders[name], folder))
            if status:
                return status
            variants[name]["tasks"][task] = read_json(folder / "results.json")["tasks"][task]
    results = {
        "machine": machine_info("cpu" if options.finetune.get("use_cpu") else None),
        "settings": settings | by_task | {"variants": options.variants},
        "task_name": options.task_name,
        "seeds": options.seeds,
        "baselines": scores,
        "variants": variants,
    }
    if options.baseline is not None:
        results["baseline"] = options.baseline
    if taken:
        results["earlier"] = earlier.origins(taken)
    write_results(output_dir, results, markdown)
    return 0
