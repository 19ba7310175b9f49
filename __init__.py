"""ordnung: Transformers-compatible language models that replace softmax attention.

Importing it makes the families known to transformers' Auto classes; the classes themselves are imported at first use.
"""

import importlib

from ordnung.modeling.registration import FAMILIES, lazy_names, register, register_family

__version__ = "0.1.0"

register()
_FUNCTIONS = {"convert": "ordnung.modeling.convert", "save_standalone": "ordnung.modeling.standalone"}
__all__ = ["__version__", "register_family", *sorted({*lazy_names(FAMILIES), *_FUNCTIONS})]


def __getattr__(name):
    modules = {**lazy_names(), **_FUNCTIONS}  # also of families that others registered
    if name not in modules:
        raise AttributeError(f"module 'ordnung' has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)


def __dir__():
    return __all__
