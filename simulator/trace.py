"""What happened, as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from simulator.limits import Limits
from simulator.request import Ints, Requests, State
from simulator.serving_plan import ServingPlan
from simulator.topology import Pool


@dataclass(frozen=True, slots=True)
class PoolTrace:
    """What a pool was, and did as a whole.

    Parameters
    ----------
    pool : Pool
    limits : Limits
        Settings of its workers.
    workers : tuple of int
        Which of the workers are its.
    rests : tuple of tuple of float
        By worker, when it stopped though something waited there for another worker or for a restart, and when it went
        on, in turn [s].
    hours : tuple of tuple of float
        By worker, from when and until when its devices were paid for, in turn; an open end is that of the run [s].
    preprocess_workers : int
    preprocess_busy_s : float
        CPU workers, and the time that they worked [s].
    host_loaded_blocks, host_stored_blocks : int
        KV blocks that its workers loaded from their hosts, and copied there.
    """

    pool: Pool
    limits: Limits
    workers: tuple[int, ...]
    rests: tuple[tuple[float, ...], ...]
    hours: tuple[tuple[float, ...], ...]
    preprocess_workers: int
    preprocess_busy_s: float
    host_loaded_blocks: int = 0
    host_stored_blocks: int = 0

    @property
    def host_loaded_tokens(self) -> int:
        """Tokens that were loaded instead of computed."""
        return self.host_loaded_blocks * self.limits.block_tokens

    @property
    def host_loaded_bytes(self) -> float:
        """Bytes that were loaded."""
        return self.host_loaded_blocks * self.limits.host_block_bytes


@dataclass(frozen=True, slots=True)
class LinkTrace:
    """What a wire carried.

    Parameters
    ----------
    source, target : str
        Its pools.
    slot : int
        The sending worker within its pool, or 0 for a wire of the whole pool.
    sent_bytes, busy_s : float
        Bytes that arrived, and the time with transfers under way [s].
    """

    source: str
    target: str
    slot: int
    sent_bytes: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class FailureTrace:
    """Something that went wrong.

    Parameters
    ----------
    kind, pool, to
        As in `simulator.rules.Failure`.
    slot : int
        Which of the pool's workers; -1 where it is none of them.
    at_s, until_s : float
        When it began, and when it was repaired; infinite where it was not before the end of the run [s].
    """

    kind: str
    pool: str
    to: str | None
    slot: int
    at_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class StoreTrace:
    """What a store of embeddings did.

    Parameters
    ----------
    hits, misses : int
        Items that were there, and those that were not, when they were given to encoders.
    fetched_bytes, written_bytes : float
        What landed.
    written, evicted : int
        Entries that came, and that left for others.
    busy_s : float
        Time with transfers under way [s].
    """

    hits: int = 0
    misses: int = 0
    fetched_bytes: float = 0.0
    written_bytes: float = 0.0
    written: int = 0
    evicted: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One run.

    Parameters
    ----------
    plan : ServingPlan
    requests : Requests
    prompt_tokens : ndarray of int
        By request, pictures included.
    columns : mapping of str to ndarray
        By request, times [s], not a number where it did not happen: arrival_s, preprocess_s (work of CPUs), encoded_s
        (all embeddings received from another pool), queued_s, scheduled_s, first_token_s, joined_s (a worker that
        decodes has the KV of another), finish_s, ended_s (without an answer); state, preemptions, cached_tokens,
        worker (of the prompt), decode_worker (-1: the same), retries.
    reasons : mapping of int to str
        Why requests ended that did not finish.
    steps : tuple of mapping of str to ndarray
        By worker, a row a step or leap; see `simulator.steplog.COLUMNS`.
    itl : tuple of ndarray
        Gaps between tokens [s], and how often each occurred.
    pools : tuple of PoolTrace
    links : tuple of LinkTrace
    failures : tuple of FailureTrace
        What went wrong, in order.
    store : StoreTrace
    encoder_hits, encoder_misses, evicted_blocks, held_blocks : int
        What the caches did, and blocks in use at the end.
    faults : tuple of str
        What did not add up in the caches.
    seed : int
    wall_s, cpu_s : float
        What the run took [s].
    events : int
        Events on the clock.
    """

    plan: ServingPlan
    requests: Requests
    prompt_tokens: Ints
    columns: Mapping[str, NDArray[Any]]
    reasons: Mapping[int, str]
    steps: tuple[Mapping[str, Array], ...]
    itl: tuple[Array, Array]
    pools: tuple[PoolTrace, ...]
    encoder_hits: int
    encoder_misses: int
    evicted_blocks: int
    held_blocks: int
    faults: tuple[str, ...]
    seed: int
    wall_s: float
    cpu_s: float
    events: int
    links: tuple[LinkTrace, ...] = ()
    failures: tuple[FailureTrace, ...] = ()
    store: StoreTrace = StoreTrace()

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Which requests have their last token."""
        found: NDArray[np.bool_] = self.columns["state"] == State.FINISHED
        return found

    @property
    def output_tokens(self) -> Ints:
        """Tokens of the answers."""
        return self.requests.output_tokens

    @property
    def ttft_s(self) -> Array:
        """Time to first token of each request [s]."""
        found: Array = self.columns["first_token_s"] - self.columns["arrival_s"]
        return found

    @property
    def e2e_s(self) -> Array:
        """Time from arrival to the last token of each request [s]."""
        found: Array = self.columns["finish_s"] - self.columns["arrival_s"]
        return found

    @property
    def tpot_s(self) -> Array:
        """Time per output token after the first; not a number for answers of one token [s]."""
        gaps = (self.output_tokens - 1).astype(float)
        gaps[gaps == 0] = np.nan
        result: Array = (self.columns["finish_s"] - self.columns["first_token_s"]) / gaps
        return result

    @property
    def span_s(self) -> float:
        """Time from the first arrival to the last end [s]."""
        arrival = self.columns["arrival_s"]
        return 0.0 if np.isnan(arrival).all() else self.end_s - float(np.nanmin(arrival))

    @property
    def end_s(self) -> float:
        """When the last request ended; 0 where none has [s]."""
        ends = np.fmax(self.columns["finish_s"], self.columns["ended_s"])
        return 0.0 if np.isnan(ends).all() else float(np.nanmax(ends))

    def pool_of(self, worker: int) -> PoolTrace:
        """Return the pool of a worker."""
        return next(one for one in self.pools if worker in one.workers)

    def paid_s(self, pool: PoolTrace) -> float:
        """Return for how long the workers of a pool were paid, all together [s]."""
        end_s = self.end_s
        start_s = end_s - self.span_s
        total = 0.0
        for hours in pool.hours:
            ends = [*hours, end_s] if len(hours) % 2 else hours
            for on_s, off_s in zip(ends[::2], ends[1::2], strict=True):
                total += max(0.0, min(off_s, end_s) - max(on_s, start_s))
        return total

    def steps_of(self, pool: PoolTrace) -> list[Mapping[str, Array]]:
        """Return the steps of a pool's workers."""
        return [self.steps[worker] for worker in pool.workers]


def same(a: Trace, b: Trace) -> bool:
    """Return whether two traces say the same of every request, bit by bit."""
    return all(a.columns[name].tobytes() == b.columns[name].tobytes() for name in a.columns)
