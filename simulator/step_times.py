"""Times of the steps of one compiled model: chunks read through memory, decoding by lines, leaps equal to steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from costmodel.base import Array
from costmodel.layers import CrossAttentionSpec
from costmodel.recurrent import RecurrentSpec
from costmodel.step import StepModel
from simulator.dealing import busiest
from simulator.prompt import Chunk, Layers, work_of, works_of
from simulator.step_table import StepTable


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

    __slots__ = ("_one_line", "model", "ranks", "segments", "stretch", "table")

    def __init__(self, model: StepModel, ranks: int = 1) -> None:
        self.model = model
        self.ranks = ranks
        self.stretch = _unevenness(model)
        self.segments = [_layers(model, segment) for segment in range(model.n_segments)]
        self.table = StepTable(model)
        single = len(model.read_classes) == 1 and ranks == 1 and self.stretch == 1.0
        self._one_line = single and not model.without_line

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
        works = [work_of(chunks, layers) for layers in self.segments] if alike else works_of(chunks, self.segments)
        sequences = finishing + decoding
        device_s = self.table.chunks_s(float(tokens), works, sequences, decoding, keys)
        host_s = model.step_host_s + sequences * model.sequence_host_s
        return (max(device_s, model.floors_s[0]) + host_s) * self.stretch

    def decode_s(self, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step of decoding alone."""
        if self.ranks > 1:
            decoding, keys = self._share(decoding, keys)
        return self.model.decode_step_s(decoding, keys) * self.stretch

    def _share(self, decoding: int, keys: Sequence[float]) -> tuple[int, Sequence[float]]:
        """Return the sequences of the busiest replica and the keys that they read, alike in the mean."""
        own = -(-decoding // self.ranks)
        return own, [key * own / decoding for key in keys] if decoding else keys

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone."""
        model = self.model
        if self.ranks > 1:
            after = ([first + i * more for first, more in zip(keys, growth, strict=True)] for i in range(k))
            return np.array([self.decode_s(decoding, some) for some in after])
        if not self._one_line:
            return model.decode_steps_s(decoding, keys, growth, k) * self.stretch
        rest, (line,) = model.lines(decoding, keys)  # the same without copies, for the most common models
        contexts = np.arange(float(k))
        contexts *= growth[0]
        contexts += keys[0]
        contexts /= decoding
        times = line.read_many(contexts)  # type: ignore[union-attr]
        times += rest
        if model.floors_s[1]:
            np.maximum(times, model.floors_s[1], out=times)
        times += model.step_host_s + decoding * model.sequence_host_s
        return times


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
