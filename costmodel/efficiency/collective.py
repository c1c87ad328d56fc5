"""Collectives between the devices of a node: steps of latency, bytes over the link, and the better of the protocols."""

from __future__ import annotations

from typing import Final

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.efficiency.common import Curve, NotNegative, Positive
from costmodel.hardware import HardwareProfile, Link

SWITCH_REDUCES: Final = frozenset({"hopper"})
"""Generations whose switches add up by themselves (NVLink SHARP of the third NVSwitch)."""


class NcclCurve(Curve):
    """How ring collectives of NCCL use a link.

    Parameters
    ----------
    quick_start_s : float
        Time of an empty message under the protocol for short messages.
    bulk_extra_s : float
        What the protocol for long messages takes more.
    step_s : float
        Latency of one step around the ring.
    quick_fraction, bulk_fraction : float
        Reached share of one direction's bandwidth under each.
    crowding : float
        Exponent with which the bandwidth falls beyond two ranks: 0 on a switch, above one through sockets of a host.
    switch_start_s, switch_fraction : float
        The same of the reduction inside the switch, where there is one.
    """

    quick_start_s: Positive = 5e-6
    bulk_extra_s: Positive = 18e-6
    step_s: Positive = 2e-6
    quick_fraction: Positive = 0.33
    bulk_fraction: Positive = 0.66
    crowding: NotNegative = 0.05
    switch_start_s: Positive = 70e-6
    switch_fraction: Positive = 0.66


class CustomCurve(Curve):
    """How all-reduces inside one kernel use a link; long messages and ranks that it cannot join are left to NCCL.

    Parameters
    ----------
    one_shot_start_s : float
        Time of an empty message where each rank reads all others.
    two_shot_extra_s : float
        What a reduction followed by a gathering takes more.
    step_s : float
        Latency of one more rank.
    one_shot_fraction, two_shot_fraction : float
        Reached share of one direction's bandwidth.
    """

    one_shot_start_s: Positive = 4e-6
    two_shot_extra_s: Positive = 4e-6
    step_s: Positive = 0.2e-6
    one_shot_fraction: Positive = 0.6
    two_shot_fraction: Positive = 0.6


def switch_reduces(hardware: HardwareProfile, link: Link) -> bool:
    """Return whether the switch between devices adds up all-reduces by itself."""
    return link.topology == "switch" and hardware.generation in SWITCH_REDUCES


def nccl_s(
    message_bytes: Quantity,
    *,
    ranks: Quantity,
    rounds: float,
    link_bytes_per_s: float,
    curve: NcclCurve,
    switch_reduces: bool = False,
) -> Array:
    """Return the time of a collective around a ring [s].

    Parameters
    ----------
    message_bytes : float or ndarray
        The whole buffer of one rank; the time is non-decreasing in it.
    ranks : float or ndarray
        Devices that take part.
    rounds : float
        2 for an all-reduce (reduce-scatter, then all-gather), 1 for each half and for an all-to-all.
    link_bytes_per_s : float
        One direction of one device.
    curve : NcclCurve
        Fitted parameters.
    switch_reduces : bool
        Whether the switch adds up by itself (NVLink SHARP), which four ranks and more use.

    References
    ----------
    .. [1] P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms", J. Parallel Distrib. Comput. 69, 2009.
    """
    size, n = np.broadcast_arrays(np.asarray(message_bytes, dtype=float), ranks)
    rate = link_bytes_per_s * (n / 2) ** -curve.crowding
    carried = rounds * (n - 1) / n * size
    steps = curve.step_s * (n - 1)
    quick = curve.quick_start_s + steps + carried / (curve.quick_fraction * rate)
    bulk = curve.quick_start_s + curve.bulk_extra_s + steps + carried / (curve.bulk_fraction * rate)
    best: Array = np.minimum(quick, bulk)
    if switch_reduces:
        switch = curve.switch_start_s + (1 + 1 / n) * size / (curve.switch_fraction * link_bytes_per_s)
        best = np.where(n > 2, np.minimum(best, switch), best)  # noqa: PLR2004 - two ranks have nothing to add up
    return best


def custom_all_reduce_s(
    message_bytes: Quantity,
    *,
    ranks: Quantity,
    link_bytes_per_s: float,
    curve: CustomCurve,
    ring_s: Quantity,
    most_ranks: int,
) -> Array:
    """Return the time of an all-reduce of a serving library inside a CUDA graph [s].

    Parameters
    ----------
    message_bytes : float or ndarray
        Buffer of one rank; the time is non-decreasing in it.
    ranks : float or ndarray
        Devices that take part.
    link_bytes_per_s : float
        One direction of one device.
    curve : CustomCurve
        Fitted parameters.
    ring_s : float or ndarray
        What NCCL takes for the same message [s]; see `nccl_s`.
    most_ranks : int
        Ranks that the kernel joins: all on a switch, two where peers talk through the host. More are left to NCCL.
    """
    size, n = np.broadcast_arrays(np.asarray(message_bytes, dtype=float), ranks)
    start = curve.one_shot_start_s + curve.step_s * (n - 1)
    one = start + (n - 1) * size / (curve.one_shot_fraction * link_bytes_per_s)
    two = start + curve.two_shot_extra_s + 2 * (n - 1) / n * size / (curve.two_shot_fraction * link_bytes_per_s)
    kernel = np.where(n <= most_ranks, np.minimum(one, two), np.inf)
    best: Array = np.minimum(kernel, ring_s)
    return best
