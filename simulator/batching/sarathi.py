"""Sarathi-Serve: decoding sequences first, then prompts that have begun, then new ones, under a small budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from simulator.batching import Decision, View

ALWAYS: Final = Decision()


@dataclass(frozen=True, slots=True)
class Policy:
    """See `simulator.batching.BatchPolicy`.

    References
    ----------
    .. [1] A. Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024: token
       budgets of 512 (strict) and 2048 (relaxed).
    """

    token_budget: int | None = 2048

    def decide(self, view: View) -> Decision:
        """Return what the next step may hold."""
        del view
        return ALWAYS
