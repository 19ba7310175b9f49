"""Converted models beside transformers' own classes: see `peers.py`.

transformers computes RMSNorm in float32 whatever the model is in; here its norms are computed in float64 too.
"""

from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)

from ordnung.modeling.convert import convert
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.tables import markdown_table

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
MORE = {"intermediate_size": 40, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1}
GROUPED = {"num_key_value_heads": 2, "eos_token_id": 49}
# architecture -> fields beyond those sizes
DECODERS = {
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 40, "eos_token_id": 49},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 10},
}
ENCODERS = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1},
    "distilbert": {"dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40},
}
# Texts whose embeddings are compared.
TEXTS = ["Call me Ishmael.", "Some years ago, never mind how long precisely, I thought I would sail about a little."]
LOGITS = attrgetter("logits")
PADDINGS = {"padded on the left": slice(0, 4), "padded on the right": slice(-4, None), "padded inside": slice(3, 6)}


def largest(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (got - expected).abs().max().item()


def positions_of(model, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position ids of the real tokens of `mask` (B, N), for the sources that count padding as well."""
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    if model.config.model_type == "roberta":
        counted = counted + model.config.pad_token_id + 1
    return {} if model.config.model_type == "distilbert" else {"position_ids": counted}


def tokens_of(model, rows: int = 2, length: int = 19) -> torch.Tensor:
    highest = min(model.config.vocab_size, 1000)
    return torch.randint(3, highest - 1, (rows, length))


@torch.no_grad()
def padded(source, model, reads) -> dict[str, float]:
    """Largest differences of what `reads` gives, at the real tokens of rows padded in every way."""
    differences = {}
    for name, place in {"unpadded": slice(0, 0), **PADDINGS}.items():
        if source.config.model_type == "distilbert" and name in ("padded on the left", "padded inside"):
            continue  # it takes no positions, and counts padding
        ids = tokens_of(source)
        mask = torch.ones_like(ids)
        mask[0, place] = 0
        expected = reads(source(ids, attention_mask=mask, **positions_of(source, mask)))
        differences[name] = largest(reads(model(ids, attention_mask=mask))[mask == 1], expected[mask == 1])
    return differences


def compare_decoder(source, model) -> dict[str, float | bool]:
    """What a causal model and its conversion give."""
    found = {f"logits, {name}": value for name, value in padded(source, model, LOGITS).items()}
    ids = tokens_of(source, 1)
    if source.config.model_type != "gpt2":  # which does not tell documents by their positions
        packed = {"position_ids": torch.tensor([[*range(7), *range(12)]]), "use_cache": False}
        found["logits, packed"] = largest(model(ids, **packed).logits, source(ids, **packed).logits)
    gradients = []
    for each in (source, model):
        embedded = each.get_input_embeddings()(ids).detach().requires_grad_()
        gradients.append(torch.autograd.grad(each(inputs_embeds=embedded, labels=ids).loss, embedded)[0])
    found["gradient of the loss"] = largest(*gradients)
    generated = [m.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0) for m in (model, source)]
    found["greedy generation, token for token"] = torch.equal(*generated)
    return found


def embeddings_of(model, inputs) -> torch.Tensor:
    """Mean-pooled sentence embeddings, of length 1."""
    mask = inputs["attention_mask"][..., None]
    states = model(**inputs).last_hidden_state * mask
    return torch.nn.functional.normalize(states.sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def compare_embeddings(source, model, tokenizer) -> dict[str, float]:
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {"sentence embeddings": largest(embeddings_of(model, inputs), embeddings_of(source, inputs))}


def random_model(architecture: str, auto, fields: dict, **more):
    config = AutoConfig.for_model(architecture, **{**SIZES, **MORE, **fields, **more})
    model = auto.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from initial zeros and ones
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def wide_norm(norm, states: torch.Tensor) -> torch.Tensor:
    """RMSNorm of one of transformers' modules, in the dtype of the states."""
    return norm.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def converted(source):
    """SoftmaxLM with the weights of `source`, whose norms are computed in float64 from here on."""
    for module in source.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(wide_norm, module)
    return convert(source, "softmax_lm", output_report=True)[0]


def compare_random(architecture: str) -> dict[str, float | bool]:
    """What an architecture of random weights and its conversion give."""
    if architecture in ENCODERS:
        source = random_model(architecture, AutoModelForMaskedLM, ENCODERS[architecture])
        found = {f"masked-LM logits, {k}": v for k, v in padded(source, converted(source), LOGITS).items()}
        base = random_model(architecture, AutoModel, ENCODERS[architecture])
        states = padded(base, converted(base), attrgetter("last_hidden_state"))
        return {**found, **{f"states, {name}": value for name, value in states.items()}}
    source = random_model(architecture, AutoModelForCausalLM, DECODERS[architecture])
    found = compare_decoder(source, converted(source))
    fields = {**DECODERS[architecture], "num_labels": 3}
    classifier = random_model(architecture, AutoModelForSequenceClassification, fields)
    ids = tokens_of(classifier)
    return {**found, "classification": largest(converted(classifier)(ids).logits, classifier(ids).logits)}


def compare_checkpoint(source: str) -> tuple[str, dict[str, float | bool]]:
    """Architecture of a checkpoint, and what it and its conversion give.

    Raises:
        ScriptError: the folder is not there.
    """
    if not Path(source).is_dir():
        raise ScriptError(f"--sources {source} is no folder")
    files = [path.name for path in Path(source).glob("*.gguf")]
    more = {"gguf_file": files[0]} if files else {}
    tokenizer = AutoTokenizer.from_pretrained(source, **more)
    if files:
        plain = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source, **more, **plain).double().eval()
        model.generation_config.max_length = None
        return model.config.model_type, compare_decoder(model, converted(model))
    model = AutoModel.from_pretrained(source).double().eval()
    return model.config.model_type, compare_embeddings(model, converted(model), tokenizer)


def table(peers: list[dict]) -> str:
    lines = []
    for peer in peers:
        for what, difference in peer["differences"].items():
            shown = {True: "equal", False: "differs"}.get(difference) if isinstance(difference, bool) else None
            lines.append([peer["name"], what, shown or f"{difference:.1e}"])
    return markdown_table(["architecture", "compared", "largest difference"], lines)


def run(options) -> int:
    """Compare them by the options of peers.py and write the results; returns the exit status."""
    results = {"seed": options.seed, "peers": [], "machine": machine_info()}

    def add(name: str, weights: str, found: dict) -> None:
        results["peers"].append({"name": name, "weights": weights, "differences": found})
        if options.output_file:
            write_json(options.output_file, results)

    for architecture in (*ENCODERS, *DECODERS):
        torch.manual_seed(options.seed)
        add(architecture, "random", compare_random(architecture))
    for source in options.sources or ():
        torch.manual_seed(options.seed)
        architecture, found = compare_checkpoint(source)
        add(f"{Path(source).name} ({architecture})", "of a checkpoint", found)
    print(table(results["peers"]))
    return 0
