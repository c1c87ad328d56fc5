"""Time of operators on a device: the highest of its roofs, plus the start of each kernel.

A roof is work over a rate times the reached share of it. Work never lowers a roof, so time never falls with work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array, Quantity
from costmodel.engine import EngineProfile
from costmodel.hardware import HardwareProfile
from costmodel.memo import remember
from costmodel.operators import ACTIVATION, FLOPS, KV, LAUNCHES, LINK, MESSAGES, WEIGHT, Kind, Operator, OperatorTable

MANY_POINTS: Final = 64
"""From here on products with few sums, group by group, beat one product with all of them."""
ROOFS: Final[tuple[Literal["compute", "memory", "link"], ...]] = ("compute", "memory", "link")


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """What a device reaches on each operator of a table under an engine.

    Parameters
    ----------
    compute_flops_per_s, memory_bytes_per_s, start_s : ndarray, shape (n_operators,)
        Reached matrix rate, reached memory bandwidth, and the time a kernel takes beyond its work.
    link_bytes_per_s, latency_s : ndarray, shape (n_operators,)
        Reached bandwidth of the link between the peers, and the time of an empty message.
    """

    compute_flops_per_s: Array
    memory_bytes_per_s: Array
    start_s: Array
    link_bytes_per_s: Array
    latency_s: Array

    @staticmethod
    def of(table: OperatorTable, hardware: HardwareProfile, engine: EngineProfile) -> Rates:
        """Return the rates of every operator of a table."""
        compute, bandwidth, cycles = engine.by_kind[:, table.kinds]
        peaks = {int(b): hardware.peak_flops_per_s[hardware.precision(int(b))] for b in set(table.bits.tolist())}
        peak = np.array([peaks[int(bits)] for bits in table.bits])
        links = {n: _link(hardware, engine, n) for n in set(table.peers.tolist())}
        rates_and_latencies = np.array([links[n] for n in table.peers.tolist()]).reshape(-1, 2)
        return Rates(
            compute_flops_per_s=peak * compute,
            memory_bytes_per_s=hardware.memory_bandwidth_bytes_per_s * bandwidth,
            start_s=cycles / hardware.clock_hz,
            link_bytes_per_s=rates_and_latencies[:, 0],
            latency_s=rates_and_latencies[:, 1],
        )


def _link(hardware: HardwareProfile, engine: EngineProfile, n_devices: int) -> tuple[float, float]:
    """Return the reached bandwidth and the latency of the link between so many devices."""
    if n_devices == 1:
        return np.inf, 0.0
    link = hardware.link(n_devices)
    return link.rate_bytes_per_s(n_devices) * engine.kind(Kind.COLLECTIVE).bandwidth_fraction, link.latency_s


@dataclass(frozen=True, slots=True, eq=False)
class PricedTable:
    """A table of operators with the rates of a device folded into its coefficients.

    Parameters
    ----------
    table : OperatorTable
    owners : tuple
        The device and the engine, kept so that their identity stays theirs.
    roofs : ndarray, shape (n_roofs, n_operators, n_sums)
        Seconds under each roof, all repeats, for one unit of each sum.
    starts : ndarray, shape (n_operators, n_sums)
        Seconds of kernel starts.
    contested : ndarray, shape (n_roofs, n_contested, n_sums)
        The roofs of the operators that have more than one.
    linear : ndarray, shape (n_sums,)
        Seconds of everything else, which no comparison is needed for: operators under one roof, and all starts.
    groups : tuple of (ndarray of int, ndarray)
        The contested operators by the few sums that each group depends on, with their roofs over those alone.
    """

    table: OperatorTable
    owners: tuple[HardwareProfile, EngineProfile]
    roofs: Array
    starts: Array
    contested: Array
    linear: Array
    groups: tuple[tuple[NDArray[np.intp], Array], ...]

    @staticmethod
    def of(table: OperatorTable, hardware: HardwareProfile, engine: EngineProfile) -> PricedTable:
        """Fold the rates into a table."""
        rates = Rates.of(table, hardware, engine)
        work, repeats = table.coefficients, table.repeats[:, None]
        traffic = work[WEIGHT] + work[ACTIVATION] + work[KV]
        roofs = [
            work[FLOPS] / rates.compute_flops_per_s[:, None] * repeats,
            traffic / rates.memory_bytes_per_s[:, None] * repeats,
        ]
        if (table.peers > 1).any():
            sending = work[LINK] / rates.link_bytes_per_s[:, None] + work[MESSAGES] * rates.latency_s[:, None]
            roofs.append(sending * repeats)
        starts = work[LAUNCHES] * rates.start_s[:, None] * repeats
        stacked = np.array(roofs)
        several = np.count_nonzero(stacked.any(axis=2), axis=0) > 1
        linear = stacked[:, ~several].sum(axis=(0, 1)) + starts.sum(axis=0)
        contested = stacked[:, several]
        return PricedTable(table, (hardware, engine), stacked, starts, contested, linear, _by_sums(contested))

    def total_s(self, sums: Array) -> Array:
        """Return the time of the stage at every point, shape (n_points,) [s]."""
        total: Array = self.linear @ sums
        if sums.shape[1] < MANY_POINTS:
            return total + _highest(self.contested, sums)
        for columns, roofs in self.groups:
            total += _highest(roofs, sums[columns])
        return total

    def operators_s(self, sums: Array) -> tuple[Array, Array]:
        """Return seconds under each roof, shape (n_roofs, n_operators, n_points), and of kernel starts."""
        n_roofs, n_operators, n_sums = self.roofs.shape
        flat = self.roofs.reshape(n_roofs * n_operators, n_sums) @ sums  # one product of matrices, not a stack of them
        return flat.reshape(n_roofs, n_operators, -1), self.starts @ sums


def _highest(roofs: Array, sums: Array) -> Array:
    """Return the sum over operators of the highest roof at every point [s]."""
    highest: Array = roofs[0] @ sums
    for roof in roofs[1:]:
        np.maximum(highest, roof @ sums, out=highest)
    total: Array = np.add.reduce(highest, axis=0)
    return total


def _by_sums(contested: Array) -> tuple[tuple[NDArray[np.intp], Array], ...]:
    """Return the operators grouped by the sums that they depend on."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    uses = np.count_nonzero(contested, axis=0) > 0
    for i, used in enumerate(uses):
        groups.setdefault(tuple(used.tolist()), []).append(i)
    return tuple((np.flatnonzero(used), contested[:, rows][:, :, np.array(used)]) for used, rows in groups.items())


def priced(table: OperatorTable, hardware: HardwareProfile, engine: EngineProfile) -> PricedTable:
    """Return a table with this device's rates, from the table's cache when it was made before."""
    key = (id(hardware), id(engine))
    return remember(table.cache, key, lambda: PricedTable.of(table, hardware, engine))


def operator_s(operator: Operator, hardware: HardwareProfile, engine: EngineProfile) -> Quantity:
    """Return the time of one operator, all repeats, straight from its columns [s].

    The slow and plain form of `PricedTable`, used for what techniques add and as its oracle.
    """
    efficiency = engine.kind(operator.kind)
    peak = hardware.peak_flops_per_s[hardware.precision(operator.bits)] * efficiency.compute_fraction
    bandwidth = hardware.memory_bandwidth_bytes_per_s * efficiency.bandwidth_fraction
    traffic = operator.weight_bytes + operator.activation_bytes + operator.kv_bytes
    busy = np.maximum(operator.flops / peak, traffic / bandwidth)
    rate, latency_s = _link(hardware, engine, operator.peers)
    busy = np.maximum(busy, operator.link_bytes / rate + operator.messages * latency_s)
    start = operator.launches * (efficiency.start_cycles / hardware.clock_hz)
    total: Quantity = (busy + start) * operator.repeats
    return total
