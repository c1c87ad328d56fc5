"""The encoder inside a worker: which items a chunk needs, which are encoded in this step, and where it is cut."""

from __future__ import annotations

from typing import TypeAlias

from simulator.encoder_cache import EncoderCache
from simulator.resolve import Resolved

Plan: TypeAlias = tuple[int, list[int], int]
"""What a chunk is cut to [tokens], the items that it references anew, and the first item that it needs."""


class Encoder:
    """Encoder budget and cache of one worker.

    An item is encoded whole, in the step that computes its first token, before the language model runs. A chunk ends
    in front of an item for which this step's budget or the cache has no room (vLLM V1, `scheduler.py`).

    Parameters
    ----------
    resolved : Resolved
        Items by request, their places and sizes.
    budget : int
        Embeddings that one step may encode.
    cache_tokens : int
        Room of the cache [embeddings].
    """

    __slots__ = ("_next", "batch", "budget", "cache", "held", "left", "resolved")

    def __init__(self, resolved: Resolved, budget: int, cache_tokens: int) -> None:
        self.resolved = resolved
        self.budget = self.left = budget
        self.cache = EncoderCache(cache_tokens)
        self.batch: list[int] = []  # items encoded in this step
        self._next: dict[int, int] = {}  # by request, its first item that is not yet in the KV cache
        self.held: dict[int, int] = {}  # by request, the item behind the last that it references

    def open_step(self) -> None:
        """Start a step with the whole budget."""
        self.left = self.budget
        self.batch = []

    def plan(self, request: int, start: int, tokens: int) -> Plan:
        """Return how far a chunk may go and which items it needs; changes nothing."""
        r, entries = self.resolved, self.cache.entries
        item, last = self._next.get(request, r.first_item[request]), r.first_item[request + 1]
        held = self.held.get(request, item)
        while item < last and r.item_end[item] <= start:
            item += 1
        first, wanted = item, list[int]()
        budget, reserved, coming = self.left, 0, set[int]()
        while item < last and r.item_start[item] < start + tokens:
            if item >= held:
                content, size = r.item_content[item], r.item_embeds[item]
                known = entries.get(content)
                if content not in coming and (known is None or not known[1]):  # it takes room that may be evicted
                    if (known is None and size > budget) or not self.cache.fits(reserved + size):
                        return max(0, r.item_start[item] - start), wanted, first
                    budget -= size if known is None else 0
                    coming.add(content)
                    reserved += size
                wanted.append(item)
            item += 1
        return tokens, wanted, first

    def commit(self, request: int, plan: Plan) -> None:
        """Hold the items of a plan and encode those that are not cached."""
        _, wanted, first = plan
        r = self.resolved
        new = [item for item in wanted if not self.cache.use(r.item_content[item])]  # first keep what is there
        for item in new:
            if self.cache.use(r.item_content[item]):  # the same picture twice
                continue
            self.cache.put(r.item_content[item], r.item_embeds[item])
            self.left -= r.item_embeds[item]
            self.batch.append(item)
        if request not in self.held:
            self._next[request] = self.held[request] = first
        if wanted:
            self.held[request] = wanted[-1] + 1

    def computed(self, request: int, tokens: int) -> None:
        """Give back the items whose tokens are all in the KV cache."""
        r = self.resolved
        item, held = self._next[request], self.held[request]
        while item < held and r.item_end[item] <= tokens:
            self.cache.drop(r.item_content[item])
            item += 1
        self._next[request] = item
        if tokens >= r.last_item_end[request]:
            self.forget(request)

    def forget(self, request: int) -> None:
        """Give back all items of a request that is preempted or past its pictures."""
        held = self.held.pop(request, None)
        if held is not None:
            for item in range(self._next.pop(request), held):
                self.cache.drop(self.resolved.item_content[item])
