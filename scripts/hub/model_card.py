"""The model card of a checkpoint that is shared: huggingface_hub's card classes, filled from a results file.

A results file is the JSON that a training script leaves beside its model. Of it the card reads, each if it is there:

- `eval_results`: a list of keyword arguments of `huggingface_hub.EvalResult`. An entry may hold `over_seeds` besides:
  mean, standard deviation and values over several runs, as `tables.summarise` gives them;
- `datasets`: Hub names of the data trained on; `data`: where it comes from, in words;
- `base_model`: Hub name of the model that was fine-tuned;
- `tokens`, `steps`, `seconds`, `seed`, `num_processes`, `mixed_precision`: the run;
- `sections`: further sections of the card, title to Markdown;
- `machine`: what `machine.machine_info` says.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedConfig, PreTrainedModel

from ordnung.modeling.mixers.mixer import MIXERS
from ordnung.modeling.registration import AUTO_CLASSES, is_registered
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.tables import estimate, markdown_table

# class name ending -> the Hub's pipeline tag
PIPELINE_TAGS = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "Model": "feature-extraction",
}
# what the snippet gives to the pipeline
EXAMPLE = '"The whale"'
EXAMPLES = {"text-generation": '"The whale", max_new_tokens=40', "fill-mask": 'f"The {tokenizer.mask_token}"'}
COST_LENGTHS = (128, 512, 2048, 8192)
HELD_OUT = "held-out text"  # the name of the split that pretraining sets apart


@dataclass
class Subject:
    """What a card is about.

    Args:
        repo_id: "user/name" on the Hub.
        head: ending of the model's class name, a key of `PIPELINE_TAGS`.
        revision: branch that the snippet loads.
        model: the model; None for an adapter, whose base model is not at hand.
        base_model: Hub name of the model that an adapter belongs to.
        labels: of an adapter for classification, number to name; a model's are in its config.
        results: content of the results file.
        license: the Hub's name of the weights' licence.
        language: ISO 639 codes of the language trained on.
        has_run_file: run.yaml, all options of the run, lies beside the card.
    """

    repo_id: str
    head: str = "Model"
    revision: str = "main"
    model: PreTrainedModel | None = None
    base_model: str | None = None
    labels: dict[int, str] | None = None
    results: dict[str, Any] = field(default_factory=dict)
    license: str = "apache-2.0"
    language: list[str] | None = None
    has_run_file: bool = False

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2]

    @property
    def remote_code(self) -> bool:
        return self.model is None or is_registered(type(self.model))


def head_of(class_name: str) -> str:
    """The key of `PIPELINE_TAGS` that a model class's name ends in.

    Raises:
        ScriptError: it ends in none.
    """
    if class_name.endswith("LMHeadModel"):  # as GPT-2's
        return "ForCausalLM"
    for head in PIPELINE_TAGS:
        if class_name.endswith(head) and not class_name.endswith("HeadsModel"):
            return head
    raise ScriptError(f"{class_name} has none of the heads that can be shared: {', '.join(PIPELINE_TAGS)}")


def entries_of(scores: dict[str, float], **shared) -> list[dict[str, Any]]:
    """Keyword arguments of `EvalResult`, for the results file: one for each score, by the type of its metric."""
    return [
        {**shared, "metric_type": kind, "metric_name": kind.replace("_", " "), "metric_value": value}
        for kind, value in scores.items()
    ]


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """The entries of `results["eval_results"]`.

    Raises:
        ScriptError: an entry that `EvalResult` does not take.
    """
    made = []
    for entry in results.get("eval_results", []):
        try:
            made.append(EvalResult(**{name: value for name, value in entry.items() if name != "over_seeds"}))
        except (TypeError, ValueError, AttributeError) as error:
            raise ScriptError(
                f"eval_results of the results file holds {entry}, of which no EvalResult can be made: {error}"
            ) from error
    return made


def eval_result_files(results: dict[str, Any]) -> dict[str, str]:
    """Files for the Hub's `.eval_results` folder, name to YAML: one a data set of the Hub, one value a task.

    The format has one number a task, so of several metrics the first is taken and named in the notes. What was held
    out of the training text is no benchmark.
    """
    tasks: dict[tuple[str, str], EvalResult] = {}
    for result in eval_results(results):
        # a name of the Hub, not "text" or "json" for a local file
        if result.dataset_type.count("/") == 1 and result.dataset_split != HELD_OUT:
            tasks.setdefault((result.dataset_type, result.dataset_config or "default"), result)
    entries: dict[str, list[EvalResultEntry]] = {}
    for (dataset, task), result in tasks.items():
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=result.metric_value,
            dataset_revision=result.dataset_revision,
            date=results.get("machine", {}).get("date"),
            notes=", ".join(filter(None, (result.metric_name or result.metric_type, result.dataset_split))),
        )
        entries.setdefault(dataset.replace("/", "_"), []).append(entry)
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(group), sort_keys=False)
        for name, group in entries.items()
    }


def make_card(subject: Subject) -> ModelCard:
    """The card, metadata and text.

    Raises:
        ScriptError: as `eval_results`.
    """
    measured = eval_results(subject.results)
    tags = ["ordnung"]
    if subject.model is not None:
        tags.append(subject.model.config.model_type)
        tags += ["custom_code"] if subject.remote_code else []
    data = ModelCardData(
        license=subject.license,
        language=subject.language,
        library_name="transformers" if subject.model is not None else "peft",
        pipeline_tag=PIPELINE_TAGS[subject.head],
        base_model=subject.base_model or subject.results.get("base_model"),
        datasets=subject.results.get("datasets") or None,
        metrics=list(dict.fromkeys(result.metric_type for result in measured)) or None,
        tags=tags,
        model_name=subject.name if measured else None,
        eval_results=measured or None,
    )
    sections = [f"# {subject.name}", _introduction(subject)]
    made = {title: make(subject) for title, make in SECTIONS.items()}
    for title, text in (made | subject.results.get("sections", {})).items():
        if text:
            sections.append(f"## {title}\n\n{text}")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _introduction(subject: Subject) -> str:
    if subject.model is None:
        return f"A PEFT adapter for [{subject.base_model}](https://huggingface.co/{subject.base_model})."
    model, config = subject.model, subject.model.config
    text = (
        f"A `{type(model).__name__}` of {model.num_parameters():,} parameters: {config.num_hidden_layers} layers of "
        f"width {config.hidden_size}, vocabulary of {config.vocab_size:,}."
    )
    if not subject.remote_code:
        return text
    mixers = [inspect.getdoc(MIXERS[kind]) for kind in dict.fromkeys(config.layer_types)]
    return f"{text} Its layers mix tokens by:\n\n" + "\n\n".join(f"```text\n{mixer}\n```" for mixer in mixers)


def _use(subject: Subject) -> str:
    arguments = f'"{subject.repo_id}"'
    if subject.revision != "main":
        arguments += f', revision="{subject.revision}"'
    if subject.remote_code:
        arguments += ", trust_remote_code=True"
    if subject.model is None:
        auto = AUTO_CLASSES[subject.head].replace("Auto", "AutoPeft")
        if subject.labels and subject.head in ("ForSequenceClassification", "ForTokenClassification"):
            numbers = {name: number for number, name in subject.labels.items()}
            arguments += f", num_labels={len(numbers)}, id2label={subject.labels}, label2id={numbers}"
        return f"```python\nfrom peft import {auto}\n\nmodel = {auto}.from_pretrained({arguments})\n```"
    auto, tag = AUTO_CLASSES[subject.head], PIPELINE_TAGS[subject.head]
    code = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})",
        f"model = {auto}.from_pretrained({arguments})",
        "",
    ]
    if tag == "question-answering":  # transformers 5 has no pipeline for it
        code += [
            'inputs = tokenizer("Who chased the whale?", "Ahab chased the whale.", return_tensors="pt")',
            'outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])',
            "start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
            'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
        ]
    elif tag == "multiple-choice":  # nor for this
        code += [
            'choices = ["It sank.", "It flew."]',
            'inputs = tokenizer(["What did the ship do?"] * 2, choices, padding=True, return_tensors="pt")',
            'outputs = model(input_ids=inputs["input_ids"][None], attention_mask=inputs["attention_mask"][None])',
            "print(choices[outputs.logits.argmax()])",
        ]
    else:
        code[0] += ", pipeline"
        code += [f'pipe = pipeline("{tag}", model=model, tokenizer=tokenizer)']
        code += [f"print(pipe({EXAMPLES.get(tag, EXAMPLE)}))"]
    note = ""
    if subject.remote_code:
        note = (
            "\n\n`trust_remote_code=True` runs the Python files of this repository; they need torch and transformers "
            "only. Where the package `ordnung` is installed and imported, its own classes are used."
        )
    return "```python\n" + "\n".join(code) + f"\n```{note}"


def _results(subject: Subject) -> str:
    entries = subject.results.get("eval_results", [])
    if not entries:
        return "None were recorded with this checkpoint."
    header, body = ["data", "metric", "value"], []
    several = any("over_seeds" in entry for entry in entries)
    for result, entry in zip(eval_results(subject.results), entries):
        value, seeds = result.metric_value, entry.get("over_seeds")
        row = [
            " ".join(filter(None, (result.dataset_name, result.dataset_split))),
            result.metric_name or result.metric_type,
            f"{value:.4g}" if isinstance(value, float) else str(value),
        ]
        if several:
            row.append(f"{estimate(seeds, 4)} over {len(seeds['values'])} runs" if seeds else "one run")
        body.append(row)
    return markdown_table(header + (["mean ± half the 95 % t-interval of runs like it"] if several else []), body)


def _cost(subject: Subject) -> str:
    model = subject.model
    if model is None or not hasattr(model, "flops"):
        return ""
    longest = model.config.longest_row or float("inf")
    generates, body = model.can_generate(), []
    for length in [length for length in COST_LENGTHS if length <= longest] or [longest]:
        flops = model.flops(length)
        row = [f"{length:,}", f"{flops / 1e9:,.3f}", f"{flops / length / 1e6:,.3f}"]
        body.append(row + ([f"{model.cache_bytes(length) / 1024:,.1f}"] if generates else []))
    header = ["tokens", "forward pass, GFLOP", "a token, MFLOP"] + (["generation state, KiB"] if generates else [])
    text = "Counted by the model's own `flops(tokens)`"
    text += f" and `cache_bytes(tokens)`, weights in {model.dtype}" if generates else ""
    return f"{text}; one sequence, two FLOP a multiply-add.\n\n{markdown_table(header, body)}"


def _training(subject: Subject) -> str:
    results, lines = subject.results, []
    for name, words in (
        ("model", "fine-tuned from: {}"), ("data", "data: {}"), ("objective", "objective: {}"),
        ("tokens", "tokens: {:,}"), ("steps", "steps: {:,}"), ("seconds", "seconds of training: {:,.0f}"),
        ("num_processes", "processes: {}"), ("mixed_precision", "mixed precision: {}"), ("seed", "seed: {}"),
    ):  # fmt: skip
        value = results.get(name)
        if value is not None:
            value = ", ".join(map(str, filter(None, value))) if isinstance(value, list) else value
            lines.append("- " + words.format(value))
    machine = results.get("machine")
    if machine:
        gpus = ", ".join(gpu["name"] for gpu in machine.get("gpu") or [])
        lines.append(f"- machine: {gpus or machine['cpu']}, {machine['threads']} threads")
        names = ("torch", "transformers", "ordnung")
        lines.append("- versions: " + ", ".join(f"{name} {machine[name]}" for name in names))
    return "\n".join(lines)


def _limits(subject: Subject) -> str:
    config = subject.model.config if subject.model is not None else PreTrainedConfig()
    lines = [
        "- What is not in the table of results has not been measured; bias, safety and truth of what it says least."
    ]
    field_of_view = getattr(config, "receptive_field", None)
    if field_of_view is not None:
        lines.append(f"- No output depends on more than the last {field_of_view:,} tokens.")
    longest = getattr(config, "longest_row", None)
    if longest is not None:
        lines.append(f"- It takes at most {longest:,} tokens.")
    begun = {"model", "source"} & subject.results.keys()  # of another's weights, which have seen more
    if subject.results.get("tokens") is not None and not begun:
        lines.append(f"- It has seen {subject.results['tokens']:,} tokens.")
    lines.append("- It repeats the errors and prejudices of the text that it was trained on.")
    return "\n".join(lines)


def _reproduce(subject: Subject) -> str:
    command = subject.results.get("machine", {}).get("command")
    if not command:
        return ""
    text = f"```bash\n{command}\n```"
    if subject.has_run_file:
        text += "\n\n`run.yaml` in this repository holds all options of the run; the script takes it by `--config`."
    return text


SECTIONS: dict[str, Callable[[Subject], str]] = {
    "Use": _use,
    "Results": _results,
    "Cost": _cost,
    "Training": _training,
    "Limits": _limits,
    "Reproduce": _reproduce,
}
