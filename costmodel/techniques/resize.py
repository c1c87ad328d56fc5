"""Fewer pixels: pictures are shrunk, and perhaps asked for again at full size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.media import MediaTotals
from costmodel.memo import remember
from costmodel.query import Query, Turn
from costmodel.techniques.checks import anything, check_share, is_one

BY_PIXELS: Final = (
    "patches",
    "rows",
    "window_pairs",
    "visual_tokens",
    "marker_tokens",
    "resized_pixels",
    "cross_tokens",
    "adapter_tokens",
)
"""Totals that follow the pixels."""
BY_SQUARE: Final = ("pairs", "block_pairs")
"""Totals that follow their square where an encoder attends over the whole picture, and the pixels where it tiles."""
REQUEST_TOKENS: Final = 1.0
"""Tokens of a second turn that are not cached when the first one stays: at least one is always computed."""


@dataclass(frozen=True, slots=True)
class Resize:
    """Shows the model a share of the pixels; a router may ask for the whole picture in a second turn (VisionThink).

    Parameters
    ----------
    pixels : float or ndarray
        Share of the pixels that the encoder sees at first.
    call_probability : float or ndarray
        Chance that the full size is asked for, in a turn that encodes and prefills it, and answers again: the output
        of the first turn is paid for nothing.
    keep_first : bool
        Whether the first turn (its small pictures, text and answer) stays in the context of the second.

    Notes
    -----
    TTFT stays that of the first turn; the total is the expected one. Where the chance is large, this costs more than
    no resizing.
    """

    pixels: Quantity = 1.0
    call_probability: Quantity = 0.0
    keep_first: bool = True
    name: str = "Resize"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        check_share(self.name, "pixels", self.pixels)
        check_share(self.name, "call_probability", self.call_probability, zero=True)

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "pixels"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """It needs no attention of the model."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of the request: a router reads the question."""
        return frozenset({"query"}) if anything(self.call_probability) else frozenset()

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "pixels"

    def apply(self, query: Query) -> Query:
        """Return the query with smaller pictures, and with the turn at full size if there may be one."""
        if is_one(self.pixels) or not anything(query.media.items):
            return query
        whole = remember(query.model.cache, "sees_whole_pictures", lambda: (_sees_whole_pictures(query),))[0]
        first, *later = query.turns
        turns = query.turns
        if anything(self.call_probability):
            turns = (first, self._second(first, query, whole=whole), *later)
        media = _smaller(query.media, self.pixels, whole=whole)
        return replace(query, media=media, visual_tokens=query.visual_tokens * self.pixels, turns=turns)

    def _second(self, first: Turn, query: Query, *, whole: bool) -> Turn:
        """Return the turn that brings the pictures at full size, in the measure of the small ones."""
        called: Quantity = self.call_probability
        if isinstance(self.pixels, np.ndarray):  # at full size nobody asks again
            called = called * np.asarray(self.pixels < 1.0, dtype=np.float64)
        markers = query.media.marker_tokens * self.pixels * first.visual_share
        behind = first.prefix_tokens + markers + first.text_tokens + first.output_tokens
        return Turn(
            visual_share=first.visual_share / self.pixels,
            text_tokens=REQUEST_TOKENS if self.keep_first else first.text_tokens,
            output_tokens=first.output_tokens,
            prefix_tokens=behind if self.keep_first else first.prefix_tokens,
            probability=first.probability * called,
            repeats=first.repeats,
            prefix_visual_share=first.visual_share if self.keep_first else 0.0,
            pair_scale=1.0 / self.pixels if whole else 1.0,
        )


def _sees_whole_pictures(query: Query) -> bool:
    """Return whether the family's encoder attends over a whole picture, so that its pairs follow the square."""
    rule = query.model.media
    return rule is not None and not rule.unit().pairs


def _smaller(media: MediaTotals, pixels: Quantity, *, whole: bool) -> MediaTotals:
    square = pixels * pixels if whole else pixels
    factors = dict.fromkeys(BY_PIXELS, pixels) | dict.fromkeys(BY_SQUARE, square)
    return media.scaled(**factors, largest_rows=pixels)
