"""SGLang: prompts first, in batches of their own; decoding waits while there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from simulator.batching import Decision, View

PREFILL_FIRST: Final = Decision(mixed=False)


@dataclass(frozen=True, slots=True)
class Policy:
    """See `simulator.batching.BatchPolicy`.

    References
    ----------
    .. [1] SGLang server arguments: `chunked_prefill_size` is 8192 on devices of 60 to 160 GB; mixed chunks are off.
    """

    token_budget: int | None = 8192

    def decide(self, view: View) -> Decision:
        """Return what the next step may hold."""
        del view
        return PREFILL_FIRST
