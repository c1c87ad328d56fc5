"""A stream: the prompt comes chunk by chunk, and between chunks only sinks and windows stay.

Positions stay those of the whole stream.

References
----------
.. [1] G. Xiao et al., "Efficient streaming language models with attention sinks", ICLR 2024 (arXiv:2309.17453).
.. [2] R. Xu et al., "StreamingVLM", 2025 (arXiv:2510.09608): windows of text and of visual tokens apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from costmodel.errors import Unsupported
from costmodel.techniques.stream_state import StreamState
from runtime.techniques.plan import refuse
from runtime.techniques.stores import PlainStore, Store


def last(places: Tensor, count: int) -> Tensor:
    """Return the last of some places."""
    return places[max(len(places) - count, 0) :]


class Streamer:
    """Keeps a state that does not grow.

    Parameters
    ----------
    parameters : StreamState
    """

    def __init__(self, parameters: StreamState) -> None:
        refuse(parameters, neutral={"budget_tokens": 0.0, "recompute": False})
        for field in ("sink_tokens", "text_window", "visual_window_tokens", "chunk_tokens"):
            if getattr(parameters, field) != int(getattr(parameters, field)):
                raise Unsupported(f"StreamState.{field}={getattr(parameters, field)!r} does not run; give whole tokens")
        self.parameters = parameters
        self.index = torch.arange(0)
        self.visual = torch.zeros(0, dtype=torch.bool)
        self.seen = 0

    def chunks(self, tokens: int) -> list[tuple[int, int]]:
        """Return where each chunk of a prompt starts and ends."""
        size = int(self.parameters.chunk_tokens) or tokens
        return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def came(self, visual: Tensor) -> None:
        """Note tokens that were added to all stores."""
        new = torch.arange(self.seen, self.seen + len(visual))
        self.index, self.visual = torch.cat((self.index, new)), torch.cat((self.visual, visual.cpu()))
        self.seen += len(visual)

    def kept(self) -> Tensor:
        """Return the places that stay: sinks, the last text, the last visual tokens."""
        sinks = self.index < self.parameters.sink_tokens
        text = last((~sinks & ~self.visual).nonzero()[:, 0], int(self.parameters.text_window))
        shown = last((~sinks & self.visual).nonzero()[:, 0], int(self.parameters.visual_window_tokens))
        return torch.cat((sinks.nonzero()[:, 0], text, shown)).sort().values

    def trim(self, stores: Sequence[Store]) -> None:
        """Free what does not stay; without windows everything does."""
        places = self.kept()
        if not self.parameters.state_tokens or len(places) == len(self.index):
            return
        self.index, self.visual = self.index[places], self.visual[places]
        for store in stores:
            if isinstance(store, PlainStore):
                here = places.to(store.keys.device)
                store.keys, store.values = store.keys[:, :, here], store.values[:, :, here]
