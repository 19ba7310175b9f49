"""What a linearization leaves behind: results, a picture, a card, and the table it prints."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ordnung.scripts.common.figures import COLOURS, broken_panel, empty_figure, shades
from ordnung.scripts.common.files import write_text
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.hub.model_card import Subject, entries_of, head_of, make_card
from ordnung.scripts.linearizing import measure

RESULTS, PICTURE, CARD = "linearize_results.json", "linearize.png", "README.md"
PROMPT, WRITTEN = 24, 48  # tokens of held-out text that a decoder goes on from, and that it writes


def results(run, after: dict[str, Any], layers: list[dict]) -> dict[str, Any]:
    """Everything that was measured; `run` is the finished `Linearization`."""
    options, pair, before = run.options, run.pair, run.before
    student, teacher = pair.student, pair.teacher
    made = {
        "model_type": student.config.model_type,
        "base_model": None if Path(options.source).exists() else options.source,
        "source": Path(options.source).name,
        "gguf_file": options.gguf_file,
        "teacher_fingerprint": pair.fingerprint,
        "encoder": pair.encoder,
        "config_overrides": options.config_overrides,
        "layer_types": student.config.layer_types,
        "keep_attention": options.keep_attention,
        "replaced_alone": before.get("replaced_alone"),
        "data": options.train_file or [options.dataset_name, options.dataset_config_name],
        "held_out": {"data": options.validation_file or "a part of it", "tokens": len(run.text.held_out_tokens)},
        "block_size": options.block_size,
        "eval_block_size": options.eval_block_size,
        "parameters": sum(p.numel() for p in student.parameters()),
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "stages": {
            name: {"steps": getattr(options, f"{name}_steps"), "seconds": run.seconds.get(name, 0.0)}
            for name in ("transfer", "distill")
        },
        "tokens": run.tokens,
        "seconds": sum(run.seconds.values()),
        "seed": options.seed,
        "num_processes": run.accelerator.num_processes,
        "mixed_precision": run.accelerator.mixed_precision,
        "converted": {"floor": before["floor"], "student": before["student"]},
        "teacher": after.get("teacher"),
        "student": after["student"],
        "floor": after["floor"],
        "layers": {"converted": before["layers"], "student": layers},
        "curve": run.curve(),
        "state_bytes": {"student": measure.state_bytes(student), "teacher": measure.state_bytes(teacher)},
        "options": options.record(),
        "machine": machine_info("cpu" if options.use_cpu else None),
    }
    if not pair.encoder:
        made["decoding"] = measure.decode_times(pair, run.text.held_out_tokens, options.decode_lengths)
        made["text"] = _written(run)
        if run.long_text is not None:
            made["longer"] = measure.longer(pair, run.long_text)
    made["recovered"] = {str(start): share(made, start) for start in measure.FROM}
    made["eval_results"] = _eval_results(made)
    made["sections"] = {"Linearized": text(made)}
    return made


def _written(run) -> dict[str, str]:
    pair = run.pair
    longest = min(model.config.longest_row or PROMPT + WRITTEN for model in (pair.student, pair.teacher))
    prompt, new = min(PROMPT, longest // 2), min(WRITTEN, longest - longest // 2)
    ids = torch.from_numpy(run.text.held_out_tokens[None, :prompt].astype(np.int64)).to(pair.student.device)
    written = {"prompt": run.tokenizer.decode(ids[0])}
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        written[name] = run.tokenizer.decode(made[0, ids.shape[1] :])
    return written


def share(results: dict[str, Any], start: int = 0) -> float | None:
    """The part of what conversion lost that training won back, on tokens from a position on; None if not known.

    For an encoder that of the way from no mixing to the teacher in telling similar texts.
    """
    if results["encoder"]:
        if start or "similarity" not in results["student"]:
            return None
        floor, teacher = results["converted"]["floor"]["similarity"], results["teacher"]["similarity"]
        return None if teacher == floor else (results["student"]["similarity"] - floor) / (teacher - floor)
    forms = (results["converted"]["student"], results["student"], results["teacher"])
    converted, student, teacher = (measure.loss_from(found, start) for found in forms)
    return None if converted in (None, teacher) else 1 - (student - teacher) / (converted - teacher)


def _eval_results(made: dict[str, Any]) -> list[dict]:
    shared = {"dataset_type": "text", "dataset_name": "held-out text", "dataset_split": "held-out text"}
    student = made["student"]
    if made["encoder"]:
        return entries_of({"relative_error_of_states": student["loss"]}, **shared, task_type="feature-extraction")
    scores = {"loss": student["loss"], "top-token_agreement": student["agreement"]}
    return entries_of(scores, **shared, task_type="text-generation")


def text(made: dict[str, Any]) -> str:
    """What was made of what, and what was lost where, as Markdown."""
    kept = [i for i, kind in enumerate(made["layer_types"]) if kind == "full_attention"]
    head = (
        f"A {made['model_type']} made of `{made['source']}` by replacing the attention of "
        f"{len(made['layer_types']) - len(kept)} of {len(made['layer_types'])} layers"
        + (f" (full attention stays in {', '.join(map(str, kept))})" if kept else "")
        + f" and training on {made['tokens']:,} tokens ({made['seconds']:,.0f} s)."
    )
    rows = {
        "teacher": made["teacher"],
        "student": made["student"],
        "as converted": made["converted"]["student"],
        "converted, no mixing in replaced layers (floor)": made["converted"]["floor"],
        "student, no mixing in replaced layers": made["floor"],
    }
    parts = [head, (_encoder_table if made["encoder"] else _decoder_table)(rows)]
    ratio = share(made)
    if ratio is not None and made["encoder"]:
        parts.append(f"Of the way from no mixing to the teacher the student has come {100 * ratio:.0f} %.")
    elif ratio is not None:
        parts.append(f"Of what conversion lost, training won back {100 * ratio:.0f} %.")
    worst = sorted(made["layers"]["student"], key=lambda layer: -layer["relative_error"])
    parts.append(
        "Layer by layer, on the teacher's inputs: the new mixers' error over the variance of the attention's output, "
        "and cosine.\n\n" + layer_table(made)
    )
    parts.append(f"Most is lost in layer {worst[0]['layer']}.")
    if not made["encoder"]:
        parts += [cost_tables(made), written(made)]
    if "longer" in made:
        parts.append(f"One long text, read piece by piece:\n\n{long_table(made)}")
    return "\n\n".join(parts)


def written(made: dict[str, Any]) -> str:
    """How student and teacher go on from a held-out text, each token the likeliest."""
    texts = {name: " ".join(text.split()) for name, text in made["text"].items()}
    return (
        f"From held-out text, each token the likeliest: *{texts['prompt']}*\n\n"
        f"- student: {texts['student']}\n- teacher: {texts['teacher']}"
    )


def _decoder_table(rows: dict[str, dict]) -> str:
    header = ["nats per token, by position", *measure.told(rows["student"]), "top token as teacher's"]
    body = []
    for name, found in rows.items():
        losses = [f"{loss:.3f}" for loss in measure.told(found).values()]
        body.append([name, *losses, f"{100 * found['agreement']:.1f} %" if "agreement" in found else ""])
    return markdown_table(header, body)


def _encoder_table(rows: dict[str, dict]) -> str:
    header = ["last states", "error over the teacher's variance", "cosine of mean states", "similarity (Spearman)"]
    body = []
    for name, found in rows.items():
        cells = [f"{found[key]:.4f}" if found and key in found else "" for key in ("loss", "cosine", "similarity")]
        body.append([name, *cells])
    return markdown_table(header, body)


def layer_table(made: dict[str, Any]) -> str:
    body = [
        [str(ours["layer"]), f"{first['relative_error']:.3f}", f"{first['cosine']:.3f}"]
        + [f"{ours['relative_error']:.3f}", f"{ours['cosine']:.3f}"]
        for first, ours in zip(made["layers"]["converted"], made["layers"]["student"])
    ]
    return markdown_table(["layer", "error as converted", "cosine", "error of the student", "cosine"], body)


def long_table(made: dict[str, Any]) -> str:
    """Losses along one long text, and the states' bytes."""
    body = [
        [f"{row['first']:,}-{row['last']:,}"]
        + [f"{row[f'{name}_loss']:.3f}" for name in ("student", "teacher")]
        + [f"{row[f'{name}_state_bytes'] / 2**20:,.2f}" for name in ("student", "teacher")]
        for row in made["longer"]
    ]
    return markdown_table(["position", "student, nats", "teacher", "state of the student, MiB", "of the teacher"], body)


def cost_tables(made: dict[str, Any]) -> str:
    """What generation keeps, and what a token takes, after so many tokens."""
    states = made["state_bytes"]
    body = [
        [f"{int(length):,}", *(f"{states[name][length] / 2**20:,.2f}" for name in ("student", "teacher"))]
        for length in states["student"]
        if length in states["teacher"]
    ]
    tables = [markdown_table(["tokens", "state of the student, MiB", "of the teacher"], body)]
    lengths = list(dict.fromkeys(row["tokens"] for row in made["decoding"]))
    times = {(row["model"], row["tokens"]): 1000 * row["token_seconds"] for row in made["decoding"]}
    body = [[f"{n:,}", *(f"{times[name, n]:,.1f}" for name in DECODERS)] for n in lengths]
    if body:
        header = ["tokens before", "student, ms a token", "teacher", "teacher, static cache"]
        tables.append(markdown_table(header, body))
    return "\n\n".join(tables)


DECODERS = ("student", "teacher", "teacher_static_cache")


def draw(made: dict[str, Any], image: str | Path):
    """Draw loss against position, and against tokens trained; of an encoder errors by layer, and so.

    The floor is the student without mixing in replaced layers: of a decoder far above all else, over a break of the
    axis.
    """
    figure = empty_figure((11, 5.2))
    grid, encoder = figure.add_gridspec(1, 2), made["encoder"]
    light, own = shades(made["model_type"], 2)
    floor = {"color": "red", "linestyle": ":", "label": "floor: no mixing in replaced layers"}
    teacher = COLOURS["softmax_lm"]
    if encoder:
        left, lines = [figure.add_subplot(grid[0])], []
        found = made["layers"]
        for name, color, line in (("converted", light, "--"), ("student", own, "-")):
            layers = [layer["layer"] for layer in found[name]]
            errors = [layer["relative_error"] for layer in found[name]]
            left[0].plot(layers, errors, line, marker="o", color=color, label=name)
        left[0].set(xlabel="layer", ylabel="error of the mixer's output over its variance")
    else:
        buckets = {"teacher": made["teacher"], "student": made["student"], "converted": made["converted"]["student"]}
        buckets = {name: of["loss_by_position"] for name, of in (buckets | {"floor": made["floor"]}).items()}
        looks = {
            "teacher": {"color": teacher, "linewidth": 3, "markersize": 8, "label": "teacher"},
            "student": {"color": own, "label": "student"},
            "converted": {"color": light, "linestyle": "--", "label": "as converted"},
            "floor": floor,
        }
        lines = [
            ([np.sqrt(b["first"] * b["last"]) for b in of], [b["loss"] for b in of], looks[name] | {"marker": "o"})
            for name, of in buckets.items()
        ]
        left = _draw_lines(figure, grid[0], lines)
        left[-1].set(xlabel="position in the text (tokens)", ylabel="loss (nats per token)", xscale="log")
    curves = []
    for stage, color, line in (("transfer", light, "--"), ("distill", own, "-")):
        points = [point for point in made["curve"] if point["stage"] == stage]
        if points:
            look = {"color": color, "linestyle": line, "marker": "o", "label": stage}
            curves.append(([point["tokens"] for point in points], [point["loss"] for point in points], look))
    tokens = [x for places, *_ in curves for x in places] or [0]
    ends = [min(tokens), max(tokens)]
    if not encoder:
        curves.append((ends, 2 * [made["teacher"]["loss"]], {"color": teacher, "label": "teacher"}))
    curves.append((ends, 2 * [made["floor"]["loss"]], floor))
    right = _draw_lines(figure, grid[1], curves)
    unit = "error of the states over their variance" if encoder else "nats per token"
    right[-1].set(xlabel="tokens trained on", ylabel=f"held-out loss ({unit})")
    right[-1].xaxis.set_major_formatter("{x:,.0f}")
    for panels in (left, right):
        for panel in panels:
            panel.grid(alpha=0.3)
        panels[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8)
    figure.savefig(image, dpi=130)


def _draw_lines(figure, place, lines: list[tuple[list, list, dict]]) -> list:
    """Lines of x, y and look; those far above the others over a break of the axis. Returns the panels, lowest last."""
    values = [y for _, heights, _ in lines for y in heights]
    panels = broken_panel(figure, place, values)
    for panel in panels:
        for x, y, look in lines:
            panel.plot(x, y, **look)
    return panels


def write_card(made: dict[str, Any], student, folder: Path):
    """A README.md for the folder: the card that sharing would write, for a checkpoint that is not shared yet."""
    name = folder.resolve().name
    subject = Subject(name, head_of(type(student).__name__), model=student, results=made, has_run_file=True)
    write_text(folder / CARD, str(make_card(subject)))
