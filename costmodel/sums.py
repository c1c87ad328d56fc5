"""The sums that operators depend on, from a query: rows, query-key pairs, keys read, passes.

Everything here is for the whole batch. Prefill runs in chunks of the engine's size: all full chunks are alike but for
the keys behind them, so they are one point at their mean, and the last, shorter chunk is another. A decode step is a
point at a number of generated tokens, or at the mean over all steps.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.blocks import Work
from costmodel.layers import AttentionSpec, CrossAttentionSpec
from costmodel.query import KVEntry, Query, Segment, Turn, causal_pairs
from costmodel.recurrent import RecurrentSpec
from costmodel.stages import Structure, Sums

SURE = -40.0
"""Logarithm of a chance that one double cannot tell from none; smaller ones would only make exponentials slow."""
MAX_DEALT = 256
"""Requests of a batch whose items are dealt out one by one; more are taken to be as even as these."""


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Sums of one or more points of a stage.

    Parameters
    ----------
    sums : ndarray, shape (n_sums, n_points)
    counts : tuple of float or ndarray
        How often each point's time passes.
    runs : tuple of float or ndarray
        How often one device does each point's work: in a pipeline only its share of the layers.
    """

    sums: Array
    counts: tuple[Quantity, ...]
    runs: tuple[Quantity, ...]

    @staticmethod
    def of(points: list[Sums], counts: tuple[Quantity, ...], runs: tuple[Quantity, ...] | None = None) -> Points:
        """Return the points as one array; where sums are arrays, each is a block of points."""
        flat = [point.flat() for point in points]
        sizes = [value.size for values in flat for value in values if isinstance(value, np.ndarray)]
        if not sizes:
            return Points(np.array(flat, dtype=float).T, counts, runs or counts)
        n_points = max(sizes)
        sums = np.empty((len(flat[0]), len(flat), n_points))
        for column, values in enumerate(flat):
            for row, value in enumerate(values):
                sums[row, column] = value
        return Points(sums.reshape(len(flat[0]), -1), counts, runs or counts)


def encode_points(query: Query, structure: Structure, turn: Turn) -> Points:
    """Return the encoder's work in a turn, on the device that has most of it."""
    pictures = query.replica_batch * turn.visual_share * busiest_share(query)
    passes = encoder_passes(query, turn)
    works = tuple(_encoder_work(query, turn, segment, passes, pictures) for segment in structure.encoder)
    return Points.of([Sums(passes, query.media.patches * pictures, works=works)], (1.0,))


def _encoder_work(query: Query, turn: Turn, segment: Segment, passes: Quantity, pictures: Quantity) -> Work:
    mixer = segment.layer.mixer
    windowed = isinstance(mixer, AttentionSpec) and mixer.grouping == "window"
    pairs = query.media.window_pairs if windowed else query.media.pairs * turn.pair_scale
    keep = segment.visual_keep
    rows = query.media.rows * pictures * keep
    return Work(passes, rows, pairs * pictures * (keep * keep * segment.density), rows)


def encoder_passes(query: Query, turn: Turn) -> Quantity:
    """Return the passes of the encoder in a turn: in chunks of the engine's size, but no more than there are items."""
    share, batch = turn.visual_share * busiest_share(query), query.replica_batch
    chunks = np.ceil(query.media.adapter_tokens * batch * share / query.engine.encoder_chunk_tokens)
    return np.minimum(chunks, query.media.items * batch)


def busiest_share(query: Query) -> Quantity:
    """Return the share of a replica's pictures that the busiest copy of the encoder gets.

    Whole items are dealt out, the one with most rows first, to the copy with least so far.
    """
    copies, batch, rows = query.parallelism.encoder_dp, query.replica_batch, query.media.item_rows
    if copies == 1:
        return 1.0
    if not rows:  # pictures by their number of tokens are alike
        items = query.media.items * batch
        return np.ceil(items / copies) / np.maximum(items, 1.0)
    repeats = np.minimum(batch, MAX_DEALT)
    if not isinstance(repeats, np.ndarray):
        return _dealt_share(rows, copies, int(repeats))
    numbers, where = np.unique(repeats, return_inverse=True)
    shares = np.array([_dealt_share(rows, copies, int(number)) for number in numbers])
    return shares[where].reshape(repeats.shape)


def _dealt_share(rows: tuple[float, ...], copies: int, repeats: int) -> float:
    """Return the share of the busiest copy when so many requests with items of these rows are dealt out."""
    loads = [0.0] * copies
    for row in (row for row in sorted(rows, reverse=True) for _ in range(repeats)):
        heapq.heapreplace(loads, loads[0] + row)
    return max(loads) / (sum(rows) * repeats)


def adapt_points(query: Query, structure: Structure, turn: Turn) -> Points:
    """Return the adapter's work in a turn, on the device that has most of it."""
    del structure
    pictures = query.replica_batch * turn.visual_share * busiest_share(query)
    passes, media = encoder_passes(query, turn), query.media
    patches = Work(passes, media.patches * media.adapter_patch_keep * pictures, 0.0, 0.0)
    tokens = media.adapter_tokens * media.adapter_keep * pictures
    return Points.of([Sums(passes, tokens, works=(patches,))], (1.0,))


def turn_tokens(query: Query, turn: Turn) -> tuple[Quantity, Quantity]:
    """Return the visual and the other tokens that a turn brings to the language model."""
    other = query.media.marker_tokens * turn.visual_share + turn.text_tokens
    return query.visual_tokens * turn.visual_share, other


def prefill_points(query: Query, structure: Structure, turn: Turn) -> Points:
    """Return prefill in a turn: the mean full chunk and the last chunk, or one pass when there are no chunks.

    Pipeline stages work on different chunks at once, in order: a stage is busy with its part of every chunk, and the
    stages before and behind it add theirs of the longest one, which is a full one (a flow shop of equal machines;
    M. Pinedo, "Scheduling", 6.1).
    """
    visual, other = turn_tokens(query, turn)
    tokens = query.replica_batch * (visual + other)
    chunk = query.engine.prefill_chunk_tokens
    passes = np.ceil(tokens / chunk)
    last = (tokens - (passes - 1.0) * chunk) / tokens
    chunked = bool(np.any(passes > 1))
    shares = (chunk / tokens, last) if chunked else (last,)
    n_stages = query.parallelism.pp
    behind = np.where(passes > 1, n_stages - 1.0, 0.0) if n_stages > 1 else 0.0
    counts = ((passes - 1.0 + behind) / n_stages, np.where(behind, 1.0 / n_stages, 1.0)) if chunked else (1.0,)
    runs = ((passes - 1.0) / n_stages, 1.0 / n_stages) if chunked else (1.0 / n_stages,)
    works = tuple(_prefill_work(query, segment, turn, visual, other) for segment in structure.decoder)
    return Points.of([_prefill_pass(query, tokens, works, share) for share in shares], counts, runs)


def _prefill_pass(query: Query, tokens: Quantity, works: tuple[Work, ...], share: Quantity) -> Sums:
    """Return the pass that handles this share of prefill; the head runs where a sequence ends."""
    ending = query.replica_batch * share
    scaled = tuple(_scaled(query, work, share) for work in works)
    return Sums(1.0, tokens * share, ending, np.minimum(ending, 1.0), works=scaled)


def _scaled(query: Query, work: Work, share: Quantity) -> Work:
    rows = work.rows * share
    return Work(1.0, rows, work.pairs * share, work.keys * share, touched_share(query, rows))


def touched_share(query: Query, rows: Quantity) -> Quantity:
    """Return the share of routed experts that at least one of so many rows uses, if each picks evenly.

    A row misses an expert with probability 1 - top_k / experts; with expert parallelism the rows of all replicas meet.
    """
    routing = query.model.routing
    if routing is None:
        return 0.0
    experts, top_k = routing
    missed = math.log1p(-top_k / experts) if top_k < experts else SURE
    return 1.0 - np.exp(np.maximum(rows * (missed * query.parallelism.expert_replicas), SURE))


def _prefill_work(query: Query, segment: Segment, turn: Turn, visual: Quantity, other: Quantity) -> Work:
    """Return the work of one segment over all chunks: a chunk reads again the keys of those before it."""
    rows = visual * segment.visual_keep + other * segment.text_keep
    mixer, batch = segment.layer.mixer, query.replica_batch
    prefix = turn.prefix_tokens * segment.prefix_share + visual * segment.injected
    prefix = prefix + query.visual_tokens * turn.prefix_visual_share * segment.visual_keep
    if isinstance(mixer, CrossAttentionSpec):
        new, seen = turn.visual_share, seen_share(query, turn)
        pairs = rows * query.media.cross_tokens * seen
        return Work(1.0, rows * batch, pairs * (batch * segment.density), query.media.cross_tokens * new * batch)
    pieces = np.ceil((visual + other) / query.engine.prefill_chunk_tokens)
    if isinstance(mixer, RecurrentSpec):
        tokens = np.ceil(rows / mixer.chunk) * mixer.chunk if query.engine.executes_everything else rows
        return Work(1.0, rows * batch, tokens * batch, pieces * batch)
    if query.engine.counts_full_square:
        pairs = rows * (rows + prefix)
    else:
        blocks = query.media.block_pairs * turn.visual_share * turn.pair_scale * query.model.decoder.bidirectional_media
        pairs = causal_pairs(rows, prefix=prefix, window=mixer.window) + blocks * segment.visual_keep**2
    behind = prefix * pieces + rows * (pieces - 1.0) / 2.0
    keys = rows + np.minimum(behind, mixer.window * pieces)
    return Work(1.0, rows * batch, pairs * (batch * segment.density), keys * batch)


def decode_steps(query: Query, turn: Turn) -> Quantity:
    """Return the decode steps of a turn: prefill gives the first token, unless the engine says otherwise."""
    return turn.output_tokens - 1.0 * query.engine.first_token_in_prefill


def decode_points(query: Query, structure: Structure, turn: Turn, *, detailed: bool) -> Points:
    """Return the mean decode step of a turn, and before it the first, the middle and the last one if wanted."""
    steps = np.maximum(decode_steps(query, turn), 1.0)
    ahead = query.step_rows - 1.0  # a step of several rows ends with the keys of all of them
    cached = [prompt_in_cache(query, entry, turn) + ahead * entry.grows for entry in structure.kv]
    reads = [[entry.mean_reads(kept, steps) for entry, kept in zip(structure.kv, cached, strict=True)]]
    if detailed:
        for generated in (steps, np.ceil(steps / 2.0), 1.0):
            reads.insert(0, [e.reads(kept, generated) for e, kept in zip(structure.kv, cached, strict=True)])
    points = [_step(query, step_reads) for step_reads in reads]
    none, taken = (0.0,) * (len(reads) - 1), decode_steps(query, turn)
    return Points.of(points, (*none, taken), (*none, taken / query.parallelism.pp))


def prompt_in_cache(query: Query, entry: KVEntry, turn: Turn) -> Quantity:
    """Return the tokens that a cache entry holds when a turn's prefill ends, before its window cuts them."""
    if isinstance(entry.mixer, RecurrentSpec):
        return entry.fixed_tokens  # one state, whatever came before
    visual, other = turn_tokens(query, turn)
    if isinstance(entry.mixer, CrossAttentionSpec):
        return entry.kept_prompt(0.0, 0.0, query.media.cross_tokens * seen_share(query, turn))
    return entry.kept_prompt(visual, other, 0.0) + cached_prefix(query, entry, turn)


def cached_prefix(query: Query, entry: KVEntry, turn: Turn) -> Quantity:
    """Return the tokens that a cache entry holds before a turn."""
    return turn.prefix_tokens * entry.prefix_share + query.visual_tokens * turn.prefix_visual_share * entry.visual_share


def seen_share(query: Query, turn: Turn) -> Quantity:
    """Return the share of the request's pictures that came with this turn or with one before it."""
    earlier = query.turns[: next(i for i, t in enumerate(query.turns) if t is turn)]
    together = sum((t.visual_share for t in earlier), start=turn.visual_share)
    return np.minimum(together, np.maximum(turn.visual_share, 1.0))  # above one where pictures come again, larger


def _step(query: Query, reads: list[Quantity]) -> Sums:
    batch = query.replica_batch
    rows = batch * query.step_rows
    works = tuple(Work(1.0, rows, rows * keys, batch * keys) for keys in reads)
    return Sums(1.0, rows, rows, 1.0, touched_share(query, rows), works)


def evicted_tokens(query: Query, entry: KVEntry) -> Quantity:
    """Return the tokens of one request that a cache entry holds until the first prefill ends, and not after."""
    visual, other = turn_tokens(query, query.turns[0])
    kept, most = prompt_in_cache(query, entry, query.turns[0]), entry.mixer.window - 1.0
    more = kept + entry.visual_evicted * visual + entry.text_evicted * other
    return np.minimum(more, most) - np.minimum(kept, most)


def kept_tokens(query: Query, entry: KVEntry) -> Quantity:
    """Return the tokens that one request holds in a cache entry when its last turn ends.

    The next query sees a window of keys, its own included, so one fewer is kept.
    """
    if isinstance(entry.mixer, RecurrentSpec):
        return entry.fixed_tokens
    if isinstance(entry.mixer, CrossAttentionSpec):
        return np.minimum(prompt_in_cache(query, entry, query.turns[-1]), entry.mixer.window - 1.0)
    total: Quantity = 0.0
    for turn in query.turns:
        new = prompt_in_cache(query, entry, turn) - cached_prefix(query, entry, turn)
        total = total + new + turn.output_tokens * entry.grows
    return np.minimum(total, entry.mixer.window - 1.0)
