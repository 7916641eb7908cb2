"""Transformer in Transformer (TNT) in JAX and Flax: the models, their weights, and their training.

Names are imported when they are first used: `import tnt_jax` alone imports no JAX.
"""

import importlib

__version__ = "0.2.0"

_HOME = {
    "InputError": "config",
    "create_model": "storage.load",
    "get_model": "storage.load",
    "inference_model": "inference",
    "list_models": "models.variants",
    "load_model": "storage.load",
    "save_model": "storage.folder",
    "summary": "models.summary",
    "train": "training.loop",
}
_MODULES = {"attribution": "evaluation.attribution"}
_ROOMS = ("config", "data", "evaluation", "export", "inference", "models", "storage", "tasks", "training", "visualize")
__all__ = ["__version__", *_HOME, *_MODULES, *_ROOMS]


def __getattr__(name: str):
    if name in _ROOMS or name in _MODULES:
        return importlib.import_module(f"tnt_jax.{_MODULES.get(name, name)}")
    if name not in _HOME:
        raise AttributeError(f"module 'tnt_jax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"tnt_jax.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
