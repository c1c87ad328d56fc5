"""RelaxedVerify: the target lets pass a share of the tokens that it would have rejected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.query import Query
from costmodel.speculation import acceptance_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelaxedVerify:
    """Verification that accepts a mismatch with some probability: no longer lossless.

    Parameters
    ----------
    name : str
    probability : float or ndarray
        Chance that a token is accepted which the target would reject.

    Notes
    -----
    An acceptance a becomes a + (1 - a) probability, which gives the accepted tokens of Table 10 of arXiv:2604.05546
    within 3 %. A measured mean is turned into the acceptance of a chain first.
    """

    name: str = "relaxed_verify"
    probability: Quantity = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not (np.all(np.greater_equal(self.probability, 0.0)) and np.all(np.less_equal(self.probability, 1.0))):
            raise ValueError(f"RelaxedVerify.probability={self.probability!r} must lie in [0, 1]")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "verify"

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "draft"

    @property
    def needs_attention_map(self) -> Literal["none"]:
        """Which attention scores it must see."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs from model and request."""
        return frozenset()

    def apply(self, query: Query) -> Query:
        """Return the query with a draft that is accepted more often."""
        if isinstance(self.probability, float | int) and self.probability == 0:
            return query
        draft = query.draft
        if draft is None:
            raise ValueError(f"{self.name} relaxes the verification of a draft, and there is none; speculate first")
        strict = draft.acceptance if draft.accepted is None else acceptance_of(draft.accepted, draft.levels)
        relaxed = strict + (1.0 - strict) * self.probability
        return replace(query, draft=replace(draft, acceptance=relaxed, accepted=None))
