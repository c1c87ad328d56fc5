"""Times of the steps of one compiled model: chunks read through memory, decoding by lines, leaps equal to steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

import numpy as np

from costmodel.base import Array
from costmodel.layers import CrossAttentionSpec
from costmodel.lean import CONTEXTS
from costmodel.recurrent import RecurrentSpec
from costmodel.step import StepModel
from simulator.dealing import busiest
from simulator.prompt import Chunk, Layers, work_of, works_of
from simulator.step_table import MOST_REMEMBERED, StepTable

COUNTS: Final = 1 << 14
"""Steps of one leap that are counted beforehand."""


class _Decoding:
    """Steps in which so many sequences decode and nothing else happens, of a model with one kind of cache.

    Parameters
    ----------
    model : StepModel
    decoding : int
        Sequences.
    keys : sequence of float
        Of one such step.
    """

    __slots__ = ("decoding", "floor_s", "high", "host_s", "line", "low", "near", "rest_s", "rise", "width")

    def __init__(self, model: StepModel, decoding: int, keys: Sequence[float]) -> None:
        self.rest_s, (line,) = model.lines(decoding, keys)
        assert line is not None  # noqa: S101 - checked by whoever asks
        self.line = line
        self.decoding = decoding
        self.floor_s = model.floors_s[1]
        self.host_s = model.step_host_s + decoding * model.sequence_host_s
        self.low = self.high = self.near = self.rise = 0.0  # the piece of the line that was read last
        self.width = 1.0

    def _find(self, context: float) -> bool:
        """Turn to the piece of the line around a context, and return whether there is one."""
        left = bisect_right(CONTEXTS, context) - 1
        if not 0 <= left < len(CONTEXTS) - 1:
            return False
        self.low, self.high, self.near = CONTEXTS[left], CONTEXTS[left + 1], self.line.values[left]
        self.width, self.rise = self.high - self.low, self.line.values[left + 1] - self.near
        return True

    def step_s(self, keys: float) -> float:
        """Return the time of one step [s]; bit by bit that of `StepModel.decode_step_s`."""
        context = keys / self.decoding
        if self.low <= context < self.high or self._find(context):
            device_s = self.rest_s + (self.near + (context - self.low) / self.width * self.rise)
        else:
            device_s = self.rest_s + self.line.read(context)
        return max(device_s, self.floor_s) + self.host_s

    def steps_s(self, keys: float, growth: float, counts: Array) -> Array:
        """Return the times of steps of which the first reads so many keys, and each so many more [s]."""
        times = counts * growth
        times += keys
        times /= self.decoding
        first, last = keys / self.decoding, (keys + (len(counts) - 1) * growth) / self.decoding
        if (self.low <= first and last < self.high) or (self._find(first) and last < self.high):
            times -= self.low
            times /= self.width
            times *= self.rise
            times += self.near
        else:
            times = self.line.read_many(times)
        times += self.rest_s
        if self.floor_s:
            np.maximum(times, self.floor_s, out=times)
        times += self.host_s
        return times


class StepTimes:
    """Steps of a model on one device.

    Parameters
    ----------
    model : StepModel
    ranks : int
        Data-parallel replicas that step together: sequences and prompts are dealt out whole, and the busiest is waited
        for.

    Notes
    -----
    In a pipeline, one batch a stage is under way, and each waits for the slowest stage at every one of them.
    The host's time a request (`request_host_s`: tokenising, hand-overs) is no part of a step here: other processes
    spend it while the worker goes on.
    """

    __slots__ = ("_counts", "_decoding", "_one_line", "model", "ranks", "segments", "stretch", "table")

    def __init__(self, model: StepModel, ranks: int = 1) -> None:
        self.model = model
        self.ranks = ranks
        self.stretch = _unevenness(model)
        self.segments = [_layers(model, segment) for segment in range(model.n_segments)]
        self.table = StepTable(model)
        single = len(model.read_classes) == 1 and ranks == 1 and self.stretch == 1.0
        self._one_line = single and not model.without_line and model.cached is None
        self._decoding: dict[int, _Decoding] = {}
        self._counts = np.arange(float(COUNTS))

    def chunks_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step with chunks."""
        model = self.model
        if self.ranks > 1:
            chunks = busiest(chunks, self.ranks, [float(tokens) for _, tokens, _ in chunks])
            finishing = -(-finishing // self.ranks)
            decoding, keys = self._share(decoding, keys)
        tokens, alike = 0, True
        for _, own, prompt in chunks:
            tokens += own
            alike = alike and prompt is None
        if not alike:
            works = works_of(chunks, self.segments)
        elif len(self.segments) == 1:
            works = [work_of(chunks, self.segments[0])]
        else:
            works = [work_of(chunks, layers) for layers in self.segments]
        sequences = finishing + decoding
        device_s = self.table.chunks_s(float(tokens), works, sequences, decoding, keys)
        host_s = model.step_host_s + sequences * model.sequence_host_s
        return (max(device_s, model.floors_s[0]) + host_s) * self.stretch

    def decode_s(self, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step of decoding alone."""
        if self._one_line:
            held = self._decoding.get(decoding)
            return (self._held(decoding, keys) if held is None else held).step_s(keys[0])
        if self.ranks > 1:
            decoding, keys = self._share(decoding, keys)
        return self.model.decode_step_s(decoding, keys) * self.stretch

    def _share(self, decoding: int, keys: Sequence[float]) -> tuple[int, Sequence[float]]:
        """Return the sequences of the busiest replica and the keys that they read, alike in the mean."""
        own = -(-decoding // self.ranks)
        return own, [key * own / decoding for key in keys] if decoding else keys

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone."""
        if self._one_line:  # the same with few copies, for the most common models
            held = self._decoding.get(decoding) or self._held(decoding, keys)
            return held.steps_s(keys[0], growth[0], self._counts[:k] if k <= COUNTS else np.arange(float(k)))
        if self.ranks > 1:
            after = ([first + i * more for first, more in zip(keys, growth, strict=True)] for i in range(k))
            return np.array([self.decode_s(decoding, some) for some in after])
        return self.model.decode_steps_s(decoding, keys, growth, k) * self.stretch

    def _held(self, decoding: int, keys: Sequence[float]) -> _Decoding:
        if len(self._decoding) >= MOST_REMEMBERED:
            self._decoding.clear()
        held = self._decoding[decoding] = _Decoding(self.model, decoding, keys)
        return held


def _unevenness(model: StepModel) -> float:
    """Return how much longer a step takes when every stage of a pipeline takes as long as the one with most layers."""
    stages, layers = model.query.parallelism.pp, model.structure.n_layers("decode")
    return math.ceil(layers / stages) * stages / layers if stages > 1 else 1.0


def _layers(model: StepModel, segment: int) -> Layers:
    """Return how the layers of a segment see a prompt."""
    spec, engine = model.structure.decoder[segment].layer.mixer, model.query.engine
    if isinstance(spec, CrossAttentionSpec):
        return Layers("cross", float(spec.window))
    if isinstance(spec, RecurrentSpec):
        return Layers("recurrent", 0.0, chunk=float(spec.chunk) if engine.executes_everything else 1.0)
    two_way = float(model.query.model.decoder.bidirectional_media)
    return Layers("window", float(spec.window), two_way, engine.counts_full_square)
