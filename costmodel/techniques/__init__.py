"""Techniques: rewrites of a query.

A technique is a small frozen class with `apply(query) -> Query`; a primitive is one file here, a published method one
TOML in `catalogue/`. None is modelled yet: `technique` says so for every name, and `compose` takes any object that fits
the protocol, so a study can bring its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from costmodel.errors import unknown
from costmodel.query import Query


class Technique(Protocol):
    """A rewrite of a query."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def slot(self) -> str:
        """The place it takes: two techniques of one slot exclude each other; "" takes none."""

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """Which attention scores it must see."""

    def apply(self, query: Query) -> Query:
        """Return the changed query."""


def technique_names() -> list[str]:
    """Return the names of the published methods in the catalogue."""
    from importlib import resources  # slow to import, and needed once

    folder = resources.files(__name__) / "catalogue"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def technique(name: str, **parameters: float | str) -> Technique:
    """Return a published method by name.

    Raises
    ------
    LookupError
        If the catalogue has none of this name.
    """
    del parameters
    raise unknown("technique", name, technique_names())


def compose(query: Query, techniques: Sequence[Technique]) -> Query:
    """Return the query after all techniques, in order.

    Raises
    ------
    ValueError
        If two of them take the same slot.
    """
    taken: dict[str, str] = {}
    for item in techniques:
        if item.slot and item.slot in taken:
            raise ValueError(f"techniques {taken[item.slot]!r} and {item.name!r} both take slot {item.slot!r}; use one")
        taken[item.slot] = item.name
        query = item.apply(query)
    return query
