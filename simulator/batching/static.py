"""Static batching: a batch starts when the one before it has ended, prompts first and whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from simulator.batching import Decision, View

START: Final = Decision(mixed=False)
GO_ON: Final = Decision(mixed=False, admits=False)
UNBOUNDED: Final = 1 << 40
"""Tokens of a budget that ends no step."""


@dataclass(frozen=True, slots=True)
class Policy:
    """See `simulator.batching.BatchPolicy`."""

    token_budget: int | None = UNBOUNDED

    def decide(self, view: View) -> Decision:
        """Return what the next step may hold."""
        return START if not view.prefilling and not view.decoding else GO_ON
