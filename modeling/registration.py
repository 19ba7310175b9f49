"""Makes the families known to transformers' Auto classes, and to PEFT, without importing a model.

transformers' Auto classes look classes up by name and import them at first use. The families are entered in the same
tables, as if they were in its tree, and resolve to this package's lazy names. Beyond loading, that has `Trainer` treat
a causal head as one (its label smoothing shifts labels for the names in that table only). The tables take a third of
a second to import, so they are filled when something else imports them.
"""

import importlib
import importlib.abc
import importlib.util
import sys

# model_type -> class prefix, and the heads beyond those that every family has
FAMILIES = {
    "conv_lm": ("ConvLM", ("ForMaskedLM", "ForMultipleChoice")),
    "linformer_lm": ("LinformerLM", ("ForMaskedLM", "ForMultipleChoice")),
    "cubic_prefix_lm": ("CubicPrefixLM", ("ForMaskedLM", "ForMultipleChoice")),
    "softmax_lm": ("SoftmaxLM", ("ForMaskedLM", "ForMultipleChoice")),
    "sparse_attention_lm": ("SparseAttentionLM", ("ForMaskedLM", "ForMultipleChoice")),
}
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
# class name ending -> the Auto class that loads it
AUTO_CLASSES = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}

# What PEFT adapts unless told otherwise: every linear layer of mixers and MLPs. In all families these, and no other
# modules, are named so.
LORA_TARGETS = r"(.*\.)?layers\.\d+\.(mixer|mlp)\.(.*\.)?\w+_proj"

# Those of methods that take other modules than LoRA: IA3 scales keys, values and the input of an MLP's last layer, LN
# tuning trains the norms.
ADAPTER_TARGETS = {
    "IA3_TARGET": ["k_proj", "v_proj", "down_proj"],
    "IA3_FEEDFORWARD": ["down_proj"],
    "LNTUNING_TARGET": ["mixer_norm", "mlp_norm"],
}


def heads_of(model_type: str) -> dict[str, str]:
    """Auto class name -> class name, for every head of a family."""
    prefix, more = FAMILIES[model_type]
    return {AUTO_CLASSES[head]: prefix + head for head in (*HEADS, *more)}


def lazy_names() -> dict[str, str]:
    """Public class name -> the module that defines it."""
    names = {}
    for model_type, (prefix, _) in FAMILIES.items():
        names[f"{prefix}Config"] = f"ordnung.configuration.configuration_{model_type}"
        for name in (*heads_of(model_type).values(), f"{prefix}PreTrainedModel"):
            names[name] = f"ordnung.modeling.modeling_{model_type}"
    return names


def register_configs(auto) -> None:
    """Enter the configs in `transformers.models.auto.configuration_auto`, given as `auto`."""
    for model_type, (prefix, _) in FAMILIES.items():
        auto.CONFIG_MAPPING_NAMES[model_type] = f"{prefix}Config"
        auto.CONFIG_MAPPING._modules[model_type] = sys.modules["ordnung"]


def register_models(auto) -> None:
    """Enter the model classes in `transformers.models.auto.modeling_auto`, given as `auto`."""
    for model_type, (prefix, _) in FAMILIES.items():
        for auto_class, name in heads_of(model_type).items():
            mapping = getattr(auto, auto_class)._model_mapping
            mapping._model_mapping[model_type] = name
            mapping._reverse_config_mapping[f"{prefix}Config"] = model_type
            mapping._modules[model_type] = sys.modules["ordnung"]


def register_adapters(constants) -> None:
    """Enter the families' default targets of every method in `peft.utils.constants`, given as `constants`."""
    for method, targets in vars(constants).items():
        if method.startswith("TRANSFORMERS_MODELS_TO_") and method.endswith("_MODULES_MAPPING"):
            method = method.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
            targets |= dict.fromkeys(FAMILIES, ADAPTER_TARGETS.get(method, LORA_TARGETS))


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then(module)` once, right after the module called `name` has been imported."""

    def __init__(self, name, then):
        self.name, self.then = name, then

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Register every family, now or as soon as the Auto classes, and PEFT, are imported."""
    for name, then in (
        ("transformers.models.auto.configuration_auto", register_configs),
        ("transformers.models.auto.modeling_auto", register_models),
        ("peft.utils.constants", register_adapters),
    ):
        if name in sys.modules:
            then(sys.modules[name])
        else:
            sys.meta_path.insert(0, AfterImport(name, then))
