"""How long the step takes that a batch has formed, or the leap of several that cannot differ."""

from __future__ import annotations

import math
from typing import Final

from costmodel.base import Array
from simulator.batch import Batch
from simulator.resolve import Resolved
from simulator.service import Service

LEAST_LEAP: Final = 4
"""Steps from which one call for all of them is quicker than a call each."""
MOST_LEAP: Final = 1 << 14
"""Steps of one leap: bounds the arrays."""
SHORTEST_STEP_S: Final = 1e-9
"""A step that takes no time is taken for one of this, where the length of a leap is guessed."""


class StepLength:
    """Times of one worker's steps.

    Parameters
    ----------
    service : Service
        How long things take.
    resolved : Resolved
        Items, and what they are to the model.
    most_leap : int
        Steps of decoding alone that may be one event.

    Attributes
    ----------
    steps : int
        Steps of what was timed last.
    ends : ndarray or None
        When each of them ends, if there are several [s].
    encode_s : float
        The encoder's part [s].
    """

    __slots__ = ("_cost", "_decode_s", "_no_keys", "encode_s", "ends", "most_leap", "service", "steps")

    def __init__(self, service: Service, resolved: Resolved, most_leap: int = MOST_LEAP) -> None:
        self.service = service
        self.most_leap = most_leap
        self.steps = 1
        self.ends: Array | None = None
        self.encode_s = 0.0
        self._cost = resolved.item_cost
        self._no_keys = (0.0,) * len(service.rules)
        self._decode_s = 1e-3  # of a step of decoding alone, lately: only guesses how far a leap may go

    def until(self, batch: Batch, start_s: float, next_s: float, *, encodes: bool, leaps: bool) -> float:
        """Return when a step ends, or the last of a leap.

        Parameters
        ----------
        batch : Batch
            With its step formed.
        start_s, next_s : float
            When it starts, and when the next request comes that is known [s].
        encodes : bool
            Whether it encodes for others.
        leaps : bool
            Whether it may be more than one step.
        """
        self.ends, self.steps, self.encode_s = None, 1, 0.0
        if encodes:
            return start_s + self._duty_s(batch)
        if batch.chunks:
            return start_s + self._chunks_s(batch, batch.decode.size if batch.decodes else 0)
        return self._decode_until(batch, start_s, next_s, leaps=leaps)

    def _duty_s(self, batch: Batch) -> float:
        """Return the time of a step that encodes for others: their items first, then the language model if it works."""
        items = batch.duty.batch if batch.duty is not None else ()
        encode_s = self.service.encode_s([self._cost[item] for item in items]) if items else 0.0
        time_s = 0.0
        decoding = batch.decode.size if batch.decodes else 0
        if batch.chunks:
            time_s = self._chunks_s(batch, decoding)
        elif decoding:
            time_s = self.service.step_s((), 0, decoding, batch.decode.keys())
        self.encode_s += encode_s
        return encode_s + time_s

    def _chunks_s(self, batch: Batch, decoding: int) -> float:
        """Return the time of a step with chunks: the encoder first, everybody waiting, then the language model.

        Everybody waits too for blocks that come from the host. vLLM lets the request alone wait for them and
        runs other steps meanwhile, so this is the most that loading costs others.
        """
        keys = batch.decode.keys() if decoding else self._no_keys
        time_s = self.service.step_s(batch.chunks, len(batch.finishing), decoding, keys)
        if batch.encoder.batch:
            self.encode_s = self.service.encode_s([self._cost[item] for item in batch.encoder.batch])
            time_s += self.encode_s
        if batch.loaded:
            time_s += batch.loaded * batch.limits.host_block_s
        return time_s

    def _decode_until(self, batch: Batch, start_s: float, next_s: float, *, leaps: bool) -> float:
        """Return when the next steps of decoding alone end: as many as cannot differ."""
        decode, service = batch.decode, self.service
        size, keys = decode.size, decode.keys()
        steps, most = 1, self.most_leap
        if not batch.next_may_start:  # then the next arrival changes nothing
            next_s = math.inf
        if leaps and most > 1:
            if next_s - start_s < most * self._decode_s:
                most = int((next_s - start_s) / self._decode_s) + 2
            if most >= LEAST_LEAP:
                steps = batch.steady_steps(most)
        if steps < LEAST_LEAP:
            once = service.step_s((), 0, size, keys)
            self._decode_s = max(once, SHORTEST_STEP_S)
            return start_s + once
        times = service.decode_steps_s(size, keys, decode.growth(), steps)
        self._decode_s = max(float(times[0]), SHORTEST_STEP_S)
        times[0] += start_s
        ends: Array = times.cumsum()
        end = float(ends[-1])
        if end > next_s:
            steps = int(ends.searchsorted(next_s)) + 1
            ends = ends[:steps]
            end = float(ends[-1])
        if steps > 1:
            self.steps, self.ends = steps, ends
        return end
