"""Attention over whole sequences and chunks of them by its fitted curve: operators of one kernel together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from costmodel.efficiency.attention import AttentionKernel, Chunks
from costmodel.efficiency.attention_curve import AttentionCurve
from costmodel.kernels import Kernel, Kernels, start_s
from costmodel.operators import KEYS, LAUNCHES, PAIRS, ROWS, OperatorTable
from costmodel.shapes import AttentionShape
from costmodel.units import TINY


@dataclass(frozen=True, slots=True, eq=False)
class ChunkPart:
    """Operators of prefill or encoder attention under one curve.

    Parameters
    ----------
    rows : ndarray of int
        The operators, in the table of the stage.
    drivers : ndarray, shape (4 * n_operators, n_sums)
        Calls, rows, pairs and keys for one unit of each sum.
    repeats : ndarray, shape (n_operators, 1)
    kernel : AttentionKernel
        The shapes on the device.
    start : ndarray, shape (n_operators, 1)
        The part of one call that is no work, all repeats [s].
    """

    rows: NDArray[np.intp]
    drivers: Array
    repeats: Array
    kernel: AttentionKernel
    start: Array

    def at(self, sums: Array) -> tuple[Chunks, Array]:
        """Return the sequences of one call, and the calls, of every operator and point."""
        driven = (self.drivers @ sums).reshape(4, len(self.rows), -1)
        calls = driven[0]
        rows, pairs, keys = driven[1:] / np.maximum(calls, TINY)
        return Chunks.of(rows, pairs, keys, causal=self.kernel.causal), calls

    def operators_s(self, sums: Array) -> Array:
        """Return the time of every operator at every point, shape (n_operators, n_points) [s]."""
        chunks, calls = self.at(sums)
        result: Array = self.kernel.time_s(chunks) * calls * self.repeats
        return result


def chunk_parts(table: OperatorTable, found: Sequence[tuple[int, Kernel]], kernels: Kernels) -> list[ChunkPart]:
    """Return the operators of attention over sequences, those of one kernel together."""
    together: dict[tuple[str, int, bool], list[tuple[int, Kernel]]] = {}
    for i, kernel in found:
        shape = table.shapes[i]
        assert isinstance(shape, AttentionShape)  # noqa: S101 - attention with a curve has this shape
        together.setdefault((kernel.name, int(table.bits[i]), shape.causal), []).append((i, kernel))
    return [_part(table, members, kernels, bits) for (_, bits, _), members in together.items()]


def _part(table: OperatorTable, members: Sequence[tuple[int, Kernel]], kernels: Kernels, bits: int) -> ChunkPart:
    rows, kernel = np.array([i for i, _ in members], dtype=np.intp), members[0][1]
    shapes = [shape for i, _ in members if isinstance(shape := table.shapes[i], AttentionShape)]
    curve = kernel.fitted.curve()
    assert isinstance(curve, AttentionCurve)  # noqa: S101 - the file was checked when it was read
    columns = np.array([(s.heads, s.kv_heads, s.pair_width, s.key_bytes) for s in shapes]).T[:, :, None]
    repeats = table.repeats[rows][:, None]
    drivers = np.concatenate([table.coefficients[[LAUNCHES]], table.drivers[[ROWS, PAIRS, KEYS]]])[:, rows]
    return ChunkPart(
        rows=rows,
        drivers=drivers.reshape(-1, drivers.shape[-1]),
        repeats=repeats,
        kernel=AttentionKernel.of(
            heads=columns[0],
            kv_heads=columns[1],
            pair_width=columns[2],
            key_bytes=columns[3],
            causal=shapes[0].causal,
            chip=kernels.chip(bits),
            curve=curve,
            tiling=kernel.fitted.tiling(),
        ),
        start=start_s(kernel, shapes[0], None, kernels) * repeats,
    )
