"""Variants that start from a checkpoint: converted, and where they ask for it linearized."""

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ordnung
from ordnung.modeling.registration import FAMILIES
from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError, closest
from ordnung.scripts.common.files import read_json, write_json
from ordnung.scripts.common.machine import machine_info
from ordnung.scripts.common.models import check_overrides
from ordnung.scripts.common.options import arguments, parse_options
from ordnung.scripts.linearizing import measure, report
from ordnung.scripts.linearizing import run as linearizing
from ordnung.scripts.linearizing.data import load_pairs
from ordnung.scripts.linearizing.options import LinearizeOptions
from ordnung.scripts.linearizing.teacher import Pair, fingerprint, load_teacher, load_tokenizer

# What the table of a variant holds besides fields of its config.
OWN = ("source", "model_type", "distill", "keep_attention")
# Options of linearize.py that no table of options gives, and where they are given.
OF_VARIANT = dict.fromkeys(("source", "model_type", "keep_attention"), "give it in each variant's own table")
OF_VARIANT["config_overrides"] = (
    "give the fields themselves in each variant's own table, or to all in --config_overrides"
)
OF_VARIANT["output_dir"] = "it is set for each variant, leave it out"


def fields_of(name: str, variant: dict[str, Any]) -> dict[str, Any]:
    """The config fields of a variant, checked.

    Raises:
        ScriptError: no family of ours, or a field that it does not have.
    """
    model_type = variant.get("model_type")
    if model_type not in FAMILIES:
        hint = closest(str(model_type), FAMILIES)
        raise ScriptError(f"variant {name}: model_type {model_type!r} is none of {', '.join(FAMILIES)}{hint}")
    if "distill" not in variant and "keep_attention" in variant:
        raise ScriptError(f"variant {name}: keep_attention chooses layers by text: add distill")
    fields = {field: value for field, value in variant.items() if field not in OWN}
    try:
        return check_overrides(CONFIG_MAPPING[model_type], fields)
    except ScriptError as error:
        raise ScriptError(f"variant {name}: {error}") from error


def options_of(name: str, variant: dict[str, Any], shared: dict[str, Any], folder: Path) -> LinearizeOptions:
    """The options of linearize.py for a variant; one that is converted alone needs no text.

    Raises:
        ScriptError: wrong options, or such that the variant itself gives.
    """
    distill = variant.get("distill") or {}
    for table, given in (("--linearize", shared), (f"variant {name}: distill", distill)):
        if found := [option for option in OF_VARIANT if option in given]:
            raise ScriptError(f"{table} {found[0]}: {OF_VARIANT[found[0]]}")
    own = {"source": variant["source"], "model_type": variant["model_type"], "output_dir": str(folder)}
    own |= {"config_overrides": fields_of(name, variant), "keep_attention": variant.get("keep_attention")}
    if "distill" not in variant and not {"train_file", "dataset_name"} & shared.keys():
        own["train_file"] = "any"
    return parse_options(LinearizeOptions, arguments({**shared, **distill, **own}))


def start(name: str, variant: dict[str, Any], shared: dict[str, Any], folder: Path) -> int:
    """Make a variant's checkpoint, once; returns the exit status.

    Args:
        shared: options of linearize.py.
    """
    if "distill" in variant:
        options = options_of(name, variant, shared, folder)
        return 0 if is_finished(options) else linearizing.run(options)
    if not (folder / report.RESULTS).exists():
        convert(name, variant, shared, folder)
    return 0


def is_finished(options: LinearizeOptions) -> bool:
    """Whether a variant is linearized, from this teacher and not to be pushed: its text need not be read again."""
    made = Path(options.output_dir) / report.RESULTS
    if not made.exists() or options.push_to_hub:
        return False
    return read_json(made).get("teacher_fingerprint") == fingerprint(load_teacher(options))


def convert(name: str, variant: dict[str, Any], shared: dict[str, Any], folder: Path):
    """Write the variant as its source is converted, without a head.

    Args:
        shared: of these options of linearize.py those count that say what is read and measure sentence similarity.
    """
    options = options_of(name, variant, shared, folder)
    set_seed(options.seed)  # of what the source does not have
    own = {"head": "Model", "gguf_file": options.gguf_file, **options.config_overrides}
    try:
        model = ordnung.convert(options.source, options.model_type, **own)
        tokenizer = load_tokenizer(options, model)
    except (ImportError, OSError, ValueError, TypeError, StrictDataclassError, ScriptError) as error:
        raise ScriptError(f"variant {name}: {' '.join(str(error).split())}") from error
    model.save_pretrained(folder)
    limits.fit_tokenizer(tokenizer, model).save_pretrained(folder)
    made = {"source": Path(options.source).name, "model_type": options.model_type, "parameters": model.num_parameters()}
    if options.similarity_file:
        given = {"block_size", "eval_block_size"} & shared.keys()
        longest = options.eval_block_size if given else model.config.max_position_embeddings
        made |= similarities_of(options, model.eval(), tokenizer, longest)
    write_json(folder / report.RESULTS, made | {"tokens": 0, "seconds": 0.0, "machine": machine_info()})


def similarities_of(options: LinearizeOptions, model: PreTrainedModel, tokenizer, longest: int) -> dict[str, Any]:
    """How well a converted model tells similar texts; where its mixing replaces attention also what linearize.py tells
    beside that: the teacher's, and the floor without mixing."""
    how = (tokenizer, load_pairs(options.similarity_file), max(options.per_device_eval_batch_size, 16), longest)
    try:
        pair = Pair(load_teacher(options), model, [], "")
    except ScriptError:  # a source that other families take, and softmax_lm does not
        pair = None
    if pair is None or not pair.encoder or not pair.replaced or model.config.encoder_generates:
        return {"student": {"similarity": measure.similarity(model, *how)}}
    found = {name: {"similarity": value} for name, value in measure.similarities(pair, *how).items()}
    floor = found.pop("floor")
    return {**found, "converted": {"student": found["student"], "floor": floor}}


def read(folder: Path) -> dict[str, Any]:
    """What is known of a variant that was started."""
    found = read_json(folder / report.RESULTS)
    names = ("source", "model_type", "parameters", "tokens", "seconds")
    names += ("layer_types", "teacher", "student", "converted")
    return {name: found[name] for name in names if found.get(name) is not None}
