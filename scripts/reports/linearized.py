"""Tables of linearizations side by side, from the results files that linearize.py writes."""

from typing import Any

from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import markdown_table, paragraphs
from ordnung.scripts.linearizing import measure, report


def _forms(name: str, run: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Of a run without mixing, as converted and trained: name, layers that mix anew, tokens and s; what was found."""
    kinds = run["layer_types"]
    replaced = f"{sum(kind != 'full_attention' for kind in kinds)} of {len(kinds)}"
    spent = [f"{run['tokens']:,}", f"{run['seconds']:,.0f}"]
    return [
        ([f"{name}, no mixing", replaced, "", ""], run["converted"]["floor"]),
        ([f"{name}, converted", replaced, "0", "0"], run["converted"]["student"]),
        ([name, replaced, *spent], run["student"]),
    ]


def decoders(runs: dict[str, dict[str, Any]]) -> str:
    """Losses of language models by position, and what they take; `runs` by the name to show."""
    header = ["nats per token", "layers replaced", "tokens", "s"]
    columns = list(dict.fromkeys(name for run in runs.values() for name in measure.told(run["teacher"])))
    header += [*columns, "top token agrees", "state at 8,192, MiB"]
    first = next(iter(runs.values()))
    body = [["teacher", "", "", "", *_losses(first["teacher"], columns), "", _state(first, "teacher")]]
    for name, run in runs.items():
        for cells, found in _forms(name, run):
            agreement = f"{100 * found['agreement']:.1f} %"
            body.append([*cells, *_losses(found, columns), agreement, _state(run, "student")])
    won = [
        f"{name}: "
        + ", ".join(f"{100 * share:.0f} % from {start}" for start, share in run["recovered"].items() if share)
        for name, run in runs.items()
    ]
    said = "Of what conversion lost, won back: " + "; ".join(won) + "."
    return paragraphs(_made_on(runs), markdown_table(header, body), said)


def decoders_in_short(runs: dict[str, dict[str, Any]]) -> str:
    """What language models lost and what their state takes, a line each; `runs` by the name to show."""
    first = next(iter(runs.values()))
    header = ["", "tokens trained", "nats from token 512 on", "top token agrees", "state at 8,192 tokens, MiB"]
    body = [["teacher", "", f"{measure.loss_from(first['teacher'], 512):.3f}", "", _state(first, "teacher")]]
    for name, run in runs.items():
        loss, agreement = measure.loss_from(run["student"], 512), f"{100 * run['student']['agreement']:.1f} %"
        body.append([name, f"{run['tokens']:,}", f"{loss:.3f}", agreement, _state(run, "student")])
    return paragraphs(markdown_table(header, body), _made_on(runs))


def one_decoder(run: dict[str, Any]) -> str:
    """What one of them costs to generate with, what it loses along a long text, and what it writes."""
    parts = ["Generation, beside the teacher's:", report.cost_tables(run)]
    if "longer" in run:
        parts += ["One long text, read piece by piece, beyond what the teacher was trained on:", report.long_table(run)]
    return paragraphs(*parts, report.written(run))


def encoders(runs: dict[str, dict[str, Any]]) -> str:
    """How encoders tell similar texts without training; `runs` by the name to show."""
    header = ["model", "layers replaced", "tokens", "s", "similarity (Spearman)", "floor to teacher", "error of states"]
    first = next(iter(runs.values()))
    body = [["teacher", "", "", "", f"{first['teacher']['similarity']:.3f}", "100 %", ""]]
    for name, run in runs.items():
        floor, teacher = run["converted"]["floor"]["similarity"], run["teacher"]["similarity"]
        for cells, found in _forms(name, run):
            share = 100 * (found["similarity"] - floor) / (teacher - floor)
            body.append([*cells, f"{found['similarity']:.3f}", f"{share:.0f} %", f"{found['loss']:.3f}"])
    return paragraphs(_made_on(runs), markdown_table(header, body))


def converted(runs: dict[str, dict[str, Any]]) -> str:
    """What replacing attention costs a language model before any training; `runs` by the name to show."""
    columns = list(dict.fromkeys(name for run in runs.values() for name in measure.told(run["teacher"])))
    first = next(iter(runs.values()))
    rows = {"teacher": (first["teacher"], _state(first, "teacher"))}
    rows |= {name: (run["converted"]["student"], _state(run, "student")) for name, run in runs.items()}
    header = ["nats per token, untrained", *columns, "lost", "top token agrees", "state at 8,192, MiB"]
    body = []
    for name, (found, state) in rows.items():
        lost = found["loss"] - first["teacher"]["loss"]
        agreement = f"{100 * found['agreement']:.1f} %" if "agreement" in found else ""
        body.append([name, *_losses(found, columns), f"{lost:.3f}" if agreement else "", agreement, state])
    return paragraphs(_made_on(runs), markdown_table(header, body))


def _made_on(runs: dict[str, dict[str, Any]]) -> str:
    first = next(iter(runs.values()))
    tokens = sorted({run["held_out"]["tokens"] for run in runs.values()})
    held_out, rows = " and ".join(f"{count:,}" for count in tokens), first.get("eval_block_size", first["block_size"])
    return f"Measured on {held_out} held-out tokens, rows of {rows}. {described(first['machine'])}"


def _losses(summary: dict[str, Any], columns: list[str]) -> list[str]:
    told = measure.told(summary)
    return [f"{told[name]:.3f}" if name in told else "" for name in columns]


def _state(run: dict[str, Any], name: str) -> str:
    size = run["state_bytes"][name].get("8192")
    return "" if size is None else f"{size / 2**20:,.2f}"
