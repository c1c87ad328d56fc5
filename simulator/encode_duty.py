"""Encoding for other workers: a queue of items, forward passes under a budget, outputs that wait to be sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simulator.encoder_cache import EncoderCache
from simulator.ordering import Queue, queue_of
from simulator.request import NONE
from simulator.resolve import Resolved


class EncodeDuty:
    """Items that a worker encodes for others.

    An output takes room until it has been sent. What nobody needs any more stays until room is needed: the same picture
    is not encoded twice while it is there.

    Parameters
    ----------
    resolved : Resolved
        Items by request, their places and sizes.
    budget : int
        Embeddings of one forward pass; the largest item must fit.
    room : int
        Embeddings of outputs.
    most_items : int or None
        Items of one forward pass.
    key : callable or None
        Order of the queue by item; None is first come, first served.
    urgent : callable
        Returns the items that may start though their outputs have no room: those of the request that
        has held room longest, for which others may wait.
    """

    __slots__ = ("_coming", "batch", "budget", "cache", "done", "most_items", "queue", "resolved", "urgent")

    def __init__(
        self,
        resolved: Resolved,
        *,
        budget: int,
        room: int,
        most_items: int | None,
        key: Callable[[int], float] | None,
        urgent: Callable[[], Sequence[int]],
    ) -> None:
        self.resolved = resolved
        self.budget = budget
        self.cache = EncoderCache(room)
        self.most_items = most_items or len(resolved.item_embeds)
        self.queue: Queue = queue_of(key)
        self.urgent = urgent
        self.batch: list[int] = []  # items that the step under way encodes
        self.done: list[int] = []  # items that are encoded when it ends, those of equal content included
        self._coming: set[int] = set()  # what those of the batch show

    def submit(self, item: int) -> bool:
        """Take in an item, and return whether its output is there already."""
        content = self.resolved.item_content[item]
        if content not in self._coming and self.cache.use(content):
            return True
        self.queue.append(item)
        return False

    def form(self) -> None:
        """Choose what the next step encodes."""
        self.batch, self.done = [], []
        left = self.budget
        while self.queue:
            item = self.queue[0]
            if self._is_known(item):
                self.queue.popleft()
                self.done.append(item)
                continue
            size = self.resolved.item_embeds[item]
            if not self.cache.fits(size):
                item = next((other for other in self.urgent() if other in self.queue), NONE)
                if item == NONE:
                    break
                size = self.resolved.item_embeds[item]
            if len(self.batch) == self.most_items or size > left:
                break
            if item == self.queue[0]:
                self.queue.popleft()
            else:
                self.queue.remove(item)
            self.done.append(item)
            if not self._is_known(item):
                left -= size
                self._start(item, size)

    def _is_known(self, item: int) -> bool:
        """Hold the output of an item that is there, or encoded in this pass, and say whether there is one."""
        return self.cache.use(self.resolved.item_content[item])

    def _start(self, item: int, size: int) -> None:
        content = self.resolved.item_content[item]
        self.cache.put(content, size)
        self._coming.add(content)
        self.batch.append(item)

    def close(self) -> list[int]:
        """Return the items that are encoded now that the pass is over."""
        done, self.done, self.batch = self.done, [], []
        self._coming.clear()
        return done

    def sent(self, item: int) -> None:
        """Give back the output of an item."""
        self.cache.drop(self.resolved.item_content[item])

    def take_out(self, item: int) -> bool:
        """Forget an item that waits, and return whether it did."""
        if item in self.queue:
            self.queue.remove(item)
            return True
        return False
