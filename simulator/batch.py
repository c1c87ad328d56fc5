"""The requests of one worker and what its next step computes: budgets, blocks, items, preemption. No clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from simulator.batching import Decision
from simulator.decoding import DecodeSet
from simulator.encoder import Encoder, Plan
from simulator.kv_cache import KvCache
from simulator.prompt import Chunk
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
    """

    token_budget: int
    max_sequences: int
    kv_blocks: int
    block_tokens: int
    encoder_budget: int
    encoder_cache_tokens: int
    long_prefill_tokens: int = 0
    prefix_caching: bool = True

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


class Batch:
    """Waiting and running requests, and the step that is being formed."""

    def __init__(self, resolved: Resolved, limits: Limits, rules: tuple[ReadRule, ...]) -> None:
        self.resolved = resolved
        self.limits = limits
        self.kv = KvCache(limits.kv_blocks, resolved.leaves() if limits.prefix_caching else {})
        self.encoder = Encoder(resolved, limits.encoder_budget, limits.encoder_cache_tokens)
        self.decode = DecodeSet(rules, limits.block_tokens, resolved.own_keys, resolved.kept_tokens)
        self.queue: deque[int] = deque()
        self.running: dict[int, None] = {}  # in order of admission
        self.started: dict[int, int] = {}  # running requests whose prompt is not computed -> tokens that are
        self.target: dict[int, int] = {}  # preempted requests -> tokens to compute before the next one is generated
        self.left: dict[int, int] = {}  # preempted requests -> tokens that they have still to generate
        self.preempted: list[int] = []  # in this step
        self.admitted: list[tuple[int, int]] = []  # in this step, and the prompt tokens that were cached
        self.paused: list[tuple[int, int, int]] = []  # sequences without budget in this step: request, context, steps
        self.chunks: list[Chunk] = []
        self.owners: list[int] = []  # of the chunks
        self.finishing: list[int] = []  # prompts that end in this step
        self.decodes = False
        self.ended_decoding = 0
        self._has_items = bool(resolved.item_start)
        self._reserved = False  # whether this step's blocks of the decoding sequences are taken

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

    # Forming a step

    def form(self, decision: Decision) -> None:
        """Fill in what the next step computes."""
        if self.chunks:
            self.chunks, self.owners, self.finishing, self.admitted = [], [], [], []
        if self.preempted:
            self.preempted = []
        self.decodes = self._reserved = False
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
            self._preempt(next(reversed(self.running)))
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
            last = next(reversed(self.running))
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
            if not tokens:
                break
            need = self.resolved.prefill_blocks(request, start + tokens) - hit
            if need + reused > kv.free:
                break
            queue.popleft()
            if shares:
                kv.hold(request, hit)
            kv.take(need)
            running[request] = None
            self.admitted.append((request, start))
            self._add(request, start, tokens, plan)
            budget -= tokens

    # Leaving

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
        self.queue.appendleft(request)
        self.preempted.append(request)

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

    # The end of a step

    def steady_steps(self, most: int) -> int:
        """Return for how many steps of decoding alone the batch cannot change, this one included."""
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
        if left:
            self.decode.join(request, tokens + 1, left)
        else:
            ended.append(request)
            self.leave(request, tokens)
