"""What a worker hears before the run, and tells those around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from simulator.ordering import Queue
from simulator.tape import Tape

if TYPE_CHECKING:
    from simulator.worker import Worker


class Inbox:
    """Requests whose times are known before the run: a worker takes them in at the ends of its steps.

    An arrival while a step is under way changes nothing before its end, so it needs no event of its own.

    Parameters
    ----------
    order : list of int
        Requests, in order of arrival.
    times_s : list of float
        When each is ready to run [s].
    """

    __slots__ = ("next_s", "order", "position", "times_s")

    def __init__(self, order: list[int], times_s: list[float]) -> None:
        self.order = order
        self.times_s = [*times_s, math.inf]
        self.position = 0
        self.next_s = self.times_s[0]

    def take_in(self, now: float, queue: Queue, tape: Tape) -> None:
        """Queue what has arrived by now."""
        times, position = self.times_s, self.position
        while times[position] <= now:
            request = self.order[position]
            queue.append(request)
            tape.queue(request, times[position])
            position += 1
        self.position = position
        self.next_s = times[position]


class Hooks(Protocol):
    """What a worker tells those around it."""

    def ended(self, request: int, worker: Worker) -> None:
        """Take a request that has its last token."""

    def prefilled(self, request: int, worker: Worker) -> None:
        """Take a request whose prompt is computed and that decodes elsewhere."""

    def encoded(self, item: int, worker: Worker) -> None:
        """Take an item that was encoded for another worker."""

    def needs_embeddings(self, request: int, worker: Worker) -> None:
        """Take a preempted request whose embeddings must come again."""

    def preempted(self, request: int, worker: Worker) -> None:
        """Take a preempted request of whose prompt chunks were told."""

    def chunk(self, request: int, tokens: int, worker: Worker) -> None:
        """Take note that a step starts which computes so many tokens of a request."""

    def has_room(self, worker: Worker) -> None:
        """Take note that a step has ended, which may have made room."""


class Alone:
    """Hooks of a worker that does everything: it tells only of ends."""

    def __init__(self, on_end: Callable[[int], None]) -> None:
        self.on_end = on_end

    def ended(self, request: int, worker: Worker) -> None:
        """Take a request that has its last token."""
        del worker
        self.on_end(request)

    def prefilled(self, request: int, worker: Worker) -> None:
        """Nothing is handed over."""

    encoded = needs_embeddings = preempted = prefilled

    def chunk(self, request: int, tokens: int, worker: Worker) -> None:
        """Nothing is sent."""

    def has_room(self, worker: Worker) -> None:
        """Nobody waits for room."""
