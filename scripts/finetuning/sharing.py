"""What fine-tuned models are on the Hub: one repository for each task, with the best of its runs."""

from pathlib import Path
from typing import Any

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.common.tables import summarise
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.tasks import Task
from ordnung.scripts.hub import sharing
from ordnung.scripts.hub.model_card import PIPELINE_TAGS, entries_of


def describe_run(task: Task, options: FinetuneOptions, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What a card says of a run: `datasets` and `base_model`, names on the Hub, and `eval_results`, for EvalResult.

    Args:
        scores: split -> name -> value.
    """
    if options.train_file or (options.dataset_name and Path(options.dataset_name).is_dir()):
        named, dataset = [], {"dataset_type": "local", "dataset_name": task.name}
    elif options.dataset_path:
        named = []
        dataset = {"dataset_type": "local", "dataset_name": f"{task.name} ({Path(options.dataset_path).name})"}
    else:
        name = options.dataset_name or task.dataset
        named, dataset = [name], {"dataset_type": name, "dataset_name": task.name}
        if not options.dataset_name:  # another may lack the configuration
            dataset["dataset_config"] = task.config_name
    return {
        "datasets": named,
        "base_model": None if Path(options.model_name_or_path).exists() else options.model_name_or_path,
        "eval_results": [
            {"task_type": PIPELINE_TAGS[task.head], **entry}
            for split, values in scores.items()
            for entry in entries_of(values, **dataset, dataset_split=split)
            if entry["metric_type"] != "loss"
        ],
    }


def find_targets(options: FinetuneOptions, tasks: list[Task]) -> dict[str, sharing.Target]:
    """Task -> where its model goes, checked with the Hub; empty without --push_to_hub.

    With several tasks each has a repository of its own, `hub_model_id` and the task's name.

    Raises:
        ScriptError: as `sharing.find_target`; an adapter whose base model others do not have.
    """
    if options.push_to_hub and options.use_peft and not options.merge_adapter:
        if Path(options.model_name_or_path).exists():
            raise ScriptError(
                f"--push_to_hub: an adapter for {options.model_name_or_path}, a local folder, is of no use to others: "
                "add --merge_adapter to share the merged model, or push that model first and give its Hub name"
            )
    endings = {task.name: f"-{task.name}" if len(tasks) > 1 else "" for task in tasks}
    found = {name: sharing.find_target(options, options.output_dir, ending) for name, ending in endings.items()}
    return {name: target for name, target in found.items() if target is not None}


def push_best(results: dict[str, Any], options: FinetuneOptions, targets: dict[str, sharing.Target]) -> None:
    """Push each task's best run; its card shows beside its scores those of all seeds. A failure does not stop the rest.

    Args:
        results: those of all runs, as `report.collect` gives them.

    Raises:
        ScriptError: as `sharing.push`; all models and results are on disk by then.
    """
    output_dir, failures = Path(options.output_dir), []
    for name, target in targets.items():
        summary = results["tasks"][name]
        values = summary["score"]["values"]
        folder = output_dir / summary["runs"][values.index(max(values))]
        run = read_json(folder / "results.json")
        for entry in run["eval_results"]:
            of_all = summary["metrics"][entry["dataset_split"]][entry["metric_type"]]
            entry["over_seeds"] = summarise(of_all["values"])
        if options.merge_adapter:
            folder = folder / "merged"
        write_json(folder / "shared_results.json", run)
        try:
            sharing.push(folder, target, folder / "shared_results.json")
            print(f"{name}: {folder} pushed to {target.url}")
        except ScriptError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise ScriptError("\n".join(failures))
