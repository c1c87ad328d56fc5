"""Reality beside the model: a reference LVLM in PyTorch, its measurements, and the torch-free calibrate and compare."""

from __future__ import annotations

from types import ModuleType

__all__ = ["calibrate", "compare", "measure"]


def __getattr__(name: str) -> ModuleType:
    """Import a module when it is first asked for: importing `runtime` alone imports neither torch nor scipy."""
    if name in __all__:
        from importlib import import_module

        return import_module(f"runtime.{name}")
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
