"""A pool as it runs: its workers, CPU workers, caches and what routers see of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simulator.clock import Clock
from simulator.cpu import Station
from simulator.loads import Loads
from simulator.resolve import Resolved
from simulator.routing import Router, router
from simulator.service import Service
from simulator.topology import Pool
from simulator.transfer import Room

if TYPE_CHECKING:
    from simulator.limits import Limits
    from simulator.serving_plan import Policies
    from simulator.worker import Worker


OFF, STARTING, ON, DRAINING = range(4)
"""What a worker of a pool is for the time being: not there, ordered, at work, ending what it has."""


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


class PoolRun:
    """The live parts of a pool.

    Parameters
    ----------
    pool : Pool
    service : Service
        How long its workers take.
    limits : Limits
        Their settings.
    n_slots : int
        Workers that it may come to have, each loop of its own counted.
    policies : Policies
    resolved : Resolved
        Requests as this pool's engine sees them.
    clock : Clock
    on_preprocessed : callable
        Called with each request whose pictures are preprocessed.
    """

    def __init__(
        self,
        pool: Pool,
        service: Service,
        limits: Limits,
        *,
        n_slots: int,
        policies: Policies,
        resolved: Resolved,
        clock: Clock,
        on_preprocessed: Callable[[int], None],
    ) -> None:
        self.pool = pool
        self.service = service
        self.limits = limits
        self.resolved = resolved
        self.loads = Loads(n_slots, policies.signal_age_s)
        self.router: Router = router(policies.router)
        self.encode_router: Router = router(policies.encode_router)
        self.decode_router: Router = router(policies.decode_router)
        self.workers: list[Worker] = []  # by slot
        self.shifts = [ON if slot < pool.replicas else OFF for slot in range(n_slots)]
        # by slot, from when and until when it is paid for, in turn
        self.hours: list[list[float]] = [[0.0] if shift == ON else [] for shift in self.shifts]
        self.down: set[int] = set()  # slots whose workers have crashed
        self._clock = clock
        self.rooms: list[Room] = []  # by slot, for requests that are computed elsewhere
        self.n_preprocess_workers = pool.preprocess_workers or service.preprocess_workers
        self.station = Station(clock, self.n_preprocess_workers, on_preprocessed) if pool.runs("preprocess") else None
        self.processed = ProcessorCache(pool.processor_cache_bytes)
        self.coming = [0, 0]  # requests on their way to a worker of this pool, and tokens of their prompts
        self.token_s = self._token_s() if policies.admission == "ttft" else 0.0
        self._fits: list[bool] | None = None
        self._pixel_bytes: dict[int, float] = {}  # by identity of what an item costs, of which there are few

    def _token_s(self) -> float:
        """Return the time of a prompt token, in a step that holds as much of the largest prompt as may be [s]."""
        r = self.resolved
        largest = max(range(len(r.prompt_tokens)), key=r.prompt_tokens.__getitem__, default=None)
        if largest is None or not self.pool.runs("prefill"):
            return 0.0
        tokens = min(r.prompt_tokens[largest], self.limits.token_budget)
        none = (0.0,) * len(self.service.rules)
        return self.service.step_s([(0, tokens, r.prompts[largest])], 1, 0, none) / tokens

    def tasks(self, request: int) -> Sequence[float]:
        """Return what the CPU has to do for the pictures that the processor cache lacks [s]."""
        resolved, tasks, known = self.resolved, list[float](), self._pixel_bytes
        for item in range(resolved.first_item[request], resolved.first_item[request + 1]):
            cost = resolved.item_cost[item]
            n_bytes = known.get(id(cost))
            if n_bytes is None:
                n_bytes = known[id(cost)] = self.service.pixel_bytes(cost)
            if not self.processed.use(resolved.item_content[item], n_bytes):
                tasks.append(resolved.item_preprocess_s[item])
        if not any(tasks):
            return ()
        return tasks if self.pool.preprocess_by == "item" else (sum(tasks),)

    # Workers that come and go

    @property
    def staffed(self) -> int:
        """Workers that are at work, or ordered."""
        return sum(shift in (ON, STARTING) for shift in self.shifts)

    def waiting(self) -> float:
        """Return how many requests and items wait for its workers."""
        return float(sum(worker.batch.n_waiting + len(self.rooms[slot]) for slot, worker in enumerate(self.workers)))

    def is_idle(self, slot: int) -> bool:
        """Return whether a worker has nothing left to do."""
        loads, worker = self.loads, self.workers[slot]
        has_work = loads.requests[slot] or loads.tokens[slot] or loads.image_tokens[slot]
        return not (has_work or worker.batch.holds_anything or len(self.rooms[slot]))

    def drain(self, slot: int) -> None:
        """Give a worker nothing more."""
        self.shifts[slot] = DRAINING
        self.loads.close(slot)

    def call_back(self, slot: int) -> None:
        """Give a worker work again that was to go."""
        self.shifts[slot] = ON
        self._open(slot)

    def switch_off(self, slot: int) -> None:
        """Let a worker go."""
        self.shifts[slot] = OFF
        self.hours[slot].append(self._clock.now)
        self.workers[slot].stop()

    def order(self, slot: int) -> None:
        """Pay for a worker from now on."""
        self.shifts[slot] = STARTING
        self.hours[slot].append(self._clock.now)

    def begin(self, slot: int) -> None:
        """Give an ordered worker work."""
        self.shifts[slot] = ON
        if slot not in self.down:
            self.workers[slot].start()
            self._open(slot)

    def crash(self, slot: int) -> None:
        """Let a worker lose all that it holds."""
        self.down.add(slot)
        self.loads.close(slot)
        self.workers[slot].stop()

    def repair(self, slot: int) -> None:
        """Let a worker that has crashed come back, if it is on."""
        self.down.discard(slot)
        if self.shifts[slot] in (ON, DRAINING):
            self.workers[slot].start()
            self._open(slot)

    def _open(self, slot: int) -> None:
        if self.shifts[slot] == ON and slot not in self.down:
            self.loads.reopen(slot)

    def holds(self, request: int) -> bool:
        """Return whether a request fits into a worker's cache with its longest answer."""
        if self._fits is None:  # worked out for all of them when it is asked first
            self._fits = self.held(answer=True).tolist()
        return self._fits[request]

    def held(self, *, answer: bool) -> NDArray[np.bool_]:
        """Return which requests fit into a worker's cache: their prompts, and the longest answers with them."""
        r, limit = self.resolved, self.limits.kv_blocks * self.limits.block_tokens
        tokens = np.array(r.prompt_tokens, dtype=np.int64)
        found = np.ones(len(tokens), dtype=bool)
        if self.pool.runs("prefill"):
            found &= tokens + np.array(r.beside_tokens or 0) * (tokens > 0) <= limit
        if answer:
            found &= tokens + r.requests.max_output_tokens + np.array(r.kept_tokens or 0) <= limit
        return found

    def pressure(self) -> float:
        """Return the mean tokens and embeddings a worker that takes work has; infinite if none does."""
        n = len(self.loads.open)
        return (sum(self.loads.tokens) + sum(self.loads.image_tokens)) / n if n else float("inf")
