"""What a classification head had better read, from the results of `transfer --config transfer_pooling`."""

from typing import Any

from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import estimate, markdown_table, paragraphs, seeds_described
from ordnung.scripts.experiments.verdicts import at_least, difference, everywhere


def markdown(results: dict[str, Any], name: str = "mean") -> str:
    """Scores of each pooling by task, and by how many points `name` exceeds the others, paired by seed."""
    tasks, variants, body, said = results["task_name"], results["variants"], [], []
    scores = {variant: {task: result["tasks"][task]["score"] for task in tasks} for variant, result in variants.items()}
    guess = {task: f"{100 * results['baselines'][task]['majority']['score']:.1f}" for task in tasks}
    body = [["most frequent class", *guess.values()]]
    body += [[variant, *(estimate(scores[variant][task], 1, 100) for task in tasks)] for variant in variants]
    for other in variants:
        if other == name:
            continue
        found = [difference(scores[name][task]["values"], scores[other][task]["values"]) for task in tasks]
        body.append([f"{name} - {other}, points", *(each.text(1, 100) for each in found)])
        verdicts = [at_least(each, 0) for each in found]
        by_task = ", ".join(f"{task} {verdict}" for task, verdict in zip(tasks, verdicts))
        said.append(f'"{name} scores higher than {other} on every task": {everywhere(verdicts)} ({by_task}).')
    rows = ", ".join(f"{task} {variants[name]['tasks'][task]['training_rows']:,}" for task in tasks)
    return paragraphs(
        f"Scores in %, as GLUE averages a task's metrics; {seeds_described(results['seeds'])}, differences with "
        f"their intervals, paired by seed. Training rows: {rows}. {described(results['machine'])}",
        markdown_table(["reads", *tasks], body),
        " ".join(said),
    )
