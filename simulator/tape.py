"""Times of requests, written while they live."""

from __future__ import annotations

from typing import Final

import numpy as np

from costmodel.base import Array
from simulator.request import LIFE, Ints, Requests, State

_MAY: Final = tuple(tuple(after in LIFE[before] for after in State) for before in State)


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
            for name in ("arrival_s", "preprocess_s", "queued_s", "scheduled_s", "first_token_s", "finish_s")
        }
        self.counts: dict[str, Ints] = {
            name: np.zeros(n, dtype=np.int64) for name in ("state", "preemptions", "cached_tokens", "worker")
        }
        views = {name: memoryview(column) for name, column in (self.times | self.counts).items()}
        self.arrival_s = views["arrival_s"]
        self.preprocess_s = views["preprocess_s"]
        self.queued_s = views["queued_s"]
        self.scheduled_s = views["scheduled_s"]
        self.first_token_s = views["first_token_s"]
        self.finish_s = views["finish_s"]
        self.state = views["state"]
        self.preemptions = views["preemptions"]
        self.cached_tokens = views["cached_tokens"]
        self.worker = views["worker"]

    def move(self, request: int, state: State) -> None:
        """Let a request enter another state of its life."""
        before = self.state[request]
        if not _MAY[before][state]:
            raise RuntimeError(f"request {request} cannot go from {State(before).name} to {state.name}")
        self.state[request] = state

    def queue(self, request: int, time_s: float) -> None:
        """Note that a request waits for the language model."""
        self.move(request, State.WAITING)
        self.queued_s[request] = time_s

    def start(self, request: int, time_s: float, cached_tokens: int) -> None:
        """Note that a request runs, and how much of its prompt was cached."""
        self.move(request, State.RUNNING)
        if not self.preemptions[request]:
            self.scheduled_s[request] = time_s
            self.cached_tokens[request] = cached_tokens

    def preempt(self, request: int) -> None:
        """Note that a request is back in the queue."""
        self.move(request, State.WAITING)
        self.preemptions[request] += 1

    def finish(self, request: int, time_s: float) -> None:
        """Note that a request has its last token."""
        self.move(request, State.FINISHED)
        self.finish_s[request] = time_s
