"""What fine-tuning leaves behind: predictions as the GLUE server takes them, results over seeds, the table."""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ordnung.scripts.common.files import read_json, write_text
from ordnung.scripts.common.machine import described, machine_info
from ordnung.scripts.common.tables import estimate, markdown_table, seeds_described, summarise
from ordnung.scripts.finetuning.options import FinetuneOptions
from ordnung.scripts.finetuning.scores import mean_score, seed_interval
from ordnung.scripts.finetuning.tasks import GLUE, TASKS, Task


def write_submission(task: Task, path: Path, logits: np.ndarray, numbers: np.ndarray):
    """Write a test split's predictions as gluebenchmark.com takes them: a tab-separated `index` and `prediction`.

    Similarities are cut to 0 to 5 and written with 3 decimals; labels go by number or, where the server wants it, name.

    Args:
        logits: (n, labels), or (n, 1) similarities.
        numbers: (n,) the rows' own numbers.
    """
    if task.regression:
        predictions = [f"{value:.3f}" for value in logits[:, 0].clip(0, 5)]
    else:
        chosen = logits.argmax(1)
        predictions = [task.labels[label] if task.submits_names else str(label) for label in chosen]
    lines = [f"{number}\t{prediction}\n" for number, prediction in sorted(zip(numbers.tolist(), predictions))]
    write_text(path, "index\tprediction\n" + "".join(lines))


def is_finished(run: Path) -> bool:
    """Whether the run of this folder has its results."""
    return (run / "results.json").exists()


def collect(output_dir: Path, seeds: list[int], options: FinetuneOptions) -> dict[str, Any]:
    """The results of a folder's tasks, each number a mean and standard deviation over the seeds.

    Tasks that lack a run with one of the seeds are left out.
    """
    summaries = {}
    for task in TASKS if options.task_name else [""]:  # a user's own data have the folder to themselves
        folders = [output_dir / task / f"seed-{seed}" for seed in seeds]
        if not all(map(is_finished, folders)):
            continue
        runs = [read_json(folder / "results.json") for folder in folders]
        first = runs[0]
        summary = summaries[task or first["task"]] = {
            "metrics": {
                split: {name: summarise([run["metrics"][split][name] for run in runs]) for name in scores}
                for split, scores in first["metrics"].items()
            },
            **{name: summarise([run[name] for run in runs]) for name in ("score", "seconds", "examples_per_second")},
            **{name: first[name] for name in ("training_rows", "parameters", "trainable_parameters", "truncated")},
            "runs": [folder.relative_to(output_dir).as_posix() for folder in folders],
        }
        if "details" in first:
            summary["details"] = first["details"]
            summary["intervals"] = {
                split: {
                    name: seed_interval(values["values"])
                    if len(runs) > 1
                    else first["details"][split]["intervals"][name]
                    for name, values in scores.items()
                    if name != "loss"
                }
                for split, scores in summary["metrics"].items()
            }
    results = {
        "machine": machine_info("cpu" if options.use_cpu else None),
        "model": options.model_name_or_path,
        "settings": options.record(),
        "seeds": seeds,
        "tasks": summaries,
    }
    in_glue = [task for task in summaries if task in GLUE]
    if in_glue:
        by_seed = zip(*(summaries[task]["score"]["values"] for task in in_glue))
        results["glue_average"] = {"tasks": in_glue, **summarise([fmean(scores) for scores in by_seed])}
    return results


def markdown(results: dict[str, Any]) -> str:
    """The table of a results dictionary: scores in percent, as GLUE shows them; a user's own data have their own."""
    if any("details" in result for result in results["tasks"].values()):
        return "\n\n".join(own_markdown(results, name) for name in results["tasks"])
    body = []
    for task, result in results["tasks"].items():
        for split, scores in result["metrics"].items():
            cut = result["truncated"][split]
            shown = ", ".join(f"{name} {estimate(score, 1, 100)}" for name, score in scores.items() if name != "loss")
            rows = [f"{result['training_rows']:,}", f"{cut['cut']:,} of {cut['rows']:,}"]
            body.append([task, split, shown, *rows, estimate(result["seconds"], 0)])
    average = results.get("glue_average")
    lines = [
        f"{results['model']}, {seeds_described(results['seeds'])}. {described(results['machine'])}",
        markdown_table(["task", "split", "score, %", "trained on", "cut", "training s"], body),
    ]
    if average and len(average["tasks"]) > 1:
        lines.append(f"GLUE average over {len(average['tasks'])} of {len(GLUE)} tasks: {estimate(average, 1, 100)}")
    return "\n\n".join(lines)


def own_markdown(results: dict[str, Any], name: str) -> str:
    """The scores of a user's own data: with their intervals, beside a guess that looks at no text, and by class."""
    result, seeds = results["tasks"][name], results["seeds"]
    how = (
        f"mean over seeds {', '.join(map(str, seeds))}, 95 % by Student's t" if len(seeds) > 1 else "95 % by bootstrap"
    )
    parts = [f"{results['model']} on {name}, {how}. {described(results['machine'])}"]
    for split, scores in result["metrics"].items():
        details, cut = result["details"][split], result["truncated"][split]
        baseline, intervals = details["baseline"], result["intervals"][split]
        body = [
            [metric, f"{values['mean']:.3f}", "{:.3f} to {:.3f}".format(*intervals[metric]), f"{baseline[metric]:.3f}"]
            for metric, values in scores.items()
            if metric in intervals
        ]
        said = f"{split}: {cut['rows']:,} rows, {cut['cut']:,} of them cut to {cut['to']} tokens"
        if "threshold" in details:
            how = ", which scores best on held-out rows" if results["settings"].get("threshold") == "best" else ""
            said += f"; labels from a probability of {details['threshold']:g} on{how}"
        parts += [said, markdown_table(["score", "model", "95 %", baseline["what"]], body)]
        guess = mean_score({name: value for name, value in baseline.items() if name != "what"})
        if mean_score({name: values["mean"] for name, values in scores.items()}) <= guess < 1:
            parts.append(
                f"Not better than to guess ({baseline['what']}): train longer (--num_train_epochs) or by another "
                f"--learning_rate than {results['settings']['learning_rate']:g}."
            )
        if details.get("per_class"):
            names = ("precision", "recall", "f1", "examples")
            rows = [
                [label, *(f"{row[name]:.3f}" for name in names[:3]), f"{row['examples']:,}"]
                for label, row in details["per_class"].items()
            ]
            which = f" (seed {seeds[0]})" if len(seeds) > 1 else ""
            parts.append(markdown_table([f"label{which}", *names], rows))
    return "\n\n".join(parts)
