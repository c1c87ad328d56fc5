"""A station: servers with one queue, or a queue each; work comes in tasks, and is done when all tasks are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from heapq import heappop, heappush

from simulator.clock import FIRST, Clock, Moment


def ahead(
    arrival_s: Sequence[float], tasks_s: Sequence[Sequence[float]], servers: int
) -> tuple[list[float], list[int]]:
    """Return when each job is done at servers with one queue, and the jobs in order of that; what `Station` does.

    Parameters
    ----------
    arrival_s : sequence of float
        In order [s].
    tasks_s : sequence of sequence of float
        The tasks of each job; one without any is done as it comes [s].
    servers : int
        Servers.
    """
    free = [0.0] * servers
    done: list[float] = []
    for time_s, tasks in zip(arrival_s, tasks_s, strict=True):
        last = time_s
        for task_s in tasks:
            end = max(heappop(free), time_s) + task_s
            heappush(free, end)
            last = max(last, end)
        done.append(last)
    return done, sorted(range(len(done)), key=done.__getitem__)


class Station:
    """Servers for preprocessing (or any stage whose times are known beforehand), first come, first served.

    Parameters
    ----------
    clock : Clock
    servers : int
        Servers.
    on_done : callable
        Called with each job that is done.
    own_queues : bool
        Whether task k of a job goes to the queue of server k, modulo their number; otherwise they share one queue.
    """

    def __init__(self, clock: Clock, servers: int, on_done: Callable[[int], None], *, own_queues: bool = False) -> None:
        if servers < 1:
            raise ValueError(f"servers={servers} must be at least 1; give one")
        self.clock = clock
        self.on_done = on_done
        self.servers = servers
        self.busy_s = 0.0
        self.slowness = 1.0
        n_queues = servers if own_queues else 1
        self._queues: list[deque[tuple[int, float]]] = [deque() for _ in range(n_queues)]
        self._idle = [servers // n_queues] * n_queues
        self._open: dict[int, int] = {}  # jobs -> tasks that are not done

    @property
    def load(self) -> int:
        """Jobs that wait or are served."""
        return len(self._open)

    def submit(self, job: int, tasks_s: Sequence[float]) -> None:
        """Take in a job of one or more tasks, now [s]."""
        self._open[job] = len(tasks_s)
        for index, task_s in enumerate(tasks_s):
            at = index % len(self._queues)
            if self._idle[at]:
                self._idle[at] -= 1
                self._serve(at, job, task_s)
            else:
                self._queues[at].append((job, task_s))

    def slow_down(self, slowness: float) -> None:
        """Take so many times as long for tasks that begin from now on."""
        self.slowness = slowness

    def _serve(self, at: int, job: int, task_s: float) -> None:
        task_s *= self.slowness
        self.busy_s += task_s
        self.clock.at(self.clock.now + task_s, partial(self._done, at, job), FIRST)

    def _done(self, at: int, job: int, event: Moment) -> None:
        del event
        if self._queues[at]:
            self._serve(at, *self._queues[at].popleft())
        else:
            self._idle[at] += 1
        self._open[job] -= 1
        if not self._open[job]:
            del self._open[job]
            self.on_done(job)
