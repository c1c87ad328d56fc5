"""Time of operators on a device: the highest of its roofs, plus the start of each kernel.

A roof is work over a rate times the reached share of it. Work never lowers a roof, so time never falls with work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.engine import EngineProfile
from costmodel.hardware import HardwareProfile
from costmodel.memo import remember
from costmodel.operators import ACTIVATION, FLOPS, KV, LAUNCHES, LINK, MESSAGES, WEIGHT, Kind, Operator, OperatorTable

ROOFS: Final[tuple[Literal["compute", "memory", "link"], ...]] = ("compute", "memory", "link")


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """What a device reaches on each operator of a table under an engine.

    Parameters
    ----------
    compute_flops_per_s, memory_bytes_per_s, start_s : ndarray, shape (n_operators,)
        Reached matrix rate, reached memory bandwidth, and the time a kernel takes beyond its work.
    link_bytes_per_s, latency_s : float
        Reached bandwidth of the link between the devices, and the time of an empty message.
    """

    compute_flops_per_s: Array
    memory_bytes_per_s: Array
    start_s: Array
    link_bytes_per_s: float
    latency_s: float

    @staticmethod
    def of(table: OperatorTable, hardware: HardwareProfile, engine: EngineProfile, n_devices: int) -> Rates:
        """Return the rates of every operator of a table."""
        compute, bandwidth, cycles = engine.by_kind[:, table.kinds]
        peaks = {int(b): hardware.peak_flops_per_s[hardware.precision(int(b))] for b in set(table.bits.tolist())}
        peak = np.array([peaks[int(bits)] for bits in table.bits])
        link = hardware.link(n_devices) if n_devices > 1 else None
        share = engine.kind(Kind.COLLECTIVE).bandwidth_fraction
        return Rates(
            compute_flops_per_s=peak * compute,
            memory_bytes_per_s=hardware.memory_bandwidth_bytes_per_s * bandwidth,
            start_s=cycles / hardware.clock_hz,
            link_bytes_per_s=link.bandwidth_bytes_per_s * share if link else np.inf,
            latency_s=link.latency_s if link else 0.0,
        )


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
    """

    table: OperatorTable
    owners: tuple[HardwareProfile, EngineProfile]
    roofs: Array
    starts: Array
    contested: Array
    linear: Array

    @staticmethod
    def of(table: OperatorTable, hardware: HardwareProfile, engine: EngineProfile, n_devices: int) -> PricedTable:
        """Fold the rates into a table."""
        rates = Rates.of(table, hardware, engine, n_devices)
        work, repeats = table.coefficients, table.repeats[:, None]
        traffic = work[WEIGHT] + work[ACTIVATION] + work[KV]
        roofs = [
            work[FLOPS] / rates.compute_flops_per_s[:, None] * repeats,
            traffic / rates.memory_bytes_per_s[:, None] * repeats,
        ]
        if n_devices > 1:
            roofs.append((work[LINK] / rates.link_bytes_per_s + work[MESSAGES] * rates.latency_s) * repeats)
        starts = work[LAUNCHES] * rates.start_s[:, None] * repeats
        stacked = np.array(roofs)
        several = np.count_nonzero(stacked.any(axis=2), axis=0) > 1
        linear = stacked[:, ~several].sum(axis=(0, 1)) + starts.sum(axis=0)
        return PricedTable(table, (hardware, engine), stacked, starts, stacked[:, several], linear)

    def total_s(self, sums: Array) -> Array:
        """Return the time of the stage at every point, shape (n_points,) [s]."""
        total: Array = self.linear @ sums
        if self.contested.size:
            highest = self.contested[0] @ sums
            for roof in self.contested[1:]:
                np.maximum(highest, roof @ sums, out=highest)
            total += np.add.reduce(highest, axis=0)
        return total

    def operators_s(self, sums: Array) -> tuple[Array, Array]:
        """Return seconds under each roof, shape (n_roofs, n_operators, n_points), and of kernel starts."""
        n_roofs, n_operators, n_sums = self.roofs.shape
        flat = self.roofs.reshape(n_roofs * n_operators, n_sums) @ sums  # one product of matrices, not a stack of them
        return flat.reshape(n_roofs, n_operators, -1), self.starts @ sums


def priced(table: OperatorTable, hardware: HardwareProfile, engine: EngineProfile, n_devices: int) -> PricedTable:
    """Return a table with this device's rates, from the table's cache when it was made before."""
    key = (id(hardware), id(engine), n_devices)
    return remember(table.cache, key, lambda: PricedTable.of(table, hardware, engine, n_devices))


def operator_s(operator: Operator, hardware: HardwareProfile, engine: EngineProfile, n_devices: int = 1) -> Quantity:
    """Return the time of one operator, all repeats, straight from its columns [s].

    The slow and plain form of `PricedTable`, used for what techniques add and as its oracle.
    """
    efficiency = engine.kind(operator.kind)
    peak = hardware.peak_flops_per_s[hardware.precision(operator.bits)] * efficiency.compute_fraction
    bandwidth = hardware.memory_bandwidth_bytes_per_s * efficiency.bandwidth_fraction
    traffic = operator.weight_bytes + operator.activation_bytes + operator.kv_bytes
    busy = np.maximum(operator.flops / peak, traffic / bandwidth)
    if n_devices > 1:
        link = hardware.link(n_devices)
        rate = link.bandwidth_bytes_per_s * engine.kind(Kind.COLLECTIVE).bandwidth_fraction
        busy = np.maximum(busy, operator.link_bytes / rate + operator.messages * link.latency_s)
    start = operator.launches * (efficiency.start_cycles / hardware.clock_hz)
    total: Quantity = (busy + start) * operator.repeats
    return total
