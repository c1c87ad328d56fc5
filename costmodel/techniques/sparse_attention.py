"""Sparse attention: fewer query-key pairs in prefill or in the encoder, after an estimate of which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec, CrossAttentionSpec
from costmodel.query import Overhead, Query, Segment, Stage, causal_pairs
from costmodel.recurrent import RecurrentSpec
from costmodel.sums import turn_tokens
from costmodel.techniques.kv_common import check_choice, check_count, check_scalar, check_share, is_one
from costmodel.techniques.sparse_estimators import ESTIMATORS, Scanned, estimate
from costmodel.traces import TracedMixerSpec
from costmodel.units import UNBOUNDED

BLOCK: Final = 128.0
"""Queries and keys that are computed or skipped together (XAttention, SpargeAttn)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseAttention:
    """Compute a share of the query-key pairs.

    Feed-forward blocks, projections and the cache stay as they are, so that prefill gains no more than attention's part
    of it allows: see `costmodel.techniques.sparse_laws`. Layers with a window of their own stay dense.

    Parameters
    ----------
    density : float or ndarray
        Share of the pairs that is computed, at every length. What papers publish holds for the lengths they measured:
        name these in `tokens_range`, and the technique refuses others.
    law : tuple of float
        In its place (rho, N, a): the density is rho (n / N)^-a at n tokens, which falls with the length; see
        `sparse_laws.fit_density`.
    tokens_range : tuple of float
        Least and most tokens for which a constant density was published.
    block : float
        Side of the smallest piece: a row of blocks computes its own diagonal one at least.
    estimator : {"none", "antidiagonal", "mean_pool", "last_queries", "compression"}
        What finds the pairs; see `sparse_estimators`.
    estimator_stride : float or None
        Its stride: tokens between scored antidiagonals, queries that look back, or keys compressed into one.
    visual_only : bool
        Whether only visual queries are sparse and the others see everything.
    stage : {"prefill", "encode"}
        Which tower.
    """

    density: Quantity = 1.0
    law: tuple[float, ...] = ()
    tokens_range: tuple[float, ...] = ()
    block: float = BLOCK
    estimator: Literal["none", "antidiagonal", "mean_pool", "last_queries", "compression"] = "none"
    estimator_stride: float | None = None
    visual_only: bool = False
    stage: Literal["prefill", "encode"] = "prefill"
    name: str = "sparse_attention"

    def __post_init__(self) -> None:
        """Refuse what is no density."""
        check_share("SparseAttention", "density", self.density)
        check_scalar("SparseAttention", "block", self.block)
        check_count("SparseAttention", "block", self.block, least=1)
        check_count("SparseAttention", "estimator_stride", self.estimator_stride, least=1)
        check_choice("SparseAttention", "estimator", self.estimator, ("none", *ESTIMATORS))
        check_choice("SparseAttention", "stage", self.stage, ("prefill", "encode"))
        object.__setattr__(self, "law", tuple(self.law))
        object.__setattr__(self, "tokens_range", tuple(self.tokens_range))
        if self.law:
            self._check_law()
        if self.tokens_range and not (len(self.tokens_range) == 2 and self.tokens_range[0] <= self.tokens_range[1]):  # noqa: PLR2004
            raise ValueError(f"SparseAttention.tokens_range={self.tokens_range} must be the least and the most tokens")

    def _check_law(self) -> None:
        given = f"SparseAttention.law={self.law}"
        if len(self.law) != 3:  # noqa: PLR2004
            raise ValueError(f"{given} must be (density, tokens, exponent); leave it out for a constant density")
        density, tokens, exponent = self.law
        if not (0 < density <= 1 and tokens >= 1 and exponent >= 0):
            raise ValueError(f"{given} must be a share of one, tokens from 1, and an exponent of 0 or more; it falls")
        if not is_one(self.density):
            raise ValueError(f"{given} and density={self.density} exclude each other; give one of them")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return f"{self.stage} attention"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """Which attention scores it must see."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of model and request."""
        return frozenset({"vit_attention"} if self.stage == "encode" else ())

    @property
    def stages(self) -> str:
        """The part of the query that it edits."""
        return "encoder" if self.stage == "encode" else "attention"

    def density_at(self, tokens: Quantity) -> Quantity:
        """Return the share of the pairs that is computed at a length.

        Raises
        ------
        Unsupported
            If a constant density was published for other lengths.
        """
        if self.law:
            density, at, exponent = self.law
            falling: Quantity = density * (np.maximum(tokens, 1.0) / at) ** -exponent
        else:
            self._check_range(tokens)
            falling = self.density
        return np.minimum(np.maximum(falling, self.block / np.maximum(tokens, self.block)), 1.0)

    def _check_range(self, tokens: Quantity) -> None:
        if not self.tokens_range:
            return
        least, most = self.tokens_range
        if np.min(tokens) < least or np.max(tokens) > most:
            asked = f"{np.min(tokens):g}" if np.min(tokens) < least else f"{np.max(tokens):g}"
            raise Unsupported(
                f"SparseAttention.density={self.density} of {self.name} was published for {least:g} to {most:g} tokens "
                f"and not for {asked}; give a law that falls with the length, or a tokens_range of your own"
            )

    def apply(self, query: Query) -> Query:
        """Return the query with sparse attention, and the estimate's cost."""
        if not self.law and is_one(self.density) and self.estimator == "none":
            return query
        segments = query.decoder if self.stage == "prefill" else query.encoder
        changed, operators = [], []
        for segment in segments:
            if not _is_full(segment):
                changed.append(segment)
                continue
            scanned = (_scanned_prefill if self.stage == "prefill" else _scanned_encode)(query, segment)
            density = self.density_at(scanned.tokens)
            if self.visual_only:
                density = 1.0 - scanned.visual_fraction * (1.0 - density)
            changed.append(replace(segment, density=segment.density * density))
            if self.estimator != "none":
                operators += estimate(self.estimator, scanned, stride=self.estimator_stride, block=self.block)
        stage: Stage = self.stage
        added = (Overhead(stage, tuple(operators)),) if operators else ()
        parts = {"decoder" if stage == "prefill" else "encoder": tuple(changed)}
        return replace(query, overheads=query.overheads + added, **parts)  # type: ignore[arg-type]


def _is_full(segment: Segment) -> bool:
    """Return whether a segment attends over everything: windows are sparse already, and recurrences have no pairs."""
    mixer = segment.layer.mixer
    if isinstance(mixer, TracedMixerSpec):
        raise Unsupported(
            "a traced model does not say how its attention is laid out; sparse attention needs a known one"
        )
    if isinstance(mixer, RecurrentSpec | CrossAttentionSpec):
        return False
    grouped = isinstance(mixer, AttentionSpec) and mixer.grouping == "window"
    return mixer.window >= UNBOUNDED and not grouped


def _scanned_prefill(query: Query, segment: Segment) -> Scanned:
    turn = query.turns[0]
    visual, other = turn_tokens(query, turn)
    visual, other = visual * segment.visual_keep, other * segment.text_keep
    rows, prefix = visual + other, turn.prefix_tokens * segment.prefix_share
    return Scanned.of(
        segment,
        tp=query.parallelism.tp,
        rows=rows * query.replica_batch,
        pairs=causal_pairs(rows, prefix=prefix) * query.replica_batch,
        tokens=rows + prefix,
        visual_fraction=visual / np.maximum(rows, 1.0),
    )


def _scanned_encode(query: Query, segment: Segment) -> Scanned:
    """Return what the encoder scans: each item sees itself, in both directions."""
    media, turn, keep = query.media, query.turns[0], segment.visual_keep
    pictures = query.replica_batch * turn.visual_share
    rows, pairs = media.rows * keep, media.pairs * (keep * keep)
    return Scanned.of(
        segment,
        tp=query.parallelism.encoder,
        rows=rows * pictures,
        pairs=pairs * pictures,
        tokens=pairs / np.maximum(rows, 1.0),
        visual_fraction=1.0,
    )
