"""How a model mixes the tokens of a text, and how much of it a low rank holds."""

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, pipeline
from transformers.modeling_utils import PreTrainedModel

import ordnung
from ordnung.modeling.registration import is_registered
from ordnung.modeling.sources import SOURCES
from ordnung.scripts.common.corpus import find_files, read_text
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.figures import new_figure
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import described, machine_info
from ordnung.scripts.common.models import best_run, check_folder
from ordnung.scripts.common.tables import markdown_table, paragraphs
from ordnung.scripts.finetuning.predicting import find_head
from ordnung.scripts.finetuning.predicting import load as load_labeller
from ordnung.scripts.linearizing.teacher import Mixed, watched


def load(name: str, **fields):
    """Base model, with attention that returns its weights, and tokenizer of a folder or Hub name.

    Args:
        fields: config fields of a checkpoint of another architecture, for its conversion.

    Returns:
        both, and a function that tells what a classifier says of a text; of another model None.

    Raises:
        ScriptError: there is no such checkpoint or no tokenizer in it, or it is of another architecture.
    """
    check_folder(name)
    try:
        config, head = find_head(name)
        model_type, answer = config.model_type, None
        if model_type in SOURCES:
            family = "sparse_attention_lm" if SOURCES[model_type].windows(config) else "softmax_lm"
            fields |= {"head": "Model", "output_report": True, "attn_implementation": "eager"}
            model, _ = ordnung.convert(name, family, **fields)
        elif head is not None:
            model = load_labeller(name, attn_implementation="eager")[0]
        else:
            model = AutoModel.from_pretrained(name, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ScriptError(f"cannot load a model and its tokenizer from {name}: {error}") from None
    if not is_registered(type(model)):
        raise ScriptError(
            f"{name} is of the architecture {model_type!r}: draw one of ordnung's or {', '.join(SOURCES)}"
        )
    if head is not None and hasattr(model, "model"):
        if head == "ForSequenceClassification":
            answer = answers_of(model, tokenizer)
        model = model.model
    return model, tokenizer, answer


def answers_of(model: PreTrainedModel, tokenizer):
    """What a classifier says of a text, in words."""
    several = model.config.problem_type == "multi_label_classification"
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)

    def answer(text: str) -> str:
        (said,) = classify([text], truncation=True)  # the likeliest first
        said = [each for each in said if each["score"] >= 0.5] if several else said[:1]
        return ", ".join(f"{each['label']} {each['score']:.2f}" for each in said) or "no label"

    return answer


@torch.no_grad()
def mixing_weights(model: PreTrainedModel, input_ids: torch.LongTensor) -> list[torch.Tensor]:
    """(H, N, keys) of each layer, for one sequence.

    Args:
        model: a base model of this package.
        input_ids: (1, N).
    """
    calls: list[Mixed] = []
    with watched(model, range(len(model.layers)), calls.append):
        model(input_ids, use_cache=False)
    return [model.layers[call.layer].mixer.mixing_weights(call.inputs, **call.kwargs)[0] for call in calls]


def cumulative_share(weights: torch.Tensor) -> torch.Tensor:
    """(H, r) for (H, N, keys): the share of the sum of all singular values that the first 1, 2, ..., r have."""
    values = torch.linalg.svdvals(weights.double())
    return values.cumsum(-1) / values.sum(-1, keepdim=True)


def written_out(weights: list[torch.Tensor], layer_types: list[str]) -> list[dict]:
    """For each layer: its type, and of each head of (H, N, keys) the rows of absolute weights, as words."""
    return [
        {"layer_type": layer_type, "weights": [[" ".join(f"{w:.3g}" for w in row) for row in head] for head in layer]}
        for layer, layer_type in zip((layer.abs().tolist() for layer in weights), layer_types, strict=True)
    ]


def spectrum(shares: list[torch.Tensor], layer_types: list[str], rank: int) -> list[dict]:
    """For each layer: its type; the share at `rank`, mean over heads, least and of each head; the curve of the mean."""
    rows = []
    for i, (share, layer_type) in enumerate(zip(shares, layer_types, strict=True)):
        heads = share[:, min(rank, share.shape[1]) - 1]
        numbers = {"mean": heads.mean(), "least": heads.min(), "heads": heads, "curve": share.mean(0)}
        rounded = {name: x.double().numpy().round(4).tolist() for name, x in numbers.items()}
        rows.append({"layer": i, "layer_type": layer_type, **rounded})
    return rows


def markdown(results: dict) -> str:
    """The figures of a spectrum.json as a table."""
    header = ["layer", "mean of heads", "least", "each head"]
    body = [
        [f"{row['layer']}: {row['layer_type']}", f"{row['mean']:.3f}", f"{row['least']:.3f}"]
        + [" ".join(f"{head:.2f}" for head in row["heads"])]
        for row in results["layers"]
    ]
    return paragraphs(
        f"Share of the sum of singular values at rank {results['rank']} of {results['tokens']} tokens, "
        f"{results['model']}. {described(results['machine'])}",
        markdown_table(header, body),
    )


def draw_weights(weights: list[torch.Tensor], layer_types: list[str], image: Path, title: str | None = None):
    """Draw (H, N, keys) of each layer: heads side by side, on a scale that shows small weights."""
    from matplotlib.colors import LogNorm

    rows, columns = len(weights), max(len(layer) for layer in weights)
    # a tenth of what each key has where all have the same, so that broad heads show beside sharp ones
    faintest = 0.1 / max(layer.shape[-1] for layer in weights)
    brightest = max(float(layer.abs().max()) for layer in weights)
    scale = LogNorm(faintest, max(brightest, 2 * faintest))  # to the largest there is, so that all colours are used
    figure, axes = new_figure(rows, columns, figsize=(1.3 * columns + 1, 1.3 * rows + 0.6), squeeze=False)
    for i, layer in enumerate(weights):
        for j, panel in enumerate(axes[i]):
            panel.set(xticks=[], yticks=[])
            if j >= len(layer):
                panel.axis("off")
                continue
            values = layer[j].float().abs().clamp(min=faintest).cpu()
            shown = panel.imshow(values, norm=scale, aspect="auto", cmap="viridis")
            if i == 0:
                panel.set_title(f"head {j}", fontsize=8)
        axes[i][0].set_ylabel(f"{i}: {layer_types[i]}", fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="weight (absolute)")
    figure.savefig(image, dpi=120)


def kernels(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer that convolves its lags in tokens (K,), below 0 for tokens that follow, and its weights (H, K).

    A head's channels are averaged.
    """

    def by_lag(mixer):
        weights = mixer.kernel().detach().float().cpu().unflatten(0, (model.config.num_attention_heads, -1)).mean(1)
        return (torch.arange(mixer.kernel_size) - mixer.ahead) * mixer.dilation, weights

    return {
        f"{number}: {kind}": by_lag(layer.mixer)
        for number, (layer, kind) in enumerate(zip(model.layers, model.config.layer_types))
        if hasattr(layer.mixer, "kernel")
    }


def draw_kernels(found: dict[str, tuple[torch.Tensor, torch.Tensor]], image: Path, title: str):
    """Draw the size of each head's weights against the lag in tokens, both so that small ones are seen."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    columns = min(len(found), 4)
    rows = -(-len(found) // columns)
    shape = {"figsize": (3.2 * columns + 0.6, 2.5 * rows + 0.6), "squeeze": False}
    figure, panels = new_figure(rows, columns, sharey=True, **shape)
    for panel, (name, (lags, kernel)) in zip(panels.flat, found.items()):
        for head, weights in enumerate(kernel):
            panel.plot(lags, weights.abs(), color=colormaps["viridis"](head / len(kernel)), label=f"head {head}")
        panel.set_yscale("log")
        panel.set_title(name, fontsize=8)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels.flat[len(found) :]:
        panel.axis("off")
    if len(kernel) <= 12:
        panels[0][0].legend(fontsize=6)
    figure.supxlabel("lag, tokens", fontsize=9)
    figure.supylabel("weight (absolute)", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(image, dpi=120)


def draw_spectrum(results: dict, image: Path):
    """From the content of a spectrum.json."""
    from matplotlib import colormaps

    rows, rank = results["layers"], results["rank"]
    figure, (curves, table) = new_figure(1, 2, figsize=(11, 4.5))
    for row in rows:
        colour = colormaps["viridis"](row["layer"] / max(len(rows) - 1, 1))
        label = f"{row['layer']}: {row['layer_type']}"
        curves.plot(range(1, len(row["curve"]) + 1), row["curve"], color=colour, label=label)
    curves.axvline(rank, color="grey", linewidth=0.8, linestyle="--")
    curves.set(xlabel="rank", ylabel="share of the sum of singular values, mean of heads", ylim=(0, 1.02))
    curves.grid(alpha=0.3)
    curves.legend(fontsize=7)
    width = max(len(row["heads"]) for row in rows)
    grid = [[*row["heads"], *[float("nan")] * (width - len(row["heads"]))] for row in rows]
    shown = table.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    table.set(xlabel="head", ylabel="layer", title=f"at rank {rank}", xticks=range(width), yticks=range(len(rows)))
    figure.suptitle(results["model"], fontsize=9)
    figure.colorbar(shown, ax=table, label=f"share held by {rank} singular values")
    figure.savefig(image, dpi=120)


def run(options) -> int:
    """Draw, write and print what plot_mixing.py's options ask for; returns the exit status."""
    name = best_run(options.model_name_or_path)
    model, tokenizer, answer = load(name)
    texts = options.text
    if texts is None:
        texts = ["".join(read_text(path) for path in find_files([options.text_file], "text_file"))]
    output_dir = Path(options.output_dir)
    written = []
    for number, text in enumerate(texts, 1):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=options.max_length)["input_ids"]
        tokens = ids.shape[1]
        if tokens < 2:
            raise ScriptError(f"the text has {tokens} tokens: give a longer one")
        rank = min(options.rank or max(tokens // 4, 1), tokens)
        try:
            weights = mixing_weights(model, ids)
        except ValueError as error:
            raise ScriptError(f"{tokens} tokens of the text cannot be used, set --max_length: {error}") from None

        shares = [cumulative_share(layer) for layer in weights]
        rows = spectrum(shares, model.config.layer_types, rank)
        output_dir.mkdir(parents=True, exist_ok=True)
        ending = "" if number == 1 else f"_{number}"
        shown = " ".join(text.split())
        title = f"{name}: {shown[:60]}{'…' if len(shown) > 60 else ''}" + (f" → {answer(text)}" if answer else "")
        draw_weights(weights, model.config.layer_types, output_dir / f"mixing{ending}.png", title)
        results = {"machine": machine_info(), "model": name, "tokens": tokens, "rank": rank, "layers": rows}
        write_json(output_dir / f"spectrum{ending}.json", results)
        if options.weights:
            about = {"machine": results["machine"], "model": name, "model_type": model.config.model_type, "text": shown}
            layers = written_out(weights, model.config.layer_types)
            write_json(output_dir / f"mixing{ending}.json", {**about, "tokens": tokens, "layers": layers})
            written.append(f"mixing{ending}.json")
        draw_spectrum(results, output_dir / f"spectrum{ending}.png")
        print(markdown(results))
        written += [f"mixing{ending}.png", f"spectrum{ending}.png", f"spectrum{ending}.json"]
    found = kernels(model)
    if found:
        draw_kernels(found, output_dir / "kernels.png", name)
        written.append("kernels.png")
    for image in written:
        print(output_dir / image)
    return 0
