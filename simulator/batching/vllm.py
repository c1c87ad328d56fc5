"""vLLM V1: one budget a step, running requests in order, then waiting ones; prefill in chunks beside decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from simulator.batching import Decision, View

ALWAYS: Final = Decision(in_order=True)


@dataclass(frozen=True, slots=True)
class Policy:
    """See `simulator.batching.BatchPolicy`.

    References
    ----------
    .. [1] vLLM, `vllm/v1/core/sched/scheduler.py`.
    """

    token_budget: int | None = None

    def decide(self, view: View) -> Decision:
        """Return what the next step may hold."""
        del view
        return ALWAYS
