"""simulate(): requests through a plan, with SimPy as the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import numpy as np

from simulator.batch import Batch
from simulator.batching import batch_policy
from simulator.clock import FIRST, Clock
from simulator.cpu import ahead
from simulator.encode_duty import EncodeDuty
from simulator.flow import TOO_LONG, Flow
from simulator.hooks import Alone, Inbox
from simulator.limits import Roles, limits_of
from simulator.ordering import order_key
from simulator.pool_run import PoolRun
from simulator.request import ENDS, NONE, Requests, State
from simulator.resolve import Resolved, resolve
from simulator.service import Service
from simulator.serving_plan import ServingPlan
from simulator.steplog import pooled
from simulator.tape import Tape
from simulator.topology import STAGES, Pool, Stage, encoders_for_others
from simulator.trace import LinkTrace, PoolTrace, Trace
from simulator.transfer import Room
from simulator.worker import Worker

REPORT_EVERY = 1024
"""Ended requests between two calls of `progress`."""
LEFT: Final = "the client gave up"
NO_WORKER: Final = "no worker of its pool came back"
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
        Seed of policies that draw; those here do not.
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
    run = Simulation(plan, requests, service, leaps=leaps, progress=progress)
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

    Where no arrival depends on an answer and one pool does everything, what happens before its workers is known
    beforehand and needs no events.
    """

    def __init__(
        self,
        plan: ServingPlan,
        requests: Requests,
        services: Services,
        *,
        leaps: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.plan, self.requests, self.leaps = plan, requests, leaps
        self.progress = progress
        self.clock = Clock()
        self.tape = Tape(requests)
        pools = plan.topology.pools
        by_pool = services if isinstance(services, Mapping) else {pool.name: services for pool in pools}
        first = next(pool for pool in pools if pool.runs("prefill"))
        self.service = by_pool[first.name]
        self.resolved: Resolved = resolve(requests, self.service)
        self.n_ended = 0
        self.followers = _followers(requests)
        self.first_ones = iter(np.flatnonzero(requests.after < 0).tolist())  # those that wait for nobody, in order
        self.conversation, self.unfinished = _conversations(requests)
        self.is_open = not requests.concurrency and not self.followers
        patient = bool(np.isinf(requests.patience_s).all())
        self.plain = self.is_open and patient and len(pools) == 1 and set(pools[0].stages) == set(STAGES)
        self.plain = self.plain and pools[0].replicas == 1 and plan.policies.admission == "all"
        self.runs = [self._pool_run(pool, by_pool[pool.name]) for pool in pools]
        self.flow = Flow(self.clock, plan, self.runs, resolved=self.resolved, tape=self.tape, on_end=self._ended)
        self.workers: list[Worker] = []
        inbox = self._ready_ahead(self.runs[0]) if self.plain else None
        for run in self.runs:
            for slot in range(run.pool.replicas):
                self.add_worker(run, slot, inbox)

    def _pool_run(self, pool: Pool, service: Service) -> PoolRun:
        r = self.resolved
        sends = pool.name in [other.name for other in encoders_for_others(self.plan.topology)]
        limits = limits_of(
            pool,
            self.plan.policies,
            service,
            largest_item=max(r.item_embeds, default=0),
            largest_request=_largest_request(r),
            sends=sends,
        )
        seen = r if service is self.service else resolve(self.requests, service)
        return PoolRun(
            pool,
            service,
            limits,
            policies=self.plan.policies,
            resolved=seen,
            clock=self.clock,
            on_preprocessed=self._preprocessed,
        )

    def _preprocessed(self, request: int) -> None:
        self.flow.preprocessed(request)

    def add_worker(self, run: PoolRun, slot: int, inbox: Inbox | None = None) -> Worker:
        """Add a worker to a pool."""
        pool, topology = run.pool, self.plan.topology
        layerwise = any(link.layerwise and link.source == pool.name for link in topology.links)
        worker = Worker(
            self.clock,
            len(self.workers),
            resolved=run.resolved,
            service=run.service,
            policy=batch_policy(self.plan.policies.batch),
            limits=run.limits,
            tape=self.tape,
            hooks=Alone(self._ended) if self.plain else self.flow,
            build=partial(self._batch, run),
            leaps=self.leaps,
            inbox=inbox,
            layerwise=layerwise and not pool.runs("decode"),
            plain=self.plain,
        )
        self.workers.append(worker)
        run.workers.append(worker)
        run.rooms.append(Room(lambda: worker.batch.handover.unpromised))
        self.flow.places.append((run, slot))
        return worker

    def _batch(self, run: PoolRun) -> Batch:
        """Return an empty batch of a pool's worker."""
        pool, limits, policies = run.pool, run.limits, self.plan.policies
        duty = None
        if run in self.flow.encoders:
            duty = EncodeDuty(
                run.resolved,
                budget=limits.encoder_budget,
                room=limits.encoder_cache_tokens,
                most_items=limits.encode_items,
                key=self._item_key(policies.encode_order),
                urgent=self.flow.urgent,
            )
        batch = Batch(
            run.resolved,
            limits,
            run.service.rules,
            roles=Roles(pool.runs("encode"), pool.runs("prefill"), pool.runs("decode")),
            key=self._request_key(run, policies.order),
            duty=duty,
        )
        self._let_pull(run, batch)
        return batch

    def _let_pull(self, run: PoolRun, batch: Batch) -> None:
        """Let a worker ask for embeddings only while little waits there, where its link pulls."""
        links = [link for link in self.plan.links if link.target == run.pool.name and link.mode == "pull"]
        if not links or batch.roles.encodes or not batch.roles.prefills:
            return
        most = min(link.pull_below for link in links) * run.limits.kv_blocks * run.limits.block_tokens
        encoder, prompt = batch.encoder, self.resolved.prompt_tokens
        free = encoder.room.free  # type: ignore[union-attr]

        def willing() -> float:
            waiting = sum(prompt[request] for request in batch.queue)
            return free() if not waiting or waiting < most else -1.0

        encoder.room.free = willing  # type: ignore[union-attr]

    def _request_key(self, run: PoolRun, order: str) -> Callable[[int], float] | None:
        key = order_key(order)
        return None if key is None else lambda request: key(self.flow.view(request, run))

    def _item_key(self, order: str) -> Callable[[int], float] | None:
        key = order_key(order)
        owner = self.resolved.item_request
        return None if key is None else lambda item: key(self.flow.view(owner[item], self.runs[0]))

    def run(self) -> None:
        """Let everything happen."""
        requests = self.requests
        if self.plain:
            self.clock.run()
            return
        for _ in range(requests.concurrency):
            self._next_user(0.0)
        if not requests.concurrency:
            self._feed()
        self.clock.run()
        while self.flow.parked:  # nobody will come back
            self.flow.parked.clear()
            for request in range(len(requests)):
                if self.tape.state[request] not in ENDS and not np.isnan(self.tape.arrival_s[request]):
                    self.flow.leave(request, State.FAILED, NO_WORKER)
            self.clock.run()

    # Arrivals that are known

    def _ready_ahead(self, run: PoolRun) -> Inbox:
        """Return all requests in the order in which they reach the worker, and when [s]."""
        requests, tape = self.requests, self.tape
        tape.times["arrival_s"][:] = requests.arrival_s
        tokens = np.array(self.resolved.most_tokens, dtype=np.int64)
        fits = tokens <= run.limits.kv_blocks * run.limits.block_tokens
        for request in np.flatnonzero(~fits).tolist():
            tape.end(request, State.REJECTED, TOO_LONG, float(requests.arrival_s[request]))
            self.n_ended += 1
        order, times = np.flatnonzero(fits).tolist(), (requests.arrival_s[fits] + self.service.request_s).tolist()
        if not self.resolved.preprocess_s.any() or run.station is None:
            return Inbox(order, times)
        tasks = [run.tasks(request) for request in order]
        for request, some in zip(order, tasks, strict=True):
            if some:
                tape.move(request, State.PREPROCESSING)
                tape.preprocess_s[request] = sum(some)
        run.station.busy_s = float(sum(sum(some) for some in tasks))
        done, rank = ahead(times, tasks, run.station.servers)
        return Inbox([order[i] for i in rank], [done[i] for i in rank])

    # Arrivals on the clock

    def _feed(self) -> None:
        """Wait for the next request that comes by itself; only one is on the clock."""
        request = next(self.first_ones, NONE)
        if request != NONE:
            time_s = float(self.requests.arrival_s[request])
            self.tape.arrival_s[request] = time_s
            self.clock.at(time_s + self.service.request_s, lambda _: self._fed(request), FIRST)

    def _fed(self, request: int) -> None:
        self._feed()
        self._arrive(request)

    def _expect(self, request: int, time_s: float) -> None:
        """Let one request arrive at a time [s]."""
        self.tape.arrival_s[request] = time_s
        self.clock.at(time_s + self.service.request_s, lambda _: self._arrive(request), FIRST)

    def _arrive(self, request: int) -> None:
        """Take in a request that the host has handed over."""
        patience = float(self.requests.patience_s[request])
        if patience < np.inf:
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
        audits += [f"{ends}: {line}" for ends, wire in self.flow.wires.items() for line in wire.audit()]
        if self.flow.journeys:
            audits.append(f"{len(self.flow.journeys)} requests are on their way for ever")
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
            links=tuple(LinkTrace(*ends, wire.sent_bytes, wire.busy_s) for ends, wire in self.flow.wires.items()),
        )

    def _pool_trace(self, run: PoolRun) -> PoolTrace:
        return PoolTrace(
            pool=run.pool,
            limits=run.limits,
            workers=tuple(worker.index for worker in run.workers),
            rests=tuple(tuple(worker.rests) for worker in run.workers),
            preprocess_workers=run.n_preprocess_workers if run.station is not None else 0,
            preprocess_busy_s=0.0 if run.station is None else run.station.busy_s,
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


def _largest_request(resolved: Resolved) -> int:
    """Return the embeddings of the request with most of them."""
    before = np.concatenate([[0], np.cumsum(resolved.item_embeds, dtype=np.int64)])
    first = np.array(resolved.first_item)
    return int((before[first[1:]] - before[first[:-1]]).max(initial=0))
