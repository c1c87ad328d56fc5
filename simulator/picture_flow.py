"""The way of a request's pictures: preprocessed, encoded for another pool, received where the prompt is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simulator.embedding_store import EmbeddingStore
from simulator.journey import DONE, LANDED, QUEUED, SENDING, Journey
from simulator.network import Network, lightest
from simulator.pool_run import PoolRun
from simulator.prompt_flow import PromptFlow
from simulator.received import Received
from simulator.request import NONE, State
from simulator.topology import Link
from simulator.transfer import Wire
from simulator.worker import Worker


class PictureFlow:
    """Moves pixels and embeddings.

    Parameters
    ----------
    network : Network
    prompts : PromptFlow
        Takes over requests whose pictures are where they are needed.
    """

    def __init__(self, network: Network, prompts: PromptFlow) -> None:
        self.network = network
        self.prompts = prompts
        self.encoding: dict[int, None] = {}  # those that hold room though items are not encoded, who did first in front

    # Pixels

    def begin(self, journey: Journey) -> None:
        """Preprocess the pictures of a request."""
        network, request = self.network, journey.request
        run = self._choose(journey)
        assert run.station is not None  # noqa: S101 - checked when the run began
        tasks = run.tasks(request)
        if not tasks:
            self._send_pixels(journey)
            return
        network.tape.move(request, State.PREPROCESSING)
        network.tape.preprocess_s[request] = sum(tasks)
        run.station.submit(request, tasks)

    def _choose(self, journey: Journey) -> PoolRun:
        network = self.network
        if not journey.front.pool.runs("encode"):
            journey.encoders = lightest(network.encoders)
        run = journey.preprocessor = lightest(network.preprocessors[(journey.encoders or journey.front).pool.name])
        return run

    def go_on(self, journey: Journey) -> None:
        """Take in a request whose pictures are preprocessed, as was known before."""
        self._choose(journey)
        self._send_pixels(journey)

    def preprocessed(self, request: int) -> None:
        """Go on with a request whose pictures are preprocessed."""
        journey = self.network.journeys.get(request)
        if journey is not None:
            self._send_pixels(journey)

    def _send_pixels(self, journey: Journey) -> None:
        """Bring pixels to where they are encoded, if that is another pool."""
        network = self.network
        source, target = journey.preprocessor, journey.encoders or journey.front
        assert source is not None  # noqa: S101
        if source is target:
            self._encode(journey)
            return
        first, cost = network.resolved.first_item, network.resolved.item_cost
        items = range(first[journey.request], first[journey.request + 1])
        n_bytes = sum(source.service.pixel_bytes(cost[item]) for item in items)
        wire = network.wire(source, target, 0)
        wire.send(("pixels", journey.request), n_bytes, lambda: network.if_alive(journey, self._encode))

    # Encoding

    def _encode(self, journey: Journey) -> None:
        """Encode where the prompt is computed, or send items to encoders."""
        if journey.encoders is None:
            self.prompts.place(journey)
            return
        self.network.tape.move(journey.request, State.ENCODING)
        self._dispatch(journey)

    def _dispatch(self, journey: Journey) -> None:
        """Give the items of a request to encoders; first take the room of their embeddings if the link says so."""
        run, link = journey.encoders, self._link(journey)
        assert run is not None  # noqa: S101
        journey.early = journey.again or link.mode == "reserve" or link.release == "item"
        if not run.loads.open or (journey.early and not self.prompts.bind(journey)):
            self.network.park(journey, journey.front if run.loads.open else run, self._dispatch)
            return
        if link.mode == "reserve":
            self._ask(journey, self._submit)
            return
        self._submit(journey)
        if journey.early and self.network.journeys.get(journey.request) is journey:
            self._ask(journey)

    def _submit(self, journey: Journey) -> None:
        """Queue all items of a request at encoders, but for those that the store has."""
        network, run, request = self.network, journey.encoders, journey.request
        assert run is not None  # noqa: S101
        if not run.loads.open:
            network.park(journey, run, self._submit)
            return
        r = network.resolved
        loads = run.loads.seen(network.clock.now)
        span = range(r.first_item[request], r.first_item[request + 1])
        items = [item for item in span if not self._find(journey, item)]
        chosen = []
        for item in items:
            slot = run.encode_router.route(network.view_item(request, item), loads)
            run.loads.give(slot, image_tokens=r.item_embeds[item])
            worker = journey.at[item] = run.workers[slot]
            journey.status[item] = QUEUED
            chosen.append(worker)
        if journey.granted and items:
            self._hold(journey)
        if journey.encoded:
            self._go_on_with_found(journey)
        for item, worker in zip(items, chosen, strict=True):
            worker.encode(item)

    def _find(self, journey: Journey, item: int) -> bool:
        """Return whether the store has what an item shows, and keep it there for this item."""
        store = self.network.store
        if store is None or not store.hold(self.network.resolved.item_content[item]):
            return False
        journey.at[item] = store
        journey.status[item] = DONE
        journey.encoded += 1
        return True

    def _go_on_with_found(self, journey: Journey) -> None:
        """Send what the store has of a request's items, if there is room; ask for it if they are all there."""
        if journey.granted:
            for item, status in list(journey.status.items()):
                if status == DONE:
                    self._send(journey, item)
        elif journey.encoded == journey.n_items and not journey.early:
            self._bind_late(journey)

    def encoded(self, item: int, worker: Worker) -> None:
        """Take an item that an encoder has done."""
        network = self.network
        if network.store is not None:
            content, n_bytes = network.resolved.item_content[item], self._bytes(network.place(worker)[0], item)
            network.store.write(content, n_bytes, worker)
        request = network.resolved.item_request[item]
        journey = network.journeys.get(request)
        if journey is None or journey.at.get(item) is not worker or journey.status[item] != QUEUED:
            self._drop_output(item, worker)  # nobody waits for it any more
            return
        run, slot = network.place(worker)
        run.loads.give(slot, image_tokens=-network.resolved.item_embeds[item], requests=-1)
        journey.status[item] = DONE
        journey.encoded += 1
        if journey.encoded < journey.n_items:
            self._hold(journey)
        else:
            self._let_next(request)
        if journey.granted:
            self._send(journey, item)
        elif journey.encoded == journey.n_items and not journey.early:
            self._bind_late(journey)

    def _hold(self, journey: Journey) -> None:
        """Note that others may wait for room which a request holds until its last item is encoded."""
        is_first = not self.encoding
        self.encoding[journey.request] = None
        if is_first:
            self._hurry(journey)

    def _let_next(self, request: int) -> None:
        """Let the next one that holds room start beyond the room of outputs."""
        is_first = next(iter(self.encoding), NONE) == request
        self.encoding.pop(request, None)
        if is_first and self.encoding:
            self._hurry(self.network.journeys[next(iter(self.encoding))])

    @staticmethod
    def _hurry(journey: Journey) -> None:
        for item, worker in journey.at.items():
            if journey.status[item] == QUEUED and isinstance(worker, Worker):
                worker.stir()

    def urgent(self) -> Sequence[int]:
        """Return the items of the request that has held room longest before its last item is encoded."""
        oldest = next(iter(self.encoding), NONE)
        first = self.network.resolved.first_item
        return () if oldest == NONE else range(first[oldest], first[oldest + 1])

    # Embeddings

    def _bind_late(self, journey: Journey) -> None:
        """Choose who computes the prompt now that all embeddings are there, and ask for their room."""
        if self.prompts.bind(journey):
            self._ask(journey)
        else:
            self.network.park(journey, journey.front, self._bind_late)

    def _ask(self, journey: Journey, go_on: Callable[[Journey], None] | None = None) -> None:
        """Ask for the room of a request's embeddings."""
        held = journey.worker
        assert held is not None and isinstance(held.batch.encoder, Received)  # noqa: S101, PT018
        held.batch.encoder.ask(journey.request, lambda: self._granted(journey, go_on))

    def _granted(self, journey: Journey, go_on: Callable[[Journey], None] | None) -> None:
        journey.granted = True
        if journey.encoded < journey.n_items:
            self._hold(journey)
        for item, status in list(journey.status.items()):
            if status == DONE:
                self._send(journey, item)
        if go_on is not None:
            go_on(journey)
        r = self.network.resolved
        if self._by_item(journey) and r.item_start[r.first_item[journey.request]] > 0 and not journey.enqueued:
            self.prompts.enqueue(journey)

    def _by_item(self, journey: Journey) -> bool:
        return self._link(journey).release == "item"

    def _link(self, journey: Journey) -> Link:
        assert journey.encoders is not None  # noqa: S101
        return self.network.link(journey.encoders, journey.front)

    def _send(self, journey: Journey, item: int) -> None:
        """Send an item's embeddings to who computes the prompt."""
        source = journey.at[item]
        journey.status[item] = SENDING
        if isinstance(source, EmbeddingStore):
            assert journey.encoders is not None  # noqa: S101
            source.fetch(item, self._bytes(journey.encoders, item), lambda: self._landed(journey, item))
            return
        run = self.network.place(source)[0]
        wire = self._wire(journey, source)
        wire.send(("item", item), self._bytes(run, item), lambda: self._landed(journey, item))

    def _wire(self, journey: Journey, source: Worker | EmbeddingStore) -> Wire:
        """Return the wire over which embeddings come from somewhere."""
        if isinstance(source, EmbeddingStore):
            return source.wire
        run, slot = self.network.place(source)
        return self.network.wire(run, journey.front, slot)

    def _bytes(self, run: PoolRun, item: int) -> float:
        return run.service.embedding_bytes(self.network.resolved.item_cost[item])

    def _landed(self, journey: Journey, item: int) -> None:
        if journey.status.get(item) != SENDING:  # it was dropped while the last byte was on its way
            return
        journey.status[item] = LANDED
        journey.landed += 1
        self._drop_output(item, journey.at[item])
        worker = journey.worker
        assert worker is not None and isinstance(worker.batch.encoder, Received)  # noqa: S101, PT018
        worker.batch.encoder.land(journey.request, item)
        if journey.landed == journey.n_items and not journey.again:
            self.network.tape.encoded_s[journey.request] = self.network.clock.now
        if journey.enqueued:
            worker.stir()
        elif self._by_item(journey) or journey.landed == journey.n_items:
            self.prompts.enqueue(journey)

    def _drop_output(self, item: int, worker: Worker | EmbeddingStore) -> None:
        """Free the output of an item, which may let an encoder go on."""
        if isinstance(worker, EmbeddingStore):
            worker.give_back(self.network.resolved.item_content[item])
            return
        duty = worker.batch.duty
        if duty is not None and worker.runs:
            duty.sent(item)
            if duty.queue:
                worker.stir()

    # Again, and leaving

    def again(self, journey: Journey, worker: Worker) -> None:
        """Encode the pictures of a preempted request again; it comes back to the same worker."""
        self.drop(journey)
        self.network.parked.pop(journey.request, None)  # what waited was for the first time
        journey.again, journey.worker = True, worker
        journey.front = self.network.place(worker)[0]
        self.network.tape.move(journey.request, State.ENCODING)
        self._dispatch(journey)

    def drop(self, journey: Journey) -> None:
        """Forget all items of a request, wherever they are."""
        network = self.network
        self._let_next(journey.request)
        for item, source in journey.at.items():
            status = journey.status[item]
            if status == QUEUED and isinstance(source, Worker):
                run, slot = network.place(source)
                run.loads.give(slot, image_tokens=-network.resolved.item_embeds[item], requests=-1)
                if source.runs and source.batch.duty is not None:
                    source.batch.duty.take_out(item)
            elif status == SENDING:
                self._wire(journey, source).drop(("item", item))
            if status in (SENDING, DONE):
                self._drop_output(item, source)
        journey.at, journey.status = {}, {}
        journey.encoded = journey.landed = 0
        journey.granted = journey.enqueued = False

    def drop_pixels(self, journey: Journey) -> None:
        """Stop the transfer of a request's pixels."""
        source, target = journey.preprocessor, journey.encoders or journey.front
        if source is not None and source is not target:
            self.network.wire(source, target, 0).drop(("pixels", journey.request))
