"""Products of many experts at once: tiles of the rows that each expert got, weights of those that got any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.efficiency.common import (
    AboveOne,
    Chip,
    Curve,
    NotNegative,
    Positive,
    Share,
    cold_share,
    soft_max,
    waves,
)

ROW_TILES: Final = np.array([16, 32, 64, 128], dtype=float)
COLUMN_TILES: Final = np.array([64, 128, 256], dtype=float)
WARM_SHARPNESS: Final = 8.0


class MoeCurve(Curve):
    """How grouped products of experts use a device.

    Parameters
    ----------
    start_cycles : float
        Start of the kernels: permuting rows, two products, adding up.
    expert_cycles : float
        What each expert on the device adds to it.
    compute_fraction : float
        Matrix rate of endless sums, as a share of the peak.
    ramp_elements : float
        Length of sum that a tile's prologue and epilogue are worth.
    wave_quantisation : float
        Share of whole rounds of tiles.
    balance_flops_per_byte : float
        16-bit peak over the rate at which the L2 feeds the cores.
    bandwidth_fraction : float
        Reached share of the memory bandwidth.
    norm : float
        How sharply the roofs meet.
    activation_passes : float
        Passes over the activations outside the products.
    warm_fraction : float
        Share of the L2 within which a benchmark's weights stay.
    """

    start_cycles: NotNegative = 40000.0
    expert_cycles: NotNegative = 80.0
    compute_fraction: Positive = 0.63
    ramp_elements: NotNegative = 180.0
    wave_quantisation: Share = 0.45
    balance_flops_per_byte: NotNegative = 70.0
    bandwidth_fraction: Positive = 0.81
    norm: AboveOne = 2.5
    activation_passes: NotNegative = 1.0
    warm_fraction: Positive = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Which rows the experts of one device got.

    Parameters
    ----------
    rows : ndarray, shape (...)
        Rows of all its experts together.
    active : ndarray, shape (...)
        Experts that got any.
    tiles : ndarray, shape (..., 4)
        Row tiles over all experts, for each height of `ROW_TILES`.
    """

    rows: Array
    active: Array
    tiles: Array

    @staticmethod
    def balanced(tokens: Quantity, *, top_k: Quantity, experts: Quantity, expert_shares: Quantity = 1.0) -> Routing:
        """Return the routing that gives every expert the same.

        Parameters
        ----------
        tokens, top_k, experts : float or ndarray
            Tokens, experts a token, and experts of the layer.
        expert_shares : float or ndarray
            Devices that the experts are dealt out to; the most loaded one is returned.
        """
        tokens, top_k, experts, shares = np.broadcast_arrays(tokens, top_k, experts, expert_shares)
        local = experts / shares
        rows = np.maximum(tokens * top_k / shares, 1.0)
        active = np.minimum(np.ceil(rows), local)
        tiles = active[..., None] * np.ceil(rows[..., None] / active[..., None] / ROW_TILES)
        return Routing(rows, active, tiles)

    @staticmethod
    def expected(
        tokens: Quantity, *, top_k: int, experts: int, local_experts: float, replicas: int, load: float
    ) -> Routing:
        """Return what is expected of tokens that pick their experts at random, evenly.

        Parameters
        ----------
        tokens : float or ndarray
            Of one replica.
        top_k, experts : int
            Experts a token, and experts of the layer.
        local_experts : float
            Experts on the device.
        replicas : int
            Replicas whose tokens meet there.
        load : float
            Rows of the device over `tokens * top_k`.
        """
        tokens = np.asarray(tokens, dtype=float)
        missed = max(1 - top_k / experts, 0.0) ** np.maximum(tokens * replicas, 1.0)
        rows = np.maximum(tokens * (top_k * load), 1.0)
        active = np.minimum(local_experts * (1 - missed), rows)
        return Routing(rows, active, np.maximum(active[..., None], rows[..., None] / ROW_TILES + active[..., None] / 2))

    @staticmethod
    def of(counts: Array) -> Routing:
        """Return the routing with these rows of each expert, shape (..., experts)."""
        tiles = np.ceil(counts[..., None] / ROW_TILES).sum(axis=-2)
        return Routing(counts.sum(axis=-1), (counts > 0).sum(axis=-1).astype(float), tiles)


def moe_s(
    routing: Routing,
    *,
    hidden: Quantity,
    inter: Quantity,
    local_experts: Quantity,
    matrices: Quantity,
    chip: Chip,
    curve: MoeCurve,
    bytes_per_value: float = 2.0,
    weight_bytes: float | None = None,
    resident: bool = False,
) -> Array:
    """Return the time of the experts of one device [s].

    Parameters
    ----------
    routing : Routing
        Rows of the experts; the time is non-decreasing in rows, active experts and tiles.
    hidden, inter : float or ndarray
        Widths on this device.
    local_experts : float or ndarray
        Experts that it holds.
    matrices : float or ndarray
        3 for gated experts, 2 for plain ones.
    chip : Chip
        The device, at the width of the products.
    curve : MoeCurve
        Fitted parameters.
    bytes_per_value : float
        Width of weights and rows [bytes].
    weight_bytes : float, optional
        Width of one weight where it is another [bytes].
    resident : bool
        Whether a benchmark repeats the products on the same weights; False for a served model.
    """
    hidden, inter, local_experts, matrices = (
        np.asarray(x, dtype=float) for x in (hidden, inter, local_experts, matrices)
    )
    each = bytes_per_value if weight_bytes is None else weight_bytes
    weights = routing.active * matrices * hidden * inter * each
    cold = cold_share(weights, resident * curve.warm_fraction * chip.l2_bytes, WARM_SHARPNESS)
    memory_s_per_byte = 1 / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s)
    first = (matrices - 1) * inter
    share = first / (first + inter)
    products = [(first, hidden, share), (hidden, inter, 1 - share)]
    total = np.zeros(())
    for columns, depth, part in products:
        busy, stream = _tiles_s(
            routing.tiles, columns=columns, depth=depth, chip=chip, curve=curve, widths=(bytes_per_value, each)
        )
        memory = (weights * cold * part * memory_s_per_byte)[..., None, None]
        total = total + soft_max(curve.norm, busy, stream, memory)
    best: Array = total.min(axis=(-2, -1))
    touched = routing.rows * (2 * hidden + matrices * inter) * 2
    start = (curve.start_cycles + local_experts * curve.expert_cycles) / chip.clock_hz
    return start + best + curve.activation_passes * touched * memory_s_per_byte


def _tiles_s(
    row_tiles: Array, *, columns: Array, depth: Array, chip: Chip, curve: MoeCurve, widths: tuple[float, float]
) -> tuple[Array, Array]:
    """Return the time of the matrix units and of the feed for every tile, shape (..., row tiles, column tiles) [s]."""
    tile_m, tile_n = ROW_TILES[:, None], COLUMN_TILES
    wide, deep = columns[..., None, None], depth[..., None, None]
    blocks = row_tiles[..., None] * np.ceil(wide / tile_n)
    busy = waves(blocks, chip.core_count, curve.wave_quantisation) * chip.core_count
    flops = busy * (deep + curve.ramp_elements) * 2 * tile_m * tile_n
    carried = tile_m * widths[0] + tile_n * widths[1]
    stream = busy * carried * deep * curve.balance_flops_per_byte / chip.base_flops_per_s
    return flops / (curve.compute_fraction * chip.peak_flops_per_s), stream
