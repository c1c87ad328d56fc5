"""Roofs: time of operators at stated shares of a device's rates, the highest roof plus the start of each kernel.

A roof is work over a rate times the reached share of it. Work never lowers a roof, so time never falls with work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from costmodel.hardware import HardwareProfile
from costmodel.operators import ACTIVATION, FLOPS, HOST, KV, LAUNCHES, LINK, MESSAGES, WEIGHT, Kind, OperatorTable

MANY_POINTS: Final = 64
"""From here on products with few sums, group by group, beat one product with all of them."""
DATASHEET: Final = np.array([np.ones(len(Kind)), np.ones(len(Kind)), np.zeros(len(Kind))])
"""Every kind at the rates of the datasheet."""
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
    def of(table: OperatorTable, hardware: HardwareProfile, by_kind: Array) -> Rates:
        """Return the rates of every operator of a table.

        Parameters
        ----------
        by_kind : ndarray, shape (3, n_kinds)
            Reached shares of compute and bandwidth, and start cycles; see `EngineProfile.by_kind`, or `DATASHEET`.
        """
        compute, bandwidth, cycles = by_kind[:, table.kinds]
        peaks = {int(b): hardware.peak_flops_per_s[hardware.precision(int(b))] for b in set(table.bits.tolist())}
        peak = np.array([peaks[int(bits)] for bits in table.bits])
        links = {n: _link(hardware, by_kind, n) for n in set(table.peers.tolist())}
        rates_and_latencies = np.array([links[n] for n in table.peers.tolist()]).reshape(-1, 2)
        return Rates(
            compute_flops_per_s=peak * compute,
            memory_bytes_per_s=hardware.memory_bandwidth_bytes_per_s * bandwidth,
            start_s=cycles / hardware.clock_hz,
            link_bytes_per_s=rates_and_latencies[:, 0],
            latency_s=rates_and_latencies[:, 1],
        )


def _link(hardware: HardwareProfile, by_kind: Array, n_devices: int) -> tuple[float, float]:
    """Return the reached bandwidth and the latency of the link between so many devices, or to the host."""
    if n_devices == 1:
        return np.inf, 0.0
    if n_devices == HOST:
        host = hardware.host_link()
        return host.bandwidth_bytes_per_s * float(by_kind[1, Kind.COPY]), host.latency_s
    link = hardware.link(n_devices)
    return link.rate_bytes_per_s(n_devices) * float(by_kind[1, Kind.COLLECTIVE]), link.latency_s


@dataclass(frozen=True, slots=True, eq=False)
class Roofs:
    """Operators with the rates of a device folded into their coefficients.

    Parameters
    ----------
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

    roofs: Array
    starts: Array
    contested: Array
    linear: Array
    groups: tuple[tuple[NDArray[np.intp], Array], ...]

    @staticmethod
    def of(table: OperatorTable, rates: Rates) -> Roofs:
        """Fold rates into a table."""
        roofs = roofs_of(table, rates)
        starts = table.coefficients[LAUNCHES] * rates.start_s[:, None] * table.repeats[:, None]
        several = np.count_nonzero(roofs.any(axis=2), axis=0) > 1
        linear = roofs[:, ~several].sum(axis=(0, 1)) + starts.sum(axis=0)
        contested = roofs[:, several]
        return Roofs(roofs, starts, contested, linear, _by_sums(contested))

    def total_s(self, sums: Array) -> Array:
        """Return the time of all operators at every point, shape (n_points,) [s]."""
        total: Array = self.linear @ sums
        if sums.shape[1] < MANY_POINTS:
            return total + _highest(self.contested, sums)
        for columns, roofs in self.groups:
            total += _highest(roofs, sums[columns])
        return total


def roofs_of(table: OperatorTable, rates: Rates) -> Array:
    """Return seconds under each roof, all repeats, for one unit of each sum, shape (n_roofs, n_operators, n_sums)."""
    work, repeats = table.coefficients, table.repeats[:, None]
    traffic = work[WEIGHT] + work[ACTIVATION] + work[KV]
    roofs = [
        work[FLOPS] / rates.compute_flops_per_s[:, None] * repeats,
        traffic / rates.memory_bytes_per_s[:, None] * repeats,
    ]
    if (table.peers != 1).any():
        sending = work[LINK] / rates.link_bytes_per_s[:, None] + work[MESSAGES] * rates.latency_s[:, None]
        roofs.append(sending * repeats)
    return np.array(roofs)


def under(roofs: Array, sums: Array) -> Array:
    """Return seconds under each roof at every point, shape (n_roofs, n_operators, n_points)."""
    n_roofs, n_operators, n_sums = roofs.shape
    flat = roofs.reshape(n_roofs * n_operators, n_sums) @ sums  # one product of matrices, not a stack of them
    return flat.reshape(n_roofs, n_operators, -1)


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
