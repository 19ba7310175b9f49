"""Tasks that a pass over the whole prefix can express and causal attention may not."""

import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import legend_below, new_figure, of_variants, styles
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
from ordnung.scripts.experiments.options import TaskOptions
from ordnung.scripts.experiments.task_training import Drawn, fit, train_all
from ordnung.scripts.experiments.variants import variant_configs

# Sequences to measure on are drawn with this seed, those to train on with the run's.
EVALUATION_SEED = 2**32


def draw(options: TaskOptions, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels (count, tokens) of new sequences of the task."""
    if options.task == "triplets":
        return draw_triplets(count, options.symbols, options.sequence_length, random)
    kind = {"pointer": draw_pointers, "function": draw_functions}[options.task]
    return kind(count, options.symbols, options.hops, options.queries, random)


def draw_pointers(
    count: int, symbols: int, hops: int, queries: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that show a permutation p of 0 to m - 1 and ask for p applied several times.

    p is one cycle through all m, so that no number of times is a shorter way round. Token i < m is p(i); then each of
    `queries` tokens k m + x, with k from 1 to `hops` and x drawn at random, has the label p(p(...p(x))), k times.

    Returns:
        tokens (count, m + queries) and labels of the same shape, -100 where nothing is asked.
    """
    cycle = random.random((count, symbols)).argsort(axis=1)
    pointers = np.empty_like(cycle)
    np.put_along_axis(pointers, cycle, np.roll(cycle, -1, axis=1), 1)
    places, times = random.integers(symbols, size=(count, queries)), random.integers(1, hops + 1, (count, queries))
    asked = np.take_along_axis(cycle, places, 1)
    answers = np.take_along_axis(cycle, (places + times) % symbols, 1)
    return (
        np.concatenate([pointers, times * symbols + asked], axis=1),
        np.concatenate([np.full_like(pointers, -100), answers], axis=1),
    )


def draw_functions(
    count: int, symbols: int, hops: int, queries: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that show a function f of 0 to m - 1 to the same numbers and ask for f applied `hops` times.

    Token i < m is f(i), drawn at random; then each of `queries` tokens m + x, with x drawn at random, has the label
    f(f(...f(x))). With L layers in which every token sees every other, 2^L - 1 hops are within reach: a token that
    knows the way of k hops looks up where its end leads.

    Returns:
        tokens (count, m + queries) and labels of the same shape, -100 where nothing is asked.
    """
    function = random.integers(symbols, size=(count, symbols))
    asked = random.integers(symbols, size=(count, queries))
    answers = asked
    for _ in range(hops):
        answers = np.take_along_axis(function, answers, 1)
    return (
        np.concatenate([function, symbols + asked], axis=1),
        np.concatenate([np.full_like(function, -100), answers], axis=1),
    )


def fewer_hops(options: TaskOptions) -> list[float]:
    """Of `function`: the share of answers that 0, 1, ... `hops` - 1 hops give, on what models are measured on."""
    tokens, labels = draw(options, options.eval_sequences, np.random.default_rng(EVALUATION_SEED))
    function, reached = tokens[:, : options.symbols], tokens[:, options.symbols :] - options.symbols
    shares = []
    for _ in range(options.hops):
        shares.append(float((reached == labels[:, options.symbols :]).mean()))
        reached = np.take_along_axis(function, reached, 1)
    return shares


def draw_triplets(count: int, given: int, length: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of Triplet-Counting: `given` random tokens below `length`, each later one follows from those before.

    x[n] = |{(i, j) : x[i] + x[j] + x[n - 1] = 0 mod n}| mod n, i and j from 0 to n - 1.

    Returns:
        tokens (count, length), and labels of the same shape: the next token where it follows, else -100.
    """
    x = np.zeros((count, length + 1), dtype=np.int64)
    x[:, :given] = random.integers(length, size=(count, given))
    rows = np.arange(count)[:, None]
    for n in range(given, length + 1):
        residues = x[:, :n] % n
        of_residue = np.zeros((count, n), dtype=np.int64)  # how many tokens have each residue
        np.add.at(of_residue, (rows, residues), 1)
        x[:, n] = np.take_along_axis(of_residue, -(residues + residues[:, -1:]) % n, 1).sum(1) % n
    labels = x[:, 1:].copy()
    labels[:, : given - 1] = -100
    return x[:, :-1], labels


def step_flops(options: TaskOptions, config: PreTrainedConfig) -> int:
    """FLOPs of a training step, counted as three forward passes; unscored prefixes of CubicPrefixLM are left out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    flops = model.flops(options.tokens)
    if hasattr(model.model, "prefix_flops"):
        scored = torch.from_numpy(draw(options, 1, np.random.default_rng(0))[1] != -100)
        flops += model.model.prefix_flops(options.tokens, scored) - model.model.prefix_flops(options.tokens)
    return 3 * options.batch_size * flops


@torch.no_grad()
def accuracy(options: TaskOptions, model: PreTrainedModel) -> dict[str, float | list[float]]:
    """Share of right answers, and of sequences with right answers only; for pointers, also of answers by hops."""
    model.eval()
    drawn = draw(options, options.eval_sequences, np.random.default_rng(EVALUATION_SEED))
    tokens, labels = (torch.from_numpy(x).to(model.device) for x in drawn)
    right = []
    for part, answers in zip(tokens.split(options.batch_size), labels.split(options.batch_size)):
        logits = model(part, labels=answers, shift_labels=answers, use_cache=False).logits
        right.append((logits.argmax(-1) == answers) | (answers == -100))
    right = torch.cat(right)
    scored = labels != -100
    result = {"answers": share(right[scored]), "sequences": share(right.all(1))}
    if options.task == "pointer":
        times = tokens // options.symbols
        result["answers_by_hops"] = [share(right[scored & (times == k)]) for k in range(1, options.hops + 1)]
    return result


def share(right: torch.Tensor) -> float:
    return float(right.float().mean())


def train_and_measure(options: TaskOptions, config: PreTrainedConfig, seed: int, steps: int, path: Path) -> dict:
    """Train and measure one model, or read the results of a run that has finished."""
    if path.exists():
        result = read_json(path)
        if result["curve"][-1]["step"] != steps:
            raise ScriptError(
                f"{path} was trained for {result['curve'][-1]['step']} steps, and beside these variants equal compute "
                f"takes {steps}: delete it"
            )
        print(f"{path}: finished, kept")
        return result
    spaced = np.geomspace(max(1, options.max_steps / options.evaluations), steps, options.evaluations)
    due = {*np.round(spaced).astype(int).tolist(), options.max_steps, steps}
    random = np.random.default_rng(seed)
    own = options.of_variant(path.stem.rpartition("-seed")[0])
    job = Drawn(
        config,
        steps,
        draw=lambda step: draw(own, own.batch_size, random),
        measure=lambda model: accuracy(own, model),
        measured=due,
    )
    loop, curve = fit(own, seed, job), job.curve
    result = {"parameters": loop.parameters, "curve": curve, "last_losses": float(np.mean(job.losses[-100:]))}
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    last = curve[-1]
    print(f"{path.stem}: {steps} steps, {last['answers']:.3f} right, {last['seconds']:.0f} s", flush=True)
    return result


def collect(options: TaskOptions, flops: int, runs: list[dict]) -> dict:
    """The results of one variant from its runs, one for each seed."""
    steps = [point["step"] for point in runs[0]["curve"]]

    def at(i: int) -> dict:
        points = [run["curve"][i] for run in runs]
        point = {"step": steps[i], "flops": flops * steps[i]}
        point |= {name: summarise([p[name] for p in points]) for name in ("answers", "sequences", "seconds")}
        if "answers_by_hops" in points[0]:
            point["answers_by_hops"] = [summarise(values) for values in zip(*(p["answers_by_hops"] for p in points))]
        return point

    curve = [at(i) for i in range(len(steps))]
    return {
        "parameters": runs[0]["parameters"],
        "flops_per_step": flops,
        "curve": curve,
        "equal_steps": curve[steps.index(options.max_steps)],
        "equal_compute": curve[-1],
    }


SIZES = {"hops": "hops", "queries": "answers a sequence"}  # which variants may have of their own, as they are shown


def varied(settings: dict) -> list[str]:
    """Those of `SIZES` that a variant has its own of; older files have no `training_by_variant`."""
    own_of = settings.get("training_by_variant", {}).values()
    return [size for size in SIZES if any(size in own for own in own_of)]


def size_of(settings: dict, name: str, size: str) -> int:
    return settings.get("training_by_variant", {}).get(name, {}).get(size, settings[size])


def markdown(results: dict) -> str:
    """The table of a results dictionary."""
    settings, own = results["settings"], varied(results["settings"])
    hops = range(1, settings["hops"] + 1) if settings["task"] == "pointer" else []
    header = ["variant", *(SIZES[size] for size in own)]
    header += ["parameters", "MFLOPs a step", "steps", "seconds", "answers right"]
    header += [f"{k} hop" + "s" * (k > 1) for k in hops] + ["sequences right"]
    fewer = "hops" in own and "fewer_hops" in results
    header += ["right with fewer hops, at best"] if fewer else []
    body = [
        [
            name,
            *(str(size_of(settings, name, size)) for size in own),
            f"{result['parameters']:,}",
            f"{result['flops_per_step'] / 1e6:,.0f}",
            f"{point['step']:,}",
            estimate(point["seconds"], 0),
            estimate(point["answers"], 3),
            *(
                estimate(point["answers_by_hops"][k - 1], 3) if k <= size_of(settings, name, "hops") else ""
                for k in hops
            ),
            estimate(point["sequences"], 3),
            *([f"{max(result.get('fewer_hops', results['fewer_hops'])):.3f}"] if fewer else []),
        ]
        for which in ("equal_steps", "equal_compute")
        for name, result in results["variants"].items()
        for point in [result[which]]
        if which == "equal_steps" or point["step"] != result["equal_steps"]["step"]
    ]
    sizes = ("symbols", "sequence_length") if settings["task"] == "triplets" else ("symbols", *SIZES)
    longer = "the FLOPs of the dearest" if settings["equal_compute"] else "its own number of steps"
    task = ", ".join(f"{name} {settings[name]}" for name in sizes if name not in own)
    return paragraphs(
        f"{settings['task']}, {task}: {seeds_described(results['seeds'])}, at equal steps and, where a variant "
        f"appears twice, at {longer}. {described(results['machine'])}",
        *trained_earlier(results),
        markdown_table(header, body),
    )


def plot(results: dict, image: Path):
    """Share of right answers against steps and against FLOPs, one line a seed."""
    settings = results["settings"]
    figure, panels = new_figure(1, 2, figsize=(11, 4.6), sharey=True)
    drawn = styles(of_variants(settings))
    for name, result in results["variants"].items():
        style = {key: value for key, value in drawn[name].items() if "marker" not in key}
        for panel, x in zip(panels, ("step", "flops")):
            places = [point[x] for point in result["curve"]]
            values = np.array([point["answers"]["values"] for point in result["curve"]])
            panel.plot(places, values, alpha=0.35, linewidth=0.8, **style)
            panel.plot(places, values.mean(1), linewidth=1.5, label=name, markevery=3, **drawn[name])
    symbols = settings["sequence_length" if settings["task"] == "triplets" else "symbols"]
    for panel, label in zip(panels, ("steps", "training FLOPs")):
        panel.axhline(1 / symbols, color="red", linestyle=":", linewidth=1, label=f"1 of {symbols} at random")
        if "fewer_hops" in results:
            best = max(results["fewer_hops"][:4])
            panel.axhline(best, color="red", linestyle="--", linewidth=1, label="the best of at most 3 hops")
        panel.set(xscale="log", xlabel=label, ylabel="share of answers that are right")
        panel.grid(alpha=0.3)
    panels[0].axvline(settings["max_steps"], color="grey", linestyle="--", linewidth=1)
    legend_below(figure, panels)
    figure.savefig(image, dpi=150)


def plot_sizes(results: dict, image: Path):
    """Share of right answers at the end against what variants have their own of, a dot a seed.

    A line a kind: variants are named KIND or KIND_SIZE.
    """
    settings = results["settings"]
    kinds = {name: re.sub(r"_\d+$", "", name) for name in results["variants"]}
    panels = varied(settings)
    figure, axes = new_figure(1, len(panels), figsize=(6.5 * len(panels), 4.6), sharey=True, squeeze=False)
    families = of_variants(settings)
    drawn = styles({kind: families[name] for name, kind in kinds.items()})
    for panel, size in zip(axes[0], panels):
        for kind, style in drawn.items():
            points = sorted(
                (size_of(settings, name, size), result["equal_compute"]["answers"]["values"])
                for name, result in results["variants"].items()
                if kinds[name] == kind
            )
            places = [place for place, _ in points]
            panel.plot(places, [np.mean(values) for _, values in points], label=kind, **style)
            for place, values in points:
                panel.plot([place] * len(values), values, ".", color=style["color"], alpha=0.5)
        if size == "hops" and "fewer_hops" in results:
            best = {
                size_of(settings, name, size): max(result.get("fewer_hops", results["fewer_hops"]))
                for name, result in results["variants"].items()
            }
            panel.plot(*zip(*sorted(best.items())), "r--", linewidth=1, label="fewer hops, at best")
        panel.axhline(1 / settings["symbols"], color="red", linestyle=":", linewidth=1, label="at random")
        panel.set(xlabel=SIZES[size], ylabel="share of answers that are right")
        panel.grid(alpha=0.3)
    legend_below(figure, axes[0])
    figure.savefig(image, dpi=150)


def run(options: TaskOptions) -> int:
    """Train and measure all variants and write the results; returns the exit status."""
    shared = {"max_position_embeddings": options.tokens, **options.config_overrides}
    configs = variant_configs(options.variants, shared, vocab_size=options.vocab_size)
    own = {name: options.of_variant(name) for name in configs}
    flops = {name: step_flops(own[name], config) for name, config in configs.items()}
    dearest = max(flops.values()) if options.equal_compute else 0
    steps = {name: max(own[name].max_steps, options.max_steps * dearest // cost) for name, cost in flops.items()}
    results = train_all(
        options,
        configs,
        lambda name, seed, path: train_and_measure(options, configs[name], seed, steps[name], path),
        lambda name, runs: collect(options, flops[name], runs),
        steps,
    )
    if options.task == "function":
        results["fewer_hops"] = fewer_hops(options)
        for name, result in results["variants"].items():
            if own[name].hops != options.hops:
                result["fewer_hops"] = fewer_hops(own[name])
    figure = plot_sizes if varied(results["settings"]) else plot
    write_results(options.output_dir, results, markdown, accuracy=figure)
    return 0
