"""Embeddings by content in a place that all pools reach: what is there, what is on its way, what leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

from simulator.clock import Clock
from simulator.encoder_cache import EncoderCache
from simulator.rules import Store
from simulator.trace import StoreTrace
from simulator.transfer import Wire
from simulator.worker import Worker


class EmbeddingStore:
    """The store of a plan.

    All who read and write share one wire, the store's own. An entry is there once its last byte has landed; what is on
    its way in or out stays until it is, and of the rest the one that was used longest ago leaves first. What does not
    fit beside those on their way is not written.

    Parameters
    ----------
    clock : Clock
    plan : Store
        Its size and its wire.
    """

    def __init__(self, clock: Clock, plan: Store) -> None:
        self.cache = EncoderCache(int(plan.capacity_bytes))  # in bytes; a reference is a transfer
        self.wire = Wire(clock, plan.bandwidth_bytes_per_s, plan.latency_s)
        self.misses = self.written = 0
        self.fetched_bytes = self.written_bytes = 0.0
        self._coming: dict[int, Worker] = {}  # content that is on its way here -> from whom

    # Reading

    def hold(self, content: int) -> bool:
        """Return whether a content is here, and keep it until it is given back."""
        if content not in self._coming and self.cache.use(content):
            return True
        self.misses += 1
        return False

    def fetch(self, item: int, n_bytes: float, on_land: Callable[[], None]) -> None:
        """Send what is held for an item."""

        def land() -> None:
            self.fetched_bytes += n_bytes
            on_land()

        self.wire.send(("item", item), n_bytes, land)

    def give_back(self, content: int) -> None:
        """Keep a content no longer for one of those who do."""
        self.cache.drop(content)

    # Writing

    def write(self, content: int, n_bytes: float, source: Worker) -> None:
        """Copy what an encoder has made, in the background, unless it is here or finds no room."""
        size = ceil(n_bytes)
        if content in self.cache.entries or not self.cache.fits(size):
            return
        self.cache.put(content, size)
        self._coming[content] = source

        def land() -> None:
            del self._coming[content]
            self.cache.drop(content)
            self.written += 1
            self.written_bytes += n_bytes

        self.wire.send(("content", content), n_bytes, land)

    def lose(self, source: Worker) -> None:
        """Forget what was on its way from a worker that has crashed."""
        for content in [content for content, other in self._coming.items() if other is source]:
            self.wire.drop(("content", content))
            del self._coming[content]
            self.cache.remove(content)

    @property
    def evicted(self) -> int:
        """Entries that have left for others."""
        return self.written + len(self._coming) - len(self.cache.entries)

    def trace(self) -> StoreTrace:
        """Return what it did."""
        return StoreTrace(
            hits=self.cache.hits,
            misses=self.misses,
            fetched_bytes=self.fetched_bytes,
            written_bytes=self.written_bytes,
            written=self.written,
            evicted=self.evicted,
            busy_s=self.wire.busy_s,
        )

    def audit(self) -> Iterator[str]:
        """Yield what does not add up once nothing happens any more."""
        yield from self.cache.audit()
        yield from self.wire.audit()
        if self._coming or self.cache.referenced:
            yield f"{len(self._coming)} embeddings are on their way for ever, {self.cache.referenced} bytes are held"
        if self.evicted < 0 or self.cache.free < 0:
            yield f"{len(self.cache.entries)} entries, and {self.written} were written; {self.cache.free} bytes free"
        rest = self.wire.sent_bytes - self.fetched_bytes - self.written_bytes
        if rest < -1e-9 * self.wire.sent_bytes:
            yield f"{-rest:g} bytes landed that were not sent"
