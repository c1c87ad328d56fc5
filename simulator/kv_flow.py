"""The way of a prompt's KV to the worker that decodes: whose room it takes, when it leaves, when it has landed."""

from __future__ import annotations

from collections.abc import Callable

from simulator.journey import Gone, Journey
from simulator.network import Network, lightest
from simulator.pool_run import PoolRun
from simulator.request import State
from simulator.worker import Worker


class KvFlow:
    """Hands prompts over to workers that decode.

    Parameters
    ----------
    network : Network
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    def leaves(self, journey: Journey) -> bool:
        """Return whether a request decodes elsewhere than in the pool of its prompt."""
        return not journey.front.pool.runs("decode") and self.network.most_output[journey.request] > 1

    def _pool(self, request: int) -> PoolRun:
        return lightest([run for run in self.network.decoders if run.holds(request)])

    def reserve(self, journey: Journey, go_on: Callable[[Journey], None]) -> None:
        """Go on with a prompt, where its link says so once there is room for its KV behind it."""
        run = self._pool(journey.request)
        if self.network.link(journey.front, run).mode != "reserve":
            go_on(journey)
        elif not self._bind(journey, run, lambda: go_on(journey)):
            self.network.park(journey, run, lambda journey: self.reserve(journey, go_on))

    def _bind(self, journey: Journey, run: PoolRun, go_on: Callable[[], None]) -> bool:
        """Choose where a request decodes and ask for its room; False if nobody takes work."""
        network, request = self.network, journey.request
        if not run.loads.open:
            return False
        slot = run.decode_router.route(network.view(request, run), run.loads.seen(network.clock.now))
        run.loads.give(slot, tokens=network.resolved.prompt_tokens[request])
        worker = journey.decoder = run.workers[slot]
        network.tape.decode_worker[request] = worker.index

        def take() -> None:
            worker.batch.handover.promise(request)
            go_on()

        run.rooms[slot].ask(request, worker.batch.handover.blocks_for(request), take)
        return True

    def chunk(self, request: int, tokens: int, worker: Worker) -> None:
        """Send what a step computes of a request while it runs, all but its last layer's part."""
        network = self.network
        journey = network.journeys.get(request)
        if journey is None or journey.decoder is None:
            return
        run, slot = network.place(worker)
        layers = run.service.kv_layers
        n_bytes = run.service.kv_bytes(tokens) * (layers - 1) / layers
        journey.left += 1
        journey.parts += 1
        journey.told_bytes += n_bytes
        wire = network.wire(run, network.place(journey.decoder)[0], slot)
        wire.send(("kv", request, journey.parts), n_bytes, lambda: self._landed(journey))

    def hand_over(self, journey: Journey) -> None:
        """Take a prompt that is computed to where it decodes."""
        self.network.tape.move(journey.request, State.MOVING)
        if journey.decoder is not None:
            self._send(journey)
        else:
            self._find(journey)

    def _find(self, journey: Journey) -> None:
        run = self._pool(journey.request)
        if not self._bind(journey, run, lambda: self._send(journey)):
            self.network.park(journey, run, self._find)

    def _send(self, journey: Journey) -> None:
        """Send the KV of a prompt, or what of it has not left layer by layer."""
        source, target = journey.worker, journey.decoder
        assert source is not None and target is not None  # noqa: S101, PT018
        network, request = self.network, journey.request
        (run, slot), into = network.place(source), network.place(target)[0]
        r = network.resolved
        costs = r.item_cost[r.first_item[request] : r.first_item[request + 1]]
        whole = run.service.kv_bytes(r.prompt_tokens[request], costs)
        n_bytes = max(0.0, whole - journey.told_bytes)  # what was cached has not left either
        journey.left += 1
        journey.is_sent = True
        network.wire(run, into, slot).send(("kv", request, 0), n_bytes, lambda: self._landed(journey))

    def _landed(self, journey: Journey) -> None:
        journey.left -= 1
        if journey.left or not journey.is_sent or self.network.journeys.get(journey.request) is not journey:
            return
        source, target = journey.worker, journey.decoder
        assert source is not None and target is not None  # noqa: S101, PT018
        source.batch.sent(journey.request)
        source.stir()
        journey.worker = None  # nothing of it is left there
        target.land(journey.request)

    # Leaving

    def drop(self, journey: Journey, gone: Gone) -> None:
        """Stop the transfers of a request's KV, and free its place behind them."""
        decoder, request = journey.decoder, journey.request
        if decoder is None:
            return
        self.drop_transfers(journey)
        held = decoder.batch
        joined = request in held.running or held.handover.holds(request) or request in held.queue
        if decoder.runs and joined and decoder is not journey.worker:
            self.unload(request, decoder)
            decoder.abort(request, gone.wait())
        else:
            self.drop_promise(journey)

    def unload(self, request: int, worker: Worker) -> None:
        """Count a request no longer as work of who decodes it."""
        run, slot = self.network.place(worker)
        run.loads.give(slot, tokens=-self.network.resolved.prompt_tokens[request], requests=-1)

    def drop_transfers(self, journey: Journey) -> None:
        """Stop all transfers of a request's KV."""
        network = self.network
        if journey.worker is not None and journey.decoder is not None:
            (run, slot), target = network.place(journey.worker), network.place(journey.decoder)[0]
            if run is not target:
                for part in range(journey.parts + 1):
                    network.wire(run, target, slot).drop(("kv", journey.request, part))
        journey.left = journey.parts = 0
        journey.told_bytes = 0.0

    def drop_promise(self, journey: Journey) -> None:
        """Give back the room where a request would have decoded."""
        decoder, request = journey.decoder, journey.request
        assert decoder is not None  # noqa: S101
        run, slot = self.network.place(decoder)
        self.unload(request, decoder)
        if not run.rooms[slot].drop(request) and decoder.runs and request in decoder.batch.handover.promised:
            decoder.stir()  # what waits there may fit now
            decoder.batch.handover.break_promise(request)
            run.rooms[slot].offer()
