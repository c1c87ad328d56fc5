"""Times from fitted curves at many points fast: curves by rows, and by sequences and context, read off tables.

A stage has many operators that depend on one and the same number of rows. Their times are worked out once on a grid,
and added up; a point then costs one interpolation. Between grid points, which hold every step of the usual tiles up to
a thousand rows and every 128 or 256 beyond, times are straight lines, so they rise where the curves rise.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from costmodel.efficiency.decode import DecodeCurve, step_attention_s
from costmodel.kernels import Kernel, Kernels, start_s, times_of
from costmodel.memo import remember
from costmodel.operators import KEYS, LAUNCHES, PAIRS, ROWS, Kind, OperatorTable
from costmodel.shapes import AttentionShape
from costmodel.units import TINY

Rows = NDArray[np.intp]


def _rows_grid() -> Array:
    """Return the numbers of rows at which curves are worked out.

    A tile is filled at a multiple of its rows and a new one starts right after it: both sides of every step.
    """
    steps = [
        np.arange(start, stop, step) for start, stop, step in ((64, 1024, 64), (1024, 4096, 128), (4096, 16385, 256))
    ]
    whole = np.concatenate(steps).astype(float)
    far = 16384 * 2.0 ** (np.arange(1, 121) / 4)
    few = np.array([1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 49])
    return np.unique(np.concatenate([few, whole, whole + 1, far]))


ROWS_GRID: Final = _rows_grid()
BATCH_GRID: Final = np.unique(
    np.round(np.concatenate([np.arange(1, 17), 2.0 ** (np.arange(17, 25) / 4), 2.0 ** (np.arange(13, 41) / 2)]))
)
CONTEXT_GRID: Final = np.round(np.concatenate([[1, 16, 32, 48], 2.0 ** (np.arange(24, 97) / 4)]))


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Operators driven by one and the same number.

    Parameters
    ----------
    rows : ndarray of int
        The operators, in the table of the stage.
    driver, calls : ndarray, shape (n_sums,)
        What goes through, and calls, for one unit of each sum.
    table : ndarray, shape (n_operators, n_grid)
        Seconds of one call, all repeats, on the grid.
    total : ndarray, shape (n_grid,)
        Their sum.
    starts : ndarray, shape (n_operators,)
        The part of one call that is no work.
    scales : ndarray, shape (n_operators,)
        By which errors are kept apart, over rows: one, or the bytes of a row.
    """

    rows: Rows
    driver: Array
    calls: Array
    table: Array
    total: Array
    starts: Array
    scales: Array

    def operators_s(self, sums: Array) -> tuple[Array, Array, Array]:
        """Return times and starts [s], and sizes of single calls, shape (n_operators, n_points)."""
        calls = self.calls @ sums
        through = (self.driver @ sums) / np.maximum(calls, TINY)
        left, share = _place(ROWS_GRID, through)
        times = self.table[:, left] * (1 - share) + self.table[:, left + 1] * share
        return times * calls, self.starts[:, None] * calls, self.scales[:, None] * through


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """All operators of a stage whose time depends on one number each.

    Parameters
    ----------
    groups : tuple of Group
        Those of one number together.
    drivers : ndarray, shape (2 * n_groups, n_sums)
        What goes through each group, and its calls.
    """

    groups: tuple[Group, ...]
    drivers: Array

    @staticmethod
    def of(groups: Sequence[Group]) -> Groups:
        """Put groups together."""
        stacked = [group.driver for group in groups] + [group.calls for group in groups]
        return Groups(tuple(groups), np.array(stacked))

    def total_s(self, sums: Array) -> Array:
        """Return the time of all operators at every point [s]."""
        driven = self.drivers @ sums
        calls = driven[len(self.groups) :]
        through = driven[: len(self.groups)] / np.maximum(calls, TINY)
        each = [np.interp(x, ROWS_GRID, group.total) for group, x in zip(self.groups, through, strict=True)]
        total: Array = (np.array(each) * calls).sum(axis=0)
        return total


def groups_of(table: OperatorTable, found: Sequence[tuple[int, Kernel]], kernels: Kernels) -> Groups:
    """Return the operators whose time depends on their rows alone, those of the same rows together."""
    together: dict[Hashable, list[tuple[int, Kernel]]] = {}
    for i, kernel in found:
        key = (table.drivers[ROWS, i].tobytes(), table.coefficients[LAUNCHES, i].tobytes())
        together.setdefault(key, []).append((i, kernel))
    return Groups.of([_group(table, members, kernels) for members in together.values()])


def _group(table: OperatorTable, members: Sequence[tuple[int, Kernel]], kernels: Kernels) -> Group:
    first = members[0][0]
    curves = [_curve(table, i, kernel, kernels) for i, kernel in members]
    rows = np.array([i for i, _ in members], dtype=np.intp)
    repeats = table.repeats[rows]
    seconds = np.array([once for once, _ in curves]) * repeats[:, None]
    return Group(
        rows=rows,
        driver=table.drivers[ROWS, first],
        calls=table.coefficients[LAUNCHES, first],
        table=seconds,
        total=seconds.sum(axis=0),
        starts=np.array([start for _, start in curves]) * repeats,
        scales=np.array([getattr(table.shapes[i], "row_bytes", 1.0) for i in rows]),
    )


def _curve(table: OperatorTable, i: int, kernel: Kernel, kernels: Kernels) -> tuple[Array, float]:
    """Return an operator's curve on the grid, and the start of one call, from the cache if it is there [s]."""
    kind, shape, bits, peers = Kind(int(table.kinds[i])), table.shapes[i], int(table.bits[i]), int(table.peers[i])
    assert shape is not None  # noqa: S101 - only operators with a shape have a curve

    def work_out() -> tuple[Array, float]:
        times = times_of(kernel, kind, shape, bits=bits, peers=peers, kernels=kernels)
        return times(ROWS_GRID), start_s(kernel, shape, times, kernels)

    return remember(kernels.cache, (kernel.name, kind, shape, bits, peers), work_out)


@dataclass(frozen=True, slots=True, eq=False)
class DecodeTable:
    """One operator of decode attention by sequences and context.

    Parameters
    ----------
    row : int
        The operator, in the table of the stage.
    drivers : ndarray, shape (4, n_sums)
        Calls, queries, pairs and keys for one unit of each sum: one query a sequence, or several that read its keys
        together.
    seconds : ndarray, shape (n_batch, n_context)
        One call with one query a sequence, all repeats.
    start : float
        The part of one call that is no work, all repeats [s].
    pair_s : float
        What a query-key pair takes at the reached matrix rate, all repeats [s].
    """

    row: int
    drivers: Array
    seconds: Array
    start: float
    pair_s: float

    def at(self, sums: Array) -> tuple[Array, Array, Array]:
        """Return sequences, context and calls at every point."""
        calls, queries, pairs, keys = self.drivers @ sums
        sequences = queries / _queries_each(pairs, keys)
        return sequences / np.maximum(calls, TINY), keys / np.maximum(sequences, TINY), calls

    def total_s(self, sums: Array) -> Array:
        """Return the time at every point [s]."""
        calls, queries, pairs, keys = self.drivers @ sums
        each = _queries_each(pairs, keys)
        sequences = queries / each
        low, right = _place(BATCH_GRID, sequences / np.maximum(calls, TINY))
        left, share = _place(CONTEXT_GRID, keys / np.maximum(sequences, TINY))
        flat, width = self.seconds.ravel(), len(CONTEXT_GRID)
        at = low * width + left
        near = flat[at] + share * (flat[at + 1] - flat[at])
        at += width
        far = flat[at] + share * (flat[at + 1] - flat[at])
        result: Array = (near + right * (far - near)) * calls
        # of one query a sequence the table has the products
        np.maximum(result, (each > 1.0) * pairs * self.pair_s, out=result)
        return result


def _queries_each(pairs: Array, keys: Array) -> Array:
    """Return the queries that read a sequence's keys together."""
    each: Array = np.maximum(pairs / np.maximum(keys, TINY), 1.0)
    return each


def _place(grid: Array, x: Array) -> tuple[Rows, Array]:
    """Return the grid point left of each value, and how far it is to the next as a share."""
    left = np.searchsorted(grid, x, side="right") - 1
    np.clip(left, 0, len(grid) - 2, out=left)
    below = grid[left]
    share = (x - below) / (grid[left + 1] - below)
    return left, np.clip(share, 0.0, 1.0, out=share)


def decode_tables(table: OperatorTable, found: Sequence[tuple[int, Kernel]], kernels: Kernels) -> list[DecodeTable]:
    """Return the operators of decode attention."""
    tables = []
    for i, kernel in found:
        shape, bits = table.shapes[i], int(table.bits[i])
        assert isinstance(shape, AttentionShape)  # noqa: S101 - decode attention has this shape
        repeats = float(table.repeats[i])
        tables.append(
            DecodeTable(
                row=i,
                drivers=np.concatenate([table.coefficients[[LAUNCHES], i], table.drivers[[ROWS, PAIRS, KEYS], i]]),
                seconds=_steps(kernel, shape, bits, kernels) * repeats,
                start=start_s(kernel, shape, None, kernels) * repeats,
                pair_s=_pair_s(kernel, shape, bits, kernels) * repeats,
            )
        )
    return tables


def _pair_s(kernel: Kernel, shape: AttentionShape, bits: int, kernels: Kernels) -> float:
    """Return what a query-key pair of all heads takes at the reached matrix rate [s]."""
    curve = kernel.fitted.curve()
    assert isinstance(curve, DecodeCurve)  # noqa: S101 - the file was checked when it was read
    return 2 * shape.pair_width * shape.heads / (curve.compute_fraction * kernels.chip(bits).peak_flops_per_s)


def _steps(kernel: Kernel, shape: AttentionShape, bits: int, kernels: Kernels) -> Array:
    """Return one call on the grid, from the cache when it was worked out before [s]."""
    curve = kernel.fitted.curve()
    assert isinstance(curve, DecodeCurve)  # noqa: S101 - the file was checked when it was read

    def work_out() -> Array:
        return step_attention_s(
            CONTEXT_GRID,
            BATCH_GRID[:, None],
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            pair_width=shape.pair_width,
            key_bytes=shape.key_bytes,
            chip=kernels.chip(bits),
            curve=curve,
        )

    return remember(kernels.cache, (kernel.name, shape, bits), work_out)
