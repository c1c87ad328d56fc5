"""Attention over whole sequences: causal prefill, and the encoder's without a mask.

Thread blocks own a tile of queries of one head and walk over the keys that it reaches, 64 at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.efficiency.attention_curve import AttentionCurve, Tiling
from costmodel.efficiency.common import Chip, Scalars, cold_share, droop, soft_max

KEY_TILE: Final = 64
BYTES: Final = 2.0
"""Of a query, a key, a value or an output at 16 bits."""
WARM_SHARE: Final = 0.5
"""Share of the usable L2 within which a benchmark's inputs stay."""
WARM_SHARPNESS: Final = 4.0


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
    """
    lengths, dims = np.asarray(queries, dtype=float), np.asarray(head_dim, dtype=float)
    kernel = AttentionKernel.of(
        heads=np.asarray(heads, dtype=float),
        kv_heads=np.asarray(kv_heads, dtype=float),
        pair_width=2 * dims,
        key_bytes=2 * BYTES * dims,
        causal=causal,
        chip=chip,
        curve=curve,
        tiling=tiling,
        resident_share=resident_share,
    )
    return kernel.time_s(Chunks(lengths, np.asarray(batch, dtype=float), lengths))


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """Sequences of which each brings new queries to keys that are there, its own included.

    Parameters
    ----------
    queries, sequences, keys : ndarray
        New tokens a sequence, sequences, and keys a sequence; they broadcast.
    """

    queries: Array
    sequences: Array
    keys: Array

    @staticmethod
    def of(rows: Array, pairs: Array, keys: Array, *, causal: bool) -> Chunks:
        """Return the equal sequences whose rows, query-key pairs and keys these are in sum.

        A causal query sees all keys before its sequence's new ones and half of those; with n new tokens behind p old
        ones, pairs are n (p + (n + 1) / 2) and keys p + n a sequence. Others see all keys.
        """
        return Chunks(*equal_sequences(rows, pairs, keys, causal=causal, xp=np))


def equal_sequences(rows: Any, pairs: Any, keys: Any, *, causal: bool, xp: Any) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """Return queries, number and keys of the equal sequences of `Chunks.of`; numbers or arrays alike."""
    rows = xp.maximum(rows, 1.0)
    reach = xp.maximum(pairs / rows, 1.0)
    if not causal:
        new = xp.minimum(rows * reach / xp.maximum(keys, reach), rows)
        return new, rows / new, reach
    ratio = xp.maximum(keys / rows, 1.0)
    new = xp.minimum(xp.maximum((reach - 0.5) / (ratio - 0.5), 1.0), rows)
    return new, rows / new, ratio * new


@dataclass(frozen=True, slots=True, eq=False)
class AttentionKernel:
    """Attention of one shape, or several, on a device, with all that does not depend on its sequences worked out.

    Parameters
    ----------
    curve : AttentionCurve
        Fitted parameters.
    core_count : int
        Of the device.
    causal : bool
        Whether a query sees only keys before it.
    tile, reach : ndarray, shape (..., n_tiles)
        Rows of a tile, and the queries of a sequence that it covers.
    owners : ndarray, shape (..., 1)
        Thread blocks that share the tiles of a sequence: one a head, or one a group where its heads are packed.
    compute_s, stream_s : ndarray, shape (..., n_tiles)
        Matrix work, and feed of the cores, of one step over a tile of keys on every core [s].
    query_bytes, sequence_key_bytes : ndarray, shape (..., 1)
        A query with its output, and a key with its value, of all heads [bytes].
    memory_s_per_byte, feed_s_per_byte, resident_bytes, block_s, start_s : float
        Of device memory, of the L2, what a benchmark keeps there, and starts of thread blocks and kernel.
    """

    curve: AttentionCurve
    core_count: int
    causal: bool
    tile: Array
    reach: Array
    owners: Array
    compute_s: Array
    stream_s: Array
    query_bytes: Array
    sequence_key_bytes: Array
    memory_s_per_byte: float
    feed_s_per_byte: float
    resident_bytes: float
    block_s: float
    start_s: float

    @staticmethod
    def of(
        *,
        heads: Array,
        kv_heads: Array,
        pair_width: Array,
        key_bytes: Array,
        causal: bool,
        chip: Chip,
        curve: AttentionCurve,
        tiling: Tiling,
        resident_share: float = 0.0,
    ) -> AttentionKernel:
        """Work out what depends on the shape alone.

        Parameters
        ----------
        heads, kv_heads : ndarray
            Heads of one device.
        pair_width : ndarray
            Widths of a query and of a value together.
        key_bytes : ndarray
            One key and its value [bytes].
        causal, chip, curve, tiling, resident_share
            As in `attention_s`.
        """
        h, hk, d, key = heads[..., None], kv_heads[..., None], pair_width[..., None] / 2, key_bytes[..., None]
        tile = np.array(tiling.query_tiles, dtype=float)
        group, owners = (h / hk, hk) if tiling.packed else (np.ones_like(h), h)
        feed_s_per_byte = curve.balance_flops_per_byte / chip.base_flops_per_s
        wide = np.ceil(d / tiling.pad) * tiling.pad
        per_step = 4 * tile * KEY_TILE * curve.cycles_a_value(d, tiling.pad)
        return AttentionKernel(
            curve=curve,
            core_count=chip.core_count,
            causal=causal,
            tile=tile,
            reach=tile / group,
            owners=owners,
            compute_s=per_step * chip.core_count / chip.peak_flops_per_s,
            stream_s=KEY_TILE * wide * 4 * feed_s_per_byte * chip.core_count,
            query_bytes=2 * BYTES * d * h,
            sequence_key_bytes=key * hk,
            memory_s_per_byte=1 / (curve.bandwidth_fraction * chip.bandwidth_bytes_per_s),
            feed_s_per_byte=feed_s_per_byte,
            resident_bytes=resident_share * WARM_SHARE * chip.usable_l2_bytes,
            block_s=curve.block_cycles / chip.clock_hz,
            start_s=curve.start_cycles / chip.clock_hz,
        )

    def time_s(self, chunks: Chunks) -> Array:
        """Return the time of attention of new tokens with all keys of their sequence [s].

        References
        ----------
        .. [1] T. Dao, "FlashAttention-2", ICLR 2024, section 3: tiles of queries, partition over thread blocks.
        """
        s, b, seen = chunks.queries[..., None], chunks.sequences[..., None], chunks.keys[..., None]
        tiles = Tiles(self.reach, self.owners, self.compute_s, self.stream_s)
        traffic = b * (s * self.query_bytes + seen * self.sequence_key_bytes)
        best = self._tiles_s(tiles, s, b, seen, traffic=traffic, xp=np).min(axis=-1)
        total_s: Array = self.start_s + best + traffic[..., 0] * self._serial_s_per_byte
        return total_s

    def alone(self, i: int) -> tuple[Tiles, ...]:
        """Return the tiles of one of the shapes as single numbers, for `single_s`; shapes are along the first axis."""
        n_tiles = len(self.tile)
        columns = (self.reach, self.owners, self.compute_s, self.stream_s)
        rows = [np.broadcast_to(column[i, 0] if column.ndim > 1 else column, n_tiles) for column in columns]
        return tuple(Tiles(*(float(row[j]) for row in rows)) for j in range(n_tiles))

    def single_s(self, tiles: Sequence[Tiles], i: int, rows: float, pairs: float, keys: float) -> float:
        """Return `time_s` of one shape and of sequences by their sums, without arrays [s].

        Parameters
        ----------
        tiles : sequence of Tiles
            Of the shape; see `alone`.
        i : int
            Which shape.
        rows, pairs, keys : float
            As for `Chunks.of`.
        """
        s, b, seen = equal_sequences(rows, pairs, keys, causal=self.causal, xp=Scalars)
        traffic = b * (s * float(self.query_bytes[i, 0, 0]) + seen * float(self.sequence_key_bytes[i, 0, 0]))
        best = min(self._tiles_s(tile, s, b, seen, traffic=traffic, xp=Scalars) for tile in tiles)
        total_s: float = self.start_s + best + traffic * self._serial_s_per_byte
        return total_s

    @property
    def _serial_s_per_byte(self) -> float:
        return self.curve.serial_passes * self.memory_s_per_byte

    def _tiles_s(self, tiles: Tiles, s: Any, b: Any, seen: Any, *, traffic: Any, xp: Any) -> Any:  # noqa: ANN401
        """Return the time under each tile, without start and serial passes; numbers or arrays alike [s]."""
        q = self.curve.wave_quantisation
        count = xp.ceil(s / tiles.reach)
        longest = xp.ceil(seen / KEY_TILE)
        walked = _walked(s, count, tiles.reach, seen, all_keys=longest, xp=xp) if self.causal else longest
        rounds = b * tiles.owners * count / self.core_count
        whole = xp.ceil(rounds)
        steps = (1 - q) * xp.maximum(rounds * walked, longest) + q * xp.maximum(whole * walked, longest)
        compute = droop(steps * tiles.compute_s, self.curve.droop_fraction)
        cold = cold_share(traffic, self.resident_bytes, WARM_SHARPNESS) if self.resident_bytes else 1.0
        memory = traffic * xp.maximum(cold * self.memory_s_per_byte, self.feed_s_per_byte)
        starts = ((1 - q) * xp.maximum(rounds, 1.0) + q * whole) * self.block_s
        return soft_max(self.curve.norm, compute, steps * tiles.stream_s, memory, xp=xp) + starts


class Tiles(NamedTuple):
    """What a tile of queries fixes; numbers or arrays, see `AttentionKernel`."""

    reach: Any
    owners: Any
    compute_s: Any
    stream_s: Any


def _walked(length: Any, tiles: Any, reach: Any, seen: Any, *, all_keys: Any, xp: Any) -> Any:  # noqa: ANN401
    """Return the mean number of key tiles that a thread block walks over under a causal mask, in closed form.

    Tile number i of a head reaches the keys before the sequence's new ones and `i * reach` of those, the last tile all;
    the sum of their rounded-up key tiles over a period is that of the keys, plus half of what rounding adds.
    """
    pitch = reach / KEY_TILE
    rounding = (1 - xp.minimum(pitch, 1.0)) / 2
    total = (tiles - 1) * (pitch / 2 * tiles + rounding) + xp.ceil(length / KEY_TILE)
    return xp.minimum(xp.maximum(total / tiles + (seen - length) / KEY_TILE, 1.0), all_keys)
