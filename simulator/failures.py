"""Things that go wrong: crashes, stragglers, links that are lost, slow CPUs. Nothing is lost without a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from simulator.background import Background
from simulator.flow import Flow
from simulator.pool_run import PoolRun
from simulator.rules import Failure
from simulator.trace import FailureTrace

Mend = Callable[[], None]


class Failures:
    """Lets the failures of a plan happen.

    Two at once on the same thing both count: what is slowed down twice is slower by both.

    Parameters
    ----------
    failures : sequence of Failure
    flow : Flow
    background : Background
        When.
    seed : int
        Of what is drawn.
    """

    def __init__(self, failures: Sequence[Failure], flow: Flow, background: Background, seed: int) -> None:
        self.flow, self.network, self.background = flow, flow.network, background
        self.log: list[FailureTrace] = []  # what has happened
        self._active: dict[Hashable, list[float]] = {}  # by thing, the factors that act on it
        for index, failure in enumerate(failures):
            self._expect(failure, np.random.default_rng([seed, index]))

    def _expect(self, failure: Failure, rng: np.random.Generator) -> None:
        """Wait for the next time."""
        happen = partial(self._happen, failure, rng)
        if failure.at_s is not None:
            self.background.at(failure.at_s, happen)
        else:
            gap_s = float(rng.exponential(failure.mean_time_between_s or math.inf))
            self.background.at(self.network.clock.now + gap_s, happen, partial(self._expect, failure, rng))

    def _happen(self, failure: Failure, rng: np.random.Generator) -> None:
        run = next(run for run in self.network.pools if run.pool.name == failure.pool)
        now = self.network.clock.now
        slot = -1
        if failure.kind in ("crash", "straggler"):
            slot = failure.worker if failure.worker is not None else self._draw(run, rng)
        self.log.append(FailureTrace(failure.kind, failure.pool, failure.to, slot, now, math.inf))
        mend = self._begin(failure, run, slot)
        if failure.for_s is not None:
            repair = partial(self._repair, failure, rng, mend, len(self.log) - 1)
            self.background.at(now + failure.for_s, repair)

    def _repair(self, failure: Failure, rng: np.random.Generator, mend: Mend, index: int) -> None:
        self.log[index] = replace(self.log[index], until_s=self.network.clock.now)
        mend()
        if failure.mean_time_between_s is not None:
            self._expect(failure, rng)

    def _begin(self, failure: Failure, run: PoolRun, slot: int) -> Mend:
        """Let a failure begin, and return what ends it."""
        if failure.kind == "link":
            ends = (failure.pool, str(failure.to))
            return self._put(("link", *ends), failure.bandwidth_left, partial(self.network.change_link, *ends))
        if failure.kind == "preprocessing":
            station = run.station
            assert station is not None  # noqa: S101 - checked with the plan
            return self._put(("preprocessing", failure.pool), failure.slowdown, station.slow_down)
        if failure.kind == "straggler":
            return self._put(("straggler", failure.pool, slot), failure.slowdown, run.workers[slot].straggle)
        return self._put(("crash", failure.pool, slot), 0.0, partial(self._crash_or_return, run, slot))

    def _draw(self, run: PoolRun, rng: np.random.Generator) -> int:
        """Return a worker that runs, any of them."""
        able = [slot for slot, worker in enumerate(run.workers) if worker.runs] or [0]
        return able[int(rng.integers(len(able)))]

    def _put(self, key: Hashable, factor: float, apply: Callable[[float], None]) -> Mend:
        """Let a factor act on a thing, and return what takes it away."""
        held = self._active.setdefault(key, [])
        held.append(factor)
        apply(math.prod(held))

        def mend() -> None:
            held.remove(factor)
            apply(math.prod(held))

        return mend

    def _crash_or_return(self, run: PoolRun, slot: int, works: float) -> None:
        """Let a worker crash, or come back."""
        if works:
            run.repair(slot)
            self.network.unpark()
        elif slot not in run.down:
            run.crash(slot)
            self.flow.lose(run.workers[slot])
