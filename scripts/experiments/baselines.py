"""Scores of the majority class, and of TF-IDF with logistic regression."""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info, package_version
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.experiments.options import BaselineOptions
from ordnung.scripts.finetuning.data import load_splits
from ordnung.scripts.finetuning.glue_metric import Glue
from ordnung.scripts.finetuning.tasks import Task, choose_tasks

# inverse regularisation strengths to choose from
STRENGTHS = (0.1, 1.0, 10.0, 100.0)


def fit_majority(train: dict, task: Task):
    """Predicts the most frequent label, or the mean similarity, whatever the text."""
    labels = np.array(train["label"])
    answer = labels.mean() if task.regression else np.bincount(labels).argmax()
    return lambda rows: np.full(len(rows["label"]), answer)


def fit_tfidf(train: dict, task: Task):
    """TF-IDF features and a linear model; see the top of this file."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

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
        ScriptError: as `load_splits`.
    """
    splits = {name: split.to_dict() for name, split in load_splits(task, options).items() if name not in task.tests}
    train, results = splits.pop("train"), {}
    for name, fit in BASELINES.items():
        try:
            predict, metric = fit(train, task), Glue(task.name, keep_in_memory=True)
        except ValueError as error:  # scikit-learn's: no word in two texts, or one class
            raise ScriptError(
                f"{task.name}: {len(train['label'])} training rows are too few for {name} ({error}): give more by "
                "--max_train_samples"
            ) from error
        metrics = {
            split: metric.compute(predictions=predict(rows), references=rows["label"]) for split, rows in splits.items()
        }
        results[name] = {"metrics": metrics, "score": fmean(fmean(scores.values()) for scores in metrics.values())}
    return {"training_rows": len(train["label"]), **results}


def settings_of(options: BaselineOptions) -> dict[str, Any]:
    """What scores depend on."""
    return {name: value for name, value in asdict(options).items() if name != "output_dir"}


def run(options: BaselineOptions) -> int:
    """Score the tasks and write the results; returns the exit status."""
    tasks = choose_tasks(options.task_name)
    results = {"machine": machine_info(), "scikit_learn": package_version("scikit-learn")}
    results |= {"settings": settings_of(options), "tasks": {}}
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
