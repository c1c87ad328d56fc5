"""One file a model family: it reads the family's config files and knows how its pictures become tokens.

A family file defines `MODEL_TYPES`, the `model_type` values it reads, and `read(files) -> ModelParts`.
`load_families` finds the files by themselves.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType

HELPERS = frozenset({"text", "files"})
"""Modules of this folder that are shared by families and are none themselves."""


@functools.cache
def load_families() -> Mapping[str, ModuleType]:
    """Return the family module of every known `model_type`."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in HELPERS]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}
