"""The decoding sequences of a worker as sums: nothing here loops over them."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final

from simulator.service import NO_CAP, ReadRule

SHIFT: Final = 32
"""Bits of a request's index in an entry of the agenda."""
MASK: Final = (1 << SHIFT) - 1


class Window:
    """The keys that all sequences read where no more than a cap is read of each.

    A sequence below the cap adds one key a step until it crosses; crossings stand in an agenda.
    """

    __slots__ = ("agenda", "below", "cap", "crossing", "total")

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.total = 0
        self.below = 0
        self.agenda: list[int] = []
        self.crossing: dict[int, int] = {}  # by request below the cap, the step at which it reaches it

    def join(self, request: int, offset: int, clock: int) -> None:
        """Add a sequence."""
        context = offset + clock
        self.total += min(context, self.cap)
        if context < self.cap:
            self.below += 1
            self.crossing[request] = self.cap - offset
            heappush(self.agenda, (self.cap - offset) << SHIFT | request)

    def leave(self, request: int, context: int) -> None:
        """Take a sequence out."""
        self.total -= min(context, self.cap)
        if self.crossing.pop(request, None) is not None:
            self.below -= 1

    def advance(self, steps: int, clock: int) -> None:
        """Let all decode for some steps, none of which crosses before the last."""
        self.total += steps * self.below
        while self.agenda and self.agenda[0] >> SHIFT <= clock:
            entry = heappop(self.agenda)
            if self.crossing.get(entry & MASK) == entry >> SHIFT:
                del self.crossing[entry & MASK]
                self.below -= 1

    def steady_steps(self, clock: int) -> int:
        """Return the steps until the next sequence crosses."""
        while self.agenda and self.crossing.get(self.agenda[0] & MASK) != self.agenda[0] >> SHIFT:
            heappop(self.agenda)
        return (self.agenda[0] >> SHIFT) - clock if self.agenda else NO_CAP


class DecodeSet:
    """Sequences that decode together, one token each a step.

    Contexts, ends and new blocks are kept relative to a count of steps, so that a step changes a few sums only.

    Parameters
    ----------
    rules : tuple of ReadRule
        What decode attention reads.
    block_tokens : int
        Tokens of a block.
    own_keys : sequence of tuple of int, optional
        By request, what each rule has of it beside its context.
    kept_tokens : sequence of int, optional
        By request, tokens' worth of cache that it holds beside its context.
    """

    __slots__ = (
        "agenda",
        "block",
        "capped",
        "clock",
        "contexts",
        "kept",
        "offset",
        "own_keys",
        "own_totals",
        "phase",
        "plain",
        "rules",
        "size",
        "until",
    )

    def __init__(
        self,
        rules: tuple[ReadRule, ...],
        block_tokens: int,
        own_keys: Sequence[tuple[int, ...]] | None = None,
        kept_tokens: Sequence[int] | None = None,
    ) -> None:
        self.rules = rules
        self.block = block_tokens
        self.own_keys = own_keys
        self.kept = kept_tokens
        self.own_totals = [0] * len(rules)  # of rules without a cap that is crossed
        self.size = 0
        self.clock = 0
        self.contexts = 0  # sum of what all of them will see in the next step
        self.phase = [0] * block_tokens  # how many need a new block at which steps
        self.agenda: list[int] = []  # (last step, request), the next end first
        self.until: dict[int, int] = {}  # by request, its last step
        self.offset: dict[int, int] = {}  # by request, context less step count
        self.plain = rules == (ReadRule(),) and own_keys is None
        self.capped = tuple(None if rule.cap == NO_CAP or not rule.grows else Window(rule.cap) for rule in rules)

    def join(self, request: int, context: int, steps: int) -> None:
        """Add a sequence that sees so many tokens in its next step and decodes for so many steps."""
        clock = self.clock
        due = clock + steps
        offset = context - clock
        self.size += 1
        self.contexts += context
        self.phase[(offset - 1 if self.kept is None else self._behind(request, offset)) % self.block] += 1
        self.until[request] = due
        self.offset[request] = offset
        heappush(self.agenda, due << SHIFT | request)
        if not self.plain:
            own = self.own_keys[request] if self.own_keys else self._nothing
            for i, window in enumerate(self.capped):
                if window is not None:
                    window.join(request, offset + own[i], clock)
                else:
                    self.own_totals[i] += own[i]

    @property
    def _nothing(self) -> tuple[int, ...]:
        return (0,) * len(self.rules)

    def _behind(self, request: int, offset: int) -> int:
        """Return the tokens' worth of cache of a sequence, less the count of steps."""
        return offset - 1 + (0 if self.kept is None else self.kept[request])

    def needs_block(self, request: int) -> bool:
        """Return whether the next step of a sequence needs a new block."""
        return (self._behind(request, self.offset[request]) + self.clock) % self.block == 0

    def leave(self, request: int) -> tuple[int, int]:
        """Take a sequence out; return the tokens that it has in the cache and the steps that it had left."""
        offset = self.offset.pop(request)
        context = offset + self.clock
        self.size -= 1
        self.contexts -= context
        self.phase[(offset - 1 if self.kept is None else self._behind(request, offset)) % self.block] -= 1
        if not self.plain:
            own = self.own_keys[request] if self.own_keys else self._nothing
            for i, window in enumerate(self.capped):
                if window is not None:
                    window.leave(request, context + own[i])
                else:
                    self.own_totals[i] -= own[i]
        return context - 1, self.until.pop(request) - self.clock

    def advance(self, steps: int) -> None:
        """Let all decode for some steps."""
        self.clock += steps
        self.contexts += steps * self.size
        if not self.plain:
            for window in self.capped:
                if window is not None:
                    window.advance(steps, self.clock)

    def ended(self) -> list[int]:
        """Return the sequences whose last step is over; they are still counted until they leave."""
        agenda, clock, until = self.agenda, self.clock, self.until
        found: list[int] = []
        while agenda and agenda[0] >> SHIFT <= clock:
            entry = heappop(agenda)
            request = entry & MASK
            current = until.get(request) == entry >> SHIFT  # not one that was preempted since
            if current and (not found or found[-1] != request):
                found.append(request)
        return found

    def new_blocks(self) -> int:
        """Return the blocks that the next step needs."""
        return self.phase[-self.clock % self.block]

    def keys(self) -> tuple[float, ...]:
        """Return the keys that the next step reads, by rule."""
        if self.plain:
            return (self.contexts,)
        size, contexts = self.size, self.contexts
        held = zip(self.rules, self.capped, self.own_totals, strict=True)
        return tuple(
            rule.fixed * size + rule.share * ((contexts * rule.grows + own) if window is None else window.total)
            for rule, window, own in held
        )

    def growth(self) -> tuple[float, ...]:
        """Return how many more keys each further step reads, by rule."""
        if self.plain:
            return (self.size,)
        pairs = zip(self.rules, self.capped, strict=True)
        return tuple(
            rule.share * (self.size * rule.grows if window is None else window.below) for rule, window in pairs
        )

    def steady_steps(self, free_blocks: int, most: int) -> int:
        """Return for how many steps nothing can change: no end, no crossed cap, and blocks for all of them."""
        agenda, until = self.agenda, self.until
        while until.get(agenda[0] & MASK) != agenda[0] >> SHIFT:
            heappop(agenda)
        steps = min(most, (agenda[0] >> SHIFT) - self.clock)
        if not self.plain:
            for window in self.capped:
                if window is not None:
                    steps = min(steps, window.steady_steps(self.clock))
        if (steps // self.block + 1) * self.size > free_blocks and self.blocks_of(steps) > free_blocks:
            steps = max(1, self._affordable(free_blocks))
        return steps

    def blocks_of(self, steps: int) -> int:
        """Return the blocks that the next steps need."""
        rounds, rest = divmod(steps, self.block)
        first = -self.clock % self.block
        phase, last = self.phase, first - rest + 1
        partial = sum(phase[last : first + 1]) if last >= 0 else sum(phase[: first + 1]) + sum(phase[last:])
        return rounds * self.size + (partial if rest else 0)

    def _affordable(self, free_blocks: int) -> int:
        rounds, left = divmod(free_blocks, self.size)
        steps, first = rounds * self.block, -self.clock % self.block
        for i in range(self.block):
            left -= self.phase[first - i]
            if left < 0:
                return steps + i
        return steps
