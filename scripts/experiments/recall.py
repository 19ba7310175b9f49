"""Multi-query associative recall: what variants can look up, and from how far."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from ordnung.scripts.common.figures import new_figure
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import (
    estimate,
    markdown_table,
    paragraphs,
    seeds_described,
    summarise,
    write_results,
)
from ordnung.scripts.experiments.earlier import trained_earlier
from ordnung.scripts.experiments.options import RecallOptions
from ordnung.scripts.experiments.task_training import Drawn, fit, train_all
from ordnung.scripts.experiments.variants import variant_configs

# Sequences to measure on are drawn with this seed and the number of pairs, those to train on with the run's seed.
EVALUATION_SEED = 2**32
# A variant with this accuracy at every distance that it can see has solved the task.
SOLVED = 0.99
# A run whose loss fell by more than this share from the last but one tenth of its steps to the last was still learning.
STILL_LEARNING = 0.05


def sample(
    options: RecallOptions, count: int, num_pairs: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw sequences: pairs (key, value, key, value, ...), then queries in random places among blanks.

    Token 0 is the blank, tokens 1 to A are keys, A + 1 to 2 A values, where A is `alphabet_size`. The keys of a
    sequence differ from each other, and so do its values.

    Returns:
        tokens (count, sequence_length);
        labels, of the same shape: at a query the value of its key, -100 elsewhere;
        distances, of the same shape: at a query the tokens back to its key among the pairs, 0 elsewhere.
    """
    A, N, pairs_end = options.alphabet_size, options.sequence_length, 2 * num_pairs

    def choose(total: int, chosen: int) -> np.ndarray:
        """`chosen` different numbers below `total`, for each sequence."""
        return random.random((count, total)).argsort(axis=1)[:, :chosen]

    keys, values = 1 + choose(A, num_pairs), 1 + A + choose(A, num_pairs)
    places = pairs_end + choose(N - pairs_end, options.num_queries)
    asked = random.integers(num_pairs, size=places.shape)
    tokens = np.zeros((count, N), dtype=np.int64)
    tokens[:, 0:pairs_end:2], tokens[:, 1:pairs_end:2] = keys, values
    labels, distances = np.full_like(tokens, -100), np.zeros_like(tokens)
    np.put_along_axis(tokens, places, np.take_along_axis(keys, asked, 1), 1)
    np.put_along_axis(labels, places, np.take_along_axis(values, asked, 1), 1)
    np.put_along_axis(distances, places, places - 2 * asked, 1)
    return tokens, labels, distances


def train(options: RecallOptions, config: PreTrainedConfig, seed: int) -> tuple[torch.nn.Module, dict]:
    """Train a new model. The sequences depend on the seed alone, not on the variant.

    Returns:
        the model; its `parameters`, `seconds`, and `loss_curve`: the mean loss of each tenth of the steps.
    """
    random = np.random.default_rng(seed)

    def draw(step: int) -> tuple[np.ndarray, np.ndarray]:
        num_pairs = options.num_pairs[step % len(options.num_pairs)]  # in turn, for a loss curve without their noise
        return sample(options, options.batch_size, num_pairs, random)[:2]

    job = Drawn(config, options.max_steps, draw)
    loop = fit(options, seed, job)
    tenths = np.array_split(job.losses, min(10, len(job.losses)))
    model = loop.model
    return model, {
        "parameters": loop.parameters,
        "state_bytes": model.cache_bytes(options.sequence_length) if hasattr(model, "cache_bytes") else None,
        "seconds": loop.seconds,
        "loss_curve": [float(tenth.mean()) for tenth in tenths],
    }


@torch.no_grad()
def measure(options: RecallOptions, model: torch.nn.Module) -> dict[str, list]:
    """Share of right answers; the answer is the likeliest token of the whole vocabulary.

    Returns:
        accuracy, by number of pairs; accuracy_by_distance and answers (their number), by number of pairs and range of
        distances, None where no query lies at such a distance.
    """
    model.eval()
    result = {"accuracy": [], "accuracy_by_distance": [], "answers": []}
    for num_pairs in options.num_pairs:
        random = np.random.default_rng((EVALUATION_SEED, num_pairs))
        tokens, labels, distances = sample(options, options.eval_sequences, num_pairs, random)
        parts = torch.from_numpy(tokens).to(model.device).split(options.batch_size)
        predicted = torch.cat([model(part, use_cache=False).logits.argmax(-1).cpu() for part in parts]).numpy()
        right, asked = predicted == labels, labels != -100
        ranges = np.digitize(distances, options.distance_edges)
        chosen = [asked & (ranges == i) for i in range(1, len(options.distance_edges))]
        result["accuracy"].append(float(right[asked].mean()))
        result["accuracy_by_distance"].append([float(right[cell].mean()) if cell.any() else None for cell in chosen])
        result["answers"].append([int(cell.sum()) for cell in chosen])
    return result


def train_and_measure(options: RecallOptions, config: PreTrainedConfig, seed: int, path: Path) -> dict:
    """Train and measure one model, or read the results of a run that has finished."""
    if path.exists():
        print(f"{path}: finished, kept")
        return read_json(path)
    model, result = train(options, config, seed)
    result |= measure(options, model)
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    accuracies = ", ".join(f"{accuracy:.3f}" for accuracy in result["accuracy"])
    loss, seconds = result["loss_curve"][-1], result["seconds"]
    print(f"{path.stem}: loss {loss:.3f}, accuracy {accuracies}, {seconds:.0f} s", flush=True)
    return result


def collect(options: RecallOptions, config: PreTrainedConfig, runs: list[dict]) -> dict:
    """The results of one variant from its runs, one for each seed."""
    rows, columns = range(len(options.num_pairs)), range(len(options.distance_edges) - 1)

    def cell(i: int, j: int) -> dict | None:
        if not runs[0]["answers"][i][j]:
            return None
        return summarise([run["accuracy_by_distance"][i][j] for run in runs])

    field = getattr(config, "receptive_field", None)
    return {
        "parameters": runs[0]["parameters"],
        "state_bytes": runs[0].get("state_bytes"),  # runs of earlier versions do not tell
        "receptive_field": field,
        "training_seconds": summarise([run["seconds"] for run in runs]),
        "loss_curves": [run["loss_curve"] for run in runs],
        "solved": [seed for seed, run in zip(options.seeds, runs) if solved(run, options.distance_edges, field)],
        "still_learning": [seed for seed, run in zip(options.seeds, runs) if still_learning(run["loss_curve"])],
        "accuracy": [summarise([run["accuracy"][i] for run in runs]) for i in rows],
        "accuracy_by_distance": [[cell(i, j) for j in columns] for i in rows],
    }


def solved(run: dict, distance_edges: list[int], receptive_field: int | None) -> bool:
    """Whether the accuracy is `SOLVED` wherever the receptive field holds the whole range of distances."""
    visible = [receptive_field is None or end <= receptive_field for end in distance_edges[1:]]
    cells = [cell for line in run["accuracy_by_distance"] for cell, seen in zip(line, visible) if seen]
    return all(cell is None or cell >= SOLVED for cell in cells)


def still_learning(loss_curve: list[float]) -> bool:
    """Whether the loss was still falling when the budget ended."""
    return len(loss_curve) < 2 or loss_curve[-1] < (1 - STILL_LEARNING) * loss_curve[-2]


def range_names(edges: list[int]) -> list[str]:
    return [f"{first}-{end - 1}" for first, end in zip(edges, edges[1:])]


def state_size(result: dict) -> str:
    """What a variant's generation state holds at the end of a sequence, in words; nothing where it is not known."""
    size = result.get("state_bytes")
    return "" if size is None else f"a generation state of {size:,} bytes, "


def markdown(results: dict) -> str:
    """The tables of a results dictionary, and what to bear in mind with them."""
    settings, variants = results["settings"], results["variants"]
    header = ["variant", "pairs", "all distances", *range_names(settings["distance_edges"])]
    body = [
        [name, str(num_pairs), estimate(total, 3), *("-" if cell is None else estimate(cell, 3) for cell in cells)]
        for name, result in variants.items()
        for num_pairs, total, cells in zip(settings["num_pairs"], result["accuracy"], result["accuracy_by_distance"])
    ]
    shown = ", ".join(f"{chance:.3f} with {n}" for n, chance in zip(settings["num_pairs"], results["chance_shown"]))
    head = [
        f"Share of queries answered with the right value, by the distance from the query back to its key, after "
        f"{settings['max_steps']} steps of {settings['batch_size']} sequences of {settings['sequence_length']} tokens; "
        f"{seeds_described(results['seeds'])}. {described(results['machine'])}",
        f"Chance: {results['chance']:.3f} for any value, and for one of the values shown {shown} pairs. What is not "
        "solved was not learned in these steps, which is no proof that it cannot be; what lies beyond the receptive "
        "field cannot.",
        *trained_earlier(results),
        markdown_table(header, body),
    ]
    own, notes = settings.get("training_by_variant", {}), []
    for name, result in variants.items():
        steps = own.get(name, {}).get("max_steps", settings["max_steps"])
        longer = "" if steps == settings["max_steps"] else f" in {steps:,} steps"
        curve = np.mean(result["loss_curves"], axis=0)
        field = result["receptive_field"]
        sees = "everything" if field is None else f"keys up to {field - 1} tokens back"
        unsolved = [seed for seed in results["seeds"] if seed not in result["solved"]]
        learning = [seed for seed in unsolved if seed in result["still_learning"]]
        notes.append(
            f"- {name}: {result['parameters']:,} parameters, {state_size(result)}"
            f"{estimate(result['training_seconds'], 0)} s of training{longer}, sees {sees}. "
            + (f"Not solved, within what it sees, by seeds {unsolved}" if unsolved else "Solved within what it sees")
            + (f"; the loss of {learning or 'none'} of them fell by {STILL_LEARNING:.0%} or more" if unsolved else "")
            + (" from the last but one tenth of the steps to the last. " if unsolved else ". ")
            + f"Training loss by tenths of the steps: {', '.join(f'{loss:.2f}' for loss in curve)}."
        )
    return paragraphs(*head, "\n".join(notes))


def plot(results: dict, image: Path):
    """A map of mean accuracy for each variant; the dashed line is the end of its receptive field."""
    settings, variants = results["settings"], results["variants"]
    edges, rows = settings["distance_edges"], range(len(settings["num_pairs"]))
    names = range_names(edges)
    columns = min(5, len(variants))
    lines = -(-len(variants) // columns)
    figure, panels = new_figure(lines, columns, figsize=(4.2 * columns + 0.8, 3.6 * lines), sharey=True, squeeze=False)
    for panel in panels.flat[len(variants) :]:
        panel.remove()
    for panel, (name, result) in zip(panels.flat, variants.items()):
        means = [[np.nan if cell is None else cell["mean"] for cell in line] for line in result["accuracy_by_distance"]]
        colours = panel.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for row, line in enumerate(means):
            for column, mean in enumerate(line):
                text = "" if np.isnan(mean) else f"{mean:.2f}"
                panel.text(column, row, text, ha="center", va="center", color="black" if mean > 0.6 else "white")
        field = result["receptive_field"]
        if field is not None and field <= edges[-1]:
            panel.axvline(np.interp(field, edges, np.arange(len(edges))) - 0.5, color="red", linestyle="--")
        panel.set_xticks(range(len(names)), names, rotation=30)
        panel.set_yticks(rows, map(str, settings["num_pairs"]))
        panel.set(title=name, xlabel="tokens from query back to key")
    for panel in panels[:, 0]:
        panel.set_ylabel("key-value pairs")
    figure.colorbar(colours, ax=panels.flat[: len(variants)], label=f"accuracy (chance {results['chance']:.3f})")
    figure.savefig(image, dpi=150)


def run(options: RecallOptions) -> int:
    """Train and measure all variants and write the results; returns the exit status."""
    configs = variant_configs(options.variants, options.config_overrides, vocab_size=options.vocab_size)
    shared = train_all(
        options,
        configs,
        lambda name, seed, path: train_and_measure(options.of_variant(name), configs[name], seed, path),
        lambda name, runs: collect(options, configs[name], runs),
    )
    results = {
        **shared,
        "chance": 1 / options.alphabet_size,
        "chance_shown": [1 / num_pairs for num_pairs in options.num_pairs],
    }
    write_results(options.output_dir, results, markdown, accuracy=plot)
    return 0
