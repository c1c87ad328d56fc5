"""Where one request is on its way through the pools."""

from __future__ import annotations

from collections.abc import Callable

from simulator.embedding_store import EmbeddingStore
from simulator.pool_run import PoolRun
from simulator.worker import Worker

QUEUED, DONE, SENDING, LANDED = range(4)
"""Where an item of a request is that is encoded for another worker."""


class Journey:
    """Where one request is.

    Parameters
    ----------
    request : int
    front : PoolRun
        The pool of its prompt.
    """

    __slots__ = (
        "again",
        "at",
        "comes",
        "decoder",
        "early",
        "encoded",
        "encoders",
        "enqueued",
        "front",
        "granted",
        "is_sent",
        "landed",
        "left",
        "loaded",
        "parts",
        "preprocessor",
        "request",
        "status",
        "told_bytes",
        "worker",
    )

    def __init__(self, request: int, front: PoolRun) -> None:
        self.request = request
        self.front = front
        self.encoders: PoolRun | None = None  # the pools of its pictures
        self.preprocessor: PoolRun | None = None
        self.worker: Worker | None = None  # of its prompt
        self.decoder: Worker | None = None  # where it decodes, if elsewhere
        self.at: dict[int, Worker | EmbeddingStore] = {}  # item -> who encodes it, or has it
        self.status: dict[int, int] = {}  # item -> where it is
        self.encoded = self.landed = 0
        self.early = False  # whether the worker of its prompt is chosen before its items are encoded
        self.granted = False  # whether that has room for its embeddings
        self.enqueued = False
        self.again = False  # whether it was preempted and its embeddings come again
        self.comes = True  # whether the worker of its prompt is still to be chosen
        self.loaded: PoolRun | None = None  # whose loads count it
        self.left = self.parts = 0  # transfers of KV under way, and begun layer by layer
        self.told_bytes = 0.0  # of its KV, what left layer by layer
        self.is_sent = False  # whether all of its KV is on its way

    @property
    def n_items(self) -> int:
        """Items that are encoded for it."""
        return len(self.at)

    def touches(self, worker: Worker) -> bool:
        """Return whether something of it is, or will be, at a worker."""
        if worker in (self.worker, self.decoder):
            return True
        return any(other is worker and self.status[item] != LANDED for item, other in self.at.items())


class Gone:
    """Waits until a request has left all workers.

    Parameters
    ----------
    then : callable, optional
        Called once, after `close`.
    """

    __slots__ = ("_left", "_then")

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self._then = then
        self._left = 1

    def wait(self) -> Callable[[], None]:
        """Return what is to be called when it has left one of them."""
        self._left += 1
        return self.close

    def close(self) -> None:
        """Count one less."""
        self._left -= 1
        if not self._left and self._then is not None:
            self._then()
