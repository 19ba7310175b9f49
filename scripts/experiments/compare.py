"""Variants pretrained on the same text, and their losses held against each other."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import (
    broken_panel,
    empty_figure,
    legend_below,
    loss_unit,
    of_variants,
    styles,
)
from ordnung.scripts.common.files import read_json, read_json_lines
from ordnung.scripts.common.machine import described, machine_info
from ordnung.scripts.common.options import arguments, parse_options
from ordnung.scripts.common.tables import (
    estimate,
    markdown_table,
    paragraphs,
    seeds_described,
    summarise,
    write_results,
)
from ordnung.scripts.experiments import sweep
from ordnung.scripts.experiments.compare_data import DATA_OPTIONS, check_pretrain, prepare_data
from ordnung.scripts.experiments.earlier import EarlierComparison, trained_earlier
from ordnung.scripts.experiments.ngrams import NAMES, ngram_lines
from ordnung.scripts.experiments.options import CompareOptions, VariantOptions
from ordnung.scripts.experiments.variants import variant_configs
from ordnung.scripts.experiments.verdicts import changes, interval
from ordnung.scripts.pretraining import run as pretraining
from ordnung.scripts.pretraining.data import HeldOut, held_out_blocks
from ordnung.scripts.pretraining.losses import position_buckets, position_losses
from ordnung.scripts.pretraining.options import PretrainOptions
from ordnung.scripts.training.runs import claim_output_dir

EQUAL = "_equal_compute"  # what names end with of variants that are trained for the FLOPs of another


def with_equal_compute(options: CompareOptions, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[dict, float]]:
    """Table entry and share of the steps of all that is trained, by name: the variants, then `equal_compute`.

    A step is taken to cost three forward passes of a block, so the ratio of steps is that of forward FLOPs.
    """
    alone = options.equal_compute_only
    runs = {name: (variant, 1.0) for name, variant in options.variants.items() if name not in alone}
    if not options.equal_compute:
        return runs
    configs = variant_configs(options.variants, options.config_overrides, vocab_size=len(tokenizer))
    with torch.device("meta"):
        models = {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()}
    block_size = options.pretrain.get("block_size", PretrainOptions.block_size)
    if options.equal_compute_with:
        models = {name: models[name] for name in (*options.equal_compute, options.equal_compute_with)}
    for name, model in models.items():
        if not hasattr(model, "flops"):
            raise ScriptError(
                f"--equal_compute: variant {name} is a {model.config.model_type}, which counts no FLOPs: leave it out, "
                "or name another in --equal_compute_with"
            )
    flops = {name: model.flops(block_size) for name, model in models.items()}
    taken = flops[options.equal_compute_with] if options.equal_compute_with else max(flops.values())
    return runs | {name + EQUAL: (options.variants[name], taken / flops[name]) for name in options.equal_compute}


def lengthened(given: dict[str, Any], ratio: float) -> dict[str, int]:
    """The options of pretrain.py that count steps, for so many times as many."""
    return {name: max(1, round(ratio * given[name])) for name in ("max_steps", "eval_steps") if given.get(name)}


def check_lengths(folders: list[Path], steps: dict[str, int]):
    """Raise a ScriptError where a finished run has another length than equal compute takes now."""
    for folder in folders:
        if "max_steps" in steps and (folder / "results.json").exists():
            taken = read_json(folder / "results.json")["steps"]
            if taken != steps["max_steps"]:
                raise ScriptError(
                    f"{folder} was trained for {taken} steps, and beside these variants equal compute takes "
                    f"{steps['max_steps']}: delete it"
                )


def collect(folders: list[Path], shared: PretrainOptions, held_out: HeldOut) -> dict[str, Any]:
    """The results of one variant from its finished runs, one for each seed."""
    runs = [read_json(folder / "results.json") for folder in folders]
    by_position, curves = [], []  # of each run: losses by position; held-out losses by step
    for folder in folders:
        lines = read_json_lines(folder / "metrics.jsonl")
        curves.append({line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line})
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=shared.trust_remote_code)
        if not shared.use_cpu and torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        by_position.append(position_losses(model, held_out.blocks, shared.per_device_eval_batch_size))
    summaries = {
        name: summarise([run["evaluation"][name] for run in runs])
        for name in ("eval_loss", "eval_perplexity", "eval_bits_per_byte")
    }
    return {
        "parameters": runs[0]["parameters"],
        "steps": runs[0]["steps"],
        "tokens": runs[0]["tokens"],
        "forward_flops_per_token": model.flops(shared.block_size) / shared.block_size
        if hasattr(model, "flops")
        else None,
        "receptive_field": getattr(model.config, "receptive_field", None),
        **summaries,
        "training_seconds": summarise([run["seconds"] for run in runs]),
        "tokens_per_second": summarise([run["tokens"] / run["seconds"] for run in runs]),
        "curve": [
            {"step": step, "eval_loss": summarise([curve[step] for curve in curves])} for step in sorted(curves[0])
        ],
        "loss_by_position": [
            {"first": first, "last": last, **summarise([float(x[first - 1 : last].mean()) for x in by_position])}
            for first, last in position_buckets(shared.block_size)
        ],
        "runs": [str(folder) for folder in folders],
    }


def hold_against(variants: dict[str, dict], baseline: str):
    """Give each variant `perplexity_change`, its perplexity over the baseline's with the same seed, less one."""
    references = variants[baseline]["eval_perplexity"]["values"]
    for result in variants.values():
        pairs = zip(result["eval_perplexity"]["values"], references)
        result["perplexity_change"] = summarise([own / reference - 1 for own, reference in pairs])


def ngram_rows(results: dict, header: list[str]) -> list[list[str]]:
    """Rows of the n-grams that have counted the same tokens, where the results hold them."""
    rows = []
    for name in NAMES.values():
        if line := results.get("ngrams", {}).get(name):
            losses = summarise([math.log(value) for value in line["values"]])
            cells = {"variant": f"{name}, counted", "loss": estimate(losses, 4), "perplexity": estimate(line, 2)}
            rows.append([cells.get(column, "-") for column in header])
    return rows


def beside_counting(results: dict) -> list[str]:
    """Which variants are below the trigram, apart those of other lengths than it counted; nothing without n-grams."""
    if "ngrams" not in results:
        return []
    trigram, usual = results["ngrams"]["trigram"]["mean"], results["settings"]["pretrain"].get("max_steps")
    below, longer = [], []
    for name, result in results["variants"].items():
        if result["eval_perplexity"]["mean"] < trigram:
            steps = result.get("steps", usual)
            below += [name] if steps == usual else []
            longer += [f"{name} ({steps:,} steps)"] if steps != usual else []
    counted = f"{usual:,} steps" if usual else "training"
    apart = f"; of other lengths: {', '.join(longer)}" if longer else ""
    return [
        f"Counted: interpolated Kneser-Ney on the tokens of {counted}. Below its trigram ({trigram:.1f}): "
        f"{', '.join(below) or 'none'}{apart}. What is not below it gives no verdict."
    ]


def markdown(results: dict) -> str:
    """The tables of a results dictionary."""
    variants = results["variants"]
    settings = results["settings"]["pretrain"]
    header = ["variant", "parameters", "loss", "perplexity", "bits per byte"]
    header += ["training s", "tokens/s", "MFLOPs/token", "receptive field"]
    body = [
        [
            name,
            f"{result['parameters']:,}",
            estimate(result["eval_loss"], 4),
            estimate(result["eval_perplexity"], 2),
            estimate(result["eval_bits_per_byte"], 4),
            estimate(result["training_seconds"], 0),
            estimate(result["tokens_per_second"], 0),
            f"{result['forward_flops_per_token'] / 1e6:.3f}" if result["forward_flops_per_token"] else "-",
            "all" if result["receptive_field"] is None else str(result["receptive_field"]),
        ]
        for name, result in variants.items()
    ]
    if results["baseline"] is not None:
        header.insert(4, f"against {results['baseline']}")
        for line, result in zip(body, variants.values()):
            pair = (each["eval_perplexity"]["values"] for each in (result, variants[results["baseline"]]))
            line.insert(4, changes(*pair).text(1, 100, " %"))
    steps = {name: result["steps"] if "steps" in result else settings["max_steps"] for name, result in variants.items()}
    lengths = set(steps.values())
    if len(lengths) > 1:
        header.insert(2, "steps")
        for line in body:
            line.insert(2, f"{steps[line[0]]:,}")
    buckets = next(iter(variants.values()))["loss_by_position"]
    positions = [
        [name, *(estimate(bucket, 3) for bucket in result["loss_by_position"])] for name, result in variants.items()
    ]
    return paragraphs(
        f"Held-out text after {' or '.join(map(str, sorted(lengths)))} steps, {seeds_described(results['seeds'])}; "
        f"relative figures are paired by seed. {described(results['machine'])}",
        *trained_earlier(results),
        markdown_table(header, body + ngram_rows(results, header)),
        *beside_counting(results),
        *([sweep.described(results)] if "sweep" in results else []),
        "Loss (nats per token) by position in the block:",
        markdown_table(["variant", *(f"{b['first']}-{b['last']}" for b in buckets)], positions),
    )


def plot(results: dict, image: Path):
    """Loss by position, with 95 % t-intervals; with a baseline, also each seed's difference from it.

    With the curves of variants that were trained for different numbers of steps, also the loss against FLOPs, of models
    that count them. Red lines are the n-grams, where the results hold them. A few variants far from the others stand
    over, or under, a break of the axis.
    """
    variants, baseline = results["variants"], results["baseline"]
    drawn = styles({name: of_variants(results["settings"])[name] for name in variants})
    counted = {order: math.log(results["ngrams"][order]["mean"]) for order in NAMES.values()
               if order in results.get("ngrams", {})}  # fmt: skip
    unit = loss_unit(results["settings"])
    by_position = {
        name: [bucket["values"] for bucket in result["loss_by_position"]] for name, result in variants.items()
    }
    buckets = next(iter(variants.values()))["loss_by_position"]
    ticks = [f"{bucket['first']}-{bucket['last']}" for bucket in buckets]
    # side by side, so that bars do not hide each other
    places = {
        name: list(np.arange(len(buckets)) + 0.6 * ((i + 0.5) / len(variants) - 0.5)) for i, name in enumerate(variants)
    }
    kinds = [(f"held-out loss ({unit})", counted, places, by_position)]
    if baseline:
        above = {
            name: [[a - b for a, b in zip(*pair)] for pair in zip(curve, by_position[baseline])]
            for name, curve in by_position.items()
        }
        kinds.append((f"{unit} above {baseline}, seed by seed", {}, places, above))
    if len({result["steps"] for result in variants.values() if "curve" in result}) > 1:
        kinds.append((f"held-out loss ({unit})", counted, *_course(variants)))
    figure = empty_figure((8 * len(kinds), 7.5))
    grid, shown = figure.add_gridspec(1, len(kinds)), []
    for i, (label, lines, where, curves) in enumerate(kinds):
        panels = _draw(figure, grid[i], drawn, lines, where, curves)
        largest = max(panels, key=lambda panel: panel.get_subplotspec().get_position(figure).height)
        largest.set(ylabel=label)
        if where is places:
            panels[-1].set_xticks(range(len(buckets)), ticks, rotation=30)
            panels[-1].set(xlabel="position in the block (tokens before)")
        else:
            panels[-1].set(xscale="log", xlabel="training FLOPs")
        shown += panels
    legend_below(figure, shown, columns=5)
    figure.savefig(image, dpi=120)


def _course(variants: dict[str, dict]) -> tuple[dict[str, list], dict[str, list]]:
    """By name, training FLOPs, and each seed's held-out loss there; not of models that do not count FLOPs."""
    places, curves = {}, {}
    for name, result in variants.items():
        if result["forward_flops_per_token"]:
            flops = 3 * result["forward_flops_per_token"] * result["tokens"] / result["steps"]
            curve = result["curve"][1:]  # without the loss before training
            places[name] = [flops * point["step"] for point in curve]
            curves[name] = [point["eval_loss"]["values"] for point in curve]
    return places, curves


def _draw(figure, place, drawn: dict[str, dict], lines: dict[str, float], where: dict, curves: dict) -> list:
    """Curves of seeds' means with their intervals, and lines across; returns the panels, the lowest last."""
    found = {name: [interval(values) for values in curve] for name, curve in curves.items()}
    bars = {name: [one.high - one.mean if one.n > 1 else 0 for one in curve] for name, curve in found.items()}
    reach = [one.mean + sign * bar for name in found for one, bar in zip(found[name], bars[name]) for sign in (-1, 1)]
    panels = broken_panel(figure, place, reach, list(lines.values()))
    for panel in panels:
        for name, curve in found.items():
            look = {"linewidth": 1.2, "elinewidth": 0.8, "capsize": 2, **drawn[name], "markersize": 6}
            panel.errorbar(where[name], [one.mean for one in curve], bars[name], label=name, **look)
        for (order, loss), line in zip(lines.items(), (":", "--", "-.")):
            panel.axhline(loss, color="red", linestyle=line, linewidth=1, label=f"{order}, counted")
        panel.grid(alpha=0.3)
    return panels


def pretrain(options: VariantOptions, variant: dict[str, Any], shared: dict[str, Any], folder: Path) -> int:
    """Pretrain a variant with the options that it shares with others, or go on; a finished run is kept.

    Returns:
        exit status.
    """
    if (folder / "results.json").exists():
        print(f"{folder}: finished, kept")
        return 0
    overrides = {**options.config_overrides, **variant}
    own = {"model_type": overrides.pop("model_type"), "config_overrides": overrides}
    own |= {"output_dir": str(folder), "resume_from_checkpoint": "auto"}
    return pretraining.run(parse_options(PretrainOptions, arguments({**shared, **own})))


def run(options: CompareOptions) -> int:
    """Train, compare and write the results; returns the exit status, that of the run that was stopped if one was."""
    output_dir, shared = Path(options.output_dir), check_pretrain(options.pretrain)
    variant_configs(options.variants, options.config_overrides)  # a wrong table is told before anything is written
    settings = {"pretrain": options.pretrain, "config_overrides": options.config_overrides}
    if options.sweep:
        for choice in sweep.grid(options.sweep):
            if not check_pretrain({**options.pretrain, **choice}).validation_fraction:
                raise ScriptError(
                    "--pretrain validation_fraction must be above 0, not 0: --sweep chooses on that share of what is "
                    "trained on, whatever is held out besides"
                )
        settings["sweep"] = options.sweep
    earlier = EarlierComparison(options.earlier, settings | {"seeds": options.seeds}, options.variants)
    claim_output_dir(output_dir, settings | {"sweep": options.sweep}, options.variants, untold={"sweep": {}})
    data = prepare_data(output_dir, shared)
    common = {name: value for name, value in options.pretrain.items() if name not in DATA_OPTIONS} | data
    tokenizer = AutoTokenizer.from_pretrained(data["tokenizer_name"])
    variants = with_equal_compute(options, tokenizer)
    lengths = {name: lengthened(options.pretrain, ratio) for name, (_, ratio) in variants.items()}
    choices = {}
    for name in options.variants if options.sweep else ():
        ratio = variants[name + EQUAL][1] if name in options.equal_compute_only else 1.0
        choices[name] = sweep.grid({**options.sweep, **lengthened(options.sweep, ratio)})
    known = earlier.tried(choices)
    tried = dict(known)
    taken = earlier.trained(variants, {name: own.get("max_steps") for name, own in lengths.items()})
    # what was chosen by other tries than these is not the same model
    taken = {name: found for name, found in taken.items() if not choices or name.removesuffix(EQUAL) in tried}
    if options.earlier:
        if taken or tried:
            earlier.check_text(ngram_lines(shared, data, options.seeds[:1]))
        print(
            f"{options.earlier}: taken over: {', '.join(taken) or 'no variant'}; tries of {', '.join(tried) or 'none'}"
        )

    folders = {name: [output_dir / "runs" / f"{name}-seed{seed}" for seed in options.seeds] for name in variants}
    for name, steps in lengths.items():
        if name not in taken:
            check_lengths(folders[name], steps)
    for name, choices_of in choices.items():
        if name in tried:
            continue
        status, tried[name] = sweep.try_all(
            choices_of,
            lambda choice, folder, name=name: pretrain(
                options,
                options.variants[name],
                sweep.options_of(choice, options.pretrain, data, options.seeds[0]),
                folder,
            ),
            output_dir / "sweep" / name,
        )
        if status:
            return status
    chosen = {name: sweep.best(tried[name.removesuffix(EQUAL)], options.sweep) if tried else {} for name in variants}
    # Seeds outside, so that a disturbance of the machine meets all variants' times alike.
    for i, seed in enumerate(options.seeds):
        for name, (variant, _) in variants.items():
            if name in taken:
                continue
            own = {**common, **chosen[name], **lengths[name], "seed": seed}
            status = pretrain(options, variant, own, folders[name][i])
            if status:
                return status

    documents = corpus.load_files([data["validation_file"]], "validation_file", "text", streaming=False)
    held_out = held_out_blocks(shared, documents, tokenizer)
    variants = {name: taken.get(name) or collect(folders[name], shared, held_out) for name in variants}
    if options.baseline is not None:
        hold_against(variants, options.baseline)
    results = {
        "machine": machine_info("cpu" if shared.use_cpu else None),
        "settings": {**settings, "variants": options.variants},
        "seeds": options.seeds,
        "baseline": options.baseline,
        "variants": variants,
        "ngrams": ngram_lines(shared, data, options.seeds),
    }
    if tried:
        results["sweep"] = tried
    if taken or known:
        results["earlier"] = earlier.origins(dict.fromkeys([*taken, *known]))
    write_results(output_dir, results, markdown, positions=plot)
    return 0
