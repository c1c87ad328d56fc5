"""The sums that operators depend on, from a query: rows, query-key pairs, keys read, passes.

Everything here is for the whole batch. Prefill runs in chunks of the engine's size: all full chunks are alike but for
the keys behind them, so they are one point at their mean, and the last, shorter chunk is another. A decode step is a
point at a number of generated tokens, or at the mean over all steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.blocks import Work
from costmodel.query import KVEntry, Query, Segment, Turn, causal_pairs
from costmodel.stages import Structure, Sums


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Sums of one or more points of a stage.

    Parameters
    ----------
    sums : ndarray, shape (n_sums, n_points)
    counts : tuple of float or ndarray
        How often each point happens.
    """

    sums: Array
    counts: tuple[Quantity, ...]

    @staticmethod
    def of(points: list[Sums], counts: tuple[Quantity, ...]) -> Points:
        """Return the points as one array; where sums are arrays, each is a block of points."""
        flat = [point.flat() for point in points]
        sizes = [value.size for values in flat for value in values if isinstance(value, np.ndarray)]
        if not sizes:
            return Points(np.array(flat, dtype=float).T, counts)
        n_points = max(sizes)
        sums = np.empty((len(flat[0]), len(flat), n_points))
        for column, values in enumerate(flat):
            for row, value in enumerate(values):
                sums[row, column] = value
        return Points(sums.reshape(len(flat[0]), -1), counts)


def encode_points(query: Query, structure: Structure, turn: Turn) -> Points:
    """Return the encoder's work in a turn."""
    media, pictures = query.media, query.batch * turn.visual_share
    passes = _encoder_passes(query, turn)
    works = tuple(_encoder_work(query, segment, passes, pictures) for segment in structure.encoder)
    return Points.of([Sums(passes, media.patches * pictures, works=works)], (1.0,))


def _encoder_work(query: Query, segment: Segment, passes: Quantity, pictures: Quantity) -> Work:
    windowed = segment.layer.mixer.grouping == "window"
    pairs = query.media.window_pairs if windowed else query.media.pairs
    keep = segment.visual_keep
    rows = query.media.rows * pictures * keep
    return Work(passes, rows, pairs * pictures * (keep * keep * segment.density), rows)


def _encoder_passes(query: Query, turn: Turn) -> Quantity:
    tokens = query.media.visual_tokens * query.batch * turn.visual_share
    return np.minimum(np.ceil(tokens / query.engine.encoder_chunk_tokens), query.media.items * query.batch)


def adapt_points(query: Query, structure: Structure, turn: Turn) -> Points:
    """Return the adapter's work in a turn."""
    del structure
    tokens = query.media.visual_tokens * query.batch * turn.visual_share
    return Points.of([Sums(_encoder_passes(query, turn), tokens)], (1.0,))


def turn_tokens(query: Query, turn: Turn) -> tuple[Quantity, Quantity]:
    """Return the visual and the other tokens that a turn brings to the language model."""
    other = query.media.marker_tokens * turn.visual_share + turn.text_tokens
    return query.visual_tokens * turn.visual_share, other


def prefill_points(query: Query, structure: Structure, turn: Turn) -> Points:
    """Return prefill in a turn: the mean full chunk and the last chunk, or one pass when there are no chunks."""
    visual, other = turn_tokens(query, turn)
    tokens = query.batch * (visual + other)
    chunk = query.engine.prefill_chunk_tokens
    passes = np.ceil(tokens / chunk)
    last = (tokens - (passes - 1.0) * chunk) / tokens
    chunked = bool(np.any(passes > 1))
    shares = (chunk / tokens, last) if chunked else (last,)
    counts = (passes - 1.0, 1.0) if chunked else (1.0,)
    works = tuple(_prefill_work(query, segment, turn, visual, other) for segment in structure.decoder)
    return Points.of([_prefill_pass(query, tokens, works, share) for share in shares], counts)


def _prefill_pass(query: Query, tokens: Quantity, works: tuple[Work, ...], share: Quantity) -> Sums:
    """Return the pass that handles this share of prefill; the head runs where a sequence ends."""
    ending = query.batch * share
    scaled = tuple(_scaled(work, share) for work in works)
    return Sums(1.0, tokens * share, ending, np.minimum(ending, 1.0), scaled)


def _scaled(work: Work, share: Quantity) -> Work:
    return Work(1.0, work.rows * share, work.pairs * share, work.keys * share)


def _prefill_work(query: Query, segment: Segment, turn: Turn, visual: Quantity, other: Quantity) -> Work:
    """Return the work of one segment over all chunks: a chunk reads again the keys of those before it."""
    rows = visual * segment.visual_keep + other * segment.text_keep
    window, prefix, chunk = segment.layer.mixer.window, turn.prefix_tokens, query.engine.prefill_chunk_tokens
    if query.engine.counts_full_square:
        pairs = rows * (rows + prefix)
    else:
        pairs = causal_pairs(rows, prefix=prefix, window=window)
    pieces = np.ceil((visual + other) / chunk)
    behind = prefix * pieces + (rows / pieces) * pieces * (pieces - 1.0) / 2.0
    keys = rows + np.minimum(behind, window * pieces)
    batch = query.batch
    return Work(1.0, rows * batch, pairs * (batch * segment.density), keys * batch)


def decode_steps(query: Query, turn: Turn) -> Quantity:
    """Return the decode steps of a turn: prefill gives the first token, unless the engine says otherwise."""
    return turn.output_tokens - 1.0 * query.engine.first_token_in_prefill


def decode_points(query: Query, structure: Structure, turn: Turn, *, detailed: bool) -> Points:
    """Return the mean decode step of a turn, and before it the first, the middle and the last one if wanted."""
    visual, other = turn_tokens(query, turn)
    steps = np.maximum(decode_steps(query, turn), 1.0)
    cached = [entry.kept_prompt(visual, other) + turn.prefix_tokens for entry in structure.kv]
    reads = [[entry.mean_reads(kept, steps) for entry, kept in zip(structure.kv, cached, strict=True)]]
    if detailed:
        for generated in (steps, np.ceil(steps / 2.0), 1.0):
            reads.insert(0, [e.reads(kept, generated) for e, kept in zip(structure.kv, cached, strict=True)])
    points = [_step(query, step_reads) for step_reads in reads]
    return Points.of(points, (*(0.0 for _ in reads[1:]), decode_steps(query, turn)))


def _step(query: Query, reads: list[Quantity]) -> Sums:
    batch = query.batch
    works = tuple(Work(1.0, batch, batch * keys, batch * keys) for keys in reads)
    return Sums(1.0, batch, batch, 1.0, works)


def kept_tokens(query: Query, entry: KVEntry) -> Quantity:
    """Return the tokens that one request holds in a cache entry when its last turn ends."""
    total: Quantity = 0.0
    for turn in query.turns:
        visual, other = turn_tokens(query, turn)
        total = total + entry.kept_prompt(visual, other) + turn.output_tokens * entry.grows
    return np.minimum(total, entry.mixer.window)
