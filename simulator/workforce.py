"""The pools and workers of a plan, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from simulator.batch import Batch
from simulator.batching import batch_policy
from simulator.clock import Clock
from simulator.device import SharedDevice
from simulator.encode_duty import EncodeDuty
from simulator.flow import Flow
from simulator.hooks import Alone, Inbox
from simulator.limits import Roles, limits_of
from simulator.ordering import order_key
from simulator.pool_run import OFF, PoolRun
from simulator.received import Received
from simulator.request import Requests
from simulator.resolve import Resolved, resolve
from simulator.service import Service
from simulator.serving_plan import ServingPlan
from simulator.topology import encoders_for_others
from simulator.transfer import Room
from simulator.worker import Worker


def pool_runs(
    plan: ServingPlan,
    requests: Requests,
    services: Mapping[str, Service],
    clock: Clock,
    on_preprocessed: Callable[[int], None],
) -> list[PoolRun]:
    """Return the pools of a plan, without workers.

    Parameters
    ----------
    services : mapping of str to Service
        By pool.
    on_preprocessed : callable
        Called with each request whose pictures are preprocessed.
    """
    senders = {pool.name for pool in encoders_for_others(plan.topology)}
    seen: dict[int, Resolved] = {}  # by service
    found = []
    sizes = [(pool.name, pool.replicas) for pool in plan.pools]
    for pool in plan.pools:
        service = services[pool.name]
        if id(service) not in seen:
            seen[id(service)] = resolve(requests, service)
        resolved = seen[id(service)]
        limits = limits_of(
            pool,
            plan.policies,
            service,
            largest_item=max(resolved.item_embeds, default=0),
            largest_request=_largest_request(resolved),
            sends=pool.name in senders,
        )
        run = PoolRun(
            pool,
            service,
            limits,
            n_slots=plan.control.most(pool.name, sizes) if plan.control else pool.replicas,
            policies=plan.policies,
            resolved=resolved,
            clock=clock,
            on_preprocessed=on_preprocessed,
        )
        found.append(run)
    return found


def _largest_request(resolved: Resolved) -> int:
    """Return the embeddings of the request with most of them."""
    before = np.concatenate([[0], np.cumsum(resolved.item_embeds, dtype=np.int64)])
    first = np.array(resolved.first_item)
    return int((before[first[1:]] - before[first[:-1]]).max(initial=0))


class Workforce:
    """Adds workers to pools.

    Parameters
    ----------
    flow : Flow
        Told of what happens.
    leaps : bool
        Whether steps of decoding alone may be one event.
    alone : Alone or None
        Told in place of the flow, where one worker does everything.
    """

    def __init__(self, flow: Flow, *, leaps: bool, alone: Alone | None = None) -> None:
        self.flow, self.network = flow, flow.network
        self.leaps, self.alone = leaps, alone
        self.workers: list[Worker] = []

    def add(self, run: PoolRun, inbox: Inbox | None = None) -> Worker:
        """Add a worker to a pool."""
        network, pool = self.network, run.pool
        layerwise = any(link.layerwise and link.source == pool.name for link in network.plan.links)
        worker = Worker(
            network.clock,
            len(self.workers),
            resolved=run.resolved,
            service=run.service,
            policy=batch_policy(network.plan.policies.batch),
            tape=network.tape,
            hooks=self.alone or self.flow,
            build=partial(self._batch, run),
            leaps=self.leaps,
            inbox=inbox,
            layerwise=layerwise and not pool.runs("decode"),
            plain=self.alone is not None,
        )
        self.workers.append(worker)
        network.places.append((run, len(run.workers)))
        run.workers.append(worker)
        run.rooms.append(Room(worker.room))
        if run.shifts[len(run.workers) - 1] == OFF:
            run.loads.close(len(run.workers) - 1)
            worker.runs = False
        return worker

    def share_devices(self) -> None:
        """Let workers of pools on the same devices take turns."""
        by_name = {run.pool.name: run for run in self.network.pools}
        for guest in self.network.pools:
            if guest.pool.shares_devices_of is not None:
                for one, other in zip(by_name[guest.pool.shares_devices_of].workers, guest.workers, strict=True):
                    one.device = other.device = one.device or SharedDevice()

    def _batch(self, run: PoolRun) -> Batch:
        """Return an empty batch of a pool's worker."""
        pool, limits, policies = run.pool, run.limits, self.network.plan.policies
        duty = None
        if run in self.network.encoders:
            duty = EncodeDuty(
                run.resolved,
                budget=limits.encoder_budget,
                room=limits.encoder_cache_tokens,
                most_items=limits.encode_items,
                key=self._item_key(run, policies.encode_order),
                urgent=self.flow.pictures.urgent,
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
        links = [link for link in self.network.plan.links if link.target == run.pool.name and link.mode == "pull"]
        encoder = batch.encoder
        if not links or not batch.roles.prefills or not isinstance(encoder, Received):
            return
        most = min(link.pull_below for link in links) * run.limits.kv_blocks * run.limits.block_tokens
        prompt, free = run.resolved.prompt_tokens, encoder.room.free

        def willing() -> float:
            waiting = sum(prompt[request] for request in batch.queue)
            return free() if not waiting or waiting < most else -1.0

        encoder.room.free = willing

    def _request_key(self, run: PoolRun, order: str) -> Callable[[int], float] | None:
        key = order_key(order)
        return None if key is None else lambda request: key(self.network.view(request, run))

    def _item_key(self, run: PoolRun, order: str) -> Callable[[int], float] | None:
        key = order_key(order)
        owner = run.resolved.item_request
        return None if key is None else lambda item: key(self.network.view(owner[item], run))
