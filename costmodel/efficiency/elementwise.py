"""Operators that only move data: a start, then bytes at the speed of the L2 or of device memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.efficiency.common import AboveOne, Chip, Curve, NotNegative, Positive, cold_share, soft_max

WARM_SHARPNESS = 4.0
CORE_BYTES_PER_CYCLE: Final = 64.0


class ElementwiseCurve(Curve):
    """How norms, activations, rotations, additions and look-ups use a device.

    Parameters
    ----------
    start_cycles : float
        Start of the kernel.
    bandwidth_fraction : float
        Reached share of the memory bandwidth.
    cache_fraction : float
        Rate of the L2 over the memory bandwidth.
    warm_fraction : float
        Share of the usable L2 within which a benchmark's values stay.
    norm : float
        How sharply start and transfer meet: 1 adds them.
    core_bytes_per_cycle : float
        What one core moves a cycle, which bounds devices with much bandwidth for their cores; a device alone does not
        tell it from the share of the bandwidth, so it is then left at what a core takes from the L2 at most.
    """

    start_cycles: NotNegative = 6000.0
    bandwidth_fraction: Positive = 0.8
    cache_fraction: Positive = 2.5
    warm_fraction: Positive = 0.5
    norm: AboveOne = 1.5
    core_bytes_per_cycle: Positive = CORE_BYTES_PER_CYCLE


def elementwise_s(traffic_bytes: Quantity, *, chip: Chip, curve: ElementwiseCurve, resident: bool = False) -> Array:
    """Return the time of operators that read and write this much once [s].

    Parameters
    ----------
    traffic_bytes : float or ndarray
        Bytes read and written; the time is non-decreasing in them.
    chip : Chip
        The device.
    curve : ElementwiseCurve
        Fitted parameters.
    resident : bool
        Whether a benchmark repeats the operator on the same values; False for a served model.
    """
    traffic = np.asarray(traffic_bytes, dtype=float)
    cold = cold_share(traffic, resident * curve.warm_fraction * chip.usable_l2_bytes, WARM_SHARPNESS)
    memory = traffic * cold / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s)
    cache = traffic / (curve.cache_fraction * chip.bandwidth_bytes_per_s)
    cores = traffic / (curve.core_bytes_per_cycle * chip.core_count * chip.clock_hz)
    moved = np.maximum(np.maximum(memory, cache), cores)
    total_s: Array = soft_max(curve.norm, np.asarray(curve.start_cycles / chip.clock_hz), moved)
    return total_s
