"""Dense products on a CPU: few rows pass over the weight again and again, many rows share one that is packed first.

Libraries for CPUs have two ways. One takes a few rows at a time and streams the weight from memory for each of them;
the other copies the weight into the order in which its kernel reads it, which costs as much as some more rows would,
and then runs at the matrix rate. The curve takes the faster way.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.efficiency.common import AboveOne, Chip, Curve, NotNegative, Positive, cold_share, soft_max

WARM_SHARPNESS: Final = 4.0
"""As of element-wise operators."""


class CpuGemmCurve(Curve):
    """How dense products use a CPU. The defaults are guesses from one Xeon core; a fit starts there.

    Parameters
    ----------
    start_cycles : float
        Call of the library.
    compute_fraction : float
        Rate of a long product over a packed weight, as a share of the peak.
    pack_rows : float
        Rows that packing the weight is worth.
    pass_rows : float
        Rows that one pass over an unpacked weight serves; whole passes are made.
    bandwidth_fraction : float
        Reached share of the memory bandwidth.
    cache_fraction : float
        Rate of the last cache over that of memory.
    warm_fraction : float
        Share of the last cache within which a benchmark's operands stay.
    norm : float
        How sharply matrix work and traffic of a packed product meet.
    """

    start_cycles: NotNegative = 5000.0
    compute_fraction: Positive = 0.95
    pack_rows: NotNegative = 30.0
    pass_rows: AboveOne = 3.0
    bandwidth_fraction: Positive = 0.95
    cache_fraction: AboveOne = 1.6
    warm_fraction: Positive = 0.8
    norm: AboveOne = 2.0


def cpu_gemm_s(
    rows: Quantity,
    *,
    d_in: Quantity,
    d_out: Quantity,
    chip: Chip,
    curve: CpuGemmCurve,
    bytes_per_value: float = 4.0,
    weight_bytes: float | None = None,
    turns: Quantity = 0,
) -> Array:
    """Return the time of dense products on a CPU, the faster of two ways [s].

    Parameters
    ----------
    rows, d_in, d_out : float or ndarray
        Shape; they broadcast. The time is non-decreasing in each, because both ways are.
    chip : Chip
        The device, at the width of the product.
    curve : CpuGemmCurve
        Fitted parameters.
    bytes_per_value : float
        Width of operands and of the output [bytes].
    weight_bytes : float, optional
        Width of one weight where it is another [bytes].
    turns : int or ndarray
        Weights that take turns in a benchmark, one where it repeats the product on the same; 0 for a model, whose
        weights never stay.

    References
    ----------
    .. [1] K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008:
       packing, and why it pays for many rows alone.
    """
    m, k, n = (np.asarray(side, dtype=float) for side in (rows, d_in, d_out))
    weight = k * n * (weight_bytes or bytes_per_value)
    values = m * (k + n) * bytes_per_value
    again = np.asarray(turns, dtype=float) * (weight + values)
    cold = np.where(again > 0, cold_share(again, curve.warm_fraction * chip.l2_bytes, WARM_SHARPNESS), 1.0)
    s_per_byte = (cold + (1 - cold) / curve.cache_fraction) / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s)
    flops_per_s = curve.compute_fraction * chip.peak_flops_per_s
    streamed = np.ceil(m / curve.pass_rows) * weight + values
    unpacked = np.maximum(streamed * s_per_byte, 2 * m * k * n / flops_per_s)
    packed = soft_max(curve.norm, 2 * (m + curve.pack_rows) * k * n / flops_per_s, (weight + values) * s_per_byte)
    total_s: Array = curve.start_cycles / chip.clock_hz + np.minimum(unpacked, packed)
    return total_s
