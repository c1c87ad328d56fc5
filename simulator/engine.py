"""simulate(): requests through a plan, with SimPy as the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from simulator.background import Background
from simulator.clock import FIRST, Clock
from simulator.control import Controller
from simulator.express import Express
from simulator.failures import Failures
from simulator.flow import Flow
from simulator.foresight import Arrivals, dealt, does_everything, has_one_way, nothing_happens, ready_for
from simulator.hooks import Alone, Inbox
from simulator.host_cache import OffloadedCache
from simulator.network import Network
from simulator.pool_run import PoolRun
from simulator.request import ENDS, NONE, Requests, State
from simulator.service import Service
from simulator.serving_plan import ServingPlan
from simulator.steplog import pooled
from simulator.tape import Tape
from simulator.topology import Stage
from simulator.trace import LinkTrace, PoolTrace, StoreTrace, Trace
from simulator.worker import Worker
from simulator.workforce import Workforce, pool_runs

REPORT_EVERY = 1024
"""Ended requests between two calls of `progress`."""
LEFT: Final = "the client gave up"
NOT_BACK: Final = "a worker or link that it needs did not come back"
Services = Service | Mapping[str, Service]


def simulate(
    plan: ServingPlan,
    requests: Requests,
    *,
    service: Services | None = None,
    seed: int = 0,
    leaps: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run requests through a plan.

    Parameters
    ----------
    plan : ServingPlan
        How they are served.
    requests : Requests
        What comes; see `simulator.traffic`.
    service : Service or mapping of str to Service, optional
        How long things take, in place of the cost model; one for all pools, or one by pool.
    seed : int
        Seed of what is drawn: failures without a time.
    leaps : bool
        Whether steps of decoding alone may be one event; the times are the same bit by bit.
    progress : callable, optional
        Called with the number of ended requests now and then.

    Returns
    -------
    Trace
        What happened, as columns.

    Raises
    ------
    ValueError
        If no pool of the plan runs what the requests need.
    """
    started = time.perf_counter(), time.process_time()
    topology = plan.topology
    _check_stages(plan, requests)
    if service is None:
        from simulator.step_service import StepService

        service = {pool.name: StepService.of_pool(plan, pool) for pool in topology.pools}
    run = Simulation(plan, requests, service, seed=seed, leaps=leaps, progress=progress)
    run.run()
    return run.trace(seed, time.perf_counter() - started[0], time.process_time() - started[1])


def _check_stages(plan: ServingPlan, requests: Requests) -> None:
    """Refuse traffic for which the plan has no pool."""
    counts = requests.n_items
    topology = plan.topology
    for media, there in ((True, bool((counts > 0).any())), (False, bool((counts == 0).any()))):
        what = "with pictures" if media else "without pictures"
        if there and not any(pool.takes(media=media) for pool in topology.running("prefill")):
            raise ValueError(f"requests {what} are taken by no pool that prefills; change serves of one")
        needed: tuple[Stage, ...] = ("preprocess", "encode") if media and there else ()
        for stage in needed:
            if not topology.running(stage):
                raise ValueError(f"stage {stage!r} is run by no pool, and requests {what} need it; add it to one")


class Simulation:
    """One run: arrivals, and the pools that they go through, on one clock.

    Where no arrival depends on an answer, when requests are preprocessed is known beforehand (`simulator.foresight`);
    where workers do everything and take turns, there is no event of an arrival at all.
    """

    def __init__(
        self,
        plan: ServingPlan,
        requests: Requests,
        services: Services,
        *,
        seed: int = 0,
        leaps: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.plan, self.requests = plan, requests
        self.progress = progress
        self.clock = Clock()
        self.tape = Tape(requests)
        pools = plan.topology.pools
        by_pool = services if isinstance(services, Mapping) else {pool.name: services for pool in pools}
        self.runs = pool_runs(plan, requests, by_pool, self.clock, self._preprocessed)
        first = next(run for run in self.runs if run.pool.runs("prefill"))
        self.service, self.resolved = first.service, first.resolved
        self.n_ended = 0
        self.followers = _followers(requests)
        self.first_ones = iter(np.flatnonzero(requests.after < 0).tolist())  # those that wait for nobody, in order
        self.conversation, self.unfinished = _conversations(requests)
        self.is_open = not requests.concurrency and not self.followers
        self.patient = bool(np.isinf(requests.patience_s).all())
        self.network = Network(self.clock, plan, self.runs, resolved=self.resolved, tape=self.tape)
        self.flow = Flow(self.network, self._ended)
        self.is_foreseen = self.is_open and self.patient and nothing_happens(plan) and has_one_way(self.network)
        self.workers = self._seat(first, leaps=leaps)
        background = Background(self.clock, lambda: self.n_ended == len(requests))
        self.failures = Failures(plan.failures, self.flow, background, seed)
        self.controller = Controller(plan.control, self.network, background) if plan.control else None

    def _seat(self, first: PoolRun, *, leaps: bool) -> list[Worker]:
        """Send known arrivals on their way, and return the workers, in their pools and with what they know of them."""
        inboxes: list[Inbox] = []
        alone: Alone | None = None
        if self.is_foreseen:
            ready, self.n_ended = ready_for(self.flow, self.tape, self.service.request_s)
            if not does_everything(self.plan):
                Arrivals(self.clock, ready, self.flow.go_on)
            elif first.pool.replicas == 1 or self.plan.policies.router == "round-robin":
                alone, inboxes = Alone(self._ended), dealt(self.tape, first.pool.replicas, ready)
            else:
                alone = Express(self.network, self._ended, first, ready)
        workforce = Workforce(self.flow, leaps=leaps, alone=alone)
        for run in self.runs:
            for slot in range(len(run.shifts)):
                workforce.add(run, inboxes[slot] if inboxes else None)
        workforce.share_devices()
        return workforce.workers

    def _preprocessed(self, request: int) -> None:
        self.flow.pictures.preprocessed(request)

    def run(self) -> None:
        """Let everything happen."""
        requests = self.requests
        for _ in range(requests.concurrency):
            self._next_user(0.0)
        if not requests.concurrency and not self.is_foreseen:
            order = list(self.first_ones)
            Arrivals(self.clock, (order, (requests.arrival_s[order] + self.service.request_s).tolist()), self._come)
        self.clock.run()
        while self.network.lacks_something() and self.n_ended < len(requests):  # a worker or a link will not come back
            self.network.parked.clear()
            for request in np.flatnonzero(~np.isnan(self.tape.times["arrival_s"])).tolist():
                if self.tape.state[request] not in ENDS:
                    self.flow.leave(request, State.FAILED, NOT_BACK)
            self.clock.run()

    # Arrivals on the clock

    def _come(self, request: int) -> None:
        """Take in a request that comes by itself."""
        self.tape.arrival_s[request] = float(self.requests.arrival_s[request])
        self._arrive(request)

    def _expect(self, request: int, time_s: float) -> None:
        """Let one request arrive at a time [s]."""
        self.tape.arrival_s[request] = time_s
        self.clock.at(time_s + self.service.request_s, lambda _: self._arrive(request), FIRST)

    def _arrive(self, request: int) -> None:
        """Take in a request that the host has handed over."""
        if not self.patient and (patience := float(self.requests.patience_s[request])) < np.inf:
            end_s = max(self.clock.now, self.tape.arrival_s[request] + patience)
            self.clock.at(end_s, lambda _: self.flow.leave(request, State.CANCELLED, LEFT))
        self.flow.arrive(request)

    def _next_user(self, now: float) -> None:
        """Let the next conversation of a closed loop begin."""
        request = next(self.first_ones, NONE)
        if request != NONE:
            self._expect(request, now + float(self.requests.arrival_s[request]))

    def _ended(self, request: int) -> None:
        """Let come what waited for this request to end."""
        self.n_ended += 1
        if self.progress is not None and self.n_ended % REPORT_EVERY == 0:
            self.progress(self.n_ended)
        if self.is_open:
            return
        now, following = self.clock.now, self.followers.get(request, ())
        for follower in following:
            self._expect(follower, now + float(self.requests.arrival_s[follower]))
        conversation = self.conversation[request]
        self.unfinished[conversation] -= 1
        if self.requests.concurrency and not self.unfinished[conversation]:
            self._next_user(now)

    # What happened

    def trace(self, seed: int, wall_s: float, cpu_s: float) -> Trace:
        """Return what happened."""
        audits = [f"worker {w.index}: {line}" for w in self.workers for line in w.batch.audit()]
        audits += [f"{ends}: {line}" for ends, wire in self.network.wires.items() for line in wire.audit()]
        if self.network.store is not None:
            audits += [f"store: {line}" for line in self.network.store.audit()]
        if self.network.journeys:
            audits.append(f"{len(self.network.journeys)} requests are on their way for ever")
        caches = [w.batch.encoder.cache for w in self.workers]
        duties = [w.batch.duty.cache for w in self.workers if w.batch.duty is not None]
        return Trace(
            plan=self.plan,
            requests=self.requests,
            prompt_tokens=np.array(self.resolved.prompt_tokens, dtype=np.int64),
            columns=self.tape.columns,
            reasons=self.tape.reasons,
            steps=tuple(w.notes.log.table() for w in self.workers),
            itl=pooled([w.notes.log for w in self.workers]),
            pools=tuple(self._pool_trace(run) for run in self.runs),
            encoder_hits=sum(cache.hits for cache in (*caches, *duties)),
            encoder_misses=sum(cache.misses for cache in (*caches, *duties)),
            evicted_blocks=sum(w.batch.kv.evicted for w in self.workers),
            held_blocks=sum(w.batch.kv.blocks - w.batch.kv.free for w in self.workers),
            faults=tuple(audits),
            seed=seed,
            wall_s=wall_s,
            cpu_s=cpu_s,
            events=self.clock.n_events,
            links=tuple(LinkTrace(*ends, wire.sent_bytes, wire.busy_s) for ends, wire in self.network.wires.items()),
            failures=tuple(self.failures.log),
            store=StoreTrace() if self.network.store is None else self.network.store.trace(),
        )

    def _pool_trace(self, run: PoolRun) -> PoolTrace:
        offloaded = [w.batch.kv for w in run.workers if isinstance(w.batch.kv, OffloadedCache)]
        return PoolTrace(
            pool=run.pool,
            limits=run.limits,
            workers=tuple(worker.index for worker in run.workers),
            rests=tuple(tuple(worker.rests) for worker in run.workers),
            hours=tuple(tuple(hours) for hours in run.hours),
            preprocess_workers=run.n_preprocess_workers if run.station is not None else 0,
            preprocess_busy_s=0.0 if run.station is None else run.station.busy_s,
            host_loaded_blocks=sum(kv.loaded for kv in offloaded),
            host_stored_blocks=sum(kv.host.stored for kv in offloaded),
        )


def _followers(requests: Requests) -> dict[int, list[int]]:
    """Return, by request, those that come when it has ended."""
    found: dict[int, list[int]] = {}
    for request in np.flatnonzero(requests.after >= 0).tolist():
        found.setdefault(int(requests.after[request]), []).append(request)
    return found


def _conversations(requests: Requests) -> tuple[list[int], list[int]]:
    """Return the first request of each request's conversation, and by first request how many there are."""
    first = list(range(len(requests)))
    for request, before in enumerate(requests.after.tolist()):
        if before >= 0:
            first[request] = first[before]
    return first, np.bincount(first, minlength=len(requests)).tolist()
