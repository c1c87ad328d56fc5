"""In which order waiting work is taken: a queue for each order, all with the verbs of a deque."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Final, Protocol

from costmodel.errors import unknown
from simulator.request import RequestView


class Queue(Protocol):
    """Waiting work, the next piece first."""

    def append(self, request: int, /) -> None:
        """Add at its place."""

    def appendleft(self, request: int, /) -> None:
        """Add in front of all."""

    def popleft(self) -> int:
        """Take the first out."""

    def remove(self, request: int, /) -> None:
        """Take one out, wherever it is."""

    def __getitem__(self, index: int, /) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


Key = Callable[[RequestView], float]
SIZE_CLASS_S: Final = 5.0
"""How much earlier a request of the next smaller class may have come and still goes first; assumed [s]."""
SMALL_TOKENS, MIDDLE_TOKENS = 1024, 8192
"""Prompts up to which a request is sand or a pebble; beyond it is a rock (RPS-Serve: text, images, video); assumed."""


def size_class(request: RequestView) -> int:
    """Return 0, 1 or 2 for prompts that are small, middling or large."""
    return int(request.prompt_tokens > SMALL_TOKENS) + int(request.prompt_tokens > MIDDLE_TOKENS)


def _first_come(request: RequestView) -> float:
    return request.arrival_s


def _priority(request: RequestView) -> float:
    return float(request.priority)


def _shortest(request: RequestView) -> float:
    return float(request.prompt_tokens)


def _size_class(request: RequestView) -> float:
    """All wait equally fast, so ageing is a head start: who came 5 s earlier beats the next smaller class."""
    return request.arrival_s + SIZE_CLASS_S * size_class(request)


ORDERS: Final[dict[str, Key]] = {
    "fcfs": _first_come,
    "priority": _priority,
    "shortest": _shortest,
    "size-class": _size_class,
}


def order_key(name: str) -> Key | None:
    """Return the key of an order, the smallest first; None for first come, first served.

    Raises
    ------
    LookupError
        If there is none of this name.
    """
    if name not in ORDERS:
        raise unknown("order", name, ORDERS)
    return None if name == "fcfs" else ORDERS[name]


class Ordered:
    """A queue by key, equal keys in order of coming.

    Parameters
    ----------
    key : callable
        Takes a request's index.
    """

    def __init__(self, key: Callable[[int], float]) -> None:
        self.key = key
        self._heap: list[tuple[float, int, int]] = []
        self._order = count()
        self._front = count(start=-1, step=-1)

    def append(self, request: int, /) -> None:
        """Add at its place."""
        heappush(self._heap, (self.key(request), next(self._order), request))

    def appendleft(self, request: int, /) -> None:
        """Add in front of all."""
        heappush(self._heap, (-math.inf, next(self._front), request))

    def popleft(self) -> int:
        """Take the first out."""
        return heappop(self._heap)[2]

    def remove(self, request: int, /) -> None:
        """Take one out, wherever it is."""
        kept = [entry for entry in self._heap if entry[2] != request]
        if len(kept) == len(self._heap):
            raise ValueError(f"request {request} is not in the queue")
        self._heap = sorted(kept)

    def __getitem__(self, index: int, /) -> int:
        return self._heap[0][2] if index == 0 else sorted(self._heap)[index][2]

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[int]:
        return (entry[2] for entry in sorted(self._heap))


def queue_of(key: Callable[[int], float] | None) -> Queue:
    """Return an empty queue in an order."""
    return deque[int]() if key is None else Ordered(key)
