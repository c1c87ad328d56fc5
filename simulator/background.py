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
        self._was_busy = False  # whether others had something to come at the last event
        self._idle = self._vain = 0  # events by themselves since others, and of those the ones that were certain
        self._asleep: list[Callable[[], None]] = []  # what goes on if something happens after all

    def at(self, time_s: float, call: Callable[[], None], again: Callable[[], None] | None = None) -> None:
        """Call a function at a time, unless all requests have ended by then [s].

        Parameters
        ----------
        time_s : float
            When [s].
        call : callable
        again : callable, optional
            Makes it not certain that the function is called: not while nothing could come of it any more, but should
            something happen after all, this is called, to wait anew.
        """
        self._pending += 1
        self._certain += again is None
        self._made += 1
        self.clock.at(time_s, lambda _: self._fire(call, again), FIRST)

    def _fire(self, call: Callable[[], None], again: Callable[[], None] | None) -> None:
        certain = again is None
        self._pending -= 1
        self._certain -= certain
        self._count(certain=certain)
        if self._is_over():
            return
        if again is None:
            call()
            self._wake()
        elif self._vain > MOST_IDLE or (self._idle > MOST_IDLE and not self._certain):
            self._asleep.append(again)
        else:
            call()

    def _count(self, *, certain: bool) -> None:
        """Count an event, or begin to count anew where others have something to do, or had since the last one."""
        others, is_busy = self.clock.n_events - self._made, self.clock.n_pending > self._pending
        if is_busy or self._was_busy or others != self._others:
            self._idle = self._vain = 0
            self._wake()
        self._others, self._was_busy = others, is_busy
        self._idle = 0 if certain else self._idle + 1
        self._vain += certain

    def _wake(self) -> None:
        asleep, self._asleep = self._asleep, []
        for again in asleep:
            again()
