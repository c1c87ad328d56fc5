"""Events that come by themselves: they end when nothing else can happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from simulator.clock import FIRST, Clock

MOST_IDLE: Final = 200
"""Events by themselves in a row, with nothing between them, after which nothing will come of the run."""


class Background:
    """The clock of failures and control.

    Parameters
    ----------
    clock : Clock
    is_over : callable
        Whether all requests have ended.
    """

    def __init__(self, clock: Clock, is_over: Callable[[], bool]) -> None:
        self.clock = clock
        self._is_over = is_over
        self._pending = 0
        self._certain = 0  # of those, events that are sure to happen
        self._made = 0
        self._others = 0  # events of others so far
        self._idle = self._vain = 0  # events by themselves since others, and of those the ones that were certain

    def at(self, time_s: float, call: Callable[[], None], *, certain: bool = False) -> None:
        """Call a function at a time, unless all requests have ended by then [s].

        Where it is not certain, it is not called either if nothing could come of it any more.
        """
        self._pending += 1
        self._certain += certain
        self._made += 1
        self.clock.at(time_s, lambda _: self._fire(call, certain=certain), FIRST)

    def _fire(self, call: Callable[[], None], *, certain: bool) -> None:
        self._pending -= 1
        self._certain -= certain
        others = self.clock.n_events - self._made
        if others != self._others or self.clock.n_pending > self._pending:
            self._idle = self._vain = 0
        self._others = others
        self._idle += 1
        self._vain += certain
        in_vain = (self._idle > MOST_IDLE and not self._certain) or self._vain > MOST_IDLE
        if not self._is_over() and (certain or not in_vain):
            call()
