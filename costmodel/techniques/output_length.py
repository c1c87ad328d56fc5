"""Fewer output tokens: shorter answers, or a short answer first and a long one only where it is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.query import Query, Turn
from costmodel.techniques.checks import check_least, check_share, is_one

UNCACHED_TOKENS: Final = 1.0
"""Tokens of a prompt that is cached which are computed all the same: the last one gives the first output."""


@dataclass(frozen=True, slots=True)
class OutputLength:
    """Changes how much is generated.

    Parameters
    ----------
    scale : float or ndarray
        Output tokens over those of the request.
    short_tokens : float or ndarray, optional
        Length of the answer that is always given first; its perplexity decides (CAR), which costs nothing more.
    long_probability : float or ndarray
        Chance that the answer of full length follows, in a turn on the cached prompt. The short one is paid all the
        same and leaves the context: E[output] = short + probability x long.
    """

    scale: Quantity = 1.0
    short_tokens: Quantity | None = None
    long_probability: Quantity = 1.0
    name: str = "OutputLength"

    def __post_init__(self) -> None:
        """Refuse what cannot be, or would be ignored."""
        check_least(self.name, "scale", self.scale, 0.0, "1 changes nothing")
        if not np.min(self.scale) > 0:
            raise ValueError(f"{self.name}.scale={self.scale!r} must be above 0; 1 changes nothing")
        check_least(self.name, "short_tokens", self.short_tokens, 1, "leave it out for one answer alone")
        check_share(self.name, "long_probability", self.long_probability, zero=True)
        if self.short_tokens is None and not is_one(self.long_probability):
            raise ValueError(f"{self.name}.long_probability is that of a second answer; give short_tokens too")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "output"

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
        return "output"

    def apply(self, query: Query) -> Query:
        """Return the query whose turns answer at another length."""
        if self.short_tokens is None and is_one(self.scale):
            return query
        turns = tuple(new for turn in query.turns for new in self._turns(query, turn))
        return replace(query, turns=turns)

    def _turns(self, query: Query, turn: Turn) -> tuple[Turn, ...]:
        # At least one token comes out, and no answer gets longer by rounding up to it.
        scaled = np.maximum(turn.output_tokens * self.scale, np.minimum(turn.output_tokens, 1.0))
        if self.short_tokens is None:
            return (replace(turn, output_tokens=scaled),)
        prompt = query.media.marker_tokens * turn.visual_share + turn.text_tokens
        again = Turn(
            visual_share=0.0,
            text_tokens=UNCACHED_TOKENS,
            output_tokens=scaled,
            prefix_tokens=turn.prefix_tokens + prompt - UNCACHED_TOKENS,
            probability=turn.probability * self.long_probability,
            repeats=turn.repeats,
            prefix_visual_share=turn.prefix_visual_share + turn.visual_share,
        )
        return replace(turn, output_tokens=self.short_tokens), again
