"""Sweeps: a query whose quantities are arrays, cut into blocks that stay in the cache of a core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, Final, TypeVar

import numpy as np

from costmodel.media import MediaTotals
from costmodel.operators import Operator
from costmodel.query import KVEntry, Overhead, Query, Segment, Turn
from costmodel.speculation import Draft

BLOCK: Final = 8192
"""Points evaluated at once."""
State = TypeVar("State")
QUANTITIES: Final[dict[type, tuple[str, ...]]] = {
    kind: tuple(
        f.name
        for f in fields(kind)
        if "Quantity" in str(f.type) or str(f.type).startswith(("tuple", "Media", "Draft", "Query"))
    )
    for kind in (Query, MediaTotals, Turn, Segment, KVEntry, Overhead, Operator, Draft)
}
"""The fields of the state of a query that may hold arrays."""


def arrays(value: object) -> Iterator[np.ndarray[Any, Any]]:
    """Yield every array in the state of a query."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from arrays(part)
    else:
        for name in QUANTITIES.get(type(value), ()):
            held = getattr(value, name)
            if type(held) is not float:
                yield from arrays(held)


def mapped(value: State, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> State:
    """Return the state with every array changed; parts without arrays stay the same objects."""
    if isinstance(value, np.ndarray):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        parts = tuple(mapped(part, change) for part in value)
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts  # type: ignore[return-value]
    held = {name: getattr(value, name) for name in QUANTITIES.get(type(value), ())}
    new = {name: mapped(part, change) for name, part in held.items() if type(part) is not float}
    changed = {name: part for name, part in new.items() if part is not held[name]}
    return replace(value, **changed) if changed else value  # type: ignore[type-var]


def shape_of(query: Query) -> tuple[int, ...]:
    """Return the shape of a sweep, () for a single point."""
    return np.broadcast_shapes(*(array.shape for array in arrays(query)))


def blocks(query: Query, shape: tuple[int, ...]) -> Iterator[tuple[slice, Query]]:
    """Yield a sweep in blocks: where each lies in the flat result, and its query."""
    flat = mapped(query, lambda array: np.broadcast_to(array, shape).reshape(-1))
    for start in range(0, int(np.prod(shape)), BLOCK):
        part = slice(start, start + BLOCK)
        yield part, mapped(flat, lambda array, part=part: array[part])  # type: ignore[misc]
