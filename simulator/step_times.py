"""Times of the steps of one compiled model: chunks read through memory, decoding by lines, leaps equal to steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from costmodel.base import Array
from costmodel.layers import CrossAttentionSpec
from costmodel.recurrent import RecurrentSpec
from costmodel.step import StepModel
from simulator.prompt import Chunk, Layers, work_of, works_of
from simulator.step_table import StepTable


class StepTimes:
    """Steps of a model on one device.

    Parameters
    ----------
    model : StepModel

    Notes
    -----
    The host's time a request (`request_host_s`: tokenising, hand-overs) is no part of a step here: other processes
    spend it while the worker goes on.
    """

    __slots__ = ("_one_line", "model", "segments", "table")

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.segments = [_layers(model, segment) for segment in range(model.n_segments)]
        self.table = StepTable(model)
        self._one_line = len(model.read_classes) == 1 and not model.without_line

    def chunks_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step with chunks."""
        model = self.model
        tokens, alike = 0, True
        for _, own, prompt in chunks:
            tokens += own
            alike = alike and prompt is None
        works = [work_of(chunks, layers) for layers in self.segments] if alike else works_of(chunks, self.segments)
        sequences = finishing + decoding
        device_s = self.table.chunks_s(float(tokens), works, sequences, decoding, keys)
        return max(device_s, model.floors_s[0]) + model.step_host_s + sequences * model.sequence_host_s

    def decode_s(self, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step of decoding alone."""
        return self.model.decode_step_s(decoding, keys)

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone."""
        model = self.model
        if not self._one_line:
            return model.decode_steps_s(decoding, keys, growth, k)
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


def _layers(model: StepModel, segment: int) -> Layers:
    """Return how the layers of a segment see a prompt."""
    spec, engine = model.structure.decoder[segment].layer.mixer, model.query.engine
    if isinstance(spec, CrossAttentionSpec):
        return Layers("cross", float(spec.window))
    if isinstance(spec, RecurrentSpec):
        return Layers("recurrent", 0.0, chunk=float(spec.chunk) if engine.executes_everything else 1.0)
    two_way = float(model.query.model.decoder.bidirectional_media)
    return Layers("window", float(spec.window), two_way, engine.counts_full_square)
