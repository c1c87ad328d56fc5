"""The requests of one worker and what they hold, and how they leave. No clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from simulator.decoding import DecodeSet
from simulator.encode_duty import EncodeDuty
from simulator.encoder import Encoder
from simulator.handover import Handover
from simulator.host_cache import OffloadedCache
from simulator.kv_cache import KvCache
from simulator.limits import EVERYTHING, Limits, Roles
from simulator.ordering import Queue, queue_of
from simulator.received import Received
from simulator.resolve import Resolved
from simulator.service import ReadRule


class Sequences:
    """Waiting and running requests, their blocks and embeddings.

    Parameters
    ----------
    resolved : Resolved
    limits : Limits
    rules : tuple of ReadRule
        What decode attention reads.
    roles : Roles
        What the worker does itself; prompts of one that does not decode are handed over.
    key : callable or None
        Order of the queue by request; None is first come, first served.
    duty : EncodeDuty or None
        What it encodes for others.
    """

    def __init__(
        self,
        resolved: Resolved,
        limits: Limits,
        rules: tuple[ReadRule, ...],
        *,
        roles: Roles = EVERYTHING,
        key: Callable[[int], float] | None = None,
        duty: EncodeDuty | None = None,
    ) -> None:
        self.resolved = resolved
        self.limits = limits
        self.roles = roles
        self.key = key
        self.duty = duty
        leaves = resolved.leaves() if limits.prefix_caching and roles.prefills else {}
        self.kv = (
            OffloadedCache(limits.kv_blocks, leaves, limits.host_blocks)
            if limits.host_blocks
            else KvCache(limits.kv_blocks, leaves)
        )
        self.encoder: Encoder | Received = (
            Encoder(resolved, limits.encoder_budget, limits.encoder_cache_tokens)
            if roles.encodes
            else Received(resolved, limits.encoder_cache_tokens)
        )
        self.decode = DecodeSet(rules, limits.block_tokens, resolved.own_keys, resolved.kept_tokens)
        self.queue: Queue = queue_of(key)
        self.running: dict[int, None] = {}  # in order of admission
        self.started: dict[int, int] = {}  # running requests whose prompt is not computed -> tokens that are
        self.target: dict[int, int] = {}  # preempted requests -> tokens to compute before the next one is generated
        self.left: dict[int, int] = {}  # preempted requests -> tokens that they have still to generate
        self.preempted: list[int] = []  # in this step
        self.was_preempted: set[int] = set()  # waiting requests that were preempted
        self.returned: list[int] = []  # preempted in this step, whose embeddings must come again
        self.paused: list[tuple[int, int, int]] = []  # sequences without budget in this step: request, context, steps
        self.owners: list[int] = []  # of the step's chunks
        self.handover = Handover(resolved, self.kv, prefills=roles.prefills)
        self.reserved = False  # whether this step's blocks of the decoding sequences are taken

    # What a policy sees

    @property
    def waiting(self) -> int:
        """Requests that have not started, or were preempted."""
        return len(self.queue)

    @property
    def prefilling(self) -> int:
        """Running requests whose prompt is not yet computed."""
        return len(self.started)

    @property
    def decoding(self) -> int:
        """Running requests that generate."""
        return self.decode.size

    @property
    def n_waiting(self) -> int:
        """Requests and items that wait here, for blocks, embeddings, or to be encoded for others."""
        waiting = len(self.queue) + len(self.handover.landed)
        waiting += 0 if self.duty is None else len(self.duty.queue)
        return waiting + (len(self.encoder.room) if isinstance(self.encoder, Received) else 0)

    @property
    def holds_anything(self) -> bool:
        """Whether a request or an output is here."""
        duty = self.duty is not None and (bool(self.duty.done) or self.duty.cache.referenced > 0)
        held = self.running or self.handover.handed or self.handover.promised
        return bool(self.n_waiting or held or duty or self.encoder.held)

    @property
    def next_may_start(self) -> bool:
        """Whether the next arrival could be the next to start: nobody waits, or not in order of arrival."""
        return (not self.queue or self.key is not None) and len(self.running) < self.limits.max_sequences

    # Leaving

    def victim(self) -> int:
        """Return who makes room: the request that was admitted last, or, by key, the last of the order.

        Those that are in the step already stay there.
        """
        if self.key is None:
            return next(reversed(self.running))
        return max((request for request in reversed(self.running) if request not in self.owners), key=self.key)

    def preempt(self, request: int) -> None:
        """Take a running request back to the head of the queue: what it has computed is computed again."""
        blocks = self.resolved.blocks
        if request in self.started:
            tokens = self.started.pop(request)
            held = self.resolved.prefill_blocks(request, tokens)
        elif request in self.decode.offset:
            tokens, steps = self.decode.leave(request)
            held = blocks(request, tokens + self.reserved)
            self.target[request], self.left[request] = tokens + 1, steps
        else:
            index = next(i for i, entry in enumerate(self.paused) if entry[0] == request)
            _, context, steps = self.paused.pop(index)
            tokens, held = context - 1, blocks(request, context - 1)
            self.target[request], self.left[request] = context, steps
        if self.limits.prefix_caching:
            self.kv.track(request)
        self.release(request, tokens, held)
        self.encoder.forget(request)
        del self.running[request]
        if self.handover.promised:
            self.handover.keep_promise(request)
        if self.roles.encodes or not self.resolved.has_items(request):
            self.queue.appendleft(request)
        else:
            self.returned.append(request)
        self.preempted.append(request)
        self.was_preempted.add(request)

    def release(self, request: int, tokens: int, held: int) -> None:
        """Free the blocks of a sequence, of whose tokens so many are computed."""
        kv = self.kv
        if request in kv.depth:
            kv.publish(request, tokens // self.limits.block_tokens)
            kv.release(request, held)
        else:
            kv.end(held, tokens // self.limits.block_tokens)

    def leave(self, request: int, tokens: int) -> None:
        """Take out a request that has ended with so many tokens in the cache."""
        self.release(request, tokens, self.resolved.blocks(request, tokens))
        del self.running[request]
        self.target.pop(request, None)
        if self.handover.promised:
            self.handover.keep_promise(request)

    def take_out(self, request: int) -> None:
        """Take out a request, between two steps, wherever it is."""
        self.encoder.forget(request)
        if request in self.started:
            tokens = self.started.pop(request)
            self.release(request, tokens, self.resolved.prefill_blocks(request, tokens))
            del self.running[request]
        elif request in self.decode.offset:
            self.leave(request, self.decode.leave(request)[0])
        elif request in self.handover.handed:
            self.sent(request)
        elif self.handover.holds(request):
            self.handover.take_out(request)
        elif request in self.queue:
            self.queue.remove(request)
        self.target.pop(request, None)
        self.left.pop(request, None)
        self.was_preempted.discard(request)

    def audit(self) -> Iterator[str]:
        """Yield what does not add up in the caches once all requests have ended."""
        yield from self.kv.audit()
        yield from self.encoder.cache.audit()
        if isinstance(self.encoder, Received):
            yield from self.encoder.audit()
        yield from self.handover.audit()
        if self.duty is not None:
            yield from self.duty.cache.audit()
            if self.duty.cache.referenced or self.duty.queue:
                yield f"{self.duty.cache.referenced} embeddings of outputs are held by nobody"

    def sent(self, request: int) -> None:
        """Free the blocks of a prompt that is where it decodes."""
        tokens = self.handover.handed.pop(request)
        self.release(request, tokens, self.resolved.blocks(request, tokens))
