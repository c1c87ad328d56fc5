"""Attention over whole sequences: causal prefill, and the encoder's without a mask.

Thread blocks own a tile of queries of one head and walk over the keys that it reaches, 64 at a time.
"""

from __future__ import annotations

from typing import Final, NamedTuple

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
    droop,
    soft_max,
    waves,
)

KEY_TILE: Final = 64
WARM_SHARE: Final = 0.5
"""Share of the usable L2 within which a benchmark's inputs stay."""
WARM_SHARPNESS: Final = 4.0
ANCHORS: Final = (64.0, 128.0, 256.0)


class Tiling(NamedTuple):
    """How a kernel cuts attention.

    Parameters
    ----------
    query_tiles : tuple of int
        Rows of queries a thread block may own; the best is taken.
    packed : bool
        Whether the query heads that share keys fill one tile together.
    pad : int
        What head_dim is rounded up to.
    """

    query_tiles: tuple[int, ...] = (64, 128)
    packed: bool = False
    pad: int = 16


class AttentionCurve(Curve):
    """How attention over whole sequences uses a device.

    Parameters
    ----------
    start_cycles : float
        Start of the kernel and of what the library runs around it.
    compute_64_fraction, compute_128_fraction, compute_256_fraction : float
        Matrix rate of long sequences at these head_dims, as a share of the peak.
    droop_fraction : float
        Slow-down of a kernel much longer than 2 ms.
    wave_quantisation : float
        Share of whole rounds of thread blocks.
    balance_flops_per_byte : float
        16-bit peak over the rate at which the L2 feeds the cores.
    bandwidth_fraction : float
        Reached share of the memory bandwidth; above one where the benchmark's inputs stay in the L2.
    norm : float
        How sharply the roofs meet.
    serial_passes : float
        Passes over queries, keys, values and outputs before or after the kernel.
    block_cycles : float
        Start and end of one thread block.
    """

    start_cycles: NotNegative = 15000.0
    compute_64_fraction: Positive = 0.53
    compute_128_fraction: Positive = 0.66
    compute_256_fraction: Positive = 0.68
    droop_fraction: NotNegative = 0.06
    wave_quantisation: Share = 0.7
    balance_flops_per_byte: NotNegative = 70.0
    bandwidth_fraction: Positive = 0.9
    norm: AboveOne = 2.5
    serial_passes: NotNegative = 0.8
    block_cycles: NotNegative = 1200.0

    def cycles_a_value(self, head_dim: Quantity, pad: int) -> Quantity:
        """Return padded head_dim over the reached share of the peak: the work of one query-key pair.

        Between the anchors it is interpolated in logarithms; it never falls with head_dim, as work does not.
        """
        wide = np.ceil(np.asarray(head_dim) / pad) * pad
        shares = (self.compute_64_fraction, self.compute_128_fraction, self.compute_256_fraction)
        costs = np.log(np.maximum.accumulate([d / share for d, share in zip(ANCHORS, shares, strict=True)]))
        inside = np.exp(np.interp(np.log(wide), np.log(ANCHORS), costs))
        outside = np.where(wide < ANCHORS[0], wide / ANCHORS[0], np.maximum(wide / ANCHORS[-1], 1.0))
        result: Quantity = inside * outside
        return result


def attention_s(
    queries: Quantity,
    *,
    batch: Quantity,
    heads: Quantity,
    kv_heads: Quantity,
    head_dim: Quantity,
    causal: bool,
    chip: Chip,
    curve: AttentionCurve,
    tiling: Tiling,
    resident_share: float = 0.0,
) -> Array:
    """Return the time of attention of sequences with themselves at 16 bits [s].

    Parameters
    ----------
    queries : float or ndarray
        Length of a sequence; all arguments of the shape broadcast, and the time is non-decreasing in each of them
        (in kv_heads only where heads of one group are not packed).
    batch, heads, kv_heads, head_dim : float or ndarray
        The rest of the shape.
    causal : bool
        Whether a query sees only keys before it.
    chip : Chip
        The device at 16 bits.
    curve : AttentionCurve
        Fitted parameters.
    tiling : Tiling
        How the kernel library cuts the work.
    resident_share : float
        Share of the usable L2 in which a benchmark finds its inputs; 0 for a served model.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2", ICLR 2024, section 3: tiles of queries, partition over thread blocks.
    """
    arrays = np.broadcast_arrays(queries, batch, heads, kv_heads, head_dim)
    s, b, h, hk, d = (np.asarray(x, dtype=float)[..., None] for x in arrays)
    tile = np.array(tiling.query_tiles, dtype=float)
    group, owners = (h / hk, hk) if tiling.packed else (np.ones_like(h), h)
    tiles = np.ceil(s * group / tile)
    blocks = b * owners * tiles
    walked = _walked(s, tiles, tile / group, causal=causal)
    rounds = blocks / chip.core_count
    q = curve.wave_quantisation
    longest = np.ceil(s / KEY_TILE)
    steps = (1 - q) * np.maximum(rounds * walked, longest) + q * np.maximum(np.ceil(rounds) * walked, longest)
    per_step = 4 * tile * KEY_TILE * curve.cycles_a_value(d, tiling.pad)
    compute = droop(steps * per_step * chip.core_count / chip.peak_flops_per_s, curve.droop_fraction)
    feed_s_per_byte = curve.balance_flops_per_byte / chip.base_flops_per_s
    wide = np.ceil(d / tiling.pad) * tiling.pad
    stream = steps * KEY_TILE * wide * 4 * feed_s_per_byte * chip.core_count
    traffic = 4 * b * s * d * (h + hk)
    cold = cold_share(traffic, resident_share * WARM_SHARE * chip.usable_l2_bytes, WARM_SHARPNESS)
    memory_s_per_byte = 1 / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s)
    memory = traffic * np.maximum(cold * memory_s_per_byte, feed_s_per_byte)
    starts = waves(blocks, chip.core_count, q) * curve.block_cycles / chip.clock_hz
    best = (soft_max(curve.norm, compute, stream, memory) + starts).min(axis=-1)
    serial: Array = traffic[..., 0] * curve.serial_passes * memory_s_per_byte
    total_s: Array = curve.start_cycles / chip.clock_hz + best + serial
    return total_s


def _walked(length: Array, tiles: Array, reach: Array, *, causal: bool) -> Array:
    """Return the mean number of key tiles that a thread block walks over, in closed form.

    Tile number i of a causal head reaches `i * reach` keys and the last one all; the sum of their rounded-up key tiles
    over a period is that of the keys, plus half of what rounding adds.
    """
    all_keys = np.ceil(length / KEY_TILE)
    if not causal:
        return np.broadcast_to(all_keys, tiles.shape)
    pitch = reach / KEY_TILE
    rounding = (1 - np.minimum(pitch, 1.0)) / 2
    total = pitch * tiles * (tiles - 1) / 2 + rounding * (tiles - 1) + all_keys
    result: Array = np.minimum(np.maximum(total / tiles, 1.0), all_keys)
    return result
