"""A worker: the loop that forms a step, waits until it is done, and hands over what has ended."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from costmodel.base import Array
from simulator.batch import Batch, Limits
from simulator.batching import BatchPolicy
from simulator.clock import Clock, Moment
from simulator.resolve import Resolved
from simulator.service import Service
from simulator.steplog import StepLog
from simulator.tape import Tape

LEAST_LEAP = 4
"""Steps from which one call for all of them is quicker than a call each."""
MOST_LEAP = 1 << 14
"""Steps of one leap: bounds the arrays."""
SHORTEST_STEP_S = 1e-9
"""A step that takes no time is taken for one of this, where the length of a leap is guessed."""


class Inbox:
    """Requests whose times are known before the run: a worker takes them in at the ends of its steps.

    An arrival while a step is under way changes nothing before its end, so it needs no event of its own.

    Parameters
    ----------
    order : list of int
        Requests, in order of arrival.
    times_s : list of float
        When each is ready to run [s].
    """

    __slots__ = ("next_s", "order", "position", "times_s")

    def __init__(self, order: list[int], times_s: list[float]) -> None:
        self.order = order
        self.times_s = [*times_s, math.inf]
        self.position = 0
        self.next_s = self.times_s[0]


class Worker:
    """One replica of the model, which runs encoder, prefill and decode.

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
    on_end : callable
        Called with each request that ends.
    leaps : bool
        Whether steps of decoding alone may be one event.
    inbox : Inbox, optional
        Arrivals that are known; others come by `enqueue`.
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
        on_end: Callable[[int], None],
        leaps: bool = True,
        inbox: Inbox | None = None,
    ) -> None:
        self.clock = clock
        self.index = index
        self.resolved = resolved
        self.service = service
        self.policy = policy
        self.limits = limits
        self.tape = tape
        self.on_end = on_end
        self.most_leap = MOST_LEAP if leaps else 1
        self.batch = Batch(resolved, limits, service.rules)
        self.log = StepLog()
        self.load_tokens = 0  # prompt tokens of what is here, for routers
        self._flight: Moment | None = None
        self._start_s = 0.0
        self._encode_s = 0.0
        self._steps = 1
        self._decode_s = 1e-3  # time of a step of decoding alone, lately: only guesses how far a leap may go
        self._ends: Array | None = None  # of the steps of a leap
        self._groups: list[list[float]] = []  # [time of the last token, decoding sequences that had theirs then]
        self._rejoined: dict[int, float] = {}
        self._silent: dict[int, float] = {}  # preempted sequences -> time of their last token
        self.inbox = inbox or Inbox([], [])
        self._no_keys = (0.0,) * len(service.rules)
        if self.inbox.order:
            self._flight = clock.at(self.inbox.next_s, self._wake)

    # Arrivals

    def enqueue(self, request: int) -> None:
        """Take in a request, now."""
        batch, now = self.batch, self.clock.now
        changes = not batch.queue and len(batch.running) < self.limits.max_sequences
        batch.queue.append(request)
        self.tape.queue(request, now)
        self.load_tokens += self.resolved.prompt_tokens[request]
        if self._flight is None:
            self._flight = self.clock.at(now, self._wake)
        elif changes and self._ends is not None:
            self._cut(now)

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
        inbox, tape, queue, prompt = self.inbox, self.tape, self.batch.queue, self.resolved.prompt_tokens
        times, position = inbox.times_s, inbox.position
        while times[position] <= now:
            request = inbox.order[position]
            queue.append(request)
            tape.queue(request, times[position])
            self.load_tokens += prompt[request]
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
        batch.form(self.policy.decide(batch))
        if batch.preempted:
            self._note_preempted()
            if not batch.chunks and not batch.decodes:
                batch.form(self.policy.decide(batch))
        if not batch.chunks and not batch.decodes:
            if batch.running or batch.queue:
                raise RuntimeError(
                    f"worker {self.index} has {len(batch.running)} running requests and no step for them"
                )
            known = self.inbox.next_s < math.inf
            self._flight = self.clock.at(self.inbox.next_s, self._wake) if known else None
            return
        self._start_s = now
        for request, cached in batch.admitted:
            self.tape.start(request, now, cached)
        self._ends = None
        self._steps = 1
        self._encode_s = 0.0
        if batch.chunks:
            end = now + self._chunks_s(batch.decode.size if batch.decodes else 0)
        else:
            end = self._decode_until(now)
        self._flight = self.clock.at(end, self._end)

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
        if self.most_leap > 1 and not batch.preempted:  # behind a preemption, the next step may admit
            most = self.most_leap
            if not batch.queue and len(batch.running) < self.limits.max_sequences:  # the next arrival would be taken in
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
        self._note_step(now, decoding)
        ended, begun = batch.close(self._steps)
        if decoding:
            self._note_gaps(now, decoding, paused)
        if begun:
            self._note_begun(now, begun)
        for request in ended:
            tape.finish(request, now)
            self.load_tokens -= self.resolved.prompt_tokens[request]
            self.on_end(request)
        self._next(now)

    # Notes

    def _note_step(self, now: float, decoding: int) -> None:
        """Log the step as it was while it ran."""
        batch = self.batch
        kv, chunks = batch.kv, batch.chunks
        tokens = 0
        for _, part, _ in chunks:
            tokens += part
        self.log.rows.extend(
            (
                self._start_s,
                now,
                self._steps,
                decoding,
                tokens,
                len(chunks),
                len(batch.finishing),
                self._encode_s,
                len(batch.encoder.batch) if chunks else 0,
                len(batch.queue),
                len(batch.running),
                kv.blocks - kv.free,
            )
        )

    def _note_gaps(self, now: float, decoding: int, paused: int) -> None:
        """Log the gaps between tokens that this step ended."""
        groups, log, ends = self._groups, self.log, self._ends
        left = decoding - self.batch.ended_decoding
        if ends is None and len(groups) == 1 and not paused:  # nearly always
            group = groups[0]
            log.gap(now - group[0], decoding)
            group[0], group[1] = now, left
            return
        first = now if ends is None else float(ends[0])
        kept = [groups[0][0], paused]
        groups[0][1] -= paused
        for last, sequences in groups:
            log.gap(first - last, int(sequences))
        if ends is not None:
            log.gaps(ends[1:] - ends[:-1], decoding)
        self._groups = [[now, left], kept] if paused else [[now, left]]

    def _note_begun(self, now: float, begun: list[int]) -> None:
        """Log first tokens, and the gaps of sequences that come back."""
        tape, until, groups = self.tape, self.batch.decode.until, self._groups
        going: float = 0
        for request in begun:
            if request in self._silent:
                self.log.gap(now - self._silent.pop(request), 1)
                self._rejoined[request] = now
            else:
                tape.first_token_s[request] = now
            going += request in until
        if groups and groups[0][0] == now:
            groups[0][1] += going
        elif going:
            groups.append([now, going])

    def _note_preempted(self) -> None:
        """Remember when preempted sequences had their last token."""
        tape, groups = self.tape, self._groups
        for request in self.batch.preempted:
            tape.preempt(request)
            had = tape.first_token_s[request]
            if had != had or request in self._silent:  # noqa: PLR0124 - not a number: no token yet
                continue
            had = self._rejoined.pop(request, had)
            group = next((g for g in groups if g[0] == had), groups[0])
            group[1] -= 1
            self._silent[request] = group[0]
