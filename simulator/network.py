"""What the parts of a request's way have in common: pools, workers, wires, and what waits for a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from simulator.clock import Clock
from simulator.embedding_store import EmbeddingStore
from simulator.journey import Journey
from simulator.pool_run import PoolRun
from simulator.request import NONE, RequestView
from simulator.resolve import Resolved
from simulator.serving_plan import ServingPlan
from simulator.tape import Tape
from simulator.topology import Link, encoders_for_others, preprocessors_of
from simulator.transfer import Wire
from simulator.worker import Worker


class Parked(NamedTuple):
    """What waits until a worker of one of these pools takes work."""

    pools: Sequence[PoolRun]
    go_on: Callable[[], None]


class Network:
    """The pools of a plan as they run, and the wires between them.

    Parameters
    ----------
    clock : Clock
    plan : ServingPlan
    pools : sequence of PoolRun
    resolved : Resolved
    tape : Tape
    """

    def __init__(
        self, clock: Clock, plan: ServingPlan, pools: Sequence[PoolRun], *, resolved: Resolved, tape: Tape
    ) -> None:
        self.clock, self.plan, self.pools = clock, plan, pools
        self.resolved, self.tape = resolved, tape
        requests = resolved.requests  # as lists, which are read quicker one by one
        self.parent, self.priority = requests.parent.tolist(), requests.priority.tolist()
        self.most_output: list[int] = requests.max_output_tokens.tolist()
        self.journeys: dict[int, Journey] = {}
        self.places: list[tuple[PoolRun, int]] = []  # by worker, its pool and slot
        self.wires: dict[tuple[str, str, int], Wire] = {}
        self.speeds: dict[tuple[str, str], float] = {}  # by link, the share of its bandwidth that is there, if not all
        self.parked: dict[int, list[Parked]] = {}  # by request, what waits for a worker that takes work
        self.store = None if plan.store is None else EmbeddingStore(clock, plan.store)
        topology = plan.topology
        self.links: Mapping[tuple[str, str], Link] = {(link.source, link.target): link for link in topology.links}
        by_name = {run.pool.name: run for run in pools}
        self.fronts = {
            media: [run for run in pools if run.pool.runs("prefill") and run.pool.takes(media=media)]
            for media in (False, True)
        }
        self.encoders = [by_name[pool.name] for pool in encoders_for_others(topology)]
        self.decoders = [run for run in pools if run.pool.runs("decode")]
        self.preprocessors = {
            run.pool.name: [by_name[pool.name] for pool in preprocessors_of(topology, run.pool)] for run in pools
        }

    def place(self, worker: Worker) -> tuple[PoolRun, int]:
        """Return a worker's pool and slot."""
        return self.places[worker.index]

    # Journeys

    def if_alive(self, journey: Journey, go_on: Callable[[Journey], None]) -> None:
        """Go on with a request, unless it has ended or begun anew meanwhile."""
        if self.journeys.get(journey.request) is journey:
            go_on(journey)

    def park(self, journey: Journey, run: PoolRun, go_on: Callable[[Journey], None]) -> None:
        """Go on with a request once a worker of a pool takes work."""
        self.park_until(journey.request, (run,), lambda: self.if_alive(journey, go_on))

    def park_until(self, request: int, pools: Sequence[PoolRun], go_on: Callable[[], None]) -> None:
        """Go on with a request that is nowhere once a worker of some pools takes work."""
        self.parked.setdefault(request, []).append(Parked(pools, go_on))

    def unpark(self) -> None:
        """Try again what waited for a worker, now that one takes work."""
        waiting, self.parked = self.parked, {}
        for several in waiting.values():
            for one in several:
                one.go_on()

    def parked_at(self, run: PoolRun) -> list[int]:
        """Return the requests that wait until a worker of a pool takes work."""
        return [request for request, several in self.parked.items() if any(run in one.pools for one in several)]

    # Wires

    def link(self, source: PoolRun, target: PoolRun) -> Link:
        """Return the link from one pool to another."""
        return self.links[source.pool.name, target.pool.name]

    def wire(self, source: PoolRun, target: PoolRun, slot: int) -> Wire:
        """Return the wire from a worker of one pool to another pool."""
        link = self.link(source, target)
        key = (source.pool.name, target.pool.name, slot if link.per == "worker" else 0)
        wire = self.wires.get(key)
        if wire is None:
            wire = self.wires[key] = Wire(self.clock, link.bandwidth_bytes_per_s, link.latency_s)
            wire.speed = self.speeds.get(key[:2], 1.0)
        return wire

    def change_link(self, source: str, target: str, speed: float) -> None:
        """Set the share of a link's bandwidth that is there, from now on; 0 cuts it."""
        self.speeds[source, target] = speed
        for key, wire in self.wires.items():
            if key[:2] == (source, target):
                wire.change(speed)

    def lacks_something(self) -> bool:
        """Return whether a pool has no worker that takes work, or a link is cut."""
        return not all(run.loads.open for run in self.pools) or 0.0 in self.speeds.values()

    # Views

    def view(self, request: int, run: PoolRun) -> RequestView:
        """Return what a policy may see of a request."""
        first, parent = self.resolved.first_item, self.parent[request]
        slot, tokens = NONE, 0
        if parent >= 0:
            place = self.places[self.tape.worker[parent]]
            if place[0] is run:
                slot, tokens = place[1], int(self.resolved.shared_tokens[request])
        return RequestView(
            index=request,
            arrival_s=self.tape.arrival_s[request],
            prompt_tokens=self.resolved.prompt_tokens[request],
            max_output_tokens=self.most_output[request],
            n_items=first[request + 1] - first[request],
            priority=self.priority[request],
            prefix_slot=slot,
            prefix_tokens=tokens,
        )

    def view_item(self, request: int, item: int) -> RequestView:
        """Return what a policy may see of an item."""
        r = self.resolved
        return RequestView(
            index=item,
            arrival_s=self.tape.arrival_s[request],
            prompt_tokens=r.prompt_tokens[request],
            max_output_tokens=0,
            n_items=1,
            image_tokens=r.item_embeds[item],
            content=r.item_content[item],
        )


def lightest(runs: Sequence[PoolRun]) -> PoolRun:
    """Return the pool with the least work for each of its workers, the first of equals."""
    return runs[0] if len(runs) == 1 else min(runs, key=PoolRun.pressure)
