"""A worker: the loop that forms a step, waits until it is done, and hands over what has ended."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from simulator.batch import Batch
from simulator.batching import BatchPolicy
from simulator.clock import Clock, Moment
from simulator.device import Paced
from simulator.hooks import Hooks, Inbox
from simulator.length import MOST_LEAP, SHORTEST_STEP_S, StepLength
from simulator.limits import EVERYTHING
from simulator.notes import Notes
from simulator.resolve import Resolved
from simulator.service import Service
from simulator.tape import Tape


class Worker(Paced):
    """One replica of the model, which runs some of encoder, prefill and decode.

    Parameters
    ----------
    clock : Clock
    index : int
        Which of the workers it is.
    resolved : Resolved
        Requests as the model sees them.
    service : Service
        How long its steps take.
    policy : BatchPolicy
    tape : Tape
        Where times of requests are written.
    hooks : Hooks
        Told of what happens.
    build : callable
        Returns an empty batch: at the start, and after a crash.
    leaps : bool
        Whether steps of decoding alone may be one event.
    inbox : Inbox, optional
        Arrivals that are known; others come by `enqueue`.
    layerwise : bool
        Whether KV leaves while prefill runs, so that chunks are told.
    plain : bool
        Whether it does everything for its requests and none leaves before its end: then there is nothing to tell.
    """

    def __init__(
        self,
        clock: Clock,
        index: int,
        *,
        resolved: Resolved,
        service: Service,
        policy: BatchPolicy,
        tape: Tape,
        hooks: Hooks,
        build: Callable[[], Batch],
        leaps: bool = True,
        inbox: Inbox | None = None,
        layerwise: bool = False,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.clock = clock
        self.index = index
        self.resolved = resolved
        self.policy = policy
        self.tape = tape
        self.hooks = hooks
        self.build = build
        self.length = StepLength(service, resolved, MOST_LEAP if leaps else 1)
        self.layerwise = layerwise
        self.batch = build()
        self._plain = plain
        self.notes = Notes(tape)
        self.runs = True  # not crashed, and not switched off
        self.rests: list[float] = []  # when it stopped though something waited, and when it went on [s]
        self._flight: Moment | None
        self._start_s = 0.0
        self._works = False  # whether a step is under way
        self._leaving: dict[int, Callable[[], None]] = {}  # requests that are taken out when the step ends
        self.inbox = inbox or Inbox([], [])
        self._sleep()

    # Arrivals

    def enqueue(self, request: int) -> None:
        """Take in a request, now."""
        batch, now = self.batch, self.clock.now
        changes = batch.next_may_start
        batch.queue.append(request)
        self.tape.queue(request, now)
        if self._flight is None:
            self.wake()
        elif changes and self.length.ends is not None:
            self._cut(now)

    def enqueue_again(self, request: int) -> None:
        """Take back a preempted request in front of all others, now that its embeddings are here."""
        self.batch.queue.appendleft(request)
        self.stir()

    def encode(self, item: int) -> None:
        """Take in an item to encode for another worker, now."""
        duty = self.batch.duty
        assert duty is not None, f"worker {self.index} encodes for nobody"  # noqa: S101 - a fault of ours
        if duty.submit(item):
            self.hooks.encoded(item, self)
        else:
            self.stir()

    def land(self, request: int) -> None:
        """Take in a request that was computed elsewhere and decodes here, now."""
        self.batch.land(request, self.resolved.output_tokens[request] - 1)
        self.stir()

    def room(self) -> float:
        """Return the blocks for requests that are computed elsewhere; where they are those of decoding, a leap ends."""
        if not self.runs:
            return -1.0
        if self.batch.roles.prefills:
            self._cut(self.clock.now)
        return self.batch.handover.unpromised

    def stir(self) -> None:
        """Look again at what there is to do: now if idle, else when the step under way ends."""
        if self._flight is None:
            self.wake()
        elif self.length.ends is not None:
            self._cut(self.clock.now)

    def wake(self) -> None:
        """Form a step now, unless one is under way."""
        if self._flight is None and self.runs:
            self._flight = self.clock.at(self.clock.now, self._wake)

    def abort(self, request: int, then: Callable[[], None]) -> None:
        """Take a request out, now or when the step under way ends, and then go on."""
        if self._flight is None or request in self.batch.handover.handed or request not in self.batch.running:
            self._take_out(request)
            self.hooks.has_room(self)
            then()
        else:
            self._leaving[request] = then
        self.stir()

    def retime(self, before: float) -> None:
        """Let the rest of the step under way take longer, or less long, than at the pace before."""
        after, now, length = self.pace, self.clock.now, self.length
        if not self._works or before == after:
            return
        self._cut(now)
        flight = self._flight
        assert flight is not None  # noqa: S101 - it works
        begun_s = self._start_s if length.ends is None else float(length.ends[-2])
        end_s = now + (flight.time_s - now) * (after / before)
        length.encode_s *= (end_s - begun_s) / max(flight.time_s - begun_s, SHORTEST_STEP_S)
        self.clock.cancel(flight)
        self._flight = self.clock.at(end_s, self._end)
        if length.ends is not None:
            length.ends = np.append(length.ends[:-1], end_s)

    def stop(self) -> None:
        """Crash, or be switched off: the step under way is lost, and so is everything in memory."""
        if self._works:  # what it was at is lost, but took its time
            self._cut(self.clock.now)
            self.notes.step(self.batch, self.clock.now, self._start_s, self.length.steps, self.length.encode_s)
        self.clock.cancel(self._flight)
        self._flight = self.length.ends = None
        self.runs = self._works = False
        self.end_turn()
        self.notes.forget_all()
        self.empty()
        self._rest()
        leaving, self._leaving = self._leaving, {}
        for then in leaving.values():
            then()

    def empty(self) -> None:
        """Forget everything that is in memory."""
        before = self.batch.kv
        self.batch = self.build()
        self.batch.kv.go_on(before)

    def start(self) -> None:
        """Go on after a stop, with nothing to do yet."""
        self.runs = True

    def _cut(self, now: float) -> None:
        """End a leap with the step that is under way, which has its blocks from now on."""
        length = self.length
        ends = length.ends
        if ends is None:
            return
        step = int(ends.searchsorted(now))
        if step < length.steps - 1:
            length.steps = step + 1
            self.clock.cancel(self._flight)
            self._flight = self.clock.at(float(ends[step]), self._end)
        self.batch.settle(length.steps)
        length.ends = ends[: length.steps] if length.steps > 1 else None

    def _wake(self, event: Moment) -> None:
        self._next(event.time_s)

    # Steps

    def _next(self, now: float) -> None:
        """Form the next step and start it, or fall idle."""
        batch = self.batch
        if self.inbox.next_s <= now:
            self.inbox.take_in(now, batch.queue, self.tape)
        if self._leaving:
            self._let_go()
            self.hooks.has_room(self)
        once = self._form(now)
        encodes = batch.duty is not None and bool(batch.duty.done)
        if not batch.chunks and not batch.decodes and not encodes:
            self._fall_idle()
            if once:
                self.hooks.has_room(self)
            return
        if len(self.rests) % 2:
            self.rests.append(now)
        if self.device is not None:
            self.device.enter(self)
        self._start_s = now
        if batch.admitted:
            self.notes.started(batch, now)
        pace, length = self.pace, self.length
        leaps = pace == 1.0 and not (once or self.device)
        end = length.until(batch, now, self.inbox.next_s, encodes=encodes, leaps=leaps)
        if pace != 1.0:
            end = now + (end - now) * pace
            length.encode_s *= pace
        self._flight = self.clock.at(end, self._end)
        self._works = True
        if self.layerwise:
            self._tell_chunks()

    def _tell_chunks(self) -> None:
        for request, (_, tokens, _) in zip(self.batch.owners, self.batch.chunks, strict=True):
            self.hooks.chunk(request, tokens, self)

    def _form(self, now: float) -> bool:
        """Fill in the next step, and return whether somebody was preempted: then it is no leap.

        The step after it may admit what fits now, and others are offered it when this one ends.
        """
        batch, policy, notes = self.batch, self.policy, self.notes
        batch.form(policy.decide(batch))
        if batch.handover.joined:  # first: who joins may be preempted in the same step
            notes.joined(batch, now)
        preempted = bool(batch.preempted)
        while batch.preempted:
            notes.preempted(batch)
            self._tell_preempted()
            if batch.chunks or batch.decodes:
                break
            batch.form(policy.decide(batch))
            if batch.handover.joined:
                notes.joined(batch, now)
        return preempted

    def _tell_preempted(self) -> None:
        for request in self.batch.preempted if self.layerwise else ():
            self.hooks.preempted(request, self)
        for request in self.batch.returned:
            self.hooks.needs_embeddings(request, self)

    def _fall_idle(self) -> None:
        """Wait for the next arrival; what is here waits for another worker, or there is nothing."""
        batch = self.batch
        held = batch.running or batch.queue or batch.handover.landed or (batch.duty is not None and batch.duty.queue)
        if held:
            if batch.roles == EVERYTHING and batch.duty is None:
                raise RuntimeError(f"worker {self.index} has {len(batch.running)} requests and no step for them")
            self._rest()
        elif len(self.rests) % 2:
            self.rests.append(self.clock.now)
        self.end_turn()
        self._sleep()

    def _sleep(self) -> None:
        next_s = self.inbox.next_s
        self._flight = self.clock.at(next_s, self._wake) if next_s < math.inf else None

    def _rest(self) -> None:
        if not len(self.rests) % 2:
            self.rests.append(self.clock.now)

    def _end(self, event: Moment) -> None:
        """Hand over what the step brought, and go on."""
        now, batch, tape, length = event.time_s, self.batch, self.tape, self.length
        self._works = False
        decoding = batch.decode.size if batch.decodes else 0
        paused = len(batch.paused)
        self.notes.step(batch, now, self._start_s, length.steps, length.encode_s)
        ended, begun = batch.close(length.steps)
        if decoding:
            self.notes.gaps(batch, now, length.ends, decoding, paused)
            length.ends = None
        if begun:
            self.notes.begun(batch, now, begun)
        for request in ended:
            if self._leaving and request in self._leaving:
                self._leaving.pop(request)()
                continue
            tape.finish(request, now)
            self.hooks.ended(request, self)
        if not self._plain:
            self._tell()
        if self._flight is event:  # nobody has stopped the worker
            self._next(now)

    def _tell(self) -> None:
        """Tell others what this step has brought them, and let go of who leaves."""
        batch, hooks = self.batch, self.hooks
        if self._leaving:
            self._let_go()
        if not batch.roles.decodes:
            for request in batch.finishing:
                if request in batch.handover.handed:
                    hooks.prefilled(request, self)
        duty = batch.duty
        if duty is not None and duty.done:
            for item in duty.close():
                hooks.encoded(item, self)
        hooks.has_room(self)

    def _let_go(self) -> None:
        leaving, self._leaving = self._leaving, {}
        for request in leaving:
            self._take_out(request)
        for then in leaving.values():
            then()

    def _take_out(self, request: int) -> None:
        """Take a request out between two steps."""
        self.notes.forget(request, decodes=request in self.batch.decode.offset)
        self.batch.take_out(request)
