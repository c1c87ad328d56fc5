"""The way of a request through pools: preprocessing, encoding, prefill, decode, and the links between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from simulator.clock import Clock
from simulator.pool_run import PoolRun
from simulator.received import Received
from simulator.request import NONE, RequestView, State
from simulator.resolve import Resolved
from simulator.serving_plan import ServingPlan
from simulator.tape import Tape
from simulator.topology import Link, encoders_for_others, preprocessors_of
from simulator.transfer import Wire
from simulator.worker import Worker

QUEUED, DONE, SENDING, LANDED = range(4)
"""Where an item of a request is that is encoded for another worker."""
TOO_LONG: Final = "no pool has room for so many tokens"
NOT_ADMITTED: Final = "not admitted"


class Journey:
    """Where one request is.

    Parameters
    ----------
    request : int
    front : PoolRun
        The pool of its prompt.
    encoders, preprocessor : PoolRun or None
        The pools of its pictures.
    """

    __slots__ = (
        "again",
        "at",
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
        "worker",
    )

    def __init__(self, request: int, front: PoolRun) -> None:
        self.request = request
        self.front = front
        self.encoders: PoolRun | None = None
        self.preprocessor: PoolRun | None = None
        self.worker: Worker | None = None  # of its prompt
        self.decoder: Worker | None = None  # where it decodes, if elsewhere
        self.at: dict[int, Worker] = {}  # item -> who encodes it
        self.status: dict[int, int] = {}  # item -> where it is
        self.encoded = self.landed = 0
        self.early = self.granted = self.enqueued = self.again = False
        self.loaded: PoolRun | None = None  # whose loads count it
        self.left = self.parts = 0  # transfers of KV under way, and begun layer by layer
        self.is_sent = False  # whether all of its KV is on its way

    @property
    def n_items(self) -> int:
        """Items that are encoded for it."""
        return len(self.at)


class Flow:
    """Moves requests between pools; every worker's hooks end here.

    Parameters
    ----------
    clock : Clock
    plan : ServingPlan
    pools : sequence of PoolRun
    resolved : Resolved
    tape : Tape
    on_end : callable
        Called with each request that has ended, however.
    """

    def __init__(
        self,
        clock: Clock,
        plan: ServingPlan,
        pools: Sequence[PoolRun],
        *,
        resolved: Resolved,
        tape: Tape,
        on_end: Callable[[int], None],
    ) -> None:
        self.clock, self.plan, self.pools = clock, plan, pools
        self.resolved, self.tape, self.on_end = resolved, tape, on_end
        self.journeys: dict[int, Journey] = {}
        self.encoding: dict[int, None] = {}  # requests with items that are not encoded, the oldest first
        self.places: list[tuple[PoolRun, int]] = []  # by worker, its pool and slot
        self.wires: dict[tuple[str, str, int], Wire] = {}
        self.parked: list[Callable[[], None]] = []  # what waits for a worker that takes work
        topology = plan.topology
        self.links: Mapping[tuple[str, str], Link] = {(link.source, link.target): link for link in topology.links}
        by_name = {run.pool.name: run for run in pools}
        self.fronts = {
            media: [run for run in pools if run.pool.runs("prefill") and run.pool.takes(media=media)]
            for media in (False, True)
        }
        self.encoders = [by_name[pool.name] for pool in encoders_for_others(topology)]
        self.decoders = [run for run in pools if run.pool.runs("decode")]
        self.preprocessors = {
            run.pool.name: [by_name[pool.name] for pool in preprocessors_of(topology, run.pool)] for run in pools
        }

    # Arrival

    def arrive(self, request: int) -> None:
        """Take in a request, now."""
        first = self.resolved.first_item
        media = first[request + 1] > first[request]
        fronts = self.fronts[media]
        if not any(self._fits(request, run) for run in fronts):
            self._end(request, State.REJECTED, TOO_LONG)
            return
        able = [run for run in fronts if run.loads.open and self._fits(request, run)]
        if not able:
            self.parked.append(partial(self._again, request))
            return
        front = able[0] if len(able) == 1 else min(able, key=PoolRun.pressure)
        if self.plan.policies.admission != "all" and not self._admits(front):
            self._end(request, State.REJECTED, NOT_ADMITTED)
            return
        journey = self.journeys[request] = Journey(request, front)
        if not media:
            self._place(journey)
            return
        if not front.pool.runs("encode"):
            journey.encoders = _lightest(self.encoders)
        place = self.preprocessors[(journey.encoders or front).pool.name]
        journey.preprocessor = _lightest(place)
        self._preprocess(journey)

    def _again(self, request: int) -> None:
        """Try once more, if the client has not left."""
        if self.tape.state[request] == State.EXPECTED and request not in self.journeys:
            self.arrive(request)

    def _fits(self, request: int, front: PoolRun) -> bool:
        """Return whether prompt and longest answer fit where they would be."""
        if front.pool.runs("decode"):
            return front.holds(request, answer=True)
        return front.holds(request, answer=False) and any(run.holds(request, answer=True) for run in self.decoders)

    def _admits(self, front: PoolRun) -> bool:
        """Return whether a request is taken, by what routers see."""
        policies, loads = self.plan.policies, front.loads.seen(self.clock.now)
        limit = policies.admission_limit
        if policies.admission == "queue":
            return limit is None or loads.requests[loads.least(loads.requests)] < limit
        if limit is None:
            limit = self.plan.slo.ttft_s if self.plan.slo and self.plan.slo.ttft_s else float("inf")
        return loads.tokens[loads.least(loads.tokens)] * front.token_s <= limit

    # Pictures

    def _preprocess(self, journey: Journey) -> None:
        run, request = journey.preprocessor, journey.request
        assert run is not None and run.station is not None  # noqa: S101, PT018 - checked when the run began
        tasks = run.tasks(request)
        if not tasks:
            self._send_pixels(journey)
            return
        self.tape.move(request, State.PREPROCESSING)
        self.tape.preprocess_s[request] = sum(tasks)
        run.station.submit(request, tasks)

    def preprocessed(self, request: int) -> None:
        """Go on with a request whose pictures are preprocessed."""
        journey = self.journeys.get(request)
        if journey is not None:
            self._send_pixels(journey)

    def _send_pixels(self, journey: Journey) -> None:
        """Bring pixels to where they are encoded, if that is another pool."""
        source, target = journey.preprocessor, journey.encoders or journey.front
        assert source is not None  # noqa: S101
        if source is target:
            self._encode(journey)
            return
        first, cost = self.resolved.first_item, self.resolved.item_cost
        items = range(first[journey.request], first[journey.request + 1])
        n_bytes = sum(source.service.pixel_bytes(cost[item]) for item in items)
        wire = self._wire(source, target, 0)
        wire.send(("pixels", journey.request), n_bytes, lambda: self._if_alive(journey, self._encode))

    def _if_alive(self, journey: Journey, go_on: Callable[[Journey], None]) -> None:
        if self.journeys.get(journey.request) is journey:
            go_on(journey)

    def _encode(self, journey: Journey) -> None:
        """Encode where the prompt is computed, or send items to encoders."""
        if journey.encoders is None:
            self._place(journey)
            return
        self.tape.move(journey.request, State.ENCODING)
        self._dispatch(journey)

    def _dispatch(self, journey: Journey) -> None:
        """Give the items of a request to encoders; first take the room of their embeddings if the link says so."""
        run, link = journey.encoders, self._embedding_link(journey)
        assert run is not None  # noqa: S101
        if not run.loads.open:
            self.parked.append(lambda: self._if_alive(journey, self._dispatch))
            return
        journey.early = journey.again or link.mode == "reserve" or link.release == "item"
        if journey.early:
            if not self._bind(journey):
                self.parked.append(lambda: self._if_alive(journey, self._dispatch))
                return
            if link.mode == "reserve":
                self._ask(journey, self._submit)
                return
        self._submit(journey)
        if journey.early and self.journeys.get(journey.request) is journey:
            self._ask(journey)

    def _submit(self, journey: Journey) -> None:
        """Queue all items of a request at encoders."""
        run, r, request = journey.encoders, self.resolved, journey.request
        assert run is not None  # noqa: S101
        self.encoding[request] = None
        loads = run.loads.seen(self.clock.now)
        items = range(r.first_item[request], r.first_item[request + 1])
        for item in items:
            slot = run.encode_router.route(self._view_item(request, item), loads)
            run.loads.give(slot, image_tokens=r.item_embeds[item])
            journey.at[item] = run.workers[slot]
            journey.status[item] = QUEUED
        for item in items:
            journey.at[item].encode(item)

    def encoded(self, item: int, worker: Worker) -> None:
        """Take an item that an encoder has done."""
        request = self.resolved.item_request[item]
        journey = self.journeys.get(request)
        if journey is None or journey.at.get(item) is not worker or journey.status[item] != QUEUED:
            self._drop_output(item, worker)  # nobody waits for it any more
            return
        run, slot = self.places[worker.index]
        run.loads.give(slot, image_tokens=-self.resolved.item_embeds[item], requests=-1)
        journey.status[item] = DONE
        journey.encoded += 1
        if journey.encoded == journey.n_items:
            self._all_encoded(request)
        if journey.granted:
            self._send(journey, item)
        elif journey.encoded == journey.n_items and not journey.early:
            self._bind_late(journey)

    def _all_encoded(self, request: int) -> None:
        """Let the next oldest request start beyond the room of outputs."""
        oldest = next(iter(self.encoding))
        self.encoding.pop(request, None)
        if oldest == request and self.encoding:
            following = self.journeys[next(iter(self.encoding))]
            for item, worker in following.at.items():
                if following.status[item] == QUEUED:
                    worker.wake()

    def _bind_late(self, journey: Journey) -> None:
        """Choose who computes the prompt now that all embeddings are there, and ask for their room."""
        if self._bind(journey):
            self._ask(journey)
        else:
            self.parked.append(lambda: self._if_alive(journey, self._bind_late))

    def _ask(self, journey: Journey, go_on: Callable[[Journey], None] | None = None) -> None:
        """Ask for the room of a request's embeddings."""
        held = journey.worker
        assert held is not None and isinstance(held.batch.encoder, Received)  # noqa: S101, PT018
        held.batch.encoder.ask(journey.request, lambda: self._granted(journey, go_on))

    def _granted(self, journey: Journey, go_on: Callable[[Journey], None] | None) -> None:
        journey.granted = True
        for item, status in list(journey.status.items()):
            if status == DONE:
                self._send(journey, item)
        if go_on is not None:
            go_on(journey)
        first = self.resolved.first_item[journey.request]
        if self._by_item(journey) and self.resolved.item_start[first] > 0 and not journey.enqueued:
            self._enqueue(journey)

    def _by_item(self, journey: Journey) -> bool:
        return self._embedding_link(journey).release == "item"

    def _embedding_link(self, journey: Journey) -> Link:
        assert journey.encoders is not None  # noqa: S101
        return self.links[journey.encoders.pool.name, journey.front.pool.name]

    def _send(self, journey: Journey, item: int) -> None:
        """Send an item's embeddings to who computes the prompt."""
        source = journey.at[item]
        run, slot = self.places[source.index]
        journey.status[item] = SENDING
        n_bytes = run.service.embedding_bytes(self.resolved.item_cost[item])
        self._wire(run, journey.front, slot).send(("item", item), n_bytes, lambda: self._landed(journey, item))

    def _landed(self, journey: Journey, item: int) -> None:
        if journey.status.get(item) != SENDING:  # it was dropped while the last byte was on its way
            return
        journey.status[item] = LANDED
        journey.landed += 1
        self._drop_output(item, journey.at[item])
        worker = journey.worker
        assert worker is not None and isinstance(worker.batch.encoder, Received)  # noqa: S101, PT018
        worker.batch.encoder.land(journey.request, item)
        if journey.landed == journey.n_items:
            self.tape.encoded_s[journey.request] = self.clock.now
        if journey.enqueued:
            worker.stir()
        elif self._by_item(journey) or journey.landed == journey.n_items:
            self._enqueue(journey)

    def _drop_output(self, item: int, worker: Worker) -> None:
        """Free the output of an item, which may let an encoder go on."""
        duty = worker.batch.duty
        if duty is not None and worker.runs:
            duty.sent(item)
            if duty.queue:
                worker.stir()

    def needs_embeddings(self, request: int, worker: Worker) -> None:
        """Encode the pictures of a preempted request again; it comes back to the same worker."""
        journey = self.journeys[request]
        self._drop_items(journey)
        self._drop_kv(journey)  # who holds room elsewhere while it waits for room here could wait for ever
        journey.decoder = None
        journey.again, journey.worker = True, worker
        self.tape.move(request, State.ENCODING)
        self._dispatch(journey)

    def _drop_items(self, journey: Journey) -> None:
        """Forget all items of a request, wherever they are."""
        self.encoding.pop(journey.request, None)
        for item, worker in journey.at.items():
            status, (run, slot) = journey.status[item], self.places[worker.index]
            if status == QUEUED:
                run.loads.give(slot, image_tokens=-self.resolved.item_embeds[item], requests=-1)
                if worker.runs and worker.batch.duty is not None:
                    worker.batch.duty.take_out(item)
            elif status == SENDING:
                self._wire(run, journey.front, slot).drop(("item", item))
                self._drop_output(item, worker)
            elif status == DONE:
                self._drop_output(item, worker)
        journey.at, journey.status = {}, {}
        journey.encoded = journey.landed = 0
        journey.granted = journey.enqueued = False

    # Prompts

    def _bind(self, journey: Journey) -> bool:
        """Choose who computes the prompt; False if nobody takes work."""
        front = journey.front
        if journey.worker is not None:
            return True
        if not front.loads.open:
            return False
        slot = 0
        if len(front.workers) > 1:
            view = self.view(journey.request, front)
            slot = front.router.route(view, front.loads.seen(self.clock.now))
        front.loads.give(slot, tokens=self.resolved.prompt_tokens[journey.request])
        journey.loaded = front
        journey.worker = front.workers[slot]
        self.tape.worker[journey.request] = journey.worker.index
        return True

    def _place(self, journey: Journey) -> None:
        """Choose who computes the prompt, and queue it there."""
        if self._bind(journey):
            self._enqueue(journey)
        else:
            self.parked.append(lambda: self._if_alive(journey, self._place))

    def _enqueue(self, journey: Journey) -> None:
        """Queue a prompt; where its KV goes has a place for it first if the link says so."""
        journey.enqueued = True
        if not journey.front.pool.runs("decode") and self._may_decode(journey.request):
            self._reserve(journey)
        else:
            self._queue(journey)

    def _queue(self, journey: Journey) -> None:
        assert journey.worker is not None  # noqa: S101
        if journey.again:
            self.tape.move(journey.request, State.WAITING)
            journey.worker.enqueue_again(journey.request)
        else:
            journey.worker.enqueue(journey.request)

    def _may_decode(self, request: int) -> bool:
        return bool(self.resolved.requests.max_output_tokens[request] > 1)

    def _decoding_pool(self, request: int) -> PoolRun:
        return _lightest([run for run in self.decoders if run.holds(request, answer=True)])

    def _reserve(self, journey: Journey) -> None:
        run = self._decoding_pool(journey.request)
        link = self.links[journey.front.pool.name, run.pool.name]
        if link.mode != "reserve":
            self._queue(journey)
        elif not self._bind_decoder(journey, run, lambda: self._queue(journey)):
            self.parked.append(lambda: self._if_alive(journey, self._reserve))

    # KV

    def _bind_decoder(self, journey: Journey, run: PoolRun, go_on: Callable[[], None]) -> bool:
        """Choose where a request decodes and ask for its room; False if nobody takes work."""
        if not run.loads.open:
            return False
        slot = run.decode_router.route(self.view(journey.request, run), run.loads.seen(self.clock.now))
        run.loads.give(slot, tokens=self.resolved.prompt_tokens[journey.request])
        worker = journey.decoder = run.workers[slot]
        self.tape.decode_worker[journey.request] = worker.index

        def take() -> None:
            worker.batch.handover.promise(journey.request)
            go_on()

        run.rooms[slot].ask(journey.request, worker.batch.handover.blocks_for(journey.request), take)
        return True

    def chunk(self, request: int, tokens: int, worker: Worker) -> None:
        """Send what a step computes of a request while it runs, all but its last layer's part."""
        journey = self.journeys.get(request)
        if journey is None or journey.decoder is None:
            return
        run, slot = self.places[worker.index]
        target = self.places[journey.decoder.index][0]
        layers = run.service.kv_layers
        n_bytes = run.service.kv_bytes(tokens) * (layers - 1) / layers
        journey.left += 1
        journey.parts += 1
        self._wire(run, target, slot).send(("kv", request, journey.parts), n_bytes, lambda: self._kv_landed(journey))

    def prefilled(self, request: int, worker: Worker) -> None:
        """Take a prompt that is computed where it does not decode."""
        journey = self.journeys[request]
        self.tape.move(request, State.MOVING)
        self._unload(journey, worker)
        if journey.decoder is not None:
            self._move(journey)
        else:
            self._hand_over(journey)

    def _hand_over(self, journey: Journey) -> None:
        run = self._decoding_pool(journey.request)
        if not self._bind_decoder(journey, run, lambda: self._move(journey)):
            self.parked.append(lambda: self._if_alive(journey, self._hand_over))

    def _move(self, journey: Journey) -> None:
        """Send the KV of a prompt, or what of it has not left layer by layer."""
        source, target = journey.worker, journey.decoder
        assert source is not None and target is not None  # noqa: S101, PT018
        (run, slot), into = self.places[source.index], self.places[target.index][0]
        r, request = self.resolved, journey.request
        costs = r.item_cost[r.first_item[request] : r.first_item[request + 1]]
        n_bytes = run.service.kv_bytes(r.prompt_tokens[request], costs)
        if source.layerwise:
            n_bytes /= run.service.kv_layers
        journey.left += 1
        journey.is_sent = True
        self._wire(run, into, slot).send(("kv", request, 0), n_bytes, lambda: self._kv_landed(journey))

    def _kv_landed(self, journey: Journey) -> None:
        journey.left -= 1
        if journey.left or not journey.is_sent or self.journeys.get(journey.request) is not journey:
            return
        source, target = journey.worker, journey.decoder
        assert source is not None and target is not None  # noqa: S101, PT018
        source.batch.sent(journey.request)
        source.stir()
        target.land(journey.request)

    def has_room(self, worker: Worker) -> None:
        """Offer room that a step may have made."""
        run, slot = self.places[worker.index]
        if run.rooms:
            room = run.rooms[slot]
            if len(room):
                room.offer()
        encoder = worker.batch.encoder
        if isinstance(encoder, Received) and len(encoder.room):
            encoder.room.offer()

    # Ends

    def ended(self, request: int, worker: Worker) -> None:
        """Take a request that has its last token."""
        journey = self.journeys.pop(request)
        if journey.decoder is not None and worker is not journey.decoder:  # one token was all
            self._drop_promise(journey)
            self._unload(journey, worker)
        elif journey.decoder is not None:
            run, slot = self.places[worker.index]
            run.loads.give(slot, tokens=-self.resolved.prompt_tokens[request], requests=-1)
        else:
            self._unload(journey, worker)
        self.on_end(request)

    def _unload(self, journey: Journey, worker: Worker) -> None:
        if journey.loaded is not None:
            slot = self.places[worker.index][1]
            journey.loaded.loads.give(slot, tokens=-self.resolved.prompt_tokens[journey.request], requests=-1)
            journey.loaded = None

    def _drop_promise(self, journey: Journey) -> None:
        """Give back the room where a request would have decoded."""
        decoder, request = journey.decoder, journey.request
        assert decoder is not None  # noqa: S101
        run, slot = self.places[decoder.index]
        run.loads.give(slot, tokens=-self.resolved.prompt_tokens[request], requests=-1)
        if not run.rooms[slot].drop(request) and decoder.runs and request in decoder.batch.handover.promised:
            decoder.batch.handover.break_promise(request)
            run.rooms[slot].offer()

    def _end(self, request: int, state: State, reason: str) -> None:
        self.tape.end(request, state, reason, self.clock.now)
        self.on_end(request)

    def leave(self, request: int, state: State, reason: str) -> None:
        """End a request that has not finished, wherever it is: its client has left, or it fails."""
        if self.tape.state[request] in (State.FINISHED, State.REJECTED, State.CANCELLED, State.FAILED):
            return
        self.release(request)
        self._end(request, state, reason)

    def release(self, request: int) -> None:
        """Free all that a request holds anywhere."""
        journey = self.journeys.pop(request, None)
        if journey is None:
            return
        if journey.preprocessor is not None:
            target = journey.encoders or journey.front
            if target is not journey.preprocessor:
                self._wire(journey.preprocessor, target, 0).drop(("pixels", request))
        self._drop_items(journey)
        worker = journey.worker
        if worker is not None:
            self._drop_kv(journey)
            self._unload(journey, worker)
            if worker.runs:
                if isinstance(worker.batch.encoder, Received):
                    worker.batch.encoder.forget(request)
                worker.abort(request)

    def _drop_kv(self, journey: Journey) -> None:
        """Stop the transfers of a request's KV, and free its place behind them."""
        worker, decoder, request = journey.worker, journey.decoder, journey.request
        if worker is None or decoder is None:
            return
        (run, slot), (target, to) = self.places[worker.index], self.places[decoder.index]
        for part in range(journey.parts + 1):
            self._wire(run, target, slot).drop(("kv", request, part))
        journey.left = 0
        held = decoder.batch
        joined = request in held.running or held.handover.holds(request)
        if decoder.runs and joined and decoder is not worker:
            target.loads.give(to, tokens=-self.resolved.prompt_tokens[request], requests=-1)
            decoder.abort(request)
        else:
            self._drop_promise(journey)

    # Views and wires

    def view(self, request: int, run: PoolRun) -> RequestView:
        """Return what a policy may see of a request."""
        requests, first = self.resolved.requests, self.resolved.first_item
        parent = int(requests.parent[request])
        slot, tokens = NONE, 0
        if parent >= 0:
            place = self.places[self.tape.worker[parent]]
            if place[0] is run:
                slot, tokens = place[1], int(self.resolved.shared_tokens[request])
        return RequestView(
            index=request,
            arrival_s=self.tape.arrival_s[request],
            prompt_tokens=self.resolved.prompt_tokens[request],
            max_output_tokens=int(requests.max_output_tokens[request]),
            n_items=first[request + 1] - first[request],
            priority=int(requests.priority[request]),
            prefix_slot=slot,
            prefix_tokens=tokens,
        )

    def _view_item(self, request: int, item: int) -> RequestView:
        r = self.resolved
        return RequestView(
            index=item,
            arrival_s=self.tape.arrival_s[request],
            prompt_tokens=r.prompt_tokens[request],
            max_output_tokens=0,
            n_items=1,
            image_tokens=r.item_embeds[item],
            content=r.item_content[item],
        )

    def urgent(self) -> Sequence[int]:
        """Return the items of the oldest request that is not encoded."""
        oldest = next(iter(self.encoding), NONE)
        first = self.resolved.first_item
        return () if oldest == NONE else range(first[oldest], first[oldest + 1])

    def _wire(self, source: PoolRun, target: PoolRun, slot: int) -> Wire:
        """Return the wire from a worker of one pool to another pool."""
        link = self.links[source.pool.name, target.pool.name]
        key = (source.pool.name, target.pool.name, slot if link.per == "worker" else 0)
        wire = self.wires.get(key)
        if wire is None:
            wire = self.wires[key] = Wire(self.clock, link.bandwidth_bytes_per_s, link.latency_s)
        return wire

    def unpark(self) -> None:
        """Try again what waited for a worker, now that one takes work."""
        waiting, self.parked = self.parked, []
        for go_on in waiting:
            go_on()


def _lightest(runs: Sequence[PoolRun]) -> PoolRun:
    """Return the pool with the least work for each of its workers, the first of equals."""
    return runs[0] if len(runs) == 1 else min(runs, key=PoolRun.pressure)
