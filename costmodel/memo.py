"""Caches that live in objects and never grow without end."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, TypeAlias, TypeVar, cast

Cache: TypeAlias = dict[Hashable, Any]
MOST: Final = 1024
"""Entries of a cache; it is emptied when it would hold more, so that sweeps over structures or devices stay bounded."""
Value = TypeVar("Value")


def remember(cache: Cache, key: Hashable, make: Callable[[], Value]) -> Value:
    """Return what the cache has under a key, made and kept if it was not there."""
    found = cache.get(key)
    if found is None:
        if len(cache) >= MOST:
            cache.clear()
        found = cache[key] = make()
    return cast("Value", found)
