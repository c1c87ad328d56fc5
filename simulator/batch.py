"""The requests of one worker and what its next step computes: budgets, blocks, items, preemption. No clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from simulator.batching import Decision
from simulator.decoding import DecodeSet
from simulator.encode_duty import EncodeDuty
from simulator.encoder import Encoder, Plan
from simulator.kv_cache import KvCache
from simulator.ordering import Queue, queue_of
from simulator.prompt import Chunk
from simulator.received import Received
from simulator.resolve import Resolved
from simulator.service import ReadRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Settings of a worker, resolved.

    Parameters
    ----------
    token_budget, max_sequences : int
        Tokens of a step, and sequences that run at once.
    long_prefill_tokens : int
        Most tokens of one prompt in a step; 0 is no limit.
    kv_blocks, block_tokens : int
        Blocks of the cache, and tokens in each.
    encoder_budget, encoder_cache_tokens : int
        Embeddings that a step may encode, and that the cache holds.
    prefix_caching : bool
        Whether prompts that start alike share blocks.
    encode_items : int or None
        Most items of a forward pass for other workers.
    """

    token_budget: int
    max_sequences: int
    kv_blocks: int
    block_tokens: int
    encoder_budget: int
    encoder_cache_tokens: int
    long_prefill_tokens: int = 0
    prefix_caching: bool = True
    encode_items: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no engine starts with."""
        for name in ("token_budget", "max_sequences", "kv_blocks", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; raise it")
        if self.token_budget < self.max_sequences:
            raise ValueError(
                f"token_budget={self.token_budget} must be max_sequences={self.max_sequences} or more, so that every "
                "sequence can decode; lower max_batch"
            )
        if self.long_prefill_tokens < 0:
            raise ValueError(f"long_prefill_tokens={self.long_prefill_tokens} must be 0 (no limit) or more")


@dataclass(frozen=True, slots=True)
class Roles:
    """What a worker does itself.

    Parameters
    ----------
    encodes, prefills, decodes : bool
        Whether it encodes the pictures of its own prompts, computes prompts, generates.
    """

    encodes: bool = True
    prefills: bool = True
    decodes: bool = True


EVERYTHING = Roles()


class Batch:
    """Waiting and running requests, and the step that is being formed.

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
        self.kv = KvCache(limits.kv_blocks, resolved.leaves() if limits.prefix_caching and roles.prefills else {})
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
        self.returned: list[int] = []  # preempted in this step, whose embeddings must come again
        self.admitted: list[tuple[int, int]] = []  # in this step, and the prompt tokens that were cached
        self.paused: list[tuple[int, int, int]] = []  # sequences without budget in this step: request, context, steps
        self.chunks: list[Chunk] = []
        self.owners: list[int] = []  # of the chunks
        self.finishing: list[int] = []  # prompts that end in this step
        self.landed: deque[tuple[int, int, int]] = deque()  # computed elsewhere: request, its tokens, steps to go
        self.joined: list[int] = []  # of those, the ones that join this step
        self.handed: dict[int, int] = {}  # prompts that are computed and wait to be sent -> tokens
        self.promised: dict[int, int] = {}  # requests whose KV is coming or here -> blocks that they may need
        self.promised_blocks = 0
        self.decodes = False
        self.ended_decoding = 0
        self._has_items = bool(resolved.item_start)
        self._from_others = duty is not None  # whether there may be anything
        self._reserved = False  # whether this step's blocks of the decoding sequences are taken
        self._may_fit_later = False  # whether the head of the queue fits once less of its prompt is cached

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
    def next_may_start(self) -> bool:
        """Whether the next arrival could be the next to start: nobody waits, or not in order of arrival."""
        return (not self.queue or self.key is not None) and len(self.running) < self.limits.max_sequences

    # Forming a step

    def form(self, decision: Decision) -> None:
        """Fill in what the next step computes."""
        if self.chunks:
            self.chunks, self.owners, self.finishing, self.admitted = [], [], [], []
        if self.preempted:
            self.preempted, self.returned = [], []
        self.decodes = self._reserved = self._may_fit_later = False
        if self._from_others:
            self._take_from_others()
        if self._has_items and (self.queue or self.started):
            self.encoder.open_step()
        budget = self.limits.token_budget
        if decision.mixed and self.decode.size:
            self._ready_decode()
            budget -= self.decode.size
        if self.started:
            if decision.mixed and decision.in_order:
                budget += self._pause(budget)
            budget = self._go_on(budget)
        if decision.admits and self.queue and not self.preempted:
            self._admit(budget)
        if not decision.mixed and not self.chunks:
            self._ready_decode()
        self.decodes = self.decodes and self.decode.size > 0

    def _ready_decode(self) -> None:
        """Take the blocks that all decoding sequences need for one step; the last request makes room."""
        decode = self.decode
        need = decode.new_blocks()
        while need > self.kv.free:
            self._preempt(self._victim())
            need = decode.new_blocks()
        if decode.size:
            if need:
                self.kv.take(need)
            self.decodes = self._reserved = True

    def _pause(self, budget: int) -> int:
        """Take out the decoding sequences behind a prompt that uses up the budget; return what they leave."""
        resolved, cap = self.resolved, self.limits.long_prefill_tokens or self.limits.token_budget
        wants = {r: min(cap, self.target.get(r, resolved.prompt_tokens[r]) - t) for r, t in self.started.items()}
        if sum(wants.values()) <= budget:
            return 0
        tail: list[int] = []
        first = next(iter(self.started))
        for request in reversed(self.running):
            tail.append(request)
            if request == first:
                break
        room = budget + len(tail) - len(wants)
        for request in reversed(tail):
            if request in wants:
                room -= self._chunk(request, self.started[request], room)[0] if room else 0
            elif room:
                room -= 1
            else:
                self._pause_one(request)
        return len(self.paused)

    def _pause_one(self, request: int) -> None:
        if self.decode.needs_block(request):  # it waits with the sequence
            self.kv.give(1)
        tokens, steps = self.decode.leave(request)
        self.paused.append((request, tokens + 1, steps))

    def _go_on(self, budget: int) -> int:
        """Give prompts that have begun their next chunk; return the budget that is left."""
        for request in list(self.started):
            if not budget:
                break
            if request in self.started:
                budget -= self._continue(request, budget)
        return budget

    def _continue(self, request: int, budget: int) -> int:
        start = self.started[request]
        tokens, plan = self._chunk(request, start, budget)
        if not tokens:
            return 0
        held = self.resolved.prefill_blocks
        need = held(request, start + tokens) - held(request, start)
        while need > self.kv.free:
            last = self._victim()
            self._preempt(last)
            if last == request:
                return 0
        if need:
            self.kv.take(need)
        self._add(request, start, tokens, plan)
        return tokens

    def _chunk(self, request: int, start: int, budget: int) -> tuple[int, Plan | None]:
        """Return the tokens of a request's next chunk, and the items that it needs."""
        goal = self.target.get(request) or self.resolved.prompt_tokens[request]
        tokens = goal - start
        tokens = min(tokens, budget)
        limit = self.limits.long_prefill_tokens
        if limit and tokens > limit:
            tokens = limit
        if start >= self.resolved.last_item_end[request]:
            return tokens, None
        plan = self.encoder.plan(request, start, tokens)
        return plan[0], plan

    def _add(self, request: int, start: int, tokens: int, plan: Plan | None) -> None:
        """Put a chunk into the step."""
        if plan is not None:
            self.encoder.commit(request, plan)
        self.chunks.append((start, tokens, self.resolved.prompts[request]))
        self.owners.append(request)
        end = start + tokens
        if end == (self.target.get(request) or self.resolved.prompt_tokens[request]):
            self.finishing.append(request)
            self.started.pop(request, None)
        else:
            self.started[request] = end
        if self.kv.depth and request in self.kv.depth:
            self.kv.publish(request, end // self.limits.block_tokens)

    def _admit(self, budget: int) -> None:
        """Start waiting requests in order until one does not fit."""
        queue, running, kv, limits = self.queue, self.running, self.kv, self.limits
        block = limits.block_tokens
        while queue and budget and len(running) < limits.max_sequences:
            request = queue[0]
            hit = reused = 0
            shares = limits.prefix_caching and request in kv.leaves
            if shares:
                goal = self.target.get(request) or self.resolved.prompt_tokens[request]
                hit, reused = kv.hit(request, (goal - 1) // block)
            start = hit * block
            tokens, plan = self._chunk(request, start, budget)
            need = self.resolved.prefill_blocks(request, start + tokens) - hit
            if not tokens or need + reused > kv.free:
                self._may_fit_later = reused > 0  # from an earlier start, a chunk may end earlier
                break
            queue.popleft()
            if shares:
                kv.hold(request, hit)
            kv.take(need)
            running[request] = None
            self.admitted.append((request, start))
            self._add(request, start, tokens, plan)
            budget -= tokens

    # From other workers, and to them

    def blocks_for(self, request: int) -> int:
        """Return the blocks that a request computed elsewhere needs here, beyond which it is not preempted.

        A worker that cannot compute prompts could not bring a preempted sequence back, so all tokens that the client
        may get are counted (EPDServe checks the longest answer); others take what is there.
        """
        tokens = self.resolved.prompt_tokens[request]
        if not self.roles.prefills:
            tokens += int(self.resolved.requests.max_output_tokens[request])
        return self.resolved.blocks(request, tokens)

    @property
    def unpromised(self) -> int:
        """Blocks for requests that are computed elsewhere."""
        return self.kv.free if self.roles.prefills else self.kv.blocks - self.promised_blocks

    def promise(self, request: int) -> None:
        """Take the room of a request that comes from elsewhere."""
        blocks = self.promised[request] = self.blocks_for(request)
        self.promised_blocks += blocks
        self.kv.take(self._landing_blocks(request))

    def _landing_blocks(self, request: int) -> int:
        return self.resolved.blocks(request, self.resolved.prompt_tokens[request])

    def land(self, request: int, steps: int) -> None:
        """Take in a prompt whose KV is here; it joins with the next step."""
        self._from_others = True
        self.landed.append((request, self.resolved.prompt_tokens[request], steps))

    def break_promise(self, request: int) -> None:
        """Give back the room of a request that does not come."""
        self.promised_blocks -= self.promised.pop(request)
        self.kv.give(self._landing_blocks(request))

    def _take_from_others(self) -> None:
        """Take in what other workers have asked to be encoded, and what they have computed."""
        if self.duty is not None:
            self.duty.form()
        if self.landed:
            self._join_landed()

    def _join_landed(self) -> None:
        self.joined = []
        while self.landed and len(self.running) < self.limits.max_sequences:
            request, tokens, steps = self.landed.popleft()
            self.running[request] = None
            self.decode.join(request, tokens + 1, steps)
            self.joined.append(request)

    def sent(self, request: int) -> None:
        """Free the blocks of a prompt that is where it decodes."""
        tokens = self.handed.pop(request)
        self._release(request, tokens, self.resolved.blocks(request, tokens))

    # Leaving

    def _victim(self) -> int:
        """Return who makes room: the request that was admitted last, or, by key, the last of the order.

        Those that are in the step already stay there.
        """
        if self.key is None:
            return next(reversed(self.running))
        return max((request for request in reversed(self.running) if request not in self.owners), key=self.key)

    def _preempt(self, request: int) -> None:
        """Take a running request back to the head of the queue: what it has computed is computed again."""
        blocks = self.resolved.blocks
        if request in self.started:
            tokens = self.started.pop(request)
            held = self.resolved.prefill_blocks(request, tokens)
        elif request in self.decode.offset:
            tokens, steps = self.decode.leave(request)
            held = blocks(request, tokens + self._reserved)
            self.target[request], self.left[request] = tokens + 1, steps
        else:
            index = next(i for i, entry in enumerate(self.paused) if entry[0] == request)
            _, context, steps = self.paused.pop(index)
            tokens, held = context - 1, blocks(request, context - 1)
            self.target[request], self.left[request] = context, steps
        if self.limits.prefix_caching:
            self.kv.track(request)
        self._release(request, tokens, held)
        self.encoder.forget(request)
        del self.running[request]
        if self.promised:
            self._keep_promise(request)
        if self.roles.encodes or not self._has(request):
            self.queue.appendleft(request)
        else:
            self.returned.append(request)
        self.preempted.append(request)

    def _has(self, request: int) -> bool:
        """Return whether a request has pictures."""
        first = self.resolved.first_item
        return first[request + 1] > first[request]

    def _keep_promise(self, request: int) -> None:
        self.promised_blocks -= self.promised.pop(request, 0)

    def _release(self, request: int, tokens: int, held: int) -> None:
        kv = self.kv
        if request in kv.depth:
            kv.publish(request, tokens // self.limits.block_tokens)
            kv.release(request, held)
        else:
            kv.give(held)

    def leave(self, request: int, tokens: int) -> None:
        """Take out a request that has ended with so many tokens in the cache."""
        self._release(request, tokens, self.resolved.blocks(request, tokens))
        del self.running[request]
        self.target.pop(request, None)
        if self.promised:
            self._keep_promise(request)

    def take_out(self, request: int) -> None:
        """Take out a request, between two steps, wherever it is."""
        self.encoder.forget(request)
        if request in self.started:
            tokens = self.started.pop(request)
            self._release(request, tokens, self.resolved.prefill_blocks(request, tokens))
            del self.running[request]
        elif request in self.decode.offset:
            self.leave(request, self.decode.leave(request)[0])
        elif request in self.handed:
            self.sent(request)
        elif any(entry[0] == request for entry in self.landed):
            self.landed = deque(entry for entry in self.landed if entry[0] != request)
            self.break_promise(request)
        elif request in self.queue:
            self.queue.remove(request)
        self.target.pop(request, None)
        self.left.pop(request, None)

    def audit(self) -> Iterator[str]:
        """Yield what does not add up in the caches once all requests have ended."""
        yield from self.kv.audit()
        yield from self.encoder.cache.audit()
        if isinstance(self.encoder, Received):
            yield from self.encoder.audit()
        if self.promised or self.promised_blocks or self.handed:
            yield f"{len(self.promised)} promises and {len(self.handed)} computed prompts are left"
        if self.duty is not None:
            yield from self.duty.cache.audit()
            if self.duty.cache.referenced or self.duty.queue:
                yield f"{self.duty.cache.referenced} embeddings of outputs are held by nobody"

    # The end of a step

    def steady_steps(self, most: int) -> int:
        """Return for how many steps of decoding alone the batch cannot change, this one included."""
        if self._may_fit_later:
            return 1
        return self.decode.steady_steps(self.kv.free + self.decode.new_blocks(), most)

    def close(self, steps: int) -> tuple[list[int], list[int]]:
        """Count the step (or steps of decoding alone) as done.

        Returns
        -------
        ended : list of int
            Requests that have their last token.
        begun : list of int
            Requests that have their first token after a prompt (or after preemption), in order.
        """
        ended: list[int] = []
        decode = self.decode
        self.ended_decoding = 0
        if self.decodes:
            if steps > 1:
                self.kv.take(decode.blocks_of(steps) - decode.new_blocks())
            decode.advance(steps)
            ended = decode.ended()
            self.ended_decoding = len(ended)
            for request in ended:
                self.leave(request, decode.leave(request)[0])
        if self.encoder.held:
            for request, (start, tokens, _) in zip(self.owners, self.chunks, strict=True):
                if request in self.encoder.held:
                    self.encoder.computed(request, start + tokens)
        for request in self.finishing:
            self._begin(request, ended)
        for request, context, left in self.paused:
            decode.join(request, context, left)
        self.paused.clear()
        return ended, self.finishing

    def _begin(self, request: int, ended: list[int]) -> None:
        """Let a request whose prompt is computed decode, or end if one token is all."""
        tokens = self.target.get(request) or self.resolved.prompt_tokens[request]
        if self.decode.kept is not None:  # what is evicted when a prompt ends
            evicted = self.resolved.prefill_blocks(request, tokens) - self.resolved.blocks(request, tokens)
            if evicted:
                self.kv.give(evicted)
        left = (self.left.pop(request, 0) or self.resolved.output_tokens[request]) - 1
        if left and self.roles.decodes:
            self.decode.join(request, tokens + 1, left)
        elif left:
            del self.running[request]
            self.handed[request] = tokens
        else:
            ended.append(request)
            self.leave(request, tokens)
