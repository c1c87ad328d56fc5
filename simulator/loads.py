"""What routers see of the workers of a pool: counts by slot, as old as the signals are."""

from __future__ import annotations

from array import array
from typing import Final

import numpy as np

MANY: Final = 12
"""Slots from which on NumPy finds the least one quicker."""


class Loads:
    """Work that was given to each worker of a pool and has not ended.

    Parameters
    ----------
    slots : int
        Workers, those that are off included.
    age_s : float
        How old what routers see may be [s].
    """

    __slots__ = ("_seen", "_seen_s", "age_s", "image_tokens", "open", "requests", "tokens")

    def __init__(self, slots: int, age_s: float = 0.0) -> None:
        self.age_s = age_s
        self.requests = array("d", bytes(8 * slots))
        self.tokens = array("d", bytes(8 * slots))
        self.image_tokens = array("d", bytes(8 * slots))
        self.open: list[int] = list(range(slots))  # those that take work
        self._seen: Loads | None = None
        self._seen_s = -float("inf")

    def __len__(self) -> int:
        return len(self.requests)

    def give(self, slot: int, *, tokens: float = 0.0, image_tokens: float = 0.0, requests: int = 1) -> None:
        """Note that a worker has work; a negative count takes it back."""
        self.requests[slot] += requests
        self.tokens[slot] += tokens
        self.image_tokens[slot] += image_tokens

    def least(self, values: array[float]) -> int:
        """Return the open slot with the smallest of these values, the first of equals."""
        slots = self.open
        if len(slots) < MANY:
            return min(slots, key=values.__getitem__)
        column = np.frombuffer(values)
        if len(slots) == len(column):
            return int(column.argmin())
        return slots[int(column[slots].argmin())]

    def close(self, slot: int) -> None:
        """Send a worker nothing more."""
        if slot in self.open:
            self.open.remove(slot)

    def reopen(self, slot: int) -> None:
        """Send a worker work again."""
        if slot not in self.open:
            self.open.append(slot)
            self.open.sort()

    def grow(self) -> int:
        """Add a slot, closed, and return it."""
        for column in (self.requests, self.tokens, self.image_tokens):
            column.append(0.0)
        return len(self.requests) - 1

    def seen(self, now: float) -> Loads:
        """Return what routers see: these loads, or a copy that is at most `age_s` old; who is open is always known."""
        if not self.age_s:
            return self
        if self._seen is None or now - self._seen_s >= self.age_s or len(self._seen) != len(self):
            copy = self._seen = Loads(0)
            copy.requests, copy.tokens = array("d", self.requests), array("d", self.tokens)
            copy.image_tokens = array("d", self.image_tokens)
            self._seen_s = now
        self._seen.open = self.open
        return self._seen
