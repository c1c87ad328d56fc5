"""simulate(): requests through a plan, with SimPy as the clock."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.units import PIXEL_BYTES
from simulator.batch import Limits
from simulator.batching import batch_policy
from simulator.clock import FIRST, Clock
from simulator.cpu import Station, ahead
from simulator.request import Requests, RequestView, State
from simulator.resolve import Resolved, resolve
from simulator.routing import router
from simulator.service import Service
from simulator.serving_plan import Policies, ServingPlan
from simulator.steplog import pooled
from simulator.tape import Tape
from simulator.topology import Pool
from simulator.trace import Trace
from simulator.worker import Inbox, Worker

CHANNELS = 3
"""Values of a pixel."""
REPORT_EVERY = 1024
"""Ended requests between two calls of `progress`."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a router sees of a worker."""

    waiting: int
    running: int
    tokens: int


def simulate(
    plan: ServingPlan,
    requests: Requests,
    *,
    service: Service | None = None,
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
    service : Service, optional
        How long things take, in place of the cost model.
    seed : int
        Seed of policies that draw; those here do not.
    leaps : bool
        Whether steps of decoding alone may be one event; the times are the same bit by bit.
    progress : callable, optional
        Called with the number of ended requests now and then.

    Returns
    -------
    Trace
        What happened, as columns.
    """
    started = time.perf_counter(), time.process_time()
    _ = plan.topology
    if service is None:
        from simulator.step_service import StepService

        service = StepService.of(plan)
    run = Simulation(plan, requests, service, leaps=leaps, progress=progress)
    run.run()
    return run.trace(seed, time.perf_counter() - started[0], time.process_time() - started[1])


def limits_of(pool: Pool, policies: Policies, service: Service, largest_item: int) -> Limits:
    """Return the settings of a pool's workers: the pool's own, else those of policy, engine and device."""
    capacity = service.capacity
    policy_budget = batch_policy(policies.batch).token_budget
    max_sequences = pool.max_batch or capacity.max_sequences
    budget = pool.token_budget or policy_budget or max(capacity.chunk_tokens, max_sequences)
    encoder = max(pool.encoder_budget_tokens or capacity.encoder_tokens, largest_item)
    together = pool.lockstep
    return Limits(
        token_budget=budget * together,
        max_sequences=max(1, max_sequences * together // pool.pp),
        kv_blocks=capacity.kv_blocks * together // pool.pp,
        block_tokens=capacity.block_tokens,
        encoder_budget=encoder * together,
        encoder_cache_tokens=encoder * together,
        long_prefill_tokens=pool.long_prefill_tokens or (budget if together > 1 else 0),
        prefix_caching=policies.prefix_caching and service.shares_prefixes,
    )


class Simulation:
    """One run: arrivals, preprocessing and workers on one clock.

    Where no arrival depends on an answer, what happens before the workers is known beforehand and needs no events.
    """

    def __init__(
        self,
        plan: ServingPlan,
        requests: Requests,
        service: Service,
        *,
        leaps: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        pool = plan.pools[0]
        self.plan, self.requests, self.service, self.pool = plan, requests, service, pool
        self.progress = progress
        self.clock = Clock()
        self.resolved: Resolved = resolve(requests, service)
        self.limits = limits_of(pool, plan.policies, service, max(self.resolved.item_embeds, default=0))
        self.tape = Tape(requests)
        self.router = router(plan.policies.router)
        self.station = Station(self.clock, pool.preprocess_workers or service.preprocess_workers, self._enqueue)
        self.processed = ProcessorCache(pool.processor_cache_bytes)
        self.n_ended = 0
        self.next_closed = min(requests.concurrency, len(requests))
        self.followers = _followers(requests)
        self.is_open = not requests.concurrency and not self.followers
        ready = self._ready_ahead() if self.is_open else ([], [])
        alone = pool.replicas == 1
        policy = batch_policy(plan.policies.batch)
        self.workers = [
            Worker(
                self.clock,
                i,
                resolved=self.resolved,
                service=service,
                policy=policy,
                limits=self.limits,
                tape=self.tape,
                on_end=self._ended,
                leaps=leaps,
                inbox=Inbox(*ready) if alone else None,
            )
            for i in range(pool.replicas)
        ]
        self._feed = iter(()) if alone else iter(list(zip(*ready, strict=True)))

    def run(self) -> None:
        """Let everything happen."""
        requests = self.requests
        if self.is_open:
            self._feed_next()
        else:
            first = range(self.next_closed) if requests.concurrency else np.flatnonzero(requests.after < 0).tolist()
            for request in first:
                self._expect(request, float(requests.arrival_s[request]))
        self.clock.run()

    # Arrivals that are known

    def _ready_ahead(self) -> tuple[list[int], list[float]]:
        """Return all requests in the order in which they reach the workers, and when [s]."""
        requests, tape = self.requests, self.tape
        tape.times["arrival_s"][:] = requests.arrival_s
        tokens = np.array(self.resolved.most_tokens, dtype=np.int64)
        fits = tokens <= self.limits.kv_blocks * self.limits.block_tokens
        for request in np.flatnonzero(~fits).tolist():
            tape.move(request, State.REJECTED)
            self.n_ended += 1
        order, times = np.flatnonzero(fits).tolist(), (requests.arrival_s[fits] + self.service.request_s).tolist()
        if not self.resolved.preprocess_s.any():
            return order, times
        tasks = [self._tasks(request) for request in order]
        self.station.busy_s = float(sum(sum(some) for some in tasks))
        done, rank = ahead(times, tasks, self.station.servers)
        return [order[i] for i in rank], [done[i] for i in rank]

    def _feed_next(self) -> None:
        """Wait for the next known request of several workers."""
        following = next(self._feed, None)
        if following is not None:
            self.clock.at(following[1], lambda _: self._fed(following[0]), FIRST)

    def _fed(self, request: int) -> None:
        self._enqueue(request)
        self._feed_next()

    # Arrivals that depend on answers

    def _expect(self, request: int, time_s: float) -> None:
        """Let one request arrive at a time [s]."""
        self.tape.arrival_s[request] = time_s
        self.clock.at(time_s + self.service.request_s, lambda _: self._arrive(request), FIRST)

    def _arrive(self, request: int) -> None:
        """Take in a request that the host has handed over."""
        if self.resolved.most_tokens[request] > self.limits.kv_blocks * self.limits.block_tokens:
            self.tape.move(request, State.REJECTED)
            self._ended(request)
            return
        tasks = self._tasks(request)
        if tasks:
            self.station.submit(request, tasks)
        else:
            self._enqueue(request)

    def _tasks(self, request: int) -> list[float]:
        """Return what the CPU has to do for the pictures that the processor cache lacks [s]."""
        resolved, tasks = self.resolved, list[float]()
        for item in range(resolved.first_item[request], resolved.first_item[request + 1]):
            n_bytes = resolved.item_cost[item].resized_pixels * CHANNELS * PIXEL_BYTES
            if not self.processed.use(resolved.item_content[item], n_bytes):
                tasks.append(resolved.item_preprocess_s[item])
        if not any(tasks):
            return []
        self.tape.move(request, State.PREPROCESSING)
        self.tape.preprocess_s[request] = sum(tasks)
        return tasks if self.pool.preprocess_by == "item" else [sum(tasks)]

    def _enqueue(self, request: int) -> None:
        """Give a request to a worker."""
        index = 0
        if len(self.workers) > 1:
            index = self.router.route(self.view(request), self._loads())
            self.tape.worker[request] = index
        self.workers[index].enqueue(request)

    def view(self, request: int) -> RequestView:
        """Return what a policy may see of a request."""
        first = self.resolved.first_item
        return RequestView(
            index=request,
            arrival_s=self.tape.arrival_s[request],
            prompt_tokens=self.resolved.prompt_tokens[request],
            max_output_tokens=int(self.requests.max_output_tokens[request]),
            n_items=first[request + 1] - first[request],
        )

    def _loads(self) -> Sequence[WorkerLoad]:
        return [WorkerLoad(len(w.batch.queue), len(w.batch.running), w.load_tokens) for w in self.workers]

    # Ends

    def _ended(self, request: int) -> None:
        """Let come what waited for this request to end."""
        self.n_ended += 1
        if self.progress is not None and self.n_ended % REPORT_EVERY == 0:
            self.progress(self.n_ended)
        if self.is_open:
            return
        for follower in self.followers.get(request, ()):
            self._expect(follower, self.clock.now + float(self.requests.arrival_s[follower]))
        if self.requests.concurrency and self.next_closed < len(self.requests):
            request = self.next_closed
            self.next_closed += 1
            self._expect(request, self.clock.now + float(self.requests.arrival_s[request]))

    def trace(self, seed: int, wall_s: float, cpu_s: float) -> Trace:
        """Return what happened."""
        audits = [line for w in self.workers for line in (*w.batch.kv.audit(), *w.batch.encoder.cache.audit())]
        held = sum(w.batch.kv.blocks - w.batch.kv.free for w in self.workers)
        return Trace(
            plan=self.plan,
            requests=self.requests,
            prompt_tokens=np.array(self.resolved.prompt_tokens, dtype=np.int64),
            columns=self.tape.columns,
            steps=tuple(w.log.table() for w in self.workers),
            itl=pooled([w.log for w in self.workers]),
            limits=self.limits,
            preprocess_workers=self.station.servers,
            preprocess_busy_s=self.station.busy_s,
            encoder_hits=sum(w.batch.encoder.cache.hits for w in self.workers),
            encoder_misses=sum(w.batch.encoder.cache.misses for w in self.workers),
            evicted_blocks=sum(w.batch.kv.evicted for w in self.workers),
            held_blocks=held,
            faults=tuple(audits),
            seed=seed,
            wall_s=wall_s,
            cpu_s=cpu_s,
            events=self.clock.n_events,
        )


def _followers(requests: Requests) -> dict[int, list[int]]:
    """Return, by request, those that come when it has ended."""
    found: dict[int, list[int]] = {}
    for request in np.flatnonzero(requests.after >= 0).tolist():
        found.setdefault(int(requests.after[request]), []).append(request)
    return found


class ProcessorCache:
    """Preprocessed pictures on the host, the one used last kept longest.

    Parameters
    ----------
    most_bytes : float
        Room [bytes].
    """

    def __init__(self, most_bytes: float) -> None:
        self.free = most_bytes
        self._held: OrderedDict[int, float] = OrderedDict()

    def use(self, content: int, n_bytes: float) -> bool:
        """Return whether a picture is there, and keep it from now on if there is room."""
        if content in self._held:
            self._held.move_to_end(content)
            return True
        while self.free < n_bytes and self._held:
            self.free += self._held.popitem(last=False)[1]
        if n_bytes <= self.free:
            self._held[content] = n_bytes
            self.free -= n_bytes
        return False
