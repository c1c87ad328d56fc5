"""What it costs to choose among cached tokens: scores, similarities, and the move of what is kept.

Each function lists the operators of one entry's layers; work and traffic are those of one device, for the whole batch.
"""

from __future__ import annotations

from typing import Final

from costmodel.base import Quantity
from costmodel.operators import Kind, Operator
from costmodel.techniques.kv_common import Held, as_number

SCORE_BYTES: Final = 2
"""One attention score in memory, at 16 bits [bytes]."""
SCORE_PASSES: Final = 4
"""Times that a score matrix passes through memory: written, read and written by softmax, read (as in `mixers`)."""
LIVE_SCORE_BYTES: Final = 6
"""One score while softmax runs: 16 bits and 32 bits side by side. FastV on LLaVA-OneVision-7B with 32 frames takes
7.0 GB more than the dense run (VidCom2, Table 3); 28 heads x 6,302^2 scores x 6 bytes are 6.7 GB [bytes]."""


def row_scores(held: Held, rows: Quantity) -> tuple[list[Operator], Quantity]:
    """Return the scores of an observation window of queries against every key, and their peak [bytes].

    Fused attention gives none, so the product runs again for these rows: 2 r N q_width FLOPs a layer.
    """
    scored = held.batch * rows * held.tokens
    product = Operator(
        "scores.rows",
        Kind.GEMM,
        held.n_layers,
        flops=scored * (2.0 * held.query_width),
        kv_bytes=held.batch * held.tokens * (held.token_bytes / 2),
        launches=1.0,
    )
    softmax = Operator(
        "scores.softmax",
        Kind.ELEMENTWISE,
        held.n_layers,
        activation_bytes=scored * (held.heads * SCORE_PASSES * SCORE_BYTES),
        launches=2.0,
    )
    return [product, softmax], held.at_once * rows * held.tokens * (held.heads * LIVE_SCORE_BYTES)


def map_scores(held: Held, *, full_square: bool) -> tuple[list[Operator], Quantity]:
    """Return column sums of the whole attention map, and the map of one layer at its peak [bytes].

    Attention leaves the fused kernel: it computes the masked half too, and its N^2 scores a head pass through memory,
    once more for the sums.

    Parameters
    ----------
    full_square : bool
        Whether the engine computes the masked half anyway.
    """
    pairs = held.batch * held.tokens * held.tokens
    product = Operator(
        "scores.masked_half",
        Kind.GEMM,
        held.n_layers,
        flops=pairs * (0.0 if full_square else 2.0 * held.query_width),
        launches=1.0,
    )
    softmax = Operator(
        "scores.map",
        Kind.ELEMENTWISE,
        held.n_layers,
        activation_bytes=pairs * (held.heads * (SCORE_PASSES + 1) * SCORE_BYTES),
        launches=3.0,
    )
    return [product, softmax], held.at_once * held.tokens * held.tokens * (held.heads * LIVE_SCORE_BYTES)


def norm_scores(held: Held) -> tuple[list[Operator], Quantity]:
    """Return scores by the keys' similarity and the values' norm alone: the cache is read once."""
    read = held.batch * held.tokens * held.token_bytes
    return [Operator("scores.norms", Kind.ELEMENTWISE, held.n_layers, kv_bytes=read, launches=2.0)], 0.0


def merge(held: Held, kept: Quantity, evicted: Quantity) -> tuple[list[Operator], Quantity]:
    """Return the merge of evicted tokens into kept ones: a similarity for each pair, and the sums; and their peak."""
    pairs, width = held.batch * evicted * kept, held.cached_width / 2
    product = Operator(
        "merge.similarities",
        Kind.GEMM,
        held.n_layers,
        flops=pairs * (2.0 * width),
        activation_bytes=pairs * (2 * SCORE_BYTES * held.key_heads),
        kv_bytes=held.batch * (evicted + kept) * (held.token_bytes / 2),
        launches=1.0,
    )
    moved = held.batch * (evicted + 2.0 * kept) * held.token_bytes
    sums = Operator("merge.sums", Kind.ELEMENTWISE, held.n_layers, kv_bytes=moved, launches=2.0)
    return [product, sums], held.at_once * evicted * kept * (held.key_heads * SCORE_BYTES)


def compact(held: Held, kept: Quantity) -> list[Operator]:
    """Return the choice of the highest scores, and the copy of what they keep: read and written once.

    Where everything is kept, nothing moves.
    """
    happens = as_number(kept < held.tokens)
    moved = happens * held.batch * kept * (2.0 * held.token_bytes)
    ranked = happens * held.batch * held.tokens * (held.heads * 2 * SCORE_BYTES)
    return [
        Operator("keep.rank", Kind.ELEMENTWISE, held.n_layers, activation_bytes=ranked, launches=1.0 * happens),
        Operator("keep.copy", Kind.ELEMENTWISE, held.n_layers, kv_bytes=moved, launches=2.0 * happens),
    ]
