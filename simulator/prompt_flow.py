"""The way of a prompt to the worker that computes it."""

from __future__ import annotations

from simulator.journey import Journey
from simulator.kv_flow import KvFlow
from simulator.network import Network
from simulator.request import State
from simulator.worker import Worker


class PromptFlow:
    """Chooses who computes prompts.

    Parameters
    ----------
    network : Network
    caches : KvFlow
        Takes over what decodes elsewhere.
    """

    def __init__(self, network: Network, caches: KvFlow) -> None:
        self.network = network
        self.caches = caches

    def bind(self, journey: Journey) -> bool:
        """Choose who computes the prompt; False if nobody takes work."""
        front, network = journey.front, self.network
        if journey.worker is not None:
            return True
        if not front.loads.open:
            return False
        self.arrived(journey)
        slot = 0
        if len(front.workers) > 1:
            view = network.view(journey.request, front)
            slot = front.router.route(view, front.loads.seen(network.clock.now))
        front.loads.give(slot, tokens=network.resolved.prompt_tokens[journey.request])
        journey.loaded = front
        journey.worker = front.workers[slot]
        network.tape.worker[journey.request] = journey.worker.index
        return True

    def arrived(self, journey: Journey) -> None:
        """Count a request no longer as on its way to the pool of its prompt."""
        if journey.comes:
            journey.comes = False
            journey.front.coming[0] -= 1
            journey.front.coming[1] -= self.network.resolved.prompt_tokens[journey.request]

    def place(self, journey: Journey) -> None:
        """Choose who computes the prompt, and queue it there."""
        if self.bind(journey):
            self.enqueue(journey)
        else:
            self.network.park(journey, journey.front, self.place)

    def enqueue(self, journey: Journey) -> None:
        """Queue a prompt; where its KV goes has a place for it first if the link says so."""
        journey.enqueued = True
        if self.caches.leaves(journey):
            self.caches.reserve(journey, self._queue)
        else:
            self._queue(journey)

    def _queue(self, journey: Journey) -> None:
        assert journey.worker is not None  # noqa: S101
        if journey.again:
            self.network.tape.move(journey.request, State.WAITING)
            journey.worker.enqueue_again(journey.request)
        else:
            journey.worker.enqueue(journey.request)

    def unload(self, journey: Journey, worker: Worker) -> None:
        """Count a prompt no longer as work of a worker."""
        if journey.loaded is not None:
            slot = self.network.place(worker)[1]
            tokens = self.network.resolved.prompt_tokens[journey.request]
            journey.loaded.loads.give(slot, tokens=-tokens, requests=-1)
            journey.loaded = None
