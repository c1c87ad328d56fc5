"""What one layer keeps of one request: keys and values as long as they are needed, and not a byte more.

A store grows by what is appended, so that its bytes are those of what is kept at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from runtime.attention import attend_behind


class Store(Protocol):
    """Keys and values of one layer, shape (1, kv_heads, tokens, head_dim) where all heads keep as many."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens."""

    def drop(self, count: int) -> None:
        """Forget the last tokens, which were rejected."""

    def settle(self) -> None:
        """Do what follows once the last tokens are sure to stay."""

    def attend(self, q: Tensor, *, scale: float | None) -> Tensor:
        """Return the attention of the last tokens over what is kept."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Everything that is held on the device."""


def held_bytes(stores: Sequence[Store]) -> int:
    """Return the bytes of all tensors that stores hold on the device, by the storage behind them [bytes]."""
    found = {part.data_ptr(): part.untyped_storage().nbytes() for store in stores for part in store.tensors}
    return sum(found.values())


class PlainStore:
    """Everything as it came."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = k.contiguous().clone(), v.contiguous().clone()

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens."""
        self.keys, self.values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)

    def drop(self, count: int) -> None:
        """Forget the last tokens."""
        if count:
            self.keys, self.values = self.keys[:, :, :-count].clone(), self.values[:, :, :-count].clone()

    def settle(self) -> None:
        """Nothing follows."""

    def attend(self, q: Tensor, *, scale: float | None) -> Tensor:
        """Return the attention of the last tokens."""
        return attend_behind(q, self.keys, self.values, scale=scale)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Keys and values."""
        return self.keys, self.values


class RaggedStore:
    """Heads that keep different tokens, each a store of its own."""

    def __init__(self, heads: Sequence[Store]) -> None:
        self.heads = heads

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens to every head."""
        for head, (key, value) in zip(
            self.heads, zip(k.chunk(len(self.heads), 1), v.chunk(len(self.heads), 1), strict=True), strict=True
        ):
            head.append(key, value)

    def drop(self, count: int) -> None:
        """Forget the last tokens."""
        for head in self.heads:
            head.drop(count)

    def settle(self) -> None:
        """Settle every head."""
        for head in self.heads:
            head.settle()

    def attend(self, q: Tensor, *, scale: float | None) -> Tensor:
        """Return the attention of the last tokens, head by head at its own length."""
        queries = q.chunk(len(self.heads), 1)
        return torch.cat([head.attend(part, scale=scale) for head, part in zip(self.heads, queries, strict=True)], 1)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Those of all heads."""
        return [part for head in self.heads for part in head.tensors]
