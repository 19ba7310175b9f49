"""Pretrain variants on the same text, then fine-tune each on the same tasks.

    python scripts/transfer.py --config scripts/configs/transfer_cpu.yaml --glue_path data/glue --imdb_path data/imdb

Every variant is pretrained once by pretrain.py with the same text, tokenizer, steps and options, and then fine-tuned
on each task with each seed by finetune_glue.py or finetune_imdb.py. The majority class and TF-IDF with logistic
regression are scored on the same data. The output folder receives results.json and results.md beside the runs.
Finished runs are kept and stopped ones resumed: the same command goes on where it was stopped, and a variant, task or
seed can be added later.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ordnung.scripts import baselines, compare, finetune_glue, finetune_imdb, pretrain
from ordnung.scripts.common import (
    MergeKeyValues,
    ScriptError,
    option,
    parse_options,
    required,
    run_script,
    write_json,
    write_text,
)
from ordnung.scripts.evidence import check_seeds, claim_output_dir, markdown_table, spread, variant_configs
from ordnung.scripts.finetune_options import FinetuneOptions
from ordnung.scripts.machine import described, machine_info
from ordnung.scripts.text_tasks import TASKS, choose_tasks

# Options of the fine-tuning programs that are set for each run.
OWN_OPTIONS = ("output_dir", "model_name_or_path", "seeds", "task_name", "dataset_path")


@dataclass(kw_only=True)
class TransferOptions:
    output_dir: str = required("Folder for results.json, results.md and the runs.")
    variants: str = required("Models by name: model_type and the config fields that differ.", action=MergeKeyValues)
    pretrain: str = required("Options of pretrain.py for all variants: max_steps=100.", action=MergeKeyValues)
    config_overrides: str | None = option(None, "Config fields of all variants.", action=MergeKeyValues)
    task_name: list[str] = option(
        ["sst2", "mrpc", "rte", "cola", "imdb"], f"Tasks to fine-tune on, of {', '.join(TASKS)}."
    )
    finetune: str | None = option(None, "Options of the fine-tuning programs for all tasks.", action=MergeKeyValues)
    finetune_by_task: str | None = option(None, "Those of single tasks, by task, which win.", action=MergeKeyValues)
    seeds: list[int] = option([0, 1, 2], "Each variant is fine-tuned with each on each task.")
    glue_path: str | None = option(None, "Local folder with a folder for each GLUE task; default: the Hub.")
    imdb_path: str | None = option(None, "Local folder of IMDB; default: the Hub.")

    def __post_init__(self):
        self.config_overrides, self.finetune = self.config_overrides or {}, self.finetune or {}
        self.finetune_by_task = self.finetune_by_task or {}
        choose_tasks([*self.task_name, *self.finetune_by_task], TASKS)
        check_seeds(self.seeds)
        for options in (self.finetune, *self.finetune_by_task.values()):
            own = [name for name in OWN_OPTIONS if name in options]
            if own:
                raise ScriptError(f"--finetune {own[0]}: it is set for each run, leave it out")

    def data_path(self, task: str) -> str | None:
        return self.imdb_path if task == "imdb" else self.glue_path


def finetune_arguments(options: TransferOptions, task: str, model: Path, output_dir: Path) -> list[str]:
    """The command line of a variant's runs on a task."""
    own = {"model_name_or_path": str(model), "output_dir": str(output_dir), "seeds": options.seeds}
    own["dataset_path"] = options.data_path(task)
    if task != "imdb":
        own["task_name"] = [task]
    return compare.arguments({**options.finetune, **options.finetune_by_task.get(task, {}), **own})


def baseline(options: TransferOptions, task: str, output_dir: Path) -> dict[str, Any]:
    """The scores of a task without a neural network, computed once."""
    path = output_dir / "results.json"
    if not path.exists():
        own = {"task_name": [task], "dataset_path": options.data_path(task), "output_dir": str(output_dir)}
        shared = {**options.finetune, **options.finetune_by_task.get(task, {})}
        own |= {name: shared[name] for name in ("dataset_name", "max_train_samples") if name in shared}
        baselines.main(compare.arguments(own))
    return json.loads(path.read_text())["tasks"][task]


def markdown(results: dict[str, Any]) -> str:
    """The tables of a results dictionary."""
    tasks = results["task_name"]
    names = {"majority": "majority class", "tfidf": "TF-IDF + logistic regression"}
    scores = [
        [shown, *(f"{100 * results['baselines'][task][name]['score']:.1f}" for task in tasks)]
        for name, shown in names.items()
    ]
    costs, below = [], {name: [] for name in names}
    for variant, result in results["variants"].items():
        scores.append([variant, *(spread(result["tasks"][task]["score"], 1, 100) for task in tasks)])
        trained, seconds = result["pretraining"], sum(sum(t["seconds"]["values"]) for t in result["tasks"].values())
        costs.append(
            [
                variant,
                f"{trained['parameters']:,}",
                f"{trained['tokens']:,}",
                f"{trained['seconds']:,.0f}",
                f"{trained['evaluation']['eval_bits_per_byte']:.4f}",
                f"{seconds:,.0f}",
            ]
        )
        for name, cells in below.items():
            cells += [
                f"{variant} on {task}"
                for task in tasks
                if result["tasks"][task]["score"]["mean"] <= results["baselines"][task][name]["score"]
            ]
    remarks = [f"Not above {names[name]}: {', '.join(cells) or 'none'}." for name, cells in below.items()]
    return "\n\n".join(
        [
            f"Scores in %, the mean of a task's metrics as GLUE averages them; mean ± sample standard deviation over "
            f"fine-tuning seeds {', '.join(map(str, results['seeds']))} of one pretrained model each. "
            f"{described(results['machine'])}",
            markdown_table(["model", *tasks], scores),
            " ".join(remarks),
            markdown_table(
                ["model", "parameters", "pretraining tokens", "s", "held-out bits per byte", "fine-tuning s, all runs"],
                costs,
            ),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit status, that of the run that was stopped if one was."""
    options = parse_options(TransferOptions, argv, __doc__)
    output_dir, shared = Path(options.output_dir), compare.check_pretrain(options.pretrain)
    # wrong tables are told before anything is written
    variant_configs(options.variants, options.config_overrides)
    for task in options.task_name:
        options_type = FinetuneOptions if task == "imdb" else finetune_glue.GlueOptions
        parse_options(options_type, finetune_arguments(options, task, Path("any"), Path("any")))
    settings = {name: getattr(options, name) for name in ("pretrain", "config_overrides", "finetune")}
    by_task = {f"finetune {task}": options.finetune_by_task.get(task, {}) for task in options.task_name}
    claim_output_dir(output_dir, settings | by_task, options.variants)
    # first of all, as this reads every task's data: what is wrong with them is told before anything is trained
    scores = {task: baseline(options, task, output_dir / "baselines" / task) for task in options.task_name}
    data = compare.prepare_data(output_dir, shared)
    common = {name: value for name, value in options.pretrain.items() if name not in compare.DATA_OPTIONS} | data

    variants: dict[str, dict[str, Any]] = {}
    for name, variant in options.variants.items():
        folder = output_dir / "pretrain" / name
        if not (folder / "results.json").exists():
            overrides = {**options.config_overrides, **variant}
            run = {"model_type": overrides.pop("model_type"), "config_overrides": overrides}
            run |= {"output_dir": str(folder), "resume_from_checkpoint": "auto"}
            status = pretrain.main(compare.arguments({**common, **run}))
            if status:
                return status
        variants[name] = {"pretraining": json.loads((folder / "results.json").read_text()), "tasks": {}}
    for task in options.task_name:
        program = finetune_imdb if task == "imdb" else finetune_glue
        for name in options.variants:
            folder = output_dir / "finetune" / name / task
            status = program.main(finetune_arguments(options, task, output_dir / "pretrain" / name, folder))
            if status:
                return status
            variants[name]["tasks"][task] = json.loads((folder / "results.json").read_text())["tasks"][task]
    results = {
        "machine": machine_info(),
        "settings": settings | by_task | {"variants": options.variants},
        "task_name": options.task_name,
        "seeds": options.seeds,
        "baselines": scores,
        "variants": variants,
    }
    write_json(output_dir / "results.json", results)
    write_text(output_dir / "results.md", markdown(results) + "\n")
    print(f"{markdown(results)}\n\nWritten: results.json and results.md in {output_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
