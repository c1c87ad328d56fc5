"""Bytes on one device: weights, cache, activations at their peak, what fits, and the largest batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import Widths, kv_bytes_each, kv_width_on_device, weight_bytes_each
from costmodel.hardware import HardwareProfile
from costmodel.memo import remember
from costmodel.models import LayerSpec
from costmodel.query import MAX_BATCH, KVEntry, Query
from costmodel.stages import Structure
from costmodel.sums import kept_tokens, turn_tokens
from costmodel.units import BITS_PER_BYTE, PIXEL_BYTES

LOGIT_BYTES = 4
"""Engines sample in 32 bits."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one device [bytes].

    Parameters
    ----------
    weights_bytes, kv_bytes, activation_bytes : float
        Weights, cached keys and values at the end of the answer, and the largest activations of any stage.
    peak_bytes : float
        All of them together with what the engine reserves.
    capacity_bytes : float
        Memory of the device.
    usable_bytes : float
        Share of it that the engine may use.
    reserve_bytes : float
        Context, kernels and graphs of the engine.
    """

    weights_bytes: float
    kv_bytes: float
    activation_bytes: float
    peak_bytes: float
    capacity_bytes: float
    usable_bytes: float
    reserve_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within what the engine may use."""
        return self.peak_bytes <= self.usable_bytes


def memory(query: Query, hardware: HardwareProfile, structure: Structure | None = None) -> Memory:
    """Return the memory of one device for a query of single numbers."""
    engine = query.engine
    structure = structure or Structure.of(query)
    weights = weights_bytes(structure)
    cache = float(query.batch * kv_bytes_per_request(query))
    live = max(float(stage.at(query.batch)) for stage in activations(query, structure))
    return Memory(
        weights_bytes=weights,
        kv_bytes=cache,
        activation_bytes=live,
        peak_bytes=weights + cache + live + engine.reserve_bytes,
        capacity_bytes=hardware.memory_bytes,
        usable_bytes=hardware.memory_bytes * engine.memory_fraction,
        reserve_bytes=engine.reserve_bytes,
    )


def weights_bytes(structure: Structure) -> float:
    """Return the weights on one device: linear layers at their width, the rest at no less than 16 bits [bytes]."""
    return remember(structure.tables, "weights", lambda: _weights_bytes(structure))


def _weights_bytes(structure: Structure) -> float:
    decoder, parameters = structure.model.decoder, structure.model.parameters()
    full = max(16, structure.precision.weight_bits) / BITS_PER_BYTE
    linear = weight_bytes_each(structure.precision.weight_bits)
    language = decoder.layer_parameters * linear + (parameters["language"] - decoder.layer_parameters) * full
    pictures = (parameters["vision"] + parameters["adapter"]) * full
    return language / structure.parallelism.tp + pictures / structure.parallelism.encoder


def entry_bytes_per_token(entry: KVEntry, n_devices: int) -> float:
    """Return the bytes that one token takes in a cache entry on one device [bytes]."""
    return entry.n_layers * 2 * kv_width_on_device(entry.mixer, n_devices) * kv_bytes_each(entry.bits)


def kv_bytes_per_request(query: Query) -> Quantity:
    """Return the cache of one request on one device when its answer ends [bytes]."""
    total: Quantity = 0.0
    for entry in query.kv:
        if entry.placement == "gpu":
            total = total + kept_tokens(query, entry) * entry_bytes_per_token(entry, query.parallelism.tp)
    return total


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Activations of a stage on one device.

    Parameters
    ----------
    row_bytes : float
        Alive for one row while a layer runs [bytes].
    rows, most_rows : float or ndarray
        Rows of one request, and the most that are in flight at once: engines encode and prefill in chunks.
    request_bytes : float or ndarray
        Pixels, embeddings and logits that every request of the batch keeps [bytes].
    fixed_bytes : float or ndarray
        What techniques need while the stage runs [bytes].
    """

    row_bytes: float
    rows: Quantity
    most_rows: Quantity
    request_bytes: Quantity
    fixed_bytes: Quantity

    def at(self, batch: Quantity) -> Quantity:
        """Return the activations of a batch [bytes]."""
        rows = np.minimum(batch * self.rows, self.most_rows)
        return rows * self.row_bytes + batch * self.request_bytes + self.fixed_bytes

    def largest_batch(self, free_bytes: float, cache_bytes: Quantity) -> Quantity:
        """Return how many requests fit beside each other: either the chunk is full, or all rows are in flight."""
        free, each = free_bytes - self.fixed_bytes, cache_bytes + self.request_bytes
        chunk_full = (free - self.most_rows * self.row_bytes) / each
        all_rows = free / (each + self.rows * self.row_bytes)
        return np.maximum(chunk_full, all_rows)


def activations(query: Query, structure: Structure) -> list[Activations]:
    """Return the activations of encode (if there is an encoder) and of prefill."""
    encode = [_encode_activations(query, structure)] if query.model.vision else []
    return [*encode, _prefill_activations(query, structure)]


def _widest_row_bytes(structure: Structure, tower: Literal["encoder", "decoder"]) -> float:
    """Return the most bytes alive for one row in any layer of a tower [bytes]."""
    segments, widths = {
        "encoder": (structure.encoder, structure.encoder_widths),
        "decoder": (structure.decoder, structure.linear_widths),
    }[tower]
    return remember(structure.tables, tower, lambda: max(_row_bytes(s.layer, widths) for s in segments))


def _row_bytes(spec: LayerSpec, widths: Widths) -> float:
    """Return the bytes alive for one row in a layer: two residual copies and the widest intermediate [bytes]."""
    mixer, tp = spec.mixer, widths.tp
    attention = (2 * mixer.q_width + 2 * mixer.kv_width) / tp
    ffn = spec.ffn.hidden * (3 if spec.ffn.gated else 2) / tp
    return (2 * spec.width + max(attention, ffn)) * widths.state_bytes


def _encode_activations(query: Query, structure: Structure) -> Activations:
    vision, media, widths = query.model.vision, query.media, structure.encoder_widths
    assert vision is not None  # noqa: S101 - the caller asked
    rows_per_token = media.rows / np.maximum(media.visual_tokens, 1.0)
    pixels = media.patches * vision.patch_width * PIXEL_BYTES
    embeddings = media.visual_tokens * query.model.decoder.width * widths.state_bytes
    return Activations(
        row_bytes=_widest_row_bytes(structure, "encoder"),
        rows=media.rows,
        most_rows=np.maximum(query.engine.encoder_chunk_tokens * rows_per_token, media.largest_rows),
        request_bytes=pixels + embeddings,
        fixed_bytes=_overhead_bytes(query, "encode"),
    )


def _prefill_activations(query: Query, structure: Structure) -> Activations:
    widths, decoder = structure.linear_widths, query.model.decoder
    visual, other = turn_tokens(query, query.turns[0])
    logits = decoder.vocabulary / widths.tp * LOGIT_BYTES
    return Activations(
        row_bytes=_widest_row_bytes(structure, "decoder"),
        rows=visual + other,
        most_rows=query.engine.prefill_chunk_tokens,
        request_bytes=visual * decoder.width * widths.state_bytes + logits,
        fixed_bytes=_overhead_bytes(query, "prefill"),
    )


def _overhead_bytes(query: Query, stage: str) -> Quantity:
    return sum((o.peak_bytes for o in query.overheads if o.stage == stage), start=0.0)


def max_batch(query: Query, hardware: HardwareProfile, structure: Structure | None = None) -> int:
    """Return the largest batch of this request that fits on the device, 0 when not even one does."""
    engine = query.engine
    structure = structure or Structure.of(query)
    free = hardware.memory_bytes * engine.memory_fraction - engine.reserve_bytes - weights_bytes(structure)
    cache = kv_bytes_per_request(query)
    stages = activations(query, structure)
    largest = min(float(stage.largest_batch(free, cache)) for stage in stages)
    return int(min(max(0.0, largest), MAX_BATCH))
