"""A page that opens without a network: curves of the results files and heatmaps of all mixers, to pick from.

Vega-Lite draws it: its specifications are made here, and vl-convert gives Vega's libraries as one script of 0.9 MB, a
fifth of plotly's.
"""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.benchmarks import growth
from ordnung.scripts.benchmarks.measure import summarise
from ordnung.scripts.benchmarks.report import TITLES
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import COLOURS, OTHER, family_of, of_variants
from ordnung.scripts.common.files import write_text
from ordnung.scripts.experiments.ngrams import NAMES
from ordnung.scripts.experiments.verdicts import interval
from ordnung.scripts.reports import claims
from ordnung.scripts.reports.results import (
    CAUSAL_BENCHMARKS,
    CONV_BENCHMARKS,
    ENCODER_BENCHMARKS,
    RESULTS,
    commits,
    load,
    load_compare,
)

COUNTED = "counted"  # n-grams
OTHERS = "others"
SHOWN = {**COLOURS, COUNTED: "#D00000", OTHERS: OTHER}
POSITIONS = "held-out loss, nats, by position in the block ({})"
MIXERS = """Models of 2 layers and 4 heads after 300 steps on Moby-Dick (compare_families.yaml, one seed) read the first
{} tokens of “{}” Rows are queries, columns keys; LinformerLM's are the tokens of a block and of the one before it, then
its slots."""
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [12, 4]]

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ordnung: claims, curves and mixers</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
fieldset {{ border: 1px solid #ccc; display: flex; flex-wrap: wrap; gap: 0 1.2em; margin: 0.4em 0; }}
fieldset .vega-bind-name {{ margin-right: 0.4em; }}
table {{ border-collapse: collapse; font-size: 13px; }} td, th {{ border: 1px solid #ccc; padding: 3px 6px; }}
td {{ vertical-align: top; }} th {{ text-align: left; }}
</style>
<script>{libraries}</script></head><body>
<h1>ordnung: claims, curves and mixers</h1>
<p>Language models that replace softmax attention, beside softmax attention on the same backbone. Every number stands
in a results file of the project (model_cards/results); the words at a point name the file and its commit. Bars are
quartiles of timings, or 95 % t-intervals over seeds. The curves of one picture are of one size of model, those of
two files may be of two machines: compare within a file.</p>
<noscript>The pictures are drawn by JavaScript, which this browser does not run.</noscript>
<h2>Curves</h2>
<fieldset id="pick-families"><legend>families</legend></fieldset>
<fieldset id="pick-metrics"><legend>metrics and lengths</legend></fieldset>
<div id="curves"></div>
<h2>How each family mixes</h2>
<p>{mixers}</p>
<fieldset id="pick-mixer"><legend>mixer</legend></fieldset>
<div id="heatmaps"></div>
<h2>Claims and verdicts</h2>
<p>A verdict follows from an interval and a bound: “holds” where the whole interval is on the claim's side, “does not
hold” where all of it is on the other, else “not decided”; the rule in full is in model_cards/claims.md.</p>
{verdicts}
<h2>Where each number stands</h2>
{evidence}
<script>
const options = {{renderer: "svg", actions: false}};
window.drawn = Promise.all([vegaEmbed("#curves", {curves}, options), vegaEmbed("#heatmaps", {heatmaps}, options)]);
window.drawn.then(() => document.body.dataset.drawn = "yes");
</script></body></html>
"""


def point(metric: str, name: str, x: float, y: float, file: str, family: str | None = None, **more) -> dict:
    """One point of a curve; `more` are `low` and `high` of its interval, and `n`."""
    family = family_of(name) if family is None else family
    source = f"{file}.json, commit {commits(file).replace('`', '')}"
    known = family if family in SHOWN else OTHERS
    ends = {key: float(f"{value:.4g}") for key, value in more.items()}
    return {"metric": metric, "name": name, "family": known, "x": x, "y": float(f"{y:.5g}"), "source": source, **ends}


def over_seeds(values: Sequence[float]) -> dict:
    """Mean of one value a seed, and its interval where there are several."""
    found = interval(values)
    ends = {"low": found.low, "high": found.high} if found.n > 1 else {}
    return {"y": found.mean, "n": found.n, **ends}


def of_times(seconds: dict, scale: float = 1.0) -> dict:
    """Median and quartiles of what `summarise` gives of times."""
    found = {key: scale * seconds[name] for key, name in (("y", "median"), ("low", "q1"), ("high", "q3"))}
    return found | {"n": seconds["n"]}


def counted() -> Iterator[dict]:
    results = load("growth")
    shape = results["settings"]["shape"]
    size = f"width {shape['hidden_size']}, {shape['num_hidden_layers']} layers"
    for task, title in growth.TASKS.items():
        metric = f"FLOPs, counted: {title}, {size}" if task != "state" else f"bytes, counted: generation state, {size}"
        for name, of in results["families"].items():
            for x, y in zip(results["lengths"], of[task]["values"]):
                if y:
                    yield point(metric, name, x, y, "growth", name)


def timed() -> Iterator[dict]:
    """Rows of benchmark.py: time of a token, and peak memory."""
    for file in (*CONV_BENCHMARKS, *CAUSAL_BENCHMARKS, "linformer_lm_training", *ENCODER_BENCHMARKS):
        results = load(file)
        shape = results["settings"]["shape"]
        size = f"width {shape['hidden_size']}, {shape['num_hidden_layers']} layers, {results['settings']['threads']} "
        size += "threads" if results["settings"]["threads"] > 1 else "thread"
        for row in results["results"]:
            title = TITLES.get(row["task"], row["task"])
            if seconds := row.get("seconds"):
                times = of_times(seconds, 1e6 / row["tokens"])
                yield point(f"µs a token: {title}, {size}", row["name"], row["length"], file=file, **times)
            if row.get("peak_bytes"):
                yield point(f"peak bytes: {title}, {size}", row["name"], row["length"], row["peak_bytes"], file)


def timed_alone() -> Iterator[dict]:
    """Rows of the programs that time one family's operation in its forms."""
    file = "sparse_attention_lm_bench"
    results = load(file)
    titles = {"attention": "attention alone, 4 heads", "decoding": "one more token of a layer"}
    for part, title in titles.items():
        for row in results[part]:
            how = " and backward" if row.get("backward") else ""
            ran = {name: of for name, of in row["competitors"].items() if "reason" not in of}  # else: why it could not
            for name, of in ran.items():
                attention = name == "SDPA" or name.startswith("full attention")
                family = "softmax_lm" if attention else "mistral" if "Mistral" in name else "sparse_attention_lm"
                times = of_times(summarise(of["all_seconds"]))
                yield point(f"seconds: {title}{how}", name, row["length"], file=file, family=family, **times)
    file = "quadratic_kernel_lm_bench"
    results = load(file)
    for row in results["lengths"]:
        for part, title in (("forward", "forward"), ("gradients", "forward and backward")):
            for name, seconds in row[part].items():
                metric = f"seconds: {title}, kernel alone, head size {row['head_size']}"
                family = "softmax_lm" if name == "softmax" else "quadratic_kernel_lm"
                yield point(metric, name, row["length"], file=file, family=family, **of_times(seconds))
    file = "cubic_prefix_lm_benchmark"
    results = load(file)
    for row in results["training"]:
        for name, of in row["competitors"].items():
            metric = f"seconds: training step, {row['layers']} layers, width {results['settings']['hidden_size']}"
            family = "softmax_lm" if name in ("causal", "encoder") else "cubic_prefix_lm"
            times = of_times(summarise(of["all_seconds"]))
            yield point(metric, name, row["length"], file=file, family=family, **times)


def learned() -> Iterator[dict]:
    """Quality: loss by position, recall by pairs, answers by steps, of every results file that has them."""
    for path in sorted(RESULTS.glob("*.json")):
        file, results = path.stem, load_compare(path.stem)
        variants = results.get("variants")
        if not isinstance(variants, dict) or not isinstance(results.get("settings", {}).get("variants"), dict):
            continue
        families = of_variants(results["settings"])
        counted = [name for name in NAMES.values() if name in results.get("ngrams", ())]
        for order in counted:  # the same at every position: a line to hold the others against
            for bucket in next(iter(variants.values())).get("loss_by_position", ()):
                values = over_seeds([math.log(value) for value in results["ngrams"][order]["values"]])
                yield point(POSITIONS.format(file), order, bucket["first"], file=file, family=COUNTED, **values)
        for name, of in variants.items():
            found = [(POSITIONS.format(file), bucket["first"], bucket) for bucket in of.get("loss_by_position", ())]
            pairs = zip(results["settings"].get("num_pairs", ()), of.get("accuracy", ()))
            found += [(f"right answers, by key-value pairs ({file})", *pair) for pair in pairs]
            steps = [step for step in of.get("curve", ()) if "answers" in step]
            found += [(f"right answers, by steps ({file})", step["step"], step["answers"]) for step in steps]
            for metric, x, cell in found:
                yield point(metric, name, x, file=file, family=families[name], **over_seeds(cell["values"]))


def told_apart(points: Sequence[dict]) -> list[dict]:
    """The points, with `dash`: which member of its family a curve is in a picture; a second run is a curve too."""
    runs: Counter[tuple[str, str, float]] = Counter()
    members: dict[tuple[str, str], list[str]] = {}
    for one in points:
        runs[place := (one["metric"], one["name"], one["x"])] += 1
        if runs[place] > 1:
            one["name"] += f", run {runs[place]}"
        names = members.setdefault((one["metric"], one["family"]), [])
        if one["name"] not in names:
            names.append(one["name"])
        one["dash"] = names.index(one["name"]) % len(DASHES)
    return list(points)


def pick(name: str, value, label: str, element: str, kind: str = "select", **more) -> dict:
    return {"name": name, "value": value, "bind": {"input": kind, "name": label, "element": f"#{element}", **more}}


def curves(cost: Sequence[dict], quality: Sequence[dict]) -> dict:
    """Vega-Lite: cost against length, both as logarithms, and quality below it, one metric at a time."""
    present = [name for name in SHOWN if name in {one["family"] for one in (*cost, *quality)}]
    lengths = sorted({one["x"] for one in cost})
    params = [pick(name, True, name, "pick-families", "checkbox") for name in present]
    for number, points in enumerate((cost, quality)):
        metrics = list(dict.fromkeys(one["metric"] for one in points))
        params.append(pick(f"metric{number}", metrics[0], ("cost", "quality")[number], "pick-metrics", options=metrics))
    params += [
        pick("shortest", lengths[0], "from, tokens", "pick-metrics", options=lengths),
        pick("longest", lengths[-1], "to, tokens", "pick-metrics", options=lengths),
    ]
    ticked = " || ".join(f"(datum.family == '{name}' && {name})" for name in present)
    colours = {"domain": present, "range": [SHOWN[name] for name in present]}
    legend = {"orient": "top", "title": None, "columns": 6, "symbolType": "circle"}
    tooltip = [{"field": field, "type": "nominal"} for field in ("name", "x", "y", "low", "high", "n", "source")]

    def picture(number: int, points: Sequence[dict], title: str, chosen: str, scale: dict) -> dict:
        y = {"type": "quantitative", "scale": scale, "title": None, "axis": {"format": "~g", "gridOpacity": 0.5}}
        along, tokens = {"type": "log", "nice": False}, {"format": ",d", "gridOpacity": 0.5}
        last = [{"joinaggregate": [{"op": "max", "field": "x", "as": "end"}], "groupby": ["name"]}]
        return {
            "width": 760,
            "height": 380,
            "title": {"text": {"expr": f"metric{number}"}, "anchor": "start"},
            "data": {"values": points},
            "transform": [{"filter": f"datum.metric == metric{number}{chosen} && ({ticked})"}],
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": title, "scale": along, "axis": tokens},
                "color": {"field": "family", "type": "nominal", "scale": colours, "legend": legend},
                "detail": {"field": "name"},
                "tooltip": tooltip,
            },
            "layer": [
                {
                    "mark": {"type": "line", "point": {"size": 40}},
                    "encoding": {
                        "y": {"field": "y", **y},
                        "strokeDash": {"field": "dash", "type": "ordinal", "legend": None, "scale": {
                            "domain": list(range(len(DASHES))), "range": DASHES}},
                    },
                },
                {"mark": "rule", "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}}},
                {
                    "transform": [*last, {"filter": "datum.x == datum.end"}],
                    "mark": {"type": "text", "align": "left", "dx": 7, "fontSize": 11},
                    "encoding": {"y": {"field": "y", **y}, "text": {"field": "name"}},
                },
            ],
        }  # fmt: skip

    within = " && datum.x >= shortest && datum.x <= longest"
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "params": params,
        "vconcat": [
            picture(0, cost, "tokens", within, {"type": "log", "nice": False}),
            picture(1, quality, "position, pairs or steps", "", {"zero": False}),
        ],
        "padding": {"left": 5, "top": 5, "bottom": 5, "right": 150},
    }


def heatmaps(mixers: Sequence[dict]) -> dict:
    """Vega-Lite: every head of one layer of one family, queries downwards, keys to the right.

    Args:
        mixers: contents of `mixing.json` files, one a family.
    """
    values = [
        {"family": mixer["model_type"], "layer": f"{i}", "kind": layer["layer_type"], "head": head, "keys": keys,
         "w": [float(word) for line in lines for word in line.split()]}
        for mixer in mixers
        for i, layer in enumerate(mixer["layers"])
        for head, lines in enumerate(layer["weights"])
        for keys in [len(lines[0].split())]
    ]  # fmt: skip
    families = list(dict.fromkeys(one["family"] for one in values))
    layers = sorted({one["layer"] for one in values})
    faintest = 0.1 / max(one["keys"] for one in values)
    axis = {"labels": False, "ticks": False}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "params": [
            pick("family", families[0], "family", "pick-mixer", options=families),
            pick("layer", layers[0], "layer", "pick-mixer", options=layers),
        ],
        "title": {"text": {"expr": "family + ', layer ' + layer"}, "anchor": "start"},
        "data": {"values": values},
        "transform": [
            {"filter": "datum.family == family && datum.layer == layer"},
            {"flatten": ["w"]},
            {"window": [{"op": "row_number", "as": "i"}], "groupby": ["head"]},
            {"calculate": "(datum.i - 1) % datum.keys", "as": "key"},
            {"calculate": "floor((datum.i - 1) / datum.keys)", "as": "query"},
            {"calculate": f"max(datum.w, {faintest})", "as": "shown"},
        ],
        "facet": {"column": {"field": "head", "title": "head"}},
        "spec": {
            "width": 210,
            "height": 210,
            "mark": "rect",
            "encoding": {
                "x": {"field": "key", "type": "ordinal", "axis": axis},
                "y": {"field": "query", "type": "ordinal", "axis": axis},
                "color": {
                    "field": "shown",
                    "type": "quantitative",
                    "title": "weight",
                    "scale": {"type": "log", "scheme": "viridis", "domain": [faintest, 1], "clamp": True},
                },
                "tooltip": [{"field": name, "type": "nominal"} for name in ("query", "key", "w")],
            },
        },
    }


def html_table(markdown: str) -> str:
    """A table in Markdown as HTML, without its links."""
    header, _, *body = (line.strip("| ").split(" | ") for line in markdown.split("\n"))
    rows = [[f"<th>{cell}</th>" for cell in header], *([f"<td>{cell}</td>" for cell in line] for line in body)]
    table = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    return "<table>" + LINK.sub(r"\1", table) + "</table>"


def embedded(value: dict) -> str:
    """JSON that may stand in a script of a page."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def write(path: str | Path):
    """Write the page from the results files.

    Raises:
        ScriptError: vl-convert is not installed, or a results file is missing.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise ScriptError(f'{error}: pip install "ordnung[page]"') from error
    mixers, every = [load(f"mixing_{name}") for name in FAMILIES], claims.all_claims()
    cost = told_apart([*counted(), *timed(), *timed_alone()])
    libraries = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    text = PAGE.format(
        libraries=libraries,
        mixers=MIXERS.format(mixers[0]["tokens"], html.escape(mixers[0]["text"])),
        verdicts=html_table(claims.markdown(every)),
        evidence=html_table(claims.evidence(every)),
        curves=embedded(curves(cost, told_apart(list(learned())))),
        heatmaps=embedded(heatmaps(mixers)),
    )
    write_text(path, text)
