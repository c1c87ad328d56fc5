"""Fewer visual tokens out of the adapter: pooling, shuffling, or a resampler with learned queries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.operators import Kind, Operator
from costmodel.query import Overhead, Query
from costmodel.sums import busiest_share
from costmodel.techniques.checks import anything, check_alone, check_least, check_share, is_one
from costmodel.techniques.scoring import STATE_BYTES

FFN_RATIO: Final = 4
"""Hidden width of a resampler's feed-forward block over its own (BERT, and so the Q-Former)."""
LAYER_LAUNCHES: Final = 6  # queries, keys and values, attention, output, and two products


@dataclass(frozen=True, slots=True)
class AdapterReduce:
    """Sets how many tokens the adapter makes; the encoder and its patches stay.

    Parameters
    ----------
    keep : float or ndarray
        Share of the tokens that leave it.
    tokens_per_item : float or ndarray, optional
        In its place, tokens of an image or of a whole video (Video-LLaMA).
    tokens_per_frame : float or ndarray, optional
        In its place, tokens of an image or of every frame.
    layers : float or ndarray
        Layers of cross-attention of a resampler, that stands in front of the projector; 0 is pooling, which is free.
    width : float
        Its width; 0 is that of the encoder.
    queries : float or ndarray, optional
        Learned queries of a picture; not given, as many as tokens leave it.

    Notes
    -----
    Of n patches and q queries of a picture, a layer of width d costs, a multiply-add being two FLOPs,
    4 q d^2 (queries, output) + 4 n d_v d (keys, values) + 4 q n d (attention) + 4 q d (4 d) (feed-forward block).
    """

    keep: Quantity = 1.0
    tokens_per_item: Quantity | None = None
    tokens_per_frame: Quantity | None = None
    layers: Quantity = 0.0
    width: float = 0.0
    queries: Quantity | None = None
    name: str = "AdapterReduce"

    def __post_init__(self) -> None:
        """Refuse what cannot be, or says the same twice."""
        check_share(self.name, "keep", self.keep)
        kept = None if is_one(self.keep) else self.keep
        check_alone(self.name, keep=kept, tokens_per_item=self.tokens_per_item, tokens_per_frame=self.tokens_per_frame)
        for field in ("tokens_per_item", "tokens_per_frame", "queries"):
            check_least(self.name, field, getattr(self, field), 1, "leave it out for keep")
        check_least(self.name, "layers", self.layers, 0, "0 is no resampler")
        check_least(self.name, "width", self.width, 0, "0 is the encoder's")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "adapter"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """It needs no attention of the model."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """It needs nothing of model or request."""
        return frozenset()

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "adapter"

    def apply(self, query: Query) -> Query:
        """Return the query with other visual tokens, and with the resampler that makes them."""
        neutral = is_one(self.keep) and self.tokens_per_item is None and self.tokens_per_frame is None
        if not anything(query.media.items) or (neutral and not anything(self.layers)):
            return query
        seen = query.visual_tokens + query.media.cross_tokens
        keep = self._tokens(query) / np.maximum(seen, 1.0) if not neutral and is_one(self.keep) else self.keep
        media = query.media.scaled(adapter_keep=keep, cross_tokens=keep, block_pairs=keep * keep)
        overheads = (*query.overheads, *self._resampler(query, seen * keep))
        return replace(query, media=media, visual_tokens=query.visual_tokens * keep, overheads=overheads)

    def _tokens(self, query: Query) -> Quantity:
        if self.tokens_per_item is not None:
            return query.media.items * self.tokens_per_item
        assert self.tokens_per_frame is not None  # noqa: S101 - one of the two was given
        return query.media.pictures * self.tokens_per_frame

    def _resampler(self, query: Query, tokens: Quantity) -> tuple[Overhead, ...]:
        vision = query.model.vision
        if not anything(self.layers) or vision is None:
            return ()
        width, pictures = self.width or float(vision.width), np.maximum(query.media.pictures, 1.0)
        requests = query.replica_batch * busiest_share(query)
        patches = query.media.patches * query.media.adapter_patch_keep * requests
        queries = (tokens if self.queries is None else query.media.pictures * self.queries) * requests
        products = 4.0 * queries * width * width * (1 + FFN_RATIO) + 4.0 * patches * vision.width * width
        attention = 4.0 * queries * (patches / (pictures * requests)) * width
        weights = (2 * width * width * (1 + FFN_RATIO) + 2 * vision.width * width) * STATE_BYTES * self.layers
        moved = (queries * (8 + 2 * FFN_RATIO) * width + patches * (vision.width + 4 * width)) * STATE_BYTES
        work = Operator(
            "adapter_reduce.resampler",
            Kind.GEMM,
            flops=(products + attention) * self.layers,
            weight_bytes=weights,
            activation_bytes=moved * self.layers,
            launches=self.layers * LAYER_LAUNCHES,
        )
        return (Overhead("adapt", (work,), peak_bytes=weights, with_pictures=True),)
