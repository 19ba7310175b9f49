"""What needs no neural network: the majority class, and TF-IDF with logistic regression, on the same data and scores.

    python scripts/baselines.py --task_name sst2 imdb --dataset_path data/ --output_dir out/baselines

A model below these has learned nothing that counting words would not. TF-IDF counts words and pairs of words with
sublinear term frequencies; a pair of texts gives the weights of both, their absolute difference and their product.
The regularisation is chosen on a tenth of the training data. Similarities (stsb) are predicted by ridge regression,
and by their mean. Needs `pip install "ordnung[evidence]"` (scikit-learn).
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ordnung.scripts.common import ScriptError, option, parse_options, required, run_script, write_json
from ordnung.scripts.evidence import markdown_table
from ordnung.scripts.finetune_data import load_splits
from ordnung.scripts.glue_metric import Glue
from ordnung.scripts.machine import machine_info, package_version
from ordnung.scripts.text_tasks import TASKS, Task, choose_tasks

# inverse regularisation strengths to choose from
STRENGTHS = (0.1, 1.0, 10.0, 100.0)


@dataclass(kw_only=True)
class BaselineOptions:
    output_dir: str = required("Folder for results.json.")
    task_name: list[str] = required(f"One or more of {', '.join(TASKS)}, or all.")
    dataset_path: str | None = option(None, "Local folder: a folder for each task, or the files of a single one.")
    dataset_name: str | None = option(None, "Data set of the Hub in place of the task's own.")
    max_train_samples: int | None = option(None, "Train on so many examples, chosen at random.")


def fit_majority(train: dict, task: Task):
    """Predicts the most frequent label, or the mean similarity, whatever the text."""
    labels = np.array(train["label"])
    answer = labels.mean() if task.regression else np.bincount(labels).argmax()
    return lambda rows: np.full(len(rows["label"]), answer)


def fit_tfidf(train: dict, task: Task):
    """TF-IDF features and a linear model; see the top of this file.

    Raises:
        ScriptError: scikit-learn is missing.
    """
    try:
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression, Ridge
    except ImportError as error:
        raise ScriptError(f'scikit-learn cannot be imported ({error}): pip install "ordnung[evidence]"') from error

    def features(rows):
        parts = [vectorizer.transform(rows[column]) for column in task.columns]
        if len(parts) == 2:
            parts += [abs(parts[0] - parts[1]), parts[0].multiply(parts[1])]
        return hstack(parts).tocsr()

    def fit(strength, chosen):
        model = Ridge(alpha=1 / strength) if task.regression else LogisticRegression(C=strength, max_iter=1000)
        return model.fit(inputs[chosen], labels[chosen])

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w+\b")
    vectorizer.fit(text for column in task.columns for text in train[column])
    inputs, labels = features(train), np.array(train["label"])
    order = np.random.default_rng(0).permutation(len(labels))
    held_out, rest = np.split(order, [max(1, len(order) // 10)])
    # both models' own score: accuracy, and explained variance
    best = max(STRENGTHS, key=lambda strength: fit(strength, rest).score(inputs[held_out], labels[held_out]))
    model = fit(best, order)
    return lambda rows: model.predict(features(rows))


BASELINES = {"majority": fit_majority, "tfidf": fit_tfidf}


def score(task: Task, options: BaselineOptions) -> dict[str, Any]:
    """By baseline: the scores of each split, and one number, as fine-tuning reports them.

    Raises:
        ScriptError: as `finetune_data.load_splits`.
    """
    splits = {name: split.to_dict() for name, split in load_splits(task, options).items() if name not in task.tests}
    train, results = splits.pop("train"), {}
    for name, fit in BASELINES.items():
        predict, metric = fit(train, task), Glue(task.name, keep_in_memory=True)
        metrics = {
            split: metric.compute(predictions=predict(rows), references=rows["label"]) for split, rows in splits.items()
        }
        results[name] = {"metrics": metrics, "score": fmean(fmean(scores.values()) for scores in metrics.values())}
    return {"training_rows": len(train["label"]), **results}


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (`sys.argv[1:]` if None); returns the exit status."""
    options = parse_options(BaselineOptions, argv, __doc__)
    tasks = choose_tasks(options.task_name, TASKS)
    results = {"machine": machine_info(), "scikit_learn": package_version("scikit-learn"), "tasks": {}}
    for task in tasks:
        results["tasks"][task.name] = score(task, options)
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "results.json", results)
    body = [
        [task, *(f"{100 * result[name]['score']:.1f}" for name in BASELINES)]
        for task, result in results["tasks"].items()
    ]
    print(markdown_table(["task", "majority, %", "TF-IDF + logistic regression, %"], body))
    print(f"\nWritten: results.json in {output_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
