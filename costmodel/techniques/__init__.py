"""Techniques: rewrites of a query.

A technique is a small frozen class with `apply(query) -> Query`; a primitive is one file here, a published method one
TOML in `catalogue/`. `compose` takes any object that fits the protocol, so a study can bring its own.
"""

from __future__ import annotations

from typing import Any

from costmodel.techniques.composing import compose
from costmodel.techniques.protocol import Primitive, Technique

__all__ = ["Primitive", "Technique", "compose", "technique", "technique_names"]


def technique_names() -> list[str]:
    """Return the names of the published methods in the catalogue."""
    from costmodel.techniques.method import load_method_texts

    return list(load_method_texts())


def technique(name: str, **parameters: Any) -> Technique:  # noqa: ANN401 - numbers, arrays and words, by primitive
    """Return a published method by name, or a primitive by its own.

    Parameters
    ----------
    name : str
        An id of the catalogue such as `fastv`, the usual name such as `PyramidDrop`, or a primitive such as
        `token_reduce`.
    **parameters : float, ndarray or str
        Fields of its primitives, and `variant` for a published setting of its file; arrays sweep.

    Raises
    ------
    LookupError
        If the name or a parameter is unknown.
    Unsupported
        If the method rewrites no request: a serving system, or a workload.
    """
    from costmodel.techniques.applied import build

    return build(name, parameters)
