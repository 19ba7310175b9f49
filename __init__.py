"""ordnung: Transformers-compatible language models that replace softmax attention.

Importing it makes the families known to transformers' Auto classes; the classes themselves are imported at first use.
"""

import importlib

from ordnung.modeling.registration import lazy_names, register

__version__ = "0.1.0"

_LAZY = {
    **lazy_names(),
    "convert": "ordnung.modeling.convert",
    "save_standalone": "ordnung.modeling.standalone",
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'ordnung' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__():
    return __all__


register()
