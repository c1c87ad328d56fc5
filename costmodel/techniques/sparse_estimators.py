"""Estimators of sparse attention: what it costs to find the blocks worth computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import Unsupported
from costmodel.mixers import cached_width_on_device
from costmodel.operators import Kind, Operator
from costmodel.query import Segment
from costmodel.recurrent import RecurrentSpec

STATE_BYTES: Final = 2
"""One number of queries, keys and values [bytes]."""
SCORE_BYTES: Final = 4
"""One score that an estimator keeps, at 32 bits [bytes]."""


@dataclass(frozen=True, slots=True, eq=False)
class Scanned:
    """One layer's attention on one device, as an estimator scans it, for the whole batch.

    Parameters
    ----------
    n_layers : int
    heads, query_width, cached_width : float
        Query heads, the width of all of them, and that of keys and values.
    rows, pairs : float or ndarray
        Queries, and query-key pairs of dense attention.
    tokens : float or ndarray
        Keys of the last query of a sequence.
    visual_fraction : float or ndarray
        Share of the queries that is visual.
    """

    n_layers: int
    heads: float
    query_width: float
    cached_width: float
    rows: Quantity
    pairs: Quantity
    tokens: Quantity
    visual_fraction: Quantity

    @staticmethod
    def of(
        segment: Segment, *, tp: int, rows: Quantity, pairs: Quantity, tokens: Quantity, visual_fraction: Quantity
    ) -> Scanned:
        """Return the view of a segment on one of so many devices."""
        mixer = segment.layer.mixer
        if isinstance(mixer, RecurrentSpec):
            raise Unsupported("recurrent layers have no pairs to choose among; sparse attention leaves them alone")
        return Scanned(
            n_layers=segment.n_layers,
            heads=mixer.heads / tp,
            query_width=mixer.q_width / tp,
            cached_width=cached_width_on_device(mixer, tp),
            rows=rows,
            pairs=pairs,
            tokens=tokens,
            visual_fraction=visual_fraction,
        )

    def product(self, pairs: Quantity, *, width: float, read: Quantity) -> Operator:
        """Return a product of queries and keys over so many pairs, which reads so many bytes."""
        return Operator(
            "estimate.scores",
            Kind.GEMM,
            self.n_layers,
            flops=pairs * (2.0 * width),
            activation_bytes=read,
            launches=1.0,
        )

    def choice(self, scores: Quantity) -> Operator:
        """Return softmax, sums over blocks and the choice: every score of every head is written and read once."""
        moved = scores * (self.heads * 2 * SCORE_BYTES)
        return Operator("estimate.choice", Kind.ELEMENTWISE, self.n_layers, activation_bytes=moved, launches=3.0)

    @property
    def query_key_bytes(self) -> Quantity:
        """All queries and keys read once [bytes]."""
        return self.rows * ((self.query_width + self.cached_width / 2) * STATE_BYTES)


def _antidiagonal(scanned: Scanned, stride: float, block: float) -> list[Operator]:
    """XAttention: sums along antidiagonals of S x S squares are products of rows S times as wide, S^2 times fewer."""
    del block
    squares = scanned.pairs / stride**2
    product = scanned.product(squares, width=scanned.query_width * stride, read=scanned.query_key_bytes)
    return [product, scanned.choice(squares)]


def _mean_pool(scanned: Scanned, stride: float, block: float) -> list[Operator]:
    """SpargeAttn: the means of blocks of queries and of (half as long) blocks of keys: (N/128) (N/64) d."""
    squares = scanned.pairs / (block * stride)
    pool = Operator(
        "estimate.pool", Kind.ELEMENTWISE, scanned.n_layers, activation_bytes=scanned.query_key_bytes, launches=2.0
    )
    return [pool, scanned.product(squares, width=scanned.query_width, read=0.0 * squares), scanned.choice(squares)]


def _last_queries(scanned: Scanned, stride: float, block: float) -> list[Operator]:
    """MMInference: the last queries of every head look at all keys, and show the pattern."""
    del block
    sequences = scanned.rows / np.maximum(scanned.tokens, 1.0)
    scores = sequences * scanned.tokens * np.minimum(stride, scanned.tokens)
    keys = scanned.rows * (scanned.cached_width / 2 * STATE_BYTES)
    return [scanned.product(scores, width=scanned.query_width, read=keys), scanned.choice(scores)]


def _compression(scanned: Scanned, stride: float, block: float) -> list[Operator]:
    """NSA: a branch of its own attends to one compressed key for every s of them, products and values: N^2 / s."""
    del block
    pairs = scanned.pairs / stride
    compress = Operator(
        "estimate.compress",
        Kind.ELEMENTWISE,
        scanned.n_layers,
        activation_bytes=scanned.rows * (scanned.cached_width * STATE_BYTES),
        launches=2.0,
    )
    read = scanned.rows * (2 * scanned.query_width * STATE_BYTES)
    return [compress, scanned.product(pairs, width=2 * scanned.query_width, read=read), scanned.choice(pairs / stride)]


ESTIMATORS: Final[Mapping[str, tuple[float, Callable[[Scanned, float, float], list[Operator]]]]] = {
    "antidiagonal": (16.0, _antidiagonal),
    "mean_pool": (64.0, _mean_pool),
    "last_queries": (64.0, _last_queries),
    "compression": (64.0, _compression),
}
"""By name, the published stride and the lister: XAttention (8 or 16), SpargeAttn (blocks 128 x 64), MMInference (last
64 queries) and VideoNSA (blocks of 64 tokens, a frame)."""


def estimate(name: str, scanned: Scanned, *, stride: float | None, block: float) -> list[Operator]:
    """Return the operators of an estimator in one segment."""
    usual, lister = ESTIMATORS[name]
    return lister(scanned, usual if stride is None else stride, block)
