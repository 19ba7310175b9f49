"""The ladder of score functions: a forest plot of how far each is from the dot product, in language and in recall."""

from pathlib import Path

from ordnung.scripts.common.figures import COLOURS, new_figure
from ordnung.scripts.common.machine import described
from ordnung.scripts.common.tables import markdown_table
from ordnung.scripts.experiments.verdicts import MARGIN, Interval, beyond_counting, changes, equal, interval
from ordnung.scripts.reports.results import has_results, load

TEXT, RECALL, DOT = "ladder_compare", "ladder_recall", "dot"


def text() -> dict[str, Interval]:
    """Of each rung, how much higher the perplexity is than the dot product's, relative to it, seed by seed."""
    values = {name: of["eval_perplexity"]["values"] for name, of in load(TEXT)["variants"].items()}
    return {name: changes(own, values[DOT]) for name, own in values.items() if name != DOT}


def recall() -> dict[str, Interval]:
    """Of each rung, how much more of the most pairs it recalls, as a share of all answers, seed by seed."""
    values = {name: of["accuracy"][-1]["values"] for name, of in load(RECALL)["variants"].items()}
    return {name: interval([a - b for a, b in zip(own, values[DOT])]) for name, own in values.items() if name != DOT}


def markdown() -> str:
    """Both, with whether they are equal but for the margin; in words that a part is not there yet."""
    parts = []
    if has_results(TEXT):
        results = load(TEXT)
        trigram, variants = results["ngrams"]["trigram"]["mean"], results["variants"]
        means = {name: of["eval_perplexity"]["mean"] for name, of in variants.items()}
        body = [[DOT, f"{means[DOT]:.2f}", "-", "-"]]
        for name, found in text().items():
            verdict = beyond_counting(equal(found), [means[name], means[DOT]], trigram)
            body.append([name, f"{means[name]:.2f}", found.text(1, 100, " %"), verdict])
        about = f"{described(results['machine'])} Text, {variants[DOT]['steps']} steps; a trigram that counted the "
        about += f"same tokens {trigram:.2f}."
        header = ["score", "perplexity", "above the dot product's", f"equal within {MARGIN:.0%}"]
        parts += [about, markdown_table(header, body)]
    if has_results(RECALL):
        results = load(RECALL)
        settings, variants = results["settings"], results["variants"]
        means = {name: of["accuracy"][-1]["mean"] for name, of in variants.items()}
        body = [[DOT, f"{means[DOT]:.3f}", "-", "-"]]
        body += [[name, f"{means[name]:.3f}", found.text(3), equal(found)] for name, found in recall().items()]
        about = f"{described(results['machine'])} Recall of {settings['num_pairs'][-1]} pairs, {settings['max_steps']} "
        header = ["score", "right", "more than the dot product", f"equal within {MARGIN:g}"]
        parts += [f"{about}steps.", markdown_table(header, body)]
    if len(parts) == 4:
        parts.append("![Forest plot of the ladder](figures/ladder.png)")
    for name in (TEXT, RECALL):
        if not has_results(name):
            program = name.partition("_")[2]
            parts.append(f"Not run yet: `python scripts/{program}.py --config scripts/configs/{name}.yaml`.")
    return "\n\n".join(parts)


def plot(image: Path):
    """A line a rung: mean and 95 % t-interval of its difference from the dot product, over the margin in grey."""
    figure, panels = new_figure(1, 2, figsize=(10, 3.4), sharey=True)
    for panel, found, label in (
        (panels[0], text(), "perplexity above the dot product's, %"),
        (panels[1], recall(), "right answers above, %"),
    ):
        panel.axvspan(-100 * MARGIN, 100 * MARGIN, color="#DDDDDD")
        panel.axvline(0, color=COLOURS["softmax_lm"], linewidth=1)
        for i, (name, each) in enumerate(found.items()):
            colour = COLOURS["conv_lm" if name == "convolution" else "softmax_lm"]
            ends = [[100 * (each.mean - each.low)], [100 * (each.high - each.mean)]] if each.n > 1 else None
            panel.errorbar([100 * each.mean], [i], xerr=ends, fmt="o", color=colour, capsize=3)
        panel.set_yticks(range(len(found)), list(found))
        panel.set(xlabel=f"{label} (n = {each.n}; grey: equal)")
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.savefig(image, dpi=120)
