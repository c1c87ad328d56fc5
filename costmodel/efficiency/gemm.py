"""Dense matrix products: tiles in waves, three roofs, a split sum for few tiles, and the start of the kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array, Quantity
from costmodel.efficiency.common import (
    AboveOne,
    Chip,
    Curve,
    NotNegative,
    Positive,
    Share,
    cold_share,
    droop,
    soft_max,
    waves,
)

TILES: Final = np.array(
    [(16, 64), (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128)], dtype=float
)
SPLITS: Final = np.array([1, 2, 3, 4, 6, 8, 12, 16, 32], dtype=float)
LEAST_SLICE: Final = 64.0
"""Shortest sum that a split leaves to one thread block."""
MOST_ROUNDS: Final = 2.0
"""A sum is split only where its blocks then need no more rounds than this."""
PARTIAL_BYTES: Final = 8.0
"""Written and read again for one partial sum of a split [bytes]."""
RESIDENCY_SHARPNESS: Final = 8.0
QUANTISED_BYTES: Final = 3.0
"""Read at 16 bits and written at 8, for one value that is quantised before a product [bytes]."""


class GemmCurve(Curve):
    """How dense products use a device.

    Parameters
    ----------
    start_cycles : float
        Start of the kernel, and of the quantisation before it at 8 bits.
    compute_fraction : float
        Matrix rate of an endless sum, as a share of the peak: an asymptote that the other terms keep away.
    droop_fraction : float
        Slow-down of a kernel much longer than 2 ms.
    ramp_elements : float
        Length of sum that a tile's prologue and epilogue are worth.
    wave_quantisation : float
        Share of whole rounds of tiles, the rest being the average.
    balance_flops_per_byte : float
        16-bit peak over the rate at which the L2 feeds the cores.
    bandwidth_fraction : float
        Reached share of the memory bandwidth.
    norm : float
        How sharply the roofs meet.
    split_cycles : float
        Adding up the partial sums of a split.
    quantise_passes : float
        Passes over an 8-bit product's inputs that quantise them; 0 at 16 bits.
    """

    start_cycles: NotNegative = 5560.0
    compute_fraction: Positive = 0.919
    droop_fraction: NotNegative = 0.223
    ramp_elements: NotNegative = 188.0
    wave_quantisation: Share = 0.57
    balance_flops_per_byte: NotNegative = 70.7
    bandwidth_fraction: Positive = 0.80
    norm: AboveOne = 5.5
    split_cycles: NotNegative = 4650.0
    quantise_passes: NotNegative = 0.0


def gemm_s(
    rows: Quantity,
    *,
    d_in: Quantity,
    d_out: Quantity,
    chip: Chip,
    curve: GemmCurve,
    bytes_per_value: float = 2.0,
    weight_bytes: float | None = None,
    output_bytes: float = 2.0,
    resident_share: float = 0.0,
) -> Array:
    """Return the time of dense products, the best tile and split of each [s].

    Parameters
    ----------
    rows, d_in, d_out : float or ndarray
        Shape; they broadcast. The time is non-decreasing in each: every candidate's is (a split sum too short for it
        is charged as if it were long enough), and so is the lowest of them.
    chip : Chip
        The device, at the width of the product.
    curve : GemmCurve
        Fitted parameters.
    bytes_per_value, output_bytes : float
        Width of operands and of the output [bytes].
    weight_bytes : float, optional
        Width of one weight where it is another [bytes].
    resident_share : float
        Share of the L2 that a benchmark finds filled with its own operands; 0 for a served model, whose weights never
        stay.

    References
    ----------
    .. [1] S. Williams et al., "Roofline", Commun. ACM 52(4), 2009.
    .. [2] NVIDIA, "Matrix Multiplication Background User's Guide", tile and wave quantisation.
    """
    widths = (bytes_per_value, weight_bytes or bytes_per_value, output_bytes)
    shape = Product.of((rows, d_in, d_out), widths)
    resident_bytes = resident_share * chip.l2_bytes
    best = _best_s(shape, SPLITS[:1], chip, curve, resident_bytes)
    few = np.ceil(shape.m / TILES[:, 0].max()) * np.ceil(shape.n / TILES[:, 1].max()) * SPLITS[1]
    may_split = few <= MOST_ROUNDS * chip.core_count
    if may_split.any():
        split = _best_s(shape.only(may_split), SPLITS[1:], chip, curve, resident_bytes)
        best[may_split] = np.minimum(best[may_split], split)
    quantising = curve.quantise_passes * QUANTISED_BYTES * shape.m * shape.k
    memory_s_per_byte = 1 / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s)
    total_s: Array = curve.start_cycles / chip.clock_hz + best + quantising * memory_s_per_byte
    return total_s.reshape(shape.form)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Products, flattened.

    Parameters
    ----------
    m, k, n : ndarray, shape (n_products,)
        Their shapes.
    row_bytes, weight_bytes, output_bytes : float
        Width of a value of the input, the weight and the output [bytes].
    form : tuple of int
        Shape of the arrays that they came in.
    """

    m: Array
    k: Array
    n: Array
    row_bytes: float
    weight_bytes: float
    output_bytes: float
    form: tuple[int, ...]

    @staticmethod
    def of(sides: tuple[Quantity, Quantity, Quantity], widths: tuple[float, float, float]) -> Product:
        """Broadcast and flatten rows, d_in and d_out."""
        arrays = np.broadcast_arrays(*(np.asarray(side, dtype=float) for side in sides))
        m, k, n = (array.ravel() for array in arrays)
        return Product(m, k, n, *widths, form=arrays[0].shape)

    def only(self, chosen: NDArray[np.bool_]) -> Product:
        """Return some of them."""
        return replace(self, m=self.m[chosen], k=self.k[chosen], n=self.n[chosen])

    @property
    def traffic_bytes(self) -> Array:
        """Operands read and output written once."""
        operands = self.m * self.k * self.row_bytes + self.k * self.n * self.weight_bytes
        return operands + self.m * self.n * self.output_bytes


def _best_s(shape: Product, splits: Array, chip: Chip, curve: GemmCurve, resident_bytes: float) -> Array:
    """Return the time of products under their best tile and split, without the start of the kernel [s]."""
    m, k, n = (x[:, None, None] for x in (shape.m, shape.k, shape.n))
    tile_m, tile_n = TILES[:, 0, None], TILES[:, 1, None]
    rounds = np.ceil(m / tile_m) * np.ceil(n / tile_n) * splits
    depth = np.maximum(k / splits, np.where(splits > 1, LEAST_SLICE, 0.0))
    busy = waves(rounds, chip.core_count, curve.wave_quantisation) * chip.core_count
    flops = busy * (depth + curve.ramp_elements) * (2 * tile_m * tile_n)
    compute = droop(flops / (curve.compute_fraction * chip.peak_flops_per_s), curve.droop_fraction)
    feed_s_per_byte = curve.balance_flops_per_byte / chip.base_flops_per_s
    stream = busy * depth * ((tile_m * shape.row_bytes + tile_n * shape.weight_bytes) * feed_s_per_byte)
    traffic = shape.traffic_bytes
    cold = cold_share(traffic, resident_bytes, RESIDENCY_SHARPNESS)
    memory = traffic * cold / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s)
    total = soft_max(curve.norm, compute, stream, memory[:, None, None])
    if splits[-1] > 1:
        total = total + curve.split_cycles / chip.clock_hz + PARTIAL_BYTES * splits * m * n * feed_s_per_byte
        total = np.where(rounds > MOST_ROUNDS * chip.core_count, np.inf, total)
    best: Array = total.min(axis=(-2, -1))
    return best
