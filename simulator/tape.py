"""Times of requests, written while they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from simulator.request import LIFE, Ints, Requests, State

_MAY: Final = tuple(tuple(after in LIFE[before] for after in State) for before in State)
_TO_WAITING: Final = tuple(State.WAITING in LIFE[before] for before in State)
WAITING, RUNNING, FINISHED = int(State.WAITING), int(State.RUNNING), int(State.FINISHED)
"""As plain numbers, which are quicker; every request passes them."""


class Tape:
    """Columns by request; memory views write single values quicker than arrays do.

    Parameters
    ----------
    requests : Requests
    """

    def __init__(self, requests: Requests) -> None:
        n = len(requests)
        self.times: dict[str, Array] = {
            name: np.full(n, np.nan)
            for name in (
                "arrival_s",
                "preprocess_s",
                "encoded_s",
                "queued_s",
                "scheduled_s",
                "first_token_s",
                "joined_s",
                "finish_s",
                "ended_s",
            )
        }
        self.counts: dict[str, Ints] = {
            name: np.zeros(n, dtype=np.int64)
            for name in ("state", "preemptions", "cached_tokens", "worker", "decode_worker", "retries")
        }
        self.counts["decode_worker"] -= 1
        self.reasons: dict[int, str] = {}
        views: dict[str, Any] = {name: column.data for name, column in self.columns.items()}
        self.arrival_s: memoryview[float] = views["arrival_s"]
        self.preprocess_s: memoryview[float] = views["preprocess_s"]
        self.queued_s: memoryview[float] = views["queued_s"]
        self.scheduled_s: memoryview[float] = views["scheduled_s"]
        self.first_token_s: memoryview[float] = views["first_token_s"]
        self.finish_s: memoryview[float] = views["finish_s"]
        self.state: memoryview[int] = views["state"]
        self.preemptions: memoryview[int] = views["preemptions"]
        self.cached_tokens: memoryview[int] = views["cached_tokens"]
        self.worker: memoryview[int] = views["worker"]
        self.decode_worker: memoryview[int] = views["decode_worker"]
        self.retries: memoryview[int] = views["retries"]
        self.encoded_s: memoryview[float] = views["encoded_s"]
        self.joined_s: memoryview[float] = views["joined_s"]
        self.ended_s: memoryview[float] = views["ended_s"]

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """All of them, by name."""
        return {**self.times, **self.counts}

    def move(self, request: int, state: State) -> None:
        """Let a request enter another state of its life."""
        before = self.state[request]
        if not _MAY[before][state]:
            raise RuntimeError(f"request {request} cannot go from {State(before).name} to {state.name}")
        self.state[request] = state

    def queue(self, request: int, time_s: float) -> None:
        """Note that a request waits for the language model."""
        if not _TO_WAITING[self.state[request]]:
            self.move(request, State.WAITING)
        self.state[request] = WAITING
        self.queued_s[request] = time_s

    def start(self, request: int, time_s: float, cached_tokens: int) -> None:
        """Note that a request runs, and how much of its prompt was cached."""
        if self.state[request] != WAITING:
            self.move(request, State.RUNNING)
        self.state[request] = RUNNING
        if not self.preemptions[request]:
            self.scheduled_s[request] = time_s
            self.cached_tokens[request] = cached_tokens

    def join(self, request: int, time_s: float) -> None:
        """Note that a request decodes on another worker than that of its prompt."""
        self.move(request, State.RUNNING)
        self.joined_s[request] = time_s

    def end(self, request: int, state: State, reason: str, time_s: float) -> None:
        """Note that a request has ended without its last token, and why."""
        self.move(request, state)
        self.reasons[request] = reason
        self.ended_s[request] = time_s

    def restart(self, request: int) -> None:
        """Forget what a request had got: it starts anew."""
        if self.state[request] != State.EXPECTED:
            self.move(request, State.EXPECTED)
        self.retries[request] += 1
        self.decode_worker[request] = -1
        for column in (self.encoded_s, self.queued_s, self.scheduled_s, self.first_token_s, self.joined_s):
            column[request] = float("nan")
        self.cached_tokens[request] = self.preemptions[request] = 0

    def preempt(self, request: int) -> None:
        """Note that a request is back in the queue."""
        self.move(request, State.WAITING)
        self.preemptions[request] += 1

    def finish(self, request: int, time_s: float) -> None:
        """Note that a request has its last token."""
        if self.state[request] != RUNNING:
            self.move(request, State.FINISHED)
        self.state[request] = FINISHED
        self.finish_s[request] = time_s
