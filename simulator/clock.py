"""The clock: SimPy's event queue, with events at absolute times."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from typing import Any, Final

import simpy
from simpy.events import NORMAL, URGENT, Event

FIRST: Final = URGENT
"""Order at equal times: what arrives comes before the steps that end, so that a boundary sees all of it."""


class Clock(simpy.Environment):
    """A SimPy environment that also takes absolute times.

    `timeout(delay)` adds the delay to the present, which rounds; steps that are summed beforehand must end at exactly
    the sums.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_events = 0

    def at(self, time_s: float, call: Callable[[Event], Any], priority: int = NORMAL) -> Event:
        """Call a function at a time [s] and return the event."""
        event = Event(self)
        event._ok = True  # noqa: SLF001 - as `simpy.Timeout` does
        event._value = None  # noqa: SLF001
        event.callbacks.append(call)
        queue: list[Any] = self._queue
        heappush(queue, (time_s, priority, next(self._eid), event))
        self.n_events += 1
        return event
