"""Fewer frames of a video: some are chosen, by a scorer that sees many more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.media import SUMMED, MediaTotals
from costmodel.operators import Kind, Operator
from costmodel.query import Overhead, Query
from costmodel.techniques.checks import anything, check_alone, check_least, check_share, is_one

SCORER_BATCH: Final = 32
"""Frames that a scorer sees at once (FOCUS scores with BLIP-large in batches of 32)."""
BY_FRAMES: Final = (*SUMMED, "adapter_tokens", "frames")
"""Totals of a video that follow its frames; encoders attend inside a frame or a pair of them."""


@dataclass(frozen=True, slots=True)
class FrameSelect:
    """Keeps some of the candidate frames: those that the request gives to the model.

    Videos alone are touched, and a request without one is left as it is.

    Parameters
    ----------
    keep : float or ndarray
        Share of the frames that stays.
    frames : float or ndarray, optional
        In its place, how many frames stay.
    scored_share : float or ndarray
        Share of the candidates that is scored: all of them by most methods, few by bandits (FOCUS).
    scorer_flops_per_frame : float or ndarray
        Work of the scorer on one frame [FLOP].
    scorer_bytes : float or ndarray
        Weights of the scorer, which stay resident [bytes].
    extra_decode : bool
        Whether the host decodes the frames that are scored, beside those that stay.
    per_question : bool
        Whether scores depend on the question: then every turn pays for them, not that with the video alone.

    Notes
    -----
    Without a scorer's work a method still decodes its candidates. Selection itself (top-k over scores) is not priced.
    """

    keep: Quantity = 1.0
    frames: Quantity | None = None
    scored_share: Quantity = 1.0
    scorer_flops_per_frame: Quantity = 0.0
    scorer_bytes: Quantity = 0.0
    extra_decode: bool = True
    per_question: bool = True
    name: str = "FrameSelect"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        check_share(self.name, "keep", self.keep)
        check_alone(self.name, keep=None if is_one(self.keep) else self.keep, frames=self.frames)
        check_least(self.name, "frames", self.frames, 1, "a video keeps at least one")
        check_share(self.name, "scored_share", self.scored_share)
        check_least(self.name, "scorer_flops_per_frame", self.scorer_flops_per_frame, 0, "0 is no scorer")
        check_least(self.name, "scorer_bytes", self.scorer_bytes, 0, "0 is no scorer")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "frames"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """It needs no attention of the model."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of the request."""
        return frozenset({"whole_video", "query"} if self.per_question else {"whole_video"})

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "frames"

    def apply(self, query: Query) -> Query:
        """Return the query with fewer frames, and with the scorer on the candidates."""
        media = query.media
        if self.frames is None and is_one(self.keep):
            return query
        if not anything(media.frames):
            self._check_known(media)
            return query
        keep: Quantity = self.keep if self.frames is None else np.minimum(self.frames / media.frames, 1.0)
        keep = keep if isinstance(keep, np.ndarray) else float(keep)
        if is_one(keep):
            return query
        active: Quantity = np.asarray(keep < 1.0, dtype=float) if isinstance(keep, np.ndarray) else 1.0
        decoded: Quantity = np.maximum(keep, self.scored_share) if self.extra_decode else keep
        shorter = _shorter(media, keep, decoded)
        left = shorter.visual_tokens / np.maximum(media.visual_tokens, 1.0)
        return replace(
            query,
            media=shorter,
            visual_tokens=query.visual_tokens * left,
            overheads=(*query.overheads, *self._scorer(query, active)),
        )

    def _check_known(self, media: MediaTotals) -> None:
        if np.any(media.items) and not media.item_rows:
            raise ValueError(f"{self.name} needs the frames of a video; give one by its size, not visual_tokens")

    def _scorer(self, query: Query, active: Quantity) -> tuple[Overhead, ...]:
        if not anything(self.scorer_flops_per_frame) and not anything(self.scorer_bytes):
            return ()
        scored = query.media.frames * self.scored_share * query.replica_batch * active
        passes = np.ceil(scored / SCORER_BATCH)
        scorer = Operator(
            "frame_select.scorer",
            Kind.GEMM,
            flops=scored * self.scorer_flops_per_frame,
            weight_bytes=passes * self.scorer_bytes,
            launches=passes,
        )
        resident = self.scorer_bytes * active
        return (Overhead("encode", (scorer,), peak_bytes=resident, with_pictures=not self.per_question),)


def _shorter(media: MediaTotals, keep: Quantity, decoded: Quantity) -> MediaTotals:
    """Return the totals of a request with this share of its frames, of which the host decodes another."""
    if media.video is not None:
        return _beside(media, media.video, _shorter(media.video, keep, decoded))
    changed: dict[str, Any] = {name: getattr(media, name) * keep for name in BY_FRAMES}
    rows = media.item_rows if isinstance(keep, np.ndarray) else tuple(row * keep for row in media.item_rows)
    largest = np.minimum(media.largest_rows, changed["rows"])
    return replace(media, frame_pixels=media.frame_pixels * decoded, largest_rows=largest, item_rows=rows, **changed)


def _beside(media: MediaTotals, video: MediaTotals, shorter: MediaTotals) -> MediaTotals:
    """Return the totals of a request with images, in which the part of the videos is replaced."""
    changed: dict[str, Any] = {
        name: getattr(media, name) - getattr(video, name) + getattr(shorter, name)
        for name in (*BY_FRAMES, "frame_pixels")
    }
    images = len(media.item_rows) - len(video.item_rows)
    rows = (*media.item_rows[:images], *shorter.item_rows)
    return replace(media, video=shorter, item_rows=rows, **changed)
