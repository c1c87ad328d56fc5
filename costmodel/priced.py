"""Time of operators on a device: a fitted curve where the engine's kernels have one, else the highest roof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.chunked import ChunkPart, chunk_parts
from costmodel.kernels import PLAIN, Kernel, Kernels
from costmodel.memo import Cache, remember
from costmodel.operators import COLUMNS, DRIVERS, Kind, Operator, OperatorTable
from costmodel.roofline import DATASHEET, Rates, Roofs, roofs_of, under
from costmodel.tabulated import DecodeTable, Groups, decode_tables, groups_of

BY_ROWS: Final = frozenset({Kind.GEMM, Kind.MOE_GEMM, Kind.ELEMENTWISE, Kind.COLLECTIVE, *PLAIN})
OVER_SEQUENCES: Final = frozenset({Kind.PREFILL_ATTENTION, Kind.ENCODER_ATTENTION})


@dataclass(frozen=True, slots=True, eq=False)
class OperatorTimes:
    """Every operator of a stage at every point.

    Parameters
    ----------
    roofs_s : ndarray, shape (n_roofs, n_operators, n_points)
        Seconds under each roof; of an operator with a curve, at the rates of the datasheet.
    busy_s, start_s : ndarray, shape (n_operators, n_points)
        Seconds of work, and of kernel starts.
    sizes : ndarray, shape (n_operators, n_points)
        What the errors of its curve are kept apart by: rows, bytes, queries or context; zero without a curve.
    """

    roofs_s: Array
    busy_s: Array
    start_s: Array
    sizes: Array


@dataclass(frozen=True, slots=True, eq=False)
class PricedTable:
    """A table of operators on a device under an engine.

    Parameters
    ----------
    table : OperatorTable
    kernels : Kernels
        The curves of the device and the engine.
    found : tuple
        The curve of each operator, or None.
    flat : list of int
        The operators without one.
    rest : Roofs
        These at the rates that the engine states.
    groups, steps, chunks : list
        Those with one, by what drives them.
    """

    table: OperatorTable
    kernels: Kernels
    found: tuple[Kernel | None, ...]
    flat: list[int]
    rest: Roofs
    groups: Groups
    steps: Sequence[DecodeTable]
    chunks: Sequence[ChunkPart]
    cache: Cache = field(default_factory=dict)

    @staticmethod
    def of(table: OperatorTable, kernels: Kernels) -> PricedTable:
        """Find the curve of every operator, and fold the rates of the device into the others."""
        kinds = [Kind(int(kind)) for kind in table.kinds]
        looked_for = zip(kinds, table.shapes, table.bits.tolist(), table.peers.tolist(), strict=True)
        found = tuple(kernels.find(kind, shape, bits=bits, peers=peers) for kind, shape, bits, peers in looked_for)
        flat = [i for i, kernel in enumerate(found) if kernel is None]
        rest = table.only(flat)
        known = [(kinds[i], i, kernel) for i, kernel in enumerate(found) if kernel is not None]
        return PricedTable(
            table=table,
            kernels=kernels,
            found=found,
            flat=flat,
            rest=Roofs.of(rest, Rates.of(rest, kernels.hardware, kernels.engine.by_kind)),
            groups=groups_of(table, [(i, k) for kind, i, k in known if kind in BY_ROWS], kernels),
            steps=decode_tables(table, [(i, k) for kind, i, k in known if kind == Kind.DECODE_ATTENTION], kernels),
            chunks=chunk_parts(table, [(i, k) for kind, i, k in known if kind in OVER_SEQUENCES], kernels),
        )

    def total_s(self, sums: Array) -> Array:
        """Return the time of the stage at every point, shape (n_points,) [s]."""
        total = self.rest.total_s(sums) if self.flat else np.zeros(sums.shape[1])
        if self.groups.groups:
            total = total + self.groups.total_s(sums)
        for step in self.steps:
            total = total + step.total_s(sums)
        for chunks in self.chunks:
            total = total + chunks.operators_s(sums).sum(axis=0)
        return total

    def operators_s(self, sums: Array) -> OperatorTimes:
        """Return every operator at every point."""
        roofs_s = under(self._roofs(), sums)
        time_s = roofs_s.max(axis=0)
        start_s, sizes = np.zeros_like(time_s), np.zeros_like(time_s)
        start_s[self.flat] = self.rest.starts @ sums
        time_s[self.flat] += start_s[self.flat]
        for group in self.groups.groups:
            time_s[group.rows], start_s[group.rows], sizes[group.rows] = group.operators_s(sums)
        for step in self.steps:
            batch, context, calls = step.at(sums)
            del batch
            time_s[step.row], start_s[step.row], sizes[step.row] = step.total_s(sums), step.start * calls, context
        for part in self.chunks:
            chunks, calls = part.at(sums)
            time_s[part.rows], start_s[part.rows], sizes[part.rows] = (
                part.operators_s(sums),
                part.start * calls,
                chunks.queries,
            )
        np.minimum(start_s, time_s, out=start_s)
        return OperatorTimes(roofs_s, time_s - start_s, start_s, sizes)

    def _roofs(self) -> Array:
        """Return the roofs of all operators: those with a curve at datasheet rates."""

        def work_out() -> Array:
            if len(self.flat) == len(self.found):
                return self.rest.roofs
            roofs = roofs_of(self.table, Rates.of(self.table, self.kernels.hardware, DATASHEET))
            roofs[: len(self.rest.roofs), self.flat] = self.rest.roofs
            return roofs

        return remember(self.cache, "roofs", work_out)


def priced(table: OperatorTable, kernels: Kernels) -> PricedTable:
    """Return a table with this device's rates, from the table's cache when it was made before."""
    return remember(table.cache, id(kernels), lambda: PricedTable.of(table, kernels))


def operator_s(operator: Operator, kernels: Kernels) -> Quantity:
    """Return the time of one operator, all repeats [s].

    The slow and plain way, used for what techniques add and as the oracle of `PricedTable`.
    """
    values = (*operator.columns, *operator.drivers)
    flat = np.broadcast_arrays(*(np.asarray(value, dtype=float) for value in values))
    sums = np.array([value.ravel() for value in flat])
    total = priced(_alone(operator, kernels), kernels).total_s(sums)
    return total.reshape(flat[0].shape) if flat[0].shape else float(total[0])


def _alone(operator: Operator, kernels: Kernels) -> OperatorTable:
    """Return a table of one operator whose columns and drivers are sums themselves."""
    units = np.eye(len(COLUMNS) + len(DRIVERS))
    names = (*COLUMNS, *DRIVERS)
    bare = replace(operator, name="alone", **dict(zip(names, units, strict=True)))  # type: ignore[arg-type]
    key = (operator.kind, operator.repeats, operator.bits, operator.peers, operator.shape)
    return remember(kernels.cache, key, lambda: OperatorTable.of([bare], len(units)))
