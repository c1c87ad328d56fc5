"""A decode step of fixed shapes: as one CUDA graph, which the host launches once, or through torch.compile."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from runtime.cache import KvCache
from runtime.model import Lvlm

WARM_UP: Final = 3
"""Steps before capture, as PyTorch's notes on CUDA graphs do."""


class GraphedStep:
    """Replays the step of a model on a cache whose shapes stay fixed.

    Parameters
    ----------
    model : Lvlm
        On a CUDA device.
    cache : KvCache
        Behind a prefill, with room for a step at least. From here on each step reads all of it behind a mask.
    """

    def __init__(self, model: Lvlm, cache: KvCache) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"steps='graph' needs a CUDA device, and the model is on {model.device}; use plain")
        cache.fixed = True
        self.cache, self.tokens = cache, torch.zeros_like(cache.lengths)
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step(model)
        torch.cuda.current_stream(model.device).wait_stream(side)
        lengths, longest = cache.lengths.clone(), cache.longest
        with torch.cuda.graph(self.graph):
            self.logits = model.decode_step(self.tokens, cache)
        cache.lengths.copy_(lengths)
        cache.longest = longest

    def _step(self, model: Lvlm) -> None:
        """Run a step and forget it: the first real one writes over what it left."""
        lengths, longest = self.cache.lengths.clone(), self.cache.longest
        model.decode_step(self.tokens, self.cache)
        self.cache.lengths.copy_(lengths)
        self.cache.longest = longest

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits of what follows these tokens, one a sequence; the next call writes over them."""
        if self.cache.longest >= self.cache.capacity:
            raise ValueError(f"cache is full with {self.cache.capacity} tokens; reserve more")
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.cache.longest += 1
        return self.logits


class CompiledStep:
    """Runs the layers of a step through torch.compile, on a cache whose shapes stay fixed.

    Parameters
    ----------
    model : Lvlm
    cache : KvCache
        Behind a prefill. From here on each step reads all of it behind a mask.
    """

    def __init__(self, model: Lvlm, cache: KvCache) -> None:
        cache.fixed = True
        self.model, self.cache = model, cache
        self.step = torch.compile(model.decoder.step)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits of what follows these tokens, one a sequence."""
        return self.model.decode_step(tokens, self.cache, step=self.step)
