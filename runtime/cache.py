"""The static cache of keys and values: reserved once for as many tokens as a request may reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from costmodel.layers import AttentionSpec
from costmodel.models import DecoderSpec
from costmodel.units import UNBOUNDED
from runtime.attention import attend_one, attend_prompt


class Cache(Protocol):
    """What layers ask of a cache: it keeps keys and values, and attends over what it kept."""

    def attend_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None
    ) -> Tensor:
        """Return the attention of whole prompts, and keep their keys and values; without a mask it is causal."""

    def attend_step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: float, *, scale: float | None) -> Tensor:
        """Return the attention of new tokens over a window of what was kept, themselves included."""


@dataclass(slots=True, eq=False)
class KvCache:
    """Keys and values of all layers, and how far each sequence has come.

    Parameters
    ----------
    keys, values : list of Tensor, shape (batch, kv_heads, capacity, head_dim)
        One a layer.
    lengths : Tensor of int, shape (batch,)
        Tokens that each sequence holds.
    offsets : Tensor of int, shape (batch,)
        Position of the next token minus their number: pictures take fewer positions than tokens.
    longest : int
        The largest of `lengths`, known to the host.
    equal : bool
        Whether all lengths are the same.
    fixed : bool
        Whether a step reads the whole reserve behind a mask, so that its shapes never change (CUDA graphs).
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    offsets: Tensor
    longest: int = 0
    equal: bool = True
    fixed: bool = False

    @staticmethod
    def reserve(spec: DecoderSpec, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> KvCache:
        """Return an empty cache for so many sequences of so many tokens."""
        mixers = [layer.mixer for layer in spec.layers()]
        shapes = [(batch, m.kv_heads, capacity, m.head_dim) for m in mixers if isinstance(m, AttentionSpec)]
        keys, values = ([torch.zeros(s, device=device, dtype=dtype) for s in shapes] for _ in range(2))
        lengths, offsets = (torch.zeros(batch, device=device, dtype=torch.long) for _ in range(2))
        return KvCache(keys, values, lengths, offsets)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can reach."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Reserved memory [bytes]."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def attend_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None
    ) -> Tensor:
        """Return the attention of whole prompts, and keep their keys and values."""
        self.fill(layer, k, v)
        return attend_prompt(q, k, v, mask, scale=scale)

    def attend_step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: float, *, scale: float | None) -> Tensor:
        """Return the attention of one new token a sequence."""
        self.append(layer, k, v)
        span, mask = self.span(window)
        return attend_one(q, self.keys[layer][:, :, span], self.values[layer][:, :, span], mask, scale=scale)

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the prompt's keys and values; those of padding are overwritten before they are read."""
        self.keys[layer][:, :, : keys.shape[2]] = keys
        self.values[layer][:, :, : values.shape[2]] = values

    def prompt(self, lengths: Tensor, offsets: Tensor, longest: int, *, equal: bool) -> None:
        """Note what the prompts left."""
        self.lengths.copy_(lengths)
        self.offsets.copy_(offsets)
        self.longest, self.equal = longest, equal

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of one new token a sequence, shape (batch, kv_heads, 1, head_dim)."""
        if self.equal and not self.fixed:
            self.keys[layer][:, :, self.longest] = keys[:, :, 0]
            self.values[layer][:, :, self.longest] = values[:, :, 0]
            return
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self.keys[layer][rows, :, self.lengths] = keys[:, :, 0]
        self.values[layer][rows, :, self.lengths] = values[:, :, 0]

    def span(self, window: float) -> tuple[slice, Tensor | None]:
        """Return what a new token reads of the reserve, and the mask over it; None where it sees all of that.

        Parameters
        ----------
        window : float
            Keys that it sees at most, itself included.
        """
        if self.fixed:
            return slice(0, self.capacity), self._mask(0, self.capacity, window)
        end = self.longest + 1
        start = 0 if window == UNBOUNDED else max(0, end - int(window))
        if self.equal:
            return slice(start, end), None
        return slice(0, end), self._mask(0, end, window)

    def _mask(self, start: int, end: int, window: float) -> Tensor:
        index = torch.arange(start, end, device=self.lengths.device)
        behind = self.lengths[:, None] - index
        seen = behind >= 0 if window == UNBOUNDED else (behind >= 0) & (behind < int(window))
        return seen[:, None, None]

    def advance(self) -> None:
        """Count the token that every layer has written."""
        self.lengths.add_(1)
        self.longest += 1
