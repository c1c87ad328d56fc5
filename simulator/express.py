"""The short way: a pool that does everything for requests of which nothing depends on another; a choice and a queue."""

from __future__ import annotations

from collections.abc import Callable

from simulator.foresight import Arrivals, Ready
from simulator.hooks import Alone
from simulator.network import Network
from simulator.pool_run import PoolRun
from simulator.worker import Worker


class Express(Alone):
    """Arrivals and ends of such a pool; what `simulator.flow.Flow` does for it.

    Parameters
    ----------
    network : Network
        Whose clock, tape and views it uses.
    on_end : callable
        Called with each request that has ended.
    run : PoolRun
        The pool.
    ready : Ready
        Requests that fit, and when each is ready for a worker.
    """

    def __init__(self, network: Network, on_end: Callable[[int], None], run: PoolRun, ready: Ready) -> None:
        super().__init__(on_end)
        self.clock, self.tape, self.view = network.clock, network.tape, network.view
        self.run, self.prompt_tokens = run, run.resolved.prompt_tokens
        Arrivals(self.clock, ready, self._arrive)

    def _arrive(self, request: int) -> None:
        """Give a request to a worker."""
        run = self.run
        loads = run.loads
        slot = run.router.route(self.view(request, run), loads.seen(self.clock.now))
        loads.give(slot, tokens=self.prompt_tokens[request])
        self.tape.worker[request] = slot
        run.workers[slot].enqueue(request)

    def ended(self, request: int, worker: Worker) -> None:
        """Take a request that has its last token."""
        self.run.loads.give(worker.index, tokens=-self.prompt_tokens[request], requests=-1)
        self.on_end(request)
