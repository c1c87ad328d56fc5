"""A worker: the loop that forms a step, waits until it is done, and hands over what has ended."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from costmodel.base import Array
from simulator.batch import Batch
from simulator.batching import BatchPolicy
from simulator.clock import Clock, Moment
from simulator.hooks import Hooks, Inbox
from simulator.limits import EVERYTHING, Limits
from simulator.notes import Notes
from simulator.resolve import Resolved
from simulator.service import Service
from simulator.tape import Tape

LEAST_LEAP = 4
"""Steps from which one call for all of them is quicker than a call each."""
MOST_LEAP = 1 << 14
"""Steps of one leap: bounds the arrays."""
SHORTEST_STEP_S = 1e-9
"""A step that takes no time is taken for one of this, where the length of a leap is guessed."""


class Worker:
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
    limits : Limits
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
        limits: Limits,
        tape: Tape,
        hooks: Hooks,
        build: Callable[[], Batch],
        leaps: bool = True,
        inbox: Inbox | None = None,
        layerwise: bool = False,
        plain: bool = False,
    ) -> None:
        self.clock = clock
        self.index = index
        self.resolved = resolved
        self.service = service
        self.policy = policy
        self.limits = limits
        self.tape = tape
        self.hooks = hooks
        self.build = build
        self.most_leap = MOST_LEAP if leaps else 1
        self.layerwise = layerwise
        self.batch = build()
        self._plain = plain
        self.notes = Notes(tape)
        self.slowness = 1.0  # a straggler takes this many times as long
        self.runs = True  # not crashed, and not switched off
        self.rests: list[float] = []  # when it stopped though something waited, and when it went on [s]
        self._flight: Moment | None = None
        self._start_s = 0.0
        self._encode_s = 0.0
        self._steps = 1
        self._decode_s = 1e-3  # time of a step of decoding alone, lately: only guesses how far a leap may go
        self._ends: Array | None = None  # of the steps of a leap
        self._leaving: list[int] = []  # requests that are taken out when the step ends
        self.inbox = inbox or Inbox([], [])
        self._no_keys = (0.0,) * len(service.rules)
        if self.inbox.order:
            self._flight = clock.at(self.inbox.next_s, self._wake)

    # Arrivals

    def enqueue(self, request: int) -> None:
        """Take in a request, now."""
        batch, now = self.batch, self.clock.now
        changes = batch.next_may_start
        batch.queue.append(request)
        self.tape.queue(request, now)
        if self._flight is None:
            self.wake()
        elif changes and self._ends is not None:
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

    def stir(self) -> None:
        """Look again at what there is to do: now if idle, else when the step under way ends."""
        if self._flight is None:
            self.wake()
        elif self._ends is not None:
            self._cut(self.clock.now)

    def wake(self) -> None:
        """Form a step now, unless one is under way."""
        if self._flight is None and self.runs:
            self._flight = self.clock.at(self.clock.now, self._wake)

    def abort(self, request: int) -> None:
        """Take a request out: now, or when the step under way ends."""
        if self._flight is None or request in self.batch.handover.handed or request not in self.batch.running:
            self._take_out(request)
            self.stir()
        else:
            self._leaving.append(request)
            self.stir()

    def stop(self) -> None:
        """Crash, or be switched off: the step under way is lost, and so is everything in memory."""
        self._flight = self._ends = None
        self.runs = False
        self._leaving = []
        self.notes.forget_all()
        old = self.batch
        self.batch = self.build()
        self.batch.kv.evicted = old.kv.evicted
        self._rest()

    def start(self) -> None:
        """Go on after a stop."""
        self.runs = True
        self.wake()

    def _cut(self, now: float) -> None:
        """End a leap with the step that is under way."""
        ends = self._ends
        if ends is None:
            return
        step = int(np.searchsorted(ends, now))
        if step < self._steps - 1:
            self._steps = step + 1
            self._flight = self.clock.at(float(ends[step]), self._end)
        self._ends = ends[: self._steps] if self._steps > 1 else None

    def _take_in(self, now: float) -> None:
        """Queue what has arrived since the last step began."""
        inbox, tape, queue = self.inbox, self.tape, self.batch.queue
        times, position = inbox.times_s, inbox.position
        while times[position] <= now:
            request = inbox.order[position]
            queue.append(request)
            tape.queue(request, times[position])
            position += 1
        inbox.position = position
        inbox.next_s = times[position]

    def _wake(self, event: Moment) -> None:
        if event is self._flight:
            self._next(event.time_s)

    # Steps

    def _next(self, now: float) -> None:
        """Form the next step and start it, or fall idle."""
        batch = self.batch
        if self.inbox.next_s <= now:
            self._take_in(now)
        if self._leaving:
            self._let_go()
        batch.form(self.policy.decide(batch))
        while batch.preempted:
            self._back_to_queue()
            if batch.chunks or batch.decodes:
                break
            batch.form(self.policy.decide(batch))
        encodes = batch.duty is not None and bool(batch.duty.done)
        if not batch.chunks and not batch.decodes and not encodes:
            self._fall_idle()
            return
        if len(self.rests) % 2:
            self.rests.append(now)
        self._start_s = now
        self.notes.started(batch, now)
        self._flight = self.clock.at(self._end_of_step(now, encodes=encodes), self._end)
        if self.layerwise:
            for request, (_, tokens, _) in zip(batch.owners, batch.chunks, strict=True):
                self.hooks.chunk(request, tokens, self)

    def _back_to_queue(self) -> None:
        """Note who was preempted, and ask for the embeddings that are not here any more."""
        self.notes.preempted(self.batch)
        for request in self.batch.returned:
            self.hooks.needs_embeddings(request, self)

    def _end_of_step(self, now: float, *, encodes: bool) -> float:
        """Return when the step that starts now ends, or the last of several that cannot differ."""
        batch = self.batch
        self._ends, self._steps, self._encode_s = None, 1, 0.0
        if encodes:
            end = now + self._duty_s()
        elif batch.chunks:
            end = now + self._chunks_s(batch.decode.size if batch.decodes else 0)
        else:
            end = self._decode_until(now)
        return end if self.slowness == 1.0 else now + (end - now) * self.slowness

    def _fall_idle(self) -> None:
        """Wait for the next arrival; what is here waits for another worker, or there is nothing."""
        batch = self.batch
        held = batch.running or batch.queue or batch.handover.landed or (batch.duty is not None and batch.duty.queue)
        if held:
            alone = batch.roles == EVERYTHING and batch.duty is None
            if alone:
                raise RuntimeError(
                    f"worker {self.index} has {len(batch.running)} running requests and no step for them"
                )
            self._rest()
        elif len(self.rests) % 2:
            self.rests.append(self.clock.now)
        known = self.inbox.next_s < math.inf
        self._flight = self.clock.at(self.inbox.next_s, self._wake) if known else None

    def _rest(self) -> None:
        if not len(self.rests) % 2:
            self.rests.append(self.clock.now)

    def _duty_s(self) -> float:
        """Return the time of a step that encodes for others: their items first, then the language model if it works."""
        batch, cost = self.batch, self.resolved.item_cost
        items = batch.duty.batch if batch.duty is not None else ()
        encode_s = self.service.encode_s([cost[item] for item in items]) if items else 0.0
        time_s = 0.0
        decoding = batch.decode.size if batch.decodes else 0
        if batch.chunks:
            time_s = self._chunks_s(decoding)
        elif decoding:
            time_s = self.service.step_s((), 0, decoding, batch.decode.keys())
        self._encode_s += encode_s
        return encode_s + time_s

    def _chunks_s(self, decoding: int) -> float:
        """Return the time of a step with chunks: the encoder first, everybody waiting, then the language model."""
        batch = self.batch
        keys = batch.decode.keys() if decoding else self._no_keys
        time_s = self.service.step_s(batch.chunks, len(batch.finishing), decoding, keys)
        if batch.encoder.batch:
            cost = self.resolved.item_cost
            self._encode_s = self.service.encode_s([cost[item] for item in batch.encoder.batch])
            time_s += self._encode_s
        return time_s

    def _decode_until(self, start: float) -> float:
        """Return when the next steps of decoding alone end: as many as cannot differ."""
        batch, decode, service = self.batch, self.batch.decode, self.service
        size, keys = decode.size, decode.keys()
        next_s = math.inf
        steps = 1
        if self.most_leap > 1 and self.slowness == 1.0 and not batch.preempted:  # the next step may admit behind one
            most = self.most_leap
            if batch.next_may_start:
                next_s = self.inbox.next_s
                if next_s - start < most * self._decode_s:
                    most = int((next_s - start) / self._decode_s) + 2
            if most >= LEAST_LEAP:
                steps = batch.steady_steps(most)
        if steps < LEAST_LEAP:
            once = service.step_s((), 0, size, keys)
            self._decode_s = max(once, SHORTEST_STEP_S)
            return start + once
        times = service.decode_steps_s(size, keys, decode.growth(), steps)
        self._decode_s = max(float(times[0]), SHORTEST_STEP_S)
        times[0] += start
        ends: Array = times.cumsum()
        end = float(ends[-1])
        if end > next_s:
            steps = int(ends.searchsorted(next_s)) + 1
            ends = ends[:steps]
            end = float(ends[-1])
        if steps > 1:
            self._steps, self._ends = steps, ends
        return end

    def _end(self, event: Moment) -> None:
        """Hand over what the step brought, and go on."""
        if event is not self._flight:  # the end of a leap that was cut
            return
        now, batch, tape = event.time_s, self.batch, self.tape
        decoding = batch.decode.size if batch.decodes else 0
        paused = len(batch.paused)
        self.notes.step(
            batch, now, start_s=self._start_s, steps=self._steps, decoding=decoding, encode_s=self._encode_s
        )
        ended, begun = batch.close(self._steps)
        if decoding:
            self.notes.gaps(batch, now, self._ends, decoding, paused)
        if begun:
            self.notes.begun(batch, now, begun)
        for request in ended:
            if self._leaving and request in self._leaving:
                self._leaving.remove(request)
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
        leaving, self._leaving = self._leaving, []
        for request in leaving:
            self._take_out(request)

    def _take_out(self, request: int) -> None:
        """Take a request out between two steps."""
        self.notes.forget(request, decodes=request in self.batch.decode.offset)
        self.batch.take_out(request)
