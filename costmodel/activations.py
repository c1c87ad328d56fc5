"""Activations on one device: what a stage holds while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import Widths
from costmodel.layers import AttentionSpec, LatentAttentionSpec, LayerSpec, MoeSpec
from costmodel.memo import remember
from costmodel.query import Query
from costmodel.recurrent import RecurrentSpec
from costmodel.stages import Structure
from costmodel.sums import turn_tokens
from costmodel.traces import TracedFfnSpec, TracedMixerSpec
from costmodel.units import PIXEL_BYTES

LOGIT_BYTES = 4
"""Engines sample in 32 bits."""


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
    unfinished_bytes : float or ndarray
        What a request holds until its prefill ends: keys and values that are evicted then [bytes].
    """

    row_bytes: float
    rows: Quantity
    most_rows: Quantity
    request_bytes: Quantity
    fixed_bytes: Quantity
    unfinished_bytes: Quantity = 0.0

    @property
    def _unfinished(self) -> Quantity:
        """Requests whose prefill is under way at once: those of a full pass, and at least one."""
        return np.maximum(self.most_rows / np.maximum(self.rows, 1.0), 1.0)

    def at(self, batch: Quantity) -> Quantity:
        """Return the activations of a batch [bytes]."""
        rows = np.minimum(batch * self.rows, self.most_rows)
        unfinished = np.minimum(batch, self._unfinished) * self.unfinished_bytes
        return rows * self.row_bytes + batch * self.request_bytes + unfinished + self.fixed_bytes

    def largest_batch(self, free_bytes: float, cache_bytes: Quantity) -> Quantity:
        """Return how many requests fit beside each other: either the chunk is full, or all rows are in flight."""
        free, each = free_bytes - self.fixed_bytes, cache_bytes + self.request_bytes
        chunk_full = (free - self.most_rows * self.row_bytes - self._unfinished * self.unfinished_bytes) / each
        all_rows = free / (each + self.rows * self.row_bytes + self.unfinished_bytes)
        return np.maximum(chunk_full, all_rows)


def activations(query: Query, structure: Structure, *, evicted_bytes: Quantity = 0.0) -> list[Activations]:
    """Return the activations of encode (if there is an encoder) and of prefill.

    Parameters
    ----------
    evicted_bytes : float or ndarray
        Keys and values of one request that are evicted when its prefill ends [bytes].
    """
    encode = [_encode_activations(query, structure)] if query.model.vision and structure.encoder else []
    return [*encode, _prefill_activations(query, structure, evicted_bytes)]


def _widest_row_bytes(structure: Structure, tower: Literal["encoder", "decoder"]) -> float:
    """Return the most bytes alive for one row in any layer of a tower [bytes]."""
    segments, widths = {
        "encoder": (structure.encoder, structure.encoder_widths),
        "decoder": (structure.decoder, structure.linear_widths),
    }[tower]
    return remember(structure.tables, tower, lambda: max(_row_bytes(s.layer, widths) for s in segments))


def _row_bytes(spec: LayerSpec, widths: Widths) -> float:
    """Return the bytes alive for one row in a layer: two residual copies and the widest intermediate [bytes]."""
    mixer, ffn, tp = spec.mixer, spec.ffn, widths.tp
    if isinstance(mixer, TracedMixerSpec) or isinstance(ffn, TracedFfnSpec):
        return (2 * spec.width + 2 * ffn.hidden) * widths.state_bytes
    if isinstance(mixer, RecurrentSpec):
        attention = 2 * (mixer.mixed_width + mixer.value_width) / tp
    elif isinstance(mixer, LatentAttentionSpec):
        attention = (mixer.q_width + mixer.expanded_width + mixer.out_width) / tp
    else:
        gates = mixer.q_width if isinstance(mixer, AttentionSpec) and mixer.gated else 0
        attention = (2 * mixer.q_width + gates + 2 * mixer.kv_width) / tp
    if isinstance(ffn, MoeSpec):
        hidden = 3 * (ffn.top_k * ffn.hidden + ffn.shared_hidden) / tp + ffn.top_k * spec.width
    else:
        hidden = ffn.hidden * (3 if ffn.gated else 2) / tp
    return (2 * spec.width + max(attention, hidden)) * widths.state_bytes


def _encode_activations(query: Query, structure: Structure) -> Activations:
    vision, media, widths = query.model.vision, query.media, structure.encoder_widths
    assert vision is not None  # noqa: S101 - the caller asked
    rows_per_token = media.rows / np.maximum(media.adapter_tokens, 1.0)
    pixels = media.patches * vision.patch_width * PIXEL_BYTES
    embeddings = media.adapter_tokens * query.model.decoder.width * widths.state_bytes
    return Activations(
        row_bytes=_widest_row_bytes(structure, "encoder"),
        rows=media.rows,
        most_rows=np.maximum(query.engine.encoder_chunk_tokens * rows_per_token, media.largest_rows),
        request_bytes=pixels + embeddings,
        fixed_bytes=np.maximum(_overhead_bytes(query, "encode"), _overhead_bytes(query, "adapt")),
    )


def _prefill_activations(query: Query, structure: Structure, evicted_bytes: Quantity) -> Activations:
    widths, decoder = structure.linear_widths, query.model.decoder
    visual, other = turn_tokens(query, query.turns[0])
    logits = decoder.vocabulary / widths.tp * LOGIT_BYTES
    return Activations(
        row_bytes=_widest_row_bytes(structure, "decoder"),
        rows=visual + other,
        most_rows=query.engine.prefill_chunk_tokens,
        request_bytes=visual * decoder.width * widths.state_bytes + logits,
        fixed_bytes=np.maximum(_overhead_bytes(query, "prefill"), _overhead_bytes(query, "decode")),
        unfinished_bytes=evicted_bytes,
    )


def _overhead_bytes(query: Query, stage: str) -> Quantity:
    return sum((o.peak_bytes for o in query.overheads if o.stage == stage), start=0.0)
