"""A device that workers of several pools share: who works at the same time gets an equal part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.worker import Worker


class SharedDevice:
    """Takes turns: of n workers with a step under way, each is n times as slow, and re-timed when that changes.

    Two kernels that need different things overlap better than that, so this is an upper bound of what sharing costs.
    """

    def __init__(self) -> None:
        self._active: dict[Worker, None] = {}

    def enter(self, worker: Worker) -> None:
        """Let a worker begin to work."""
        if worker not in self._active:
            self._active[worker] = None
            self._share_out()

    def leave(self, worker: Worker) -> None:
        """Let a worker stop working."""
        if worker in self._active:
            del self._active[worker]
            worker.take_turns(1)
            self._share_out()

    def _share_out(self) -> None:
        for worker in self._active:
            worker.take_turns(len(self._active))
