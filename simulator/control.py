"""Workers that come, go and change their role. What is looked at is there already; nothing sees the future."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from simulator.background import Background
from simulator.network import Network
from simulator.pool_run import OFF, PoolRun
from simulator.rules import Control, Move, Scaling, Signal


class Controller:
    """Looks at the pools now and then, and changes how many workers they have.

    A worker that goes takes no more work and ends what it has. It comes back with empty caches.

    Parameters
    ----------
    control : Control
    network : Network
    background : Background
        When.
    """

    def __init__(self, control: Control, network: Network, background: Background) -> None:
        self.control, self.network, self.background = control, network, background
        self.by_name = {run.pool.name: run for run in network.pools}
        self._held: dict[Hashable, int] = {}  # looks in a row that said so
        self._leaving: dict[tuple[str, int], Move | None] = {}  # workers that end what they have, and where they go
        self._wait()

    def _wait(self) -> None:
        self.background.at(self.network.clock.now + self.control.every_s, self._look, self._wait)

    def _look(self) -> None:
        self._wait()
        for name, slot in list(self._leaving):
            self._let_go(self.by_name[name], slot)
        for rule in self.control.scale:
            self._scale(rule)
        for change in self.control.move:
            self._move(change)

    def _holds(self, key: Hashable, looks: int, *, now: bool) -> bool:
        """Return whether something has been so for some looks in a row, and begin to count anew."""
        self._held[key] = self._held.get(key, 0) + 1 if now else 0
        if self._held[key] < looks:
            return False
        self._held[key] = 0
        return True

    def _scale(self, rule: Scaling) -> None:
        run = self.by_name[rule.pool]
        value = self._signal(run, rule.signal)
        if self._holds((rule, "above"), rule.holds, now=value > rule.above) and self._expected(run) < rule.most:
            going = [slot for (name, slot), move in self._leaving.items() if name == rule.pool and move is None]
            if going:
                back = going[0]
                del self._leaving[rule.pool, back]
                run.call_back(back)
                self.network.unpark()
            else:
                self._start(run, rule.cold_start_s)
        if self._holds((rule, "below"), rule.holds, now=value < rule.below) and run.staffed > rule.least:
            self._send_away(run, None)

    def _move(self, rule: Move) -> None:
        source, target = self.by_name[rule.source], self.by_name[rule.target]
        wanted = self._signal(target, rule.signal) > rule.above and self._signal(source, rule.signal) < rule.below
        if not self._holds(rule, rule.holds, now=wanted):
            return
        least = max([rule.least, *(scale.least for scale in self.control.scale if scale.pool == rule.source)])
        most = [scale.most for scale in self.control.scale if scale.pool == rule.target]
        if source.staffed > least and all(self._expected(target) < n for n in most):
            self._send_away(source, rule)

    def _expected(self, run: PoolRun) -> int:
        """Return the workers that a pool has, or will have when those that move to it have come."""
        return run.staffed + sum(move is not None and move.target == run.pool.name for move in self._leaving.values())

    def _send_away(self, run: PoolRun, move: Move | None) -> None:
        """Let the worker with the least to do end what it has, and then go."""
        open_slots = run.loads.open
        if open_slots:
            slot = min(open_slots, key=lambda slot: (run.loads.requests[slot], -slot))
            run.drain(slot)
            self._leaving[run.pool.name, slot] = move
            self._let_go(run, slot)

    def _let_go(self, run: PoolRun, slot: int) -> None:
        """Let a worker go that has nothing left to do, and begin elsewhere if it moves."""
        if run.is_idle(slot):
            move = self._leaving.pop((run.pool.name, slot))
            run.switch_off(slot)
            if move is not None:
                self._start(self.by_name[move.target], move.switch_s)

    def _start(self, run: PoolRun, after_s: float) -> None:
        """Order a worker, which takes work after some time."""
        slot = next((slot for slot, shift in enumerate(run.shifts) if shift == OFF), None)
        if slot is None:
            return
        run.order(slot)
        self.background.at(self.network.clock.now + after_s, lambda: self._arrive(run, slot))

    def _arrive(self, run: PoolRun, slot: int) -> None:
        run.begin(slot)
        self.network.unpark()

    def _signal(self, run: PoolRun, name: Signal) -> float:
        prompt_tokens = self.network.resolved.prompt_tokens
        return signal(run, name, [prompt_tokens[request] for request in self.network.parked_at(run)])


def signal(run: PoolRun, name: Signal, parked: Sequence[int] = ()) -> float:
    """Return what is looked at, a worker that takes work; infinite if there is work and none does.

    Parameters
    ----------
    run : PoolRun
    name : {"waiting", "requests", "tokens"}
    parked : sequence of int
        Tokens of the prompts that wait until a worker takes work.
    """
    loads, n = run.loads, len(run.loads.open)
    if name == "waiting":
        total = run.waiting() + len(parked)
    elif name == "requests":
        total = sum(loads.requests) + len(parked)
    else:
        total = sum(loads.tokens) + sum(loads.image_tokens) + sum(parked)
    if n:
        return float(total) / n
    return float("inf") if total else 0.0
