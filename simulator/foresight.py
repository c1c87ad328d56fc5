"""What is known before a run: when requests are ready whose arrivals depend on no answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from simulator.clock import FIRST, Clock, Moment
from simulator.cpu import ahead
from simulator.flow import TOO_LONG, Flow
from simulator.hooks import Inbox
from simulator.network import Network
from simulator.pool_run import PoolRun
from simulator.request import State
from simulator.serving_plan import ServingPlan
from simulator.tape import Tape
from simulator.topology import STAGES

Ready = tuple[list[int], list[float]]
"""Requests in the order in which they are ready, and when [s]."""


def nothing_happens(plan: ServingPlan) -> bool:
    """Return whether all requests are taken, and no worker comes, goes or fails."""
    return plan.policies.admission == "all" and not plan.failures and plan.control is None


def does_everything(plan: ServingPlan) -> bool:
    """Return whether each worker does everything."""
    return len(plan.pools) == 1 and set(plan.pools[0].stages) == set(STAGES)


def has_one_way(network: Network) -> bool:
    """Return whether there is no choice of pools for prompts and for the CPUs of pictures."""
    return all(len(fronts) <= 1 for fronts in network.fronts.values()) and len(_preprocessors(network)) <= 1


def _preprocessors(network: Network) -> set[PoolRun]:
    return {run for runs in network.preprocessors.values() for run in runs}


def ready_ahead(tape: Tape, run: PoolRun, fits: NDArray[np.bool_], request_s: float) -> Ready:
    """Return when requests are preprocessed, on the CPUs of a pool, and note it; those that do not fit are rejected.

    Parameters
    ----------
    tape : Tape
    run : PoolRun
        The pool that preprocesses.
    fits : ndarray of bool
        Which requests fit.
    request_s : float
        From arrival to when the host has handed a request over [s].
    """
    requests = run.resolved.requests
    tape.times["arrival_s"][:] = requests.arrival_s
    for request in np.flatnonzero(~fits).tolist():
        tape.end(request, State.REJECTED, TOO_LONG, float(requests.arrival_s[request]))
    order, times = np.flatnonzero(fits).tolist(), (requests.arrival_s[fits] + request_s).tolist()
    if not run.resolved.preprocess_s.any() or run.station is None:
        return order, times
    tasks = [run.tasks(request) for request in order]
    for request, some in zip(order, tasks, strict=True):
        if some:
            tape.move(request, State.PREPROCESSING)
            tape.preprocess_s[request] = sum(some)
    run.station.busy_s = float(sum(sum(some) for some in tasks))
    done, rank = ahead(times, tasks, run.station.servers)
    return [order[i] for i in rank], [done[i] for i in rank]


def dealt(tape: Tape, n_workers: int, ready: Ready) -> list[Inbox]:
    """Return the inboxes of workers that take requests in turn, as `simulator.routing.RoundRobin` does."""
    order, times_s = ready
    if n_workers == 1:
        return [Inbox(order, times_s)]
    place = np.array(order, dtype=np.int64) % n_workers
    tape.counts["worker"][order] = place
    mine = [np.flatnonzero(place == slot).tolist() for slot in range(n_workers)]
    return [Inbox([order[i] for i in some], [times_s[i] for i in some]) for some in mine]


class Arrivals:
    """Sends requests on their way when they are ready; only one is on the clock.

    Parameters
    ----------
    clock : Clock
    ready : Ready
    go_on : callable
        Takes a request.
    """

    def __init__(self, clock: Clock, ready: Ready, go_on: Callable[[int], None]) -> None:
        self.clock, self.go_on = clock, go_on
        self.order, self.times_s = ready
        self._place = 0
        if self.order:
            clock.at(self.times_s[0], self._next, FIRST)

    def _next(self, event: Moment) -> None:
        del event
        place = self._place
        self._place = after = place + 1
        if after < len(self.order):
            self.clock.at(self.times_s[after], self._next, FIRST)
        self.go_on(self.order[place])


def ready_for(flow: Flow, tape: Tape, request_s: float) -> tuple[Ready, int]:
    """Return when requests are ready for the one way through pools, and how many do not fit."""
    network = flow.network
    fits = flow.fitting()
    cpus = _preprocessors(network)
    run = cpus.pop() if cpus else network.fronts[False][0]
    return ready_ahead(tape, run, fits, request_s), int((~fits).sum())
