"""The table of a step read through memory: most of its parts depend on one or two whole numbers that come again."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Final

import numpy as np

from costmodel.lean import LeanChunk, LeanGroup, LeanStep, Line
from costmodel.step import StepModel
from costmodel.sums import touched_share
from simulator.prompt import Work

MOST_REMEMBERED: Final = 1 << 19
"""Values that are remembered before all are forgotten."""
ALWAYS_ONE: Final = frozenset({0, 4})
"""Sums that are one in every step with chunks: passes, and passes with chunks (`costmodel.serving_step.StepSums`)."""


class _Parts:
    """Parts of the table that depend on the same sums."""

    __slots__ = ("parts", "pick", "values")

    def __init__(self, indices: tuple[int, ...], parts: list[LeanGroup | LeanChunk]) -> None:
        self.pick = itemgetter(*indices)
        self.parts = parts
        self.values: dict[float | tuple[float, ...], float] = {}

    def work_out(self, sums: list[float]) -> float:
        """Return their time, which is remembered [s]."""
        if len(self.values) >= MOST_REMEMBERED:
            self.values.clear()
        value = self.values[self.pick(sums)] = sum([part.total_s(sums) for part in self.parts])
        return value


class _Attention:
    """Decode attention of one cache entry: a line by mean context for each number of sequences."""

    __slots__ = ("call_weight", "key_index", "key_weight", "lines", "part", "simple", "weight")

    def __init__(self, part: LeanStep) -> None:
        self.part = part
        calls, queries, pairs, keys = part.drivers
        self.simple = pairs == keys and len(calls) == len(queries) == len(keys) == 1  # each sequence asks once
        self.key_index, self.key_weight = keys[0] if self.simple else (0, 0.0)
        self.call_weight = calls[0][1] if self.simple else 0.0
        self.weight = queries[0][1] if self.simple else 0.0
        self.lines: dict[int, tuple[Line, float]] = {}

    def total_s(self, sums: list[float], decoding: int) -> float:
        """Return its time [s]; what `LeanStep.total_s` returns."""
        if not self.simple:
            return self.part.total_s(sums)
        held = self.lines.get(decoding)
        if held is None:
            rows = self.weight * decoding
            held = self.lines[decoding] = Line.of(self.part.table, rows / self.call_weight), rows
        line, rows = held
        return self.call_weight * line.read(self.key_weight * sums[self.key_index] / rows)


class StepTable:
    """Device times of steps with chunks.

    Parameters
    ----------
    model : StepModel
    """

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self._dense = model.query.model.routing is None
        self._touched: dict[float, float] = {}
        groups: dict[tuple[int, ...], list[LeanGroup | LeanChunk]] = {}
        self._attention: list[_Attention] = []
        for part in model.lean.parts if model.lean else ():
            if isinstance(part, LeanStep):
                self._attention.append(_Attention(part))
            else:
                groups.setdefault(_indices(part), []).append(part)
        self._parts = [_Parts(indices, parts) for indices, parts in groups.items()]

    def chunks_s(
        self, tokens: float, works: Sequence[Work], sequences: int, decoding: int, keys: Sequence[float]
    ) -> float:
        """Return the device's time of a step with chunks [s].

        Parameters
        ----------
        tokens : float
            Of the chunks.
        works : sequence of tuple
            By segment, rows, pairs and keys of the chunks.
        sequences, decoding : int
            Rows through the head, and decoding sequences.
        keys : sequence of float
            By read class, the keys that all decoding sequences read.
        """
        sums = [1.0, tokens + decoding, sequences, 1.0 if sequences else 0.0, 1.0, 1.0 if decoding else 0.0, decoding]
        for work in works:
            sums += work
            sums.append(0.0 if self._dense else self._touched_share(work[0] + decoding))
        sums += keys
        if self.model.lean is None:
            return float(self.model.table.total_s(np.array(sums, dtype=float)[:, None])[0])
        time_s = 0.0
        for parts in self._parts:
            value = parts.values.get(parts.pick(sums))
            time_s += parts.work_out(sums) if value is None else value
        if decoding:
            for attention in self._attention:
                time_s += attention.total_s(sums, decoding)
        return time_s

    def _touched_share(self, rows: float) -> float:
        found = self._touched.get(rows)
        if found is None:
            found = self._touched[rows] = float(touched_share(self.model.query, rows))
        return found


def _indices(part: LeanGroup | LeanChunk) -> tuple[int, ...]:
    """Return which sums a part depends on."""
    terms = (part.driver, part.calls) if isinstance(part, LeanGroup) else part.drivers
    found = {i for some in terms for i, _ in some} - ALWAYS_ONE
    return tuple(sorted(found)) or (0,)
