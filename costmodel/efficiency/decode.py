"""Attention of one new query a sequence with its cache: blocks stream keys and values, split where there are few."""

from __future__ import annotations

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

SPLITS: Final = np.array([1, 2, 4, 8, 16, 32, 64, 128], dtype=float)
LEAST_SLICE: Final = 64.0
"""Fewest keys that a split leaves to one thread block."""
QUERY_TILE: Final = 16
"""Rows of the smallest matrix instruction: fewer query heads in a group waste the rest."""
CORE_BYTES_PER_CYCLE: Final = 64.0
PARTIAL_BYTES: Final = 8.0
WARM_SHARPNESS: Final = 4.0


class DecodeCurve(Curve):
    """How decode attention uses a device.

    Parameters
    ----------
    start_cycles : float
        Start of the kernel and of what the library runs around it.
    stream_fraction : float
        Rate at which one core takes keys and values, as a share of 64 bytes a cycle.
    ramp_tokens : float
        Keys that the start of a thread block's stream is worth.
    wave_quantisation : float
        Share of whole rounds of thread blocks.
    compute_fraction : float
        Matrix rate on padded queries, as a share of the peak.
    bandwidth_fraction : float
        Reached share of the memory bandwidth.
    warm_fraction : float
        Share of the usable L2 within which a benchmark's cache stays.
    norm : float
        How sharply the roofs meet.
    split_cycles : float
        Merging the partial results of a split.
    block_cycles : float
        Start and end of one thread block.
    """

    start_cycles: NotNegative = 11000.0
    stream_fraction: Positive = 0.35
    ramp_tokens: NotNegative = 100.0
    wave_quantisation: Share = 0.6
    compute_fraction: Positive = 0.28
    bandwidth_fraction: Positive = 0.81
    warm_fraction: Positive = 1.0
    norm: AboveOne = 4.5
    split_cycles: NotNegative = 8000.0
    block_cycles: NotNegative = 4000.0


def decode_attention_s(
    context: Quantity,
    *,
    batch: Quantity,
    heads: Quantity,
    kv_heads: Quantity,
    head_dim: Quantity,
    chip: Chip,
    curve: DecodeCurve,
    kv_bytes_per_value: float = 2.0,
    resident: bool = False,
) -> Array:
    """Return the time of one step of attention with the cache [s].

    Parameters
    ----------
    context : float or ndarray
        Keys a sequence; all arguments of the shape broadcast, and the time is non-decreasing in context, batch,
        head_dim and heads, and in kv_heads where heads are as many a group.
    batch, heads, kv_heads, head_dim : float or ndarray
        The rest of the shape.
    chip : Chip
        The device at 16 bits.
    curve : DecodeCurve
        Fitted parameters.
    kv_bytes_per_value : float
        Width of the cache [bytes].
    resident : bool
        Whether a benchmark repeats the step on one cache; False for a served model, whose layers' caches take turns.

    Returns
    -------
    ndarray
        See `step_attention_s`.

    References
    ----------
    .. [1] T. Dao et al., "Flash-Decoding for long-context inference", 2023: splits of the keys and their merge.
    """
    dims = np.asarray(head_dim, dtype=float)
    return step_attention_s(
        context,
        batch,
        heads=heads,
        kv_heads=kv_heads,
        pair_width=2 * dims,
        key_bytes=2 * dims * kv_bytes_per_value,
        chip=chip,
        curve=curve,
        resident=resident,
    )


def step_attention_s(
    context: Quantity,
    batch: Quantity,
    *,
    heads: Quantity,
    kv_heads: Quantity,
    pair_width: Quantity,
    key_bytes: Quantity,
    chip: Chip,
    curve: DecodeCurve,
    resident: bool = False,
) -> Array:
    """Return the time of one step of attention with a cache of any form [s].

    Parameters
    ----------
    context, batch : float or ndarray
        Keys a sequence, and sequences; they broadcast.
    heads, kv_heads : float or ndarray
        Heads of one device.
    pair_width : float or ndarray
        Widths of a query and of a value together.
    key_bytes : float or ndarray
        One key and its value in the cache, of one head [bytes].
    chip, curve, resident
        As in `decode_attention_s`.
    """
    arrays = np.broadcast_arrays(context, batch, heads, kv_heads, pair_width, key_bytes)
    length, b, h, hk, pair, key = (np.asarray(x, dtype=float)[..., None] for x in arrays)
    keys = np.ceil(np.maximum(length / SPLITS, np.where(SPLITS > 1, LEAST_SLICE, 0.0))) + curve.ramp_tokens
    rounds = waves(b * hk * SPLITS, chip.core_count, curve.wave_quantisation)
    core_bytes_per_s = CORE_BYTES_PER_CYCLE * chip.clock_hz * curve.stream_fraction
    stream = rounds * keys * key / core_bytes_per_s
    padded = QUERY_TILE * np.ceil(h / hk / QUERY_TILE)
    flops = rounds * keys * 2 * pair * padded * chip.core_count
    compute = flops / (curve.compute_fraction * chip.peak_flops_per_s)
    traffic = b * length * hk * key
    cold = cold_share(traffic, resident * curve.warm_fraction * chip.usable_l2_bytes, WARM_SHARPNESS)
    memory = traffic * cold / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s)
    merge = curve.split_cycles / chip.clock_hz
    merge = merge + PARTIAL_BYTES * b * h * (pair / 2) * SPLITS / (core_bytes_per_s * chip.core_count)
    starts = rounds * curve.block_cycles / chip.clock_hz
    total = soft_max(curve.norm, stream, compute, memory) + starts + np.where(SPLITS > 1, merge, 0.0)
    best: Array = total.min(axis=-1)
    return curve.start_cycles / chip.clock_hz + best
