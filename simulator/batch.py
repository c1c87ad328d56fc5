"""The requests of one worker and what its next step computes: budgets, blocks, items, preemption. No clock."""

from __future__ import annotations

from collections.abc import Callable

from simulator.batching import Decision
from simulator.encode_duty import EncodeDuty
from simulator.encoder import Plan
from simulator.limits import EVERYTHING, Limits, Roles
from simulator.prompt import Chunk
from simulator.resolve import Resolved
from simulator.sequences import Sequences
from simulator.service import ReadRule


class Batch(Sequences):
    """The step that is being formed, and what it changes; see `simulator.sequences.Sequences` for its parameters."""

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
        super().__init__(resolved, limits, rules, roles=roles, key=key, duty=duty)
        self.admitted: list[tuple[int, int]] = []  # in this step, and the prompt tokens that were cached
        self.chunks: list[Chunk] = []
        self.finishing: list[int] = []  # prompts that end in this step
        self.decodes = False
        self.ended_decoding = 0
        self._has_items = bool(resolved.item_start)
        self._from_others = duty is not None  # whether there may be anything
        self.loaded = 0  # blocks that this step brings from the host
        self._taken = 0  # blocks that decoding sequences took for this step, or for the steps of a leap so far
        self._may_fit_later = False  # whether the head of the queue fits once less of its prompt is cached

    # Forming a step

    def form(self, decision: Decision) -> None:
        """Fill in what the next step computes."""
        self._clear()
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

    def _clear(self) -> None:
        """Forget the step before."""
        if self.chunks:
            self.chunks, self.owners, self.finishing, self.admitted = [], [], [], []
        if self.preempted:
            self.preempted, self.returned = [], []
            self._resume()  # who made way for a prompt that was preempted itself
        self.decodes = self.reserved = self._may_fit_later = False
        self.loaded = 0

    def _ready_decode(self) -> None:
        """Take the blocks that all decoding sequences need for one step; the last request makes room."""
        decode = self.decode
        need = decode.new_blocks()
        while need > self.kv.free:
            self.preempt(self.victim())
            need = decode.new_blocks()
        if decode.size:
            if need:
                self.kv.take(need)
            self._taken = need
            self.decodes = self.reserved = True

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

    def _resume(self) -> None:
        """Let the sequences decode again that had no budget."""
        for request, context, left in self.paused:
            self.decode.join(request, context, left)
        self.paused.clear()

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
            last = self.victim()
            self.preempt(last)
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
            hit = reused = loaded = 0
            shares = request in kv.leaves
            if shares:
                goal = self.target.get(request) or self.resolved.prompt_tokens[request]
                hit, reused, loaded = kv.found(request, (goal - 1) // block)
            start = (hit + loaded) * block
            tokens, plan = self._chunk(request, start, budget)
            need = self.resolved.prefill_blocks(request, start + tokens) - hit
            if not tokens or max(need, self._whole(request) - hit) + reused > kv.free:
                self._may_fit_later = reused > 0  # from an earlier start, a chunk may end earlier
                break
            queue.popleft()
            self.was_preempted.discard(request)
            if shares:
                kv.hold(request, hit)
            kv.take(need)
            if loaded:
                kv.load(request, loaded)
                self.loaded += loaded
            running[request] = None
            self.admitted.append((request, start))
            self._add(request, start, tokens, plan)
            budget -= tokens

    def _whole(self, request: int) -> int:
        """Return the blocks of all of a prompt that must fit before it is started, 0 where it need not.

        While requests hold blocks that do not run here, one that was preempted would else be preempted again and again,
        for as long as they are on their way.
        """
        if request not in self.was_preempted or not (self.handover.handed or self.handover.promised):
            return 0
        return self.resolved.prefill_blocks(request, self.target.get(request) or self.resolved.prompt_tokens[request])

    # From other workers, and to them

    def land(self, request: int, steps: int) -> None:
        """Take in a prompt whose KV is here; it joins with the next step."""
        self._from_others = True
        self.handover.land(request, steps)

    def _take_from_others(self) -> None:
        """Take in what other workers have asked to be encoded, and what they have computed."""
        if self.duty is not None:
            self.duty.form()
        if self.handover.landed:
            self.handover.join(self.running, self.decode, self.limits.max_sequences)

    # The end of a step

    def steady_steps(self, most: int) -> int:
        """Return for how many steps of decoding alone the batch cannot change, this one included."""
        if self._may_fit_later:
            return 1
        return self.decode.steady_steps(self.kv.free + self.decode.new_blocks(), most)

    def settle(self, steps: int) -> None:
        """Take the blocks of so many steps of decoding alone, the first of which has its own."""
        need = self.decode.blocks_of(steps)
        self.kv.take(need - self._taken)
        self._taken = need

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
                self.settle(steps)
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
        if self.paused:
            self._resume()
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
            self.handover.handed[request] = tokens
        else:
            ended.append(request)
            self.leave(request, tokens)
