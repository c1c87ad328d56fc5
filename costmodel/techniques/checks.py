"""Checks of what techniques are given: one clear line each."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import shown, unknown

WAY_OUT = "give a share of one"


def check_share(name: str, field: str, value: Quantity, *, zero: bool = False) -> None:
    """Refuse what is no share of one, above zero unless zero makes sense."""
    low = np.min(value) >= 0 if zero else np.min(value) > 0
    if not (low and np.max(value) <= 1):
        span = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{name}.{field}={shown(value)} must lie in {span}; {WAY_OUT}")


def check_least(name: str, field: str, value: Quantity | None, least: float, way_out: str) -> None:
    """Refuse numbers below the least one; None is no number and fine."""
    if value is not None and not (np.min(value) >= least and np.all(np.isfinite(value))):
        raise ValueError(f"{name}.{field}={shown(value)} must be a number from {least:g}; {way_out}")


def check_choice(name: str, field: str, value: object, known: Iterable[str]) -> None:
    """Refuse a word that is not among the known ones."""
    if value not in set(known):
        raise unknown(f"{name}.{field}", value, known)


def check_alone(name: str, **fields: object) -> None:
    """Refuse more than one of several ways to say the same."""
    given = [field for field, value in fields.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{name}.{given[0]} and {name}.{given[1]} say the same; give one")


def is_one(value: Quantity) -> bool:
    """Return whether a share is one number and keeps everything."""
    return not isinstance(value, np.ndarray) and value == 1.0


def anything(value: Quantity) -> bool:
    """Return whether there is anything, in a sweep at any point."""
    return bool(value.any()) if isinstance(value, np.ndarray) else bool(value)
