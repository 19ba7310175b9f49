"""What pretraining leaves behind: the data and the evaluation in words, the loss curve."""

from pathlib import Path

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import new_figure
from ordnung.scripts.common.files import read_json_lines
from ordnung.scripts.hub.model_card import HELD_OUT, entries_of
from ordnung.scripts.pretraining.options import PretrainOptions


def describe_data(options: PretrainOptions) -> dict:
    """What the results say of the data: `data` in words, and `datasets`, its names on the Hub."""
    if options.train_file:
        return {"data": ", ".join(Path(pattern).name for pattern in options.train_file), "datasets": []}
    named = [options.dataset_name] if not Path(options.dataset_name).exists() else []
    return {"data": " ".join(filter(None, (options.dataset_name, options.dataset_config_name))), "datasets": named}


def describe_evaluation(options: PretrainOptions, evaluation: dict[str, float] | None) -> list[dict]:
    """An evaluation as keyword arguments of `huggingface_hub.EvalResult`, one a metric."""
    data = describe_data(options)
    shared = {
        "task_type": {"causal": "text-generation", "masked": "fill-mask"}[options.objective],
        "dataset_type": data["datasets"][0] if data["datasets"] else "text",
        "dataset_name": data["data"],
        "dataset_config": options.dataset_config_name,
        "dataset_split": HELD_OUT,
    }
    kinds = [kind for kind in ("loss", "perplexity", "bits_per_byte") if f"eval_{kind}" in (evaluation or {})]
    return entries_of({kind: evaluation[f"eval_{kind}"] for kind in kinds}, **shared)


def read_metrics(path: str | Path) -> tuple[list[dict], list[dict]]:
    """Lines of a metrics.jsonl: (training lines, evaluation lines).

    Raises:
        ScriptError: no such file, or nothing in it to draw.
    """
    try:
        lines = read_json_lines(path)
    except (OSError, ValueError) as error:
        raise ScriptError(f"{path} cannot be read: {error}") from None
    train = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line]
    if not train and not evaluation:
        raise ScriptError(f"{path} holds no losses yet")
    return train, evaluation


def plot_loss(metrics: str | Path, image: str | Path, title: str | None = None):
    """Draw training and evaluation loss against steps, with tokens above and perplexity on the right.

    Args:
        metrics: a run's metrics.jsonl.
        image: file to write; its ending chooses the format.
    """
    import numpy as np

    train, evaluation = read_metrics(metrics)
    figure, axes = new_figure(figsize=(7, 4.5))
    if train:
        axes.plot([x["step"] for x in train], [x["loss"] for x in train], color="C0", alpha=0.6, label="training")
    if evaluation:
        steps, losses = [x["step"] for x in evaluation], [x["eval_loss"] for x in evaluation]
        best = evaluation[int(np.argmin(losses))]
        label = f"held out (best: perplexity {best['eval_perplexity']:.4g} at step {best['step']})"
        axes.plot(steps, losses, color="C3", marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    last = (train or evaluation)[-1]
    per_step = last["tokens"] / last["step"] if last["step"] else 1.0
    tokens = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    tokens.set_xlabel("training tokens")
    # clipped: matplotlib also asks for values far outside of what it draws
    functions = (lambda x: np.exp(np.clip(x, -50, 50)), lambda x: np.log(np.clip(x, 1e-20, None)))
    perplexity = axes.secondary_yaxis("right", functions=functions)
    perplexity.set_yscale("log")
    perplexity.set_ylabel("perplexity")
    figure.savefig(image, dpi=150)
