"""Speculative decoding: a draft proposes tokens, one step of the target verifies them.

A round is the draft's passes, one after another, and one step of the target whose rows are the proposed tokens and the
one before them. What follows an accepted token is the target's own next token, so a round gives one token more than
are accepted. Lossless means: as the target by itself, compressed or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from costmodel.base import Array, Quantity

if TYPE_CHECKING:
    from costmodel.query import Query, Stage

Origin: TypeAlias = Literal["model", "layers", "head"]
HALVINGS: Final = 60
"""Bisection steps: more change no double between 0 and 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """What proposes tokens, and how often it is right.

    Parameters
    ----------
    query : Query
        One pass of the draft as a decode step, and what it prefills; the target's turns and batch take the place of
        its own.
    levels : float or ndarray
        Tokens that a round proposes one behind another: of a chain all of them, of a tree its depth.
    passes : float or ndarray
        Forward passes of the draft in a round, one after another.
    acceptance : float or ndarray
        Chance that the token of a level is accepted if those before it were.
    accepted : float, ndarray or None
        Mean accepted tokens of a round where they were measured, the target's own token not among them.
    origin : {"model", "layers", "head"}
        A model beside the target; the target's own first layers, which share weights and cache with it; or a head of
        layers of its own on top of it, which shares embedding and output.
    parallel : bool
        Whether the draft has devices of its own and goes on while the target verifies.
    own_encoder : bool
        Whether it encodes the pictures by itself.
    """

    query: Query
    levels: Quantity
    passes: Quantity
    acceptance: Quantity = 0.8
    accepted: Quantity | None = None
    origin: Origin = "model"
    parallel: bool = False
    own_encoder: bool = False

    @property
    def accepted_tokens(self) -> Quantity:
        """Mean accepted tokens of a round."""
        return accepted_tokens(self.acceptance, self.levels) if self.accepted is None else self.accepted

    @property
    def round_tokens(self) -> Quantity:
        """Mean tokens of a round: those accepted, and the target's own next one."""
        return self.accepted_tokens + 1.0

    @property
    def keeps_on_device(self) -> bool:
        """Whether its weights and cache are memory beside the target's."""
        return self.origin != "layers" and not self.parallel

    def runs(self, stage: Stage) -> bool:
        """Return whether the draft takes part in a stage."""
        if stage in ("encode", "adapt"):
            return self.own_encoder
        return stage == "decode" or (stage == "prefill" and self.origin != "layers")

    def joined_s(self, stage: Stage, own_s: Quantity, draft_s: Quantity) -> Quantity:
        """Return how long target and draft take together [s].

        Parameters
        ----------
        stage : str
            Decode is a round, of which both times are all passes.
        own_s, draft_s : float or ndarray
            Time of the target, and of the draft [s].

        Notes
        -----
        A draft that goes on while the target verifies has worked ahead only if all it proposed is accepted; after a
        rejection it starts anew, and the target waits (PEARL, arXiv:2408.11850).
        """
        if not self.parallel:
            return own_s + draft_s
        ahead = self._all_accepted if stage == "decode" else 1.0
        return own_s + draft_s - ahead * np.minimum(own_s, draft_s)

    @property
    def _all_accepted(self) -> Quantity:
        """Chance that a round is accepted whole."""
        if self.accepted is None:
            return self.acceptance**self.levels
        return acceptance_of(self.accepted, self.levels) ** self.levels


def accepted_tokens(acceptance: Quantity, levels: Quantity) -> Quantity:
    """Return the mean accepted tokens of a chain: the sum over i = 1 … levels of acceptance^i.

    References
    ----------
    .. [1] Y. Leviathan, M. Kalman, Y. Matias, "Fast inference from transformers via speculative decoding", ICML 2023.
    """
    certain = np.equal(acceptance, 1.0)
    missed = np.where(certain, 1.0, 1.0 - np.asarray(acceptance))
    tokens = np.where(certain, levels, acceptance * (1.0 - np.power(acceptance, levels)) / missed)
    return tokens if tokens.shape else float(tokens)


def acceptance_of(accepted: Quantity, levels: Quantity) -> Quantity:
    """Return the acceptance at which so many tokens of a chain are accepted in the mean: the inverse of the above."""
    low: Array = np.zeros(np.broadcast(accepted, levels).shape)
    high = low + 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = np.asarray(accepted_tokens(middle, levels)) < accepted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high if high.shape else float(high)
