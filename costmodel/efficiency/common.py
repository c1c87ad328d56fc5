"""What the curves share: the device as they see it, waves of thread blocks, residency in the cache, soft maxima.

Constants are in clock cycles, FLOP per byte and fractions, because those nearly coincide between devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from pydantic import Field

from costmodel.base import Array, Frozen, Quantity
from costmodel.hardware import HardwareProfile

NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
AboveOne = Annotated[float, Field(ge=1)]

SHORTEST_S: Final = 1e-30
"""No time is shorter; keeps zero over zero away [s]."""
DROOP_S: Final = 2e-3
"""Length of a kernel at which half of the power droop has set in [s]."""
PARTITIONED: Final = frozenset({"ampere", "hopper"})
PARTITIONED_BANDWIDTH: Final = 1.2e12
"""Data-centre devices of these generations, with stacked memory, cut their L2 in two halves [byte/s]."""


@dataclass(frozen=True, slots=True)
class Chip:
    """A device as the curves see it, for products of one width.

    Parameters
    ----------
    core_count : int
        Multiprocessors that thread blocks are dealt out to.
    clock_hz : float
        Their clock.
    peak_flops_per_s, base_flops_per_s : float
        Matrix rate at the width, and at 16 bits, to which the feed of the cores is proportional.
    bandwidth_bytes_per_s : float
        Of device memory.
    l2_bytes, usable_l2_bytes : float
        The cache, and what of it one core sees at full speed.
    """

    core_count: int
    clock_hz: float
    peak_flops_per_s: float
    base_flops_per_s: float
    bandwidth_bytes_per_s: float
    l2_bytes: float
    usable_l2_bytes: float

    @staticmethod
    def of(hardware: HardwareProfile, bits: int = 16) -> Chip:
        """Return a device for products of this width [bits]."""
        stacked = hardware.memory_bandwidth_bytes_per_s > PARTITIONED_BANDWIDTH
        halves = 2 if hardware.generation in PARTITIONED and stacked else 1
        peaks = hardware.peak_flops_per_s
        return Chip(
            core_count=hardware.core_count,
            clock_hz=hardware.clock_hz,
            peak_flops_per_s=peaks[hardware.precision(bits)],
            base_flops_per_s=peaks[hardware.precision(16)],
            bandwidth_bytes_per_s=hardware.memory_bandwidth_bytes_per_s,
            l2_bytes=hardware.l2_bytes,
            usable_l2_bytes=hardware.l2_bytes / halves,
        )


class Curve(Frozen):
    """Parameters of one curve; a field's default is its prior, the value that the four measured devices share."""


def waves(blocks: Quantity, core_count: int, quantisation: float) -> Array:
    """Return the rounds that cores need for thread blocks: between the average and whole rounds.

    Parameters
    ----------
    blocks : float or ndarray
        Thread blocks; non-decreasing in them.
    core_count : int
        Cores that run one each.
    quantisation : float
        0 takes the average, but at least one round; 1 takes whole rounds.
    """
    rounds = np.asarray(blocks) / core_count
    result: Array = (1 - quantisation) * np.maximum(rounds, 1.0) + quantisation * np.ceil(rounds)
    return result


class Scalars:
    """The functions of NumPy that formulas need, for single numbers: many times faster than arrays of one."""

    maximum = staticmethod(max)
    minimum = staticmethod(min)
    ceil = staticmethod(math.ceil)
    power = staticmethod(pow)


def soft_max(norm: float, *terms: Any, xp: Any = np) -> Any:  # noqa: ANN401 - numbers or arrays alike
    """Return the p-norm of times [s]: their maximum for a large norm, their sum for a norm of one.

    Parameters
    ----------
    norm : float
        How sharply they meet.
    *terms : float or ndarray
        Times; they broadcast.
    xp : module or Scalars
        NumPy, or `Scalars` where all terms are single numbers.
    """
    highest = terms[0]
    for term in terms[1:]:
        highest = xp.maximum(highest, term)
    scale = xp.maximum(highest, SHORTEST_S)
    total = xp.power(terms[0] / scale, norm)
    for term in terms[1:]:
        total = total + xp.power(term / scale, norm)
    return highest * xp.power(xp.maximum(total, 1.0), 1 / norm)


def droop(time_s: Quantity, strength: float) -> Quantity:
    """Return a time under the clock that a long kernel is left with at the power limit [s]; increasing in it."""
    result: Quantity = time_s * (1 + strength * time_s / (time_s + DROOP_S))
    return result


def cold_share(traffic_bytes: Quantity, resident_bytes: float, sharpness: float) -> Quantity:
    """Return the share of traffic that comes from device memory, because the cache has not kept it.

    Parameters
    ----------
    traffic_bytes : float or ndarray
        What one pass touches [bytes]; traffic times share is increasing in it.
    resident_bytes : float
        What a repeated pass finds again [bytes]; 0 when nothing is kept, as in a served model.
    sharpness : float
        Exponent of the step.
    """
    if resident_bytes <= 0:
        return np.ones_like(traffic_bytes, dtype=float)
    step = (np.asarray(traffic_bytes) / resident_bytes) ** sharpness
    result: Quantity = step / (1 + step)
    return result
