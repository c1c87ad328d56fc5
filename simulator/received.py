"""Embeddings that other workers encode: how far a prompt may be computed, and the room that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from simulator.encoder import Plan
from simulator.encoder_cache import EncoderCache
from simulator.resolve import Resolved
from simulator.transfer import Room

NOTHING: Final[list[int]] = []
"""Items that a step of this worker encodes: none."""


class Received:
    """The place of `simulator.encoder.Encoder` in a worker that does not encode.

    Room for all embeddings of a request is given out at once, in order of asking, so that no two requests wait for
    what the other holds. An item's room is free again when its tokens are in the KV cache.

    Parameters
    ----------
    resolved : Resolved
        Items by request, their places and sizes.
    tokens : int
        Room [embeddings]; the largest request must fit.
    """

    __slots__ = ("_computed", "batch", "cache", "free", "held", "landed", "resolved", "room", "tokens")

    def __init__(self, resolved: Resolved, tokens: int) -> None:
        self.resolved = resolved
        self.tokens = self.free = tokens
        self.cache = EncoderCache(0)  # nothing is encoded here
        self.batch = NOTHING
        self.held: dict[int, int] = {}  # by request, the item behind its last one
        self.landed: set[int] = set()  # items whose embeddings are here
        self._computed: dict[int, int] = {}  # by request, its first item that is not yet in the KV cache
        self.room = Room(lambda: self.free)

    def ask(self, request: int, on_grant: Callable[[], None]) -> None:
        """Ask for room for the embeddings of a request."""
        self.room.ask(request, self._size(request), lambda: self._grant(request, on_grant))

    def _size(self, request: int) -> int:
        r = self.resolved
        return sum(r.item_embeds[r.first_item[request] : r.first_item[request + 1]])

    def _grant(self, request: int, on_grant: Callable[[], None]) -> None:
        self.free -= self._size(request)
        self._computed[request] = self.resolved.first_item[request]
        self.held[request] = self.resolved.first_item[request + 1]
        on_grant()

    def land(self, request: int, item: int) -> None:
        """Note that an item's embeddings are here, unless its tokens came out of the cache meanwhile."""
        if item >= self._computed.get(request, item + 1):
            self.landed.add(item)

    def open_step(self) -> None:
        """Start a step."""

    def plan(self, request: int, start: int, tokens: int) -> Plan:
        """Return how far a chunk may go: up to the first item that has not landed."""
        r = self.resolved
        item, last = self._computed.get(request, r.first_item[request]), r.first_item[request + 1]
        end = start + tokens
        while item < last and r.item_start[item] < end:
            if item not in self.landed and r.item_end[item] > start:
                return max(0, r.item_start[item] - start), NOTHING, item
            item += 1
        return tokens, NOTHING, item

    def commit(self, request: int, plan: Plan) -> None:
        """Nothing is encoded here."""

    def computed(self, request: int, tokens: int) -> None:
        """Give back the room of items whose tokens are all in the KV cache."""
        r = self.resolved
        item, last = self._computed[request], self.held[request]
        while item < last and r.item_end[item] <= tokens:
            self.landed.discard(item)
            self.free += r.item_embeds[item]
            item += 1
        self._computed[request] = item
        if item == last:
            del self._computed[request], self.held[request]
        self.room.offer()

    def audit(self) -> Iterator[str]:
        """Yield what does not add up once all requests have ended."""
        if self.free != self.tokens:
            yield f"{self.tokens - self.free} embeddings of {self.tokens} are held by nobody"
        if len(self.room) or self.held or self.landed:
            yield f"{len(self.room)} requests still wait for room, {len(self.held)} hold some"

    def forget(self, request: int) -> None:
        """Give back all room of a request that leaves, or is preempted and will need its embeddings again."""
        self.room.drop(request)
        if request in self.held:
            self.computed(request, self.resolved.prompt_tokens[request])
