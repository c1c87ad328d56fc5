"""The clock: SimPy's event queue, with events at absolute times."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

import simpy
from simpy.events import NORMAL, URGENT, Event

FIRST: Final = URGENT
"""Order at equal times: what arrives comes before the steps that end, so that a boundary sees all of it."""


class Moment(Event):
    """A point in time at which a function is called; made in one go, since there is one for every step.

    Parameters
    ----------
    time_s : float
        When [s].
    call : callable
        Takes the moment.
    """

    _ok = True  # as SimPy asks of events that have happened
    _value = None

    def __init__(self, time_s: float, call: Callable[[Moment], Any]) -> None:
        self.callbacks = [call]
        self.time_s = time_s


class Clock(simpy.Environment):
    """A SimPy environment that also takes absolute times.

    `timeout(delay)` adds the delay to the present, which rounds; steps that are summed beforehand must end at exactly
    the sums.
    """

    now: float = 0.0  # a plain value is read quicker than SimPy's property

    def __init__(self) -> None:
        super().__init__()
        self.n_events = 0
        self._n_cancelled = 0  # of those that are queued

    @property
    def n_pending(self) -> int:
        """Events that are still to come."""
        return len(self._queue) - self._n_cancelled

    def cancel(self, moment: Moment | None) -> None:
        """Let nothing happen at a moment; one that has passed, or none, is let be."""
        if moment is not None and moment.callbacks is not None:
            moment.callbacks = [_nothing]
            self._n_cancelled += 1

    def at(self, time_s: float, call: Callable[[Moment], Any], priority: int = NORMAL) -> Moment:
        """Call a function at a time [s] and return the event."""
        moment = Moment(time_s, call)
        queue: list[Any] = self._queue
        heappush(queue, (time_s, priority, next(self._eid), moment))
        self.n_events += 1
        return moment

    def run(self, until: float | Event | None = None) -> object:
        """Let everything happen, as in SimPy; moments, which cannot fail, without what failures need."""
        if until is not None:
            raise ValueError(f"until={until} must be None: a run goes on until nothing is left to happen")
        queue: list[Any] = self._queue
        while queue:
            if type(queue[0][3]) is not Moment:
                self.now = queue[0][0]
                self.step()
                continue
            time_s, _, _, moment = heappop(queue)
            (call,), moment.callbacks = moment.callbacks, None
            if call is _nothing:  # time does not pass for it
                self._n_cancelled -= 1
                continue
            self.now = self._now = time_s
            call(moment)
        return None


def _nothing(_: Event) -> None:
    """Happens at a moment that was cancelled."""
