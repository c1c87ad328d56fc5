"""Blocks of the KV cache that a worker keeps in its host's memory: what is copied, what is loaded, what leaves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from costmodel.errors import Unsupported
from costmodel.hardware import load_hardware
from simulator.kv_cache import KvCache, Node
from simulator.topology import Pool


class HostCache:
    """The host's part of one worker's cache; the last of the order was used last. Check, then act; no clock.

    Runs of blocks leave whole or from their end, the one that was used longest ago first. A prefix counts as used after
    everything that follows on it, so what is held of a sequence is always its first part.

    Parameters
    ----------
    blocks : int
        Room.
    """

    __slots__ = ("blocks", "evicted", "free", "held", "stored")

    def __init__(self, blocks: int) -> None:
        self.blocks = self.free = blocks
        self.held: OrderedDict[Node, int] = OrderedDict()  # up to which block of its sequence a node is here
        self.stored = self.evicted = 0

    def reach(self, chain: Sequence[Node], most: int) -> int:
        """Return how many leading blocks of a sequence are here, up to so many."""
        blocks = 0
        for node in chain:
            blocks = self.held.get(node, blocks)
            if blocks < node.end:
                break
        return min(blocks, most)

    def store(self, chain: Sequence[Node], blocks: int) -> None:
        """Note that so many leading blocks of a sequence are used, and copy those that are not here and find room."""
        mine: list[tuple[Node, int]] = []  # taken out meanwhile, so that they do not make room for each other
        used = [node for node in chain if node.start < blocks]
        here = [self.held.pop(node, node.start) for node in used]
        for node, end in zip(used, here, strict=True):
            more = self._make_room(min(node.end, blocks) - end)
            self.stored += more
            if end + more > node.start:
                mine.append((node, end + more))
            else:
                break
        for node, end in reversed(mine):
            self.held[node] = end

    def _make_room(self, blocks: int) -> int:
        """Take room for so many blocks, or for as many as all others can leave; return how many."""
        while self.free < blocks and self.held:
            node, end = next(iter(self.held.items()))
            gone = min(blocks - self.free, end - node.start)
            self.free += gone
            self.evicted += gone
            if end - gone > node.start:
                self.held[node] = end - gone
            else:
                del self.held[node]
        taken = max(0, min(blocks, self.free))
        self.free -= taken
        return taken

    def audit(self) -> Iterator[str]:
        """Yield what does not add up."""
        listed = sum(end - node.start for node, end in self.held.items())
        if listed + self.free != self.blocks or not 0 <= self.free <= self.blocks:
            yield f"host: {listed} blocks are held and {self.free} are free of {self.blocks}"
        if self.stored - self.evicted != listed:
            yield f"host: {self.stored} blocks were stored, {self.evicted} left, and {listed} are held"
        for node, end in self.held.items():
            parent = node.parent
            if not node.start < end <= node.end or (parent is not None and self.held.get(parent) != parent.end):
                yield f"host: blocks {node.start} to {end} are held without those in front of them"


class OffloadedCache(KvCache):
    """The blocks of a worker whose host keeps copies.

    What a step computes is copied as soon as a block is full, in the background: copies cost no time. What the
    device has lost and the host holds is loaded when a request starts. Blocks of sequences that share with nobody are
    copied too, when they end: an engine cannot know that nobody will ask for them.

    Parameters
    ----------
    blocks, leaves
        As in `KvCache`.
    host_blocks : int
        Room in the host.
    """

    __slots__ = ("host", "loaded")

    def __init__(self, blocks: int, leaves: Mapping[int, Node], host_blocks: int) -> None:
        super().__init__(blocks, leaves)
        self.host = HostCache(host_blocks)
        self.loaded = 0

    def found(self, request: int, most: int) -> tuple[int, int, int]:
        """Return what `hit` does, and how many blocks behind those the host can add."""
        blocks, free = self.hit(request, most)
        return blocks, free, max(0, self.host.reach(self.chain(request), most) - blocks)

    def hold(self, request: int, blocks: int) -> None:
        """Take the leading cached blocks of a sequence into use."""
        super().hold(request, blocks)
        self.host.store(self.chain(request), blocks)

    def load(self, request: int, blocks: int) -> None:
        """Bring so many blocks from the host behind those that a sequence holds; their room is taken already."""
        self.loaded += blocks
        self.publish(request, self.depth[request] + blocks)

    def publish(self, request: int, blocks: int) -> None:
        """Let others find what a sequence has computed, on the device and in the host."""
        before = self.depth.get(request)
        super().publish(request, blocks)
        depth = self.depth.get(request)
        if depth is not None and depth != before:
            self.host.store(self.chain(request), depth)

    def end(self, blocks: int, full: int) -> None:
        """Free all blocks of a sequence that shares with nobody, of which so many are full."""
        super().end(blocks, full)
        if full:
            self.host.store((Node(0, full),), full)

    def go_on(self, before: KvCache) -> None:
        """Go on counting where a cache of the same worker has stopped, all of whose blocks are lost."""
        super().go_on(before)
        if isinstance(before, OffloadedCache):
            self.loaded = before.loaded
            self.host.stored = before.host.stored
            self.host.evicted = before.host.evicted + before.host.blocks - before.host.free

    def audit(self) -> Iterator[str]:
        """Yield what does not add up."""
        yield from super().audit()
        yield from self.host.audit()


def host_rate_bytes_per_s(pool: Pool) -> float:
    """Return the rate at which a worker of a pool loads blocks from its host [bytes/s].

    Each device has a link of its own to the host, and a sequence lies on as many as share its layers (`tp`).

    Raises
    ------
    ValueError
        If neither the pool nor the profile of its device says it.
    """
    if pool.host_bandwidth_bytes_per_s is not None:
        return pool.host_bandwidth_bytes_per_s
    try:
        link = load_hardware(pool.hardware).host_link()
    except (LookupError, Unsupported):
        what = f"pool {pool.name!r}: host_bandwidth_bytes_per_s=None"
        raise ValueError(
            f"{what} needs a device whose profile has a link to its host, and {pool.hardware!r} has none; give it"
        ) from None
    return pool.tp * link.bandwidth_bytes_per_s
