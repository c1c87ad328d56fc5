"""Blocks of the KV cache: who holds how many, what stays cached, what is evicted. Check, then act; no clock.

A block is free, or in use by one or more sequences. Free blocks keep what they hold until they are taken again, the one
that was freed longest ago first, the end of a sequence before its start. So of a run of blocks that several prompts
share (a `Node`), what is cached is always its first part, and one number says how much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping


class Node:
    """A run of blocks that sequences share whole: content from block `start` to `end` of each of them."""

    __slots__ = ("depths", "end", "free", "parent", "present", "start", "used")

    def __init__(self, start: int, end: int, parent: Node | None = None) -> None:
        self.start = start
        self.end = end
        self.parent = parent
        self.present = start  # blocks from start to here are cached
        self.used = start  # blocks from start to here are in use
        self.depths: dict[int, int] = {}  # how far sequences use it, and how many of them
        self.free: list[Run] = []  # its runs among the free blocks


class Run:
    """Free blocks in a row, freed together: of a node, or of nobody who will ask for them again."""

    __slots__ = ("high", "low", "node")

    def __init__(self, node: Node | None, low: int, high: int) -> None:
        self.node = node
        self.low = low
        self.high = high


class KvCache:
    """The blocks of one worker.

    Parameters
    ----------
    blocks : int
        All of them.
    leaves : mapping of int to Node
        By request, the last node of its sequence, for requests that share; others are counted only.
    """

    __slots__ = ("blocks", "depth", "evicted", "free", "leaves", "never_used", "runs")

    def __init__(self, blocks: int, leaves: Mapping[int, Node] | None = None) -> None:
        self.blocks = blocks
        self.free = blocks
        self.never_used = blocks
        self.evicted = 0
        self.runs: deque[Run] = deque()
        self.leaves: dict[int, Node] = dict(leaves or {})
        self.depth: dict[int, int] = {}  # by running request that shares, blocks that it holds as part of nodes

    # Sequences that share nothing need only these two

    def take(self, blocks: int) -> None:
        """Put free blocks to use; whoever calls has checked that there are as many."""
        self.free -= blocks
        if blocks <= self.never_used:
            self.never_used -= blocks
            return
        blocks -= self.never_used
        self.never_used = 0
        self.evicted += blocks
        runs = self.runs
        while blocks:
            run = runs[0]
            have = run.high - run.low
            if have <= blocks:
                runs.popleft()
                taken = have
            else:
                taken = blocks
            blocks -= taken
            run.high -= taken
            if run.node is not None and taken:
                run.node.present = run.high
                if run.high == run.low:
                    run.node.free.remove(run)

    def give(self, blocks: int) -> None:
        """Free blocks that nobody will ask for again."""
        self.free += blocks
        runs = self.runs
        if runs and runs[-1].node is None:
            runs[-1].high += blocks
        else:
            runs.append(Run(None, 0, blocks))

    def end(self, blocks: int, full: int) -> None:
        """Free all blocks of a sequence that shares with nobody, of which so many are full."""
        del full  # of those a host may keep copies
        self.give(blocks)

    # Sequences that share

    def chain(self, request: int) -> list[Node]:
        """Return the nodes of a request's sequence, from its start."""
        nodes = []
        node = self.leaves.get(request)
        while node is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def hit(self, request: int, most: int) -> tuple[int, int]:
        """Return how many leading blocks of a sequence are cached, up to so many, and how many of those are free."""
        blocks = free = 0
        for node in self.chain(request):
            reach = min(node.present, most)
            if reach > blocks:
                blocks = reach
                free += max(0, reach - max(node.used, node.start))
            if reach < node.end:
                break
        return blocks, free

    def found(self, request: int, most: int) -> tuple[int, int, int]:
        """Return what `hit` does, and how many blocks behind those can be loaded from elsewhere: none."""
        return *self.hit(request, most), 0

    def load(self, request: int, blocks: int) -> None:
        """Bring blocks from elsewhere; there is nowhere."""
        raise NotImplementedError(f"request {request} has no {blocks} blocks elsewhere")

    def hold(self, request: int, blocks: int) -> None:
        """Take the leading cached blocks of a sequence into use."""
        self.depth[request] = blocks
        for node in self.chain(request):
            reach = min(node.end, blocks)
            if reach <= node.start:
                break
            node.depths[reach] = node.depths.get(reach, 0) + 1
            if reach > node.used:
                self.free -= reach - node.used
                self._reclaim(node, reach)

    def _reclaim(self, node: Node, reach: int) -> None:
        """Take a node's blocks up to one out of the free ones."""
        kept = []
        for run in node.free:
            run.low = max(run.low, min(reach, run.high))
            if run.low < run.high:
                kept.append(run)
        node.free = kept
        node.used = reach

    def publish(self, request: int, blocks: int) -> None:
        """Let others find what a sequence has computed: its blocks up to this one."""
        depth = self.depth.get(request)
        if depth is None or blocks <= depth:
            return
        for node in self.chain(request):
            if node.end <= depth:
                continue
            if node.present != depth:  # somebody else has computed it too: these copies stay private
                break
            reach = min(node.end, blocks)
            if depth > node.start:
                self._leave(node, depth)
            node.depths[reach] = node.depths.get(reach, 0) + 1
            node.present = node.used = reach
            depth = reach
            if reach == blocks:
                break
        self.depth[request] = depth

    def release(self, request: int, blocks: int) -> None:
        """Free all blocks of a sequence that holds so many: its end first, so that it is evicted first."""
        depth = self.depth.pop(request, 0)
        if blocks > depth:
            self.give(blocks - depth)
        if not depth:
            return
        for node in reversed(self.chain(request)):
            reach = min(node.end, depth)
            if reach <= node.start:
                continue
            self._leave(node, reach)
            used = max(node.depths, default=node.start)
            if used < node.used:
                run = Run(node, used, node.used)
                node.free.append(run)
                self.runs.append(run)
                self.free += node.used - used
                node.used = used

    @staticmethod
    def _leave(node: Node, reach: int) -> None:
        left = node.depths[reach] - 1
        if left:
            node.depths[reach] = left
        else:
            del node.depths[reach]

    def track(self, request: int) -> None:
        """Let a request that shares with nobody find its own blocks again after preemption."""
        if request not in self.leaves:
            self.leaves[request] = Node(0, 1 << 40)
            self.depth[request] = 0

    def go_on(self, before: KvCache) -> None:
        """Go on counting where a cache of the same worker has stopped, all of whose blocks are lost."""
        self.evicted = before.evicted

    def audit(self) -> Iterator[str]:
        """Yield what does not add up."""
        listed = self.never_used + sum(run.high - run.low for run in self.runs)
        if listed != self.free:
            yield f"free={self.free} blocks, and {listed} are listed"
        if not 0 <= self.free <= self.blocks:
            yield f"free={self.free} must lie between 0 and blocks={self.blocks}"
