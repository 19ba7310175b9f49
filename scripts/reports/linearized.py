"""Tables of linearizations side by side, from the results files that linearize.py writes."""

from typing import Any

from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.linearizing import measure, report


def replaced(results: dict[str, Any]) -> str:
    """How many layers mix otherwise than the teacher's."""
    kinds = results["layer_types"]
    return f"{sum(kind != 'full_attention' for kind in kinds)} of {len(kinds)}"


def decoders(runs: dict[str, dict[str, Any]]) -> str:
    """Losses of language models by position, and what they take; `runs` by the name to show."""
    header = ["nats per token", "layers replaced", "tokens", "s"]
    columns = list(dict.fromkeys(name for run in runs.values() for name in measure.told(run["teacher"])))
    header += [*columns, "top token agrees", "state at 8,192, MiB"]
    first = next(iter(runs.values()))
    body = [["teacher", "", "", "", *_losses(first["teacher"], columns), "", _state(first, "teacher")]]
    for name, run in runs.items():
        converted = {**run, "student": run["converted"]["student"]}
        floor = {**run, "student": run["converted"]["floor"]}
        for words, made, spent in (
            (f"{name}, no mixing", floor, ("", "")),
            (f"{name}, converted", converted, ("0", "0")),
            (name, run, (f"{run['tokens']:,}", f"{run['seconds']:,.0f}")),
        ):
            losses = _losses(made["student"], columns)
            agreement = f"{100 * made['student']['agreement']:.1f} %"
            state = _state(run, "student")
            body.append([words, replaced(run), *spent, *losses, agreement, state])
    won = [
        f"{name}: "
        + ", ".join(f"{100 * share:.0f} % from {start}" for start, share in run["recovered"].items() if share)
        for name, run in runs.items()
    ]
    parts = [_made_on(runs), markdown_table(header, body), "Of what conversion lost, won back: " + "; ".join(won) + "."]
    return "\n\n".join(parts)


def encoders(runs: dict[str, dict[str, Any]]) -> str:
    """How encoders tell similar texts without training; `runs` by the name to show."""
    header = ["model", "layers replaced", "tokens", "s", "similarity (Spearman)", "floor to teacher", "error of states"]
    first = next(iter(runs.values()))
    body = [["teacher", "", "", "", f"{first['teacher']['similarity']:.3f}", "100 %", ""]]
    for name, run in runs.items():
        floor, teacher = run["converted"]["floor"]["similarity"], run["teacher"]["similarity"]
        for words, found, spent in (
            (f"{name}, no mixing", run["converted"]["floor"], ("", "")),
            (f"{name}, converted", run["converted"]["student"], ("0", "0")),
            (name, run["student"], (f"{run['tokens']:,}", f"{run['seconds']:,.0f}")),
        ):
            share = 100 * (found["similarity"] - floor) / (teacher - floor)
            cells = [f"{found['similarity']:.3f}", f"{share:.0f} %", f"{found['loss']:.3f}"]
            body.append([words, replaced(run), *spent, *cells])
    return "\n\n".join([_made_on(runs), markdown_table(header, body)])


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
    return "\n\n".join([_made_on(runs), markdown_table(header, body)])


def layers(run: dict[str, Any]) -> str:
    """What was lost in each layer of one run."""
    return report.layer_table(run)


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
