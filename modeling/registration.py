"""Makes families known to transformers' Auto classes, and to PEFT, without importing a model.

transformers' Auto classes look classes up by name and import them at first use. The families are entered in the same
tables, as if they were in its tree, and resolve to this package's lazy names. Beyond loading, that has `Trainer` treat
a causal head as one (its label smoothing shifts labels for the names in that table only). The tables take a third of
a second to import, so they are filled when something else imports them.

Families of this package stand in `FAMILIES`; those of other packages come in through `register_family`, as these do.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterable
from typing import NamedTuple

# The families of this package: model_type -> class prefix, and the heads beyond those that every family has.
FAMILIES = {
    "conv_lm": ("ConvLM", ("ForMaskedLM", "ForMultipleChoice")),
    "linformer_lm": ("LinformerLM", ("ForMaskedLM", "ForMultipleChoice")),
    "cubic_prefix_lm": ("CubicPrefixLM", ("ForMaskedLM", "ForMultipleChoice")),
    "softmax_lm": ("SoftmaxLM", ("ForMaskedLM", "ForMultipleChoice")),
    "sparse_attention_lm": ("SparseAttentionLM", ("ForMaskedLM", "ForMultipleChoice")),
    "quadratic_kernel_lm": ("QuadraticKernelLM", ()),
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

# Packages name here, as entry points, modules that call `register_family`; the programs import them.
PLUGINS = "ordnung.families"


class Family(NamedTuple):
    """What is known of a registered family: what its class names begin with, its heads beyond `HEADS`, its modules."""

    prefix: str
    heads: tuple[str, ...]
    configuration: str
    modeling: str


# Every family that is known, of this package and of others.
REGISTERED: dict[str, Family] = {}

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
    family = REGISTERED[model_type]
    return {AUTO_CLASSES[head]: family.prefix + head for head in (*HEADS, *family.heads)}


def lazy_names(model_types: Iterable[str] | None = None) -> dict[str, str]:
    """Public class name -> the module that defines it, of some families or of all."""
    names = {}
    for model_type in REGISTERED if model_types is None else model_types:
        family = REGISTERED[model_type]
        names[f"{family.prefix}Config"] = family.configuration
        for name in (*heads_of(model_type).values(), f"{family.prefix}PreTrainedModel"):
            names[name] = family.modeling
    return names


def is_registered(model_class: type) -> bool:
    """Whether a class is one of a registered family, and no other of that name."""
    return lazy_names().get(model_class.__name__) == model_class.__module__


def register_family(
    model_type: str, prefix: str, heads: Iterable[str] = (), *, configuration: str, modeling: str
) -> None:
    """Make a family known: Auto classes, PEFT, `ordnung.convert`, `ordnung.save_standalone` and the programs take it.

    Its modules are imported at first use, and its classes are names of `ordnung` too. They build on this package's:
    a config on `BackboneConfig`, a mixer on `Mixer`, models on `BackboneModel` and the classes of `modeling.heads`.

    Args:
        model_type: that of the config class, such as "retention_lm".
        prefix: what the class names begin with, such as "RetentionLM".
        heads: class name endings beyond `HEADS`, which every family has: "ForMaskedLM", "ForMultipleChoice".
        configuration: name of the module that defines the config class, `<prefix>Config`.
        modeling: name of the module that defines `<prefix>Model`, `<prefix>PreTrainedModel` and the heads.

    Raises:
        ValueError: the names are not of that kind, or stand for another family already.
        ModuleNotFoundError: there is no such module.
    """
    family = Family(prefix, tuple(heads), configuration, modeling)
    if not (model_type.isidentifier() and prefix.isidentifier()):
        raise ValueError(f"model_type {model_type!r} and prefix {prefix!r} must be names, such as 'my_lm' and 'MyLM'")
    unknown = sorted(set(family.heads) - set(AUTO_CLASSES))
    if unknown:
        raise ValueError(f"{model_type} has the heads {unknown}, but there are {sorted(AUTO_CLASSES)} only")
    same = [name for name, known in REGISTERED.items() if known.prefix == prefix and name != model_type]
    if same or REGISTERED.get(model_type, family) != family:
        name = same[0] if same else model_type
        raise ValueError(f"{name!r} is registered as {REGISTERED[name]}: give {model_type!r} other names than these")
    for module in (configuration, modeling):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"there is no module {module} for the family {model_type!r}", name=module)
    auto = sys.modules.get("transformers.models.auto.configuration_auto")
    if auto is not None:
        check_name(auto, model_type, prefix)
    REGISTERED[model_type] = family
    for name, enter in TABLES.items():
        if name in sys.modules:
            enter(sys.modules[name], [model_type])
        elif not any(isinstance(finder, AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, AfterImport(name, enter))


def check_name(auto, model_type: str, prefix: str) -> None:
    """
    Raises:
        ValueError: transformers, whose table of configs `auto` holds, has a model of that name.
    """
    if auto.CONFIG_MAPPING_NAMES.get(model_type, f"{prefix}Config") != f"{prefix}Config":
        raise ValueError(f"transformers has a model type {model_type!r} of its own: give the family another")


def register_configs(auto, model_types: Iterable[str]) -> None:
    """Enter configs in `transformers.models.auto.configuration_auto`, given as `auto`; raises as `check_name`."""
    for model_type in model_types:
        check_name(auto, model_type, REGISTERED[model_type].prefix)
        auto.CONFIG_MAPPING_NAMES[model_type] = f"{REGISTERED[model_type].prefix}Config"
        auto.CONFIG_MAPPING._modules[model_type] = sys.modules["ordnung"]


def register_models(auto, model_types: Iterable[str]) -> None:
    """Enter model classes in `transformers.models.auto.modeling_auto`, given as `auto`."""
    for model_type in model_types:
        for auto_class, name in heads_of(model_type).items():
            mapping = getattr(auto, auto_class)._model_mapping
            mapping._model_mapping[model_type] = name
            mapping._reverse_config_mapping[f"{REGISTERED[model_type].prefix}Config"] = model_type
            mapping._modules[model_type] = sys.modules["ordnung"]


def register_adapters(constants, model_types: Iterable[str]) -> None:
    """Enter default targets of every method in `peft.utils.constants`, given as `constants`."""
    for method, targets in vars(constants).items():
        if method.startswith("TRANSFORMERS_MODELS_TO_") and method.endswith("_MODULES_MAPPING"):
            method = method.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
            targets |= dict.fromkeys(model_types, ADAPTER_TARGETS.get(method, LORA_TARGETS))


# Where families are entered: module -> what enters those of some model types there.
TABLES = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
    "peft.utils.constants": register_adapters,
}


class AfterImport(importlib.abc.MetaPathFinder):
    """Enters all families, once, right after the module called `name` has been imported."""

    def __init__(self, name, enter):
        self.name, self.enter = name, enter

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.enter(module, list(REGISTERED))

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Register the families of this package, now or as soon as the Auto classes, and PEFT, are imported."""
    for model_type, (prefix, heads) in FAMILIES.items():
        configuration, modeling = (f"ordnung.{part}.{part}_{model_type}" for part in ("configuration", "modeling"))
        register_family(model_type, prefix, heads, configuration=configuration, modeling=modeling)


def import_plugins() -> None:
    """Import the modules that installed packages name as entry points of the group `PLUGINS`."""
    from importlib.metadata import entry_points  # a third of the time that importing this package takes

    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:
            error.add_note(
                f"The family {plugin.name!r} of {plugin.dist.name} cannot be registered: mend or uninstall it"
            )
            raise
