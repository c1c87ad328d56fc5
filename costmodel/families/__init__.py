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

HELPERS = frozenset({"text", "files", "vits", "native", "anyres", "pictures"})
"""Modules of this folder that are shared by families and are none themselves."""


LANGUAGE = "language"
"""The family of language models alone: what the text folder knows and no other family reads."""


@functools.cache
def load_families() -> Mapping[str, ModuleType]:
    """Return the family module of every known `model_type`."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in _family_names()]
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}


def vision_model_types() -> set[str]:
    """Return the `model_type` values that the vision-language families read."""
    names = [name for name in _family_names() if name != LANGUAGE]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {model_type for module in modules for model_type in module.MODEL_TYPES}


def _family_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in HELPERS)
