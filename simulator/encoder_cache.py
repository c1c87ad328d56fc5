"""Encoder outputs by content: who needs them, what may go. Check, then act; no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class EncoderCache:
    """The cache of one worker; unreferenced entries stay until room is needed, the oldest goes first.

    Parameters
    ----------
    tokens : int
        Room, in embeddings.
    """

    __slots__ = ("entries", "free", "hits", "idle", "misses", "reclaimable", "tokens")

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.free = tokens
        self.entries: dict[int, list[int]] = {}  # content -> [tokens, requests that need it]
        self.idle: OrderedDict[int, int] = OrderedDict()  # content -> tokens, the one that was needed last at the end
        self.reclaimable = 0
        self.hits = self.misses = 0

    def use(self, content: int) -> bool:
        """Hold an entry if it is there, and say whether it is."""
        entry = self.entries.get(content)
        if entry is None:
            return False
        if not entry[1]:
            self.reclaimable -= self.idle.pop(content)
        entry[1] += 1
        self.hits += 1
        return True

    def fits(self, tokens: int) -> bool:
        """Return whether so many embeddings fit once unreferenced entries are gone."""
        return tokens <= self.free + self.reclaimable

    def put(self, content: int, tokens: int) -> None:
        """Add an entry with one reference; whoever calls has checked that it fits, or lets the cache run over."""
        while self.free < tokens and self.idle:
            oldest, size = self.idle.popitem(last=False)
            del self.entries[oldest]
            self.reclaimable -= size
            self.free += size
        self.free -= tokens
        self.entries[content] = [tokens, 1]
        self.misses += 1

    def drop(self, content: int) -> None:
        """Give a reference back."""
        entry = self.entries[content]
        entry[1] -= 1
        if not entry[1]:
            self.idle[content] = entry[0]
            self.reclaimable += entry[0]

    def remove(self, content: int) -> None:
        """Take out an entry that only one needs, who needs it no longer."""
        self.free += self.entries.pop(content)[0]

    @property
    def referenced(self) -> int:
        """Embeddings that somebody needs."""
        return self.tokens - self.free - self.reclaimable

    def audit(self) -> Iterator[str]:
        """Yield what does not add up."""
        held = sum(size for size, _ in self.entries.values())
        if held + self.free != self.tokens:
            yield f"entries={held} and free={self.free} embeddings must add up to {self.tokens}"
        if sum(self.idle.values()) != self.reclaimable:
            yield f"reclaimable={self.reclaimable} embeddings, and {sum(self.idle.values())} are idle"
