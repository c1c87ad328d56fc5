"""What a worker writes down: a row a step, the gaps between tokens, and the moments of requests."""

from __future__ import annotations

from costmodel.base import Array
from simulator.batch import Batch
from simulator.steplog import ROW, StepLog
from simulator.tape import Tape


class Notes:
    """The log of one worker.

    Sequences that decode in step had their last token at the same time, so gaps are counted by group.

    Parameters
    ----------
    tape : Tape
        Where times of requests are written.
    """

    __slots__ = ("_groups", "_rejoined", "_silent", "log", "tape")

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.log = StepLog()
        self._groups: list[list[float]] = []  # [time of the last token, decoding sequences that had theirs then]
        self._rejoined: dict[int, float] = {}
        self._silent: dict[int, float] = {}  # preempted sequences -> time of their last token

    def step(self, batch: Batch, now: float, start_s: float, steps: int, encode_s: float) -> None:
        """Log a step, or a leap of several, as it was while it ran."""
        decoding = batch.decode.size if batch.decodes else 0
        kv, chunks = batch.kv, batch.chunks
        tokens = 0
        for _, part, _ in chunks:
            tokens += part
        self.log.rows.frombytes(
            ROW.pack(
                start_s,
                now,
                steps,
                decoding,
                tokens,
                len(chunks),
                len(batch.finishing),
                encode_s,
                (len(batch.encoder.batch) if chunks else 0) + (0 if batch.duty is None else len(batch.duty.batch)),
                len(batch.queue),
                len(batch.running),
                kv.blocks - kv.free,
            )
        )

    def gaps(self, batch: Batch, now: float, ends: Array | None, decoding: int, paused: int) -> None:
        """Log the gaps between tokens that a step ended, or a leap with these ends."""
        groups, log = self._groups, self.log
        left = decoding - batch.ended_decoding
        if ends is None and len(groups) == 1 and not paused:  # nearly always
            group = groups[0]
            log.gap(now - group[0], decoding)
            group[0], group[1] = now, left
            return
        first = now if ends is None else float(ends[0])
        behind = next((group for group in groups if group[1] >= paused), groups[0])
        kept = [behind[0], paused]
        behind[1] -= paused
        for last, sequences in groups:
            log.gap(first - last, int(sequences))
        if ends is not None:
            log.gaps(ends, decoding)
        self._groups = [[now, left], kept] if paused else [[now, left]]

    def started(self, batch: Batch, now: float) -> None:
        """Log who starts."""
        for request, cached in batch.admitted:
            self.tape.start(request, now, cached)

    def joined(self, batch: Batch, now: float) -> None:
        """Log sequences that come from another worker, where they had their first token."""
        for request in batch.handover.joined:
            self.tape.join(request, now)
            self._groups.append([self.tape.first_token_s[request], 1])
        batch.handover.joined = []

    def begun(self, batch: Batch, now: float, begun: list[int]) -> None:
        """Log first tokens, and the gaps of sequences that come back."""
        tape, until, groups = self.tape, batch.decode.until, self._groups
        going: float = 0
        for request in begun:
            if request in self._silent:
                self.log.gap(now - self._silent.pop(request), 1)
                self._rejoined[request] = now
            else:
                tape.first_token_s[request] = now
            going += request in until
        if groups and groups[0][0] == now:
            groups[0][1] += going
        elif going:
            groups.append([now, going])

    def preempted(self, batch: Batch) -> None:
        """Remember when preempted sequences had their last token."""
        tape, groups = self.tape, self._groups
        for request in batch.preempted:
            tape.preempt(request)
            had = tape.first_token_s[request]
            if had != had or request in self._silent:  # noqa: PLR0124 - not a number: no token yet
                continue
            had = self._rejoined.pop(request, had)
            group = next((g for g in groups if g[0] == had), groups[0])
            group[1] -= 1
            self._silent[request] = group[0]

    def forget(self, request: int, *, decodes: bool) -> None:
        """Forget a request that leaves before its end."""
        if decodes:
            group = next((g for g in self._groups if g[1] > 0), None)
            if group is not None:
                group[1] -= 1
        self._silent.pop(request, None)
        self._rejoined.pop(request, None)

    def forget_all(self) -> None:
        """Forget all requests: the worker has crashed."""
        self._groups, self._rejoined, self._silent = [], {}, {}
