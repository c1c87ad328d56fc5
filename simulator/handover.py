"""Requests computed on one worker that decode on another: promised room, what has landed, what is to be sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from simulator.decoding import DecodeSet
from simulator.kv_cache import KvCache
from simulator.resolve import Resolved


class Handover:
    """What a worker takes over from others, and what it hands over.

    Parameters
    ----------
    resolved : Resolved
    kv : KvCache
        Where blocks come from.
    prefills : bool
        Whether the worker computes prompts. One that does not could not bring a preempted sequence back, so all tokens
        that the client may get are counted before a request is taken over (EPDServe checks the longest answer); others
        take what is there.
    """

    __slots__ = ("handed", "joined", "kv", "landed", "prefills", "promised", "promised_blocks", "resolved")

    def __init__(self, resolved: Resolved, kv: KvCache, *, prefills: bool) -> None:
        self.resolved = resolved
        self.kv = kv
        self.prefills = prefills
        self.landed: deque[tuple[int, int, int]] = deque()  # computed elsewhere: request, its tokens, steps to go
        self.joined: list[int] = []  # of those, the ones that join this step
        self.handed: dict[int, int] = {}  # prompts that are computed and wait to be sent -> tokens
        self.promised: dict[int, int] = {}  # requests whose KV is coming or here -> blocks that they may need
        self.promised_blocks = 0

    def blocks_for(self, request: int) -> int:
        """Return the blocks that a request computed elsewhere needs here, beyond which it is not preempted."""
        tokens = self.resolved.prompt_tokens[request]
        if not self.prefills:
            tokens += int(self.resolved.requests.max_output_tokens[request])
        return self.resolved.blocks(request, tokens)

    @property
    def unpromised(self) -> int:
        """Blocks for requests that are computed elsewhere."""
        return self.kv.free if self.prefills else self.kv.blocks - self.promised_blocks

    def promise(self, request: int) -> None:
        """Take the room of a request that comes from elsewhere."""
        blocks = self.promised[request] = self.blocks_for(request)
        self.promised_blocks += blocks
        self.kv.take(self._landing_blocks(request))

    def land(self, request: int, steps: int) -> None:
        """Take in a prompt whose KV is here; it joins with the next step."""
        self.landed.append((request, self.resolved.prompt_tokens[request], steps))

    def break_promise(self, request: int) -> None:
        """Give back the room of a request that does not come."""
        self.keep_promise(request)
        self.kv.give(self._landing_blocks(request))

    def keep_promise(self, request: int) -> None:
        """Count a request no longer: its blocks are taken, or free again."""
        self.promised_blocks -= self.promised.pop(request, 0)

    def _landing_blocks(self, request: int) -> int:
        return self.resolved.blocks(request, self.resolved.prompt_tokens[request])

    def join(self, running: dict[int, None], decode: DecodeSet, most: int) -> None:
        """Let what has landed run, up to so many sequences."""
        self.joined = []
        while self.landed and len(running) < most:
            request, tokens, steps = self.landed.popleft()
            running[request] = None
            decode.join(request, tokens + 1, steps)
            self.joined.append(request)

    def holds(self, request: int) -> bool:
        """Return whether a request has landed and waits to run."""
        return any(entry[0] == request for entry in self.landed)

    def take_out(self, request: int) -> None:
        """Forget a request that has landed."""
        self.landed = deque(entry for entry in self.landed if entry[0] != request)
        self.break_promise(request)

    def audit(self) -> Iterator[str]:
        """Yield what is left over once all requests have ended."""
        if self.promised or self.promised_blocks or self.handed or self.landed:
            yield f"{len(self.promised)} promises and {len(self.handed)} computed prompts are left"
