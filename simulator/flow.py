"""The way of a request through pools, from arrival to its end; every worker's hooks end here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simulator.journey import Gone, Journey
from simulator.kv_flow import KvFlow
from simulator.network import Network
from simulator.picture_flow import PictureFlow
from simulator.pool_run import PoolRun
from simulator.prompt_flow import PromptFlow
from simulator.received import Received
from simulator.request import ENDS, State
from simulator.worker import Worker

TOO_LONG: Final = "no pool has room for so many tokens"
NOT_ADMITTED: Final = "not admitted"
CRASHED: Final = "its worker crashed"


class Flow:
    """Moves requests between pools.

    Parameters
    ----------
    network : Network
    on_end : callable
        Called with each request that has ended, however.
    """

    def __init__(self, network: Network, on_end: Callable[[int], None]) -> None:
        self.network, self.on_end = network, on_end
        self.caches = KvFlow(network)
        self.prompts = PromptFlow(network, self.caches)
        self.pictures = PictureFlow(network, self.prompts)
        self._fit_in: dict[str, list[bool]] = {}  # by pool of the prompt, which requests fit

    # Arrival

    def arrive(self, request: int) -> None:
        """Take in a request, now."""
        network = self.network
        media = network.resolved.has_items(request)
        fronts = [run for run in network.fronts[media] if self._fits(request, run)]
        if not fronts:
            self._end(request, State.REJECTED, TOO_LONG)
            return
        able = [run for run in fronts if run.loads.open]
        if not able:
            network.park_until(request, fronts, partial(self._again, request))
            return
        front = able[0] if len(able) == 1 else min(able, key=PoolRun.pressure)
        if network.plan.policies.admission != "all" and not self._admits(front):
            self._end(request, State.REJECTED, NOT_ADMITTED)
            return
        journey = network.journeys[request] = Journey(request, front)
        front.coming[0] += 1
        front.coming[1] += network.resolved.prompt_tokens[request]
        if media:
            self.pictures.begin(journey)
        else:
            self.prompts.place(journey)

    def go_on(self, request: int) -> None:
        """Take in a request that fits and is preprocessed, where there is one way for it."""
        network = self.network
        media = network.resolved.has_items(request)
        journey = network.journeys[request] = Journey(request, network.fronts[media][0])
        journey.comes = False
        if media:
            self.pictures.go_on(journey)
        else:
            self.prompts.place(journey)

    def _again(self, request: int) -> None:
        """Try once more, if the client has not left."""
        if self.network.tape.state[request] == State.EXPECTED and request not in self.network.journeys:
            self.arrive(request)

    def _fits(self, request: int, front: PoolRun) -> bool:
        """Return whether prompt and longest answer fit where they would be."""
        known = self._fit_in.get(front.pool.name)
        if known is None:  # worked out for all requests when it is asked first
            known = self._fit_in[front.pool.name] = self._fitting(front).tolist()
        return known[request]

    def _fitting(self, front: PoolRun) -> NDArray[np.bool_]:
        if front.pool.runs("decode"):
            return front.held(answer=True)
        found = front.held(answer=False)
        found &= np.any([run.held(answer=True) for run in self.network.decoders], axis=0)
        return found

    def fitting(self) -> NDArray[np.bool_]:
        """Return which requests fit some pool."""
        media = np.diff(np.array(self.network.resolved.first_item)) > 0
        found = np.zeros(len(media), dtype=bool)
        for kind, fronts in self.network.fronts.items():
            for front in fronts:
                found |= self._fitting(front) & (media == kind)
        return found

    def _admits(self, front: PoolRun) -> bool:
        """Return whether a request is taken, by what routers see and what is on its way to the pool."""
        policies, loads = self.network.plan.policies, front.loads.seen(self.network.clock.now)
        limit, slo = policies.admission_limit, self.network.plan.slo
        if policies.admission == "queue":
            there = loads.requests[loads.least(loads.requests)] + front.coming[0] / len(front.loads.open)
            return limit is None or there < limit
        if limit is None:
            limit = slo.ttft_s if slo and slo.ttft_s else float("inf")
        tokens = loads.tokens[loads.least(loads.tokens)] + front.coming[1] / len(front.loads.open)
        return tokens * front.token_s <= limit

    # What workers tell

    def encoded(self, item: int, worker: Worker) -> None:
        """Take an item that was encoded for another worker."""
        self.pictures.encoded(item, worker)

    def chunk(self, request: int, tokens: int, worker: Worker) -> None:
        """Take note that a step starts which computes so many tokens of a request."""
        self.caches.chunk(request, tokens, worker)

    def prefilled(self, request: int, worker: Worker) -> None:
        """Take a prompt that is computed where it does not decode."""
        journey = self.network.journeys[request]
        self._drop_needless(journey)
        self.prompts.unload(journey, worker)
        self.caches.hand_over(journey)

    def needs_embeddings(self, request: int, worker: Worker) -> None:
        """Encode the pictures of a preempted request again."""
        journey = self.network.journeys[request]
        self.caches.drop(journey, Gone())  # who holds room elsewhere while it waits for room here could wait for ever
        if worker is journey.decoder:  # it is computed anew where it decoded
            journey.loaded, slot = self.network.place(worker)
            journey.loaded.loads.give(slot, tokens=self.network.resolved.prompt_tokens[request])
        journey.decoder = None
        self.pictures.again(journey, worker)

    def preempted(self, request: int, worker: Worker) -> None:
        """Stop what has left layer by layer of a prompt that is computed again."""
        journey = self.network.journeys[request]
        if worker is journey.worker and journey.decoder is not None:
            self.caches.drop_transfers(journey)

    def has_room(self, worker: Worker) -> None:
        """Offer room that a step may have made."""
        run, slot = self.network.place(worker)
        room = run.rooms[slot]
        if len(room):
            room.offer()
        encoder = worker.batch.encoder
        if isinstance(encoder, Received) and len(encoder.room):
            encoder.room.offer()

    def _drop_needless(self, journey: Journey) -> None:
        """Stop what is still to come of pictures: all that a prompt needed of them was in the prefix cache."""
        if journey.landed < journey.n_items:
            self.pictures.drop(journey)

    # Ends

    def ended(self, request: int, worker: Worker) -> None:
        """Take a request that has its last token."""
        journey = self.network.journeys.pop(request)
        self._drop_needless(journey)
        if journey.decoder is not None and worker is not journey.decoder:  # one token was all
            self.caches.drop_transfers(journey)
            self.caches.drop_promise(journey)
            self.prompts.unload(journey, worker)
        elif journey.decoder is not None:
            self.caches.unload(request, worker)
        else:
            self.prompts.unload(journey, worker)
        self.on_end(request)

    def _end(self, request: int, state: State, reason: str) -> None:
        self.network.tape.end(request, state, reason, self.network.clock.now)
        self.on_end(request)

    def leave(self, request: int, state: State, reason: str) -> None:
        """End a request that has not finished, wherever it is: its client has left, or it fails."""
        if self.network.tape.state[request] in ENDS:
            return
        self.release(request)
        self._end(request, state, reason)

    def lose(self, worker: Worker) -> None:
        """Begin anew with all requests of which something was at a worker that is down, or let them fail."""
        network = self.network
        hit = [journey.request for journey in network.journeys.values() if journey.touches(worker)]
        ways = [Gone(partial(self._again, request)) for request in hit]
        for request, way in zip(hit, ways, strict=True):
            self.release(request, way)
        if network.store is not None:
            network.store.lose(worker)
        worker.empty()  # what others gave it meanwhile was for those who are gone
        policies, tape = network.plan.policies, network.tape
        for request, way in zip(hit, ways, strict=True):
            if policies.after_crash == "fail" or tape.retries[request] == policies.most_retries:
                self._end(request, State.FAILED, CRASHED)
            else:
                tape.restart(request)
                way.close()

    def release(self, request: int, gone: Gone | None = None) -> None:
        """Free all that a request holds anywhere; a step under way keeps it until its end."""
        gone = gone or Gone()
        self.network.parked.pop(request, None)
        journey = self.network.journeys.pop(request, None)
        if journey is None:
            return
        self.pictures.drop_pixels(journey)
        self.pictures.drop(journey)
        self.caches.drop(journey, gone)
        self.prompts.arrived(journey)
        worker = journey.worker
        if worker is not None:
            self.prompts.unload(journey, worker)
            if worker.runs:
                if isinstance(worker.batch.encoder, Received):
                    worker.batch.encoder.forget(request)
                worker.abort(request, gone.wait())
