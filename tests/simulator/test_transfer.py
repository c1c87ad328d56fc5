"""Links in time: equal shares, re-timed when others come and go; and rooms that are given out in order of asking."""

import numpy as np
import pytest

from costmodel import Image, load_model
from simulator import Pool, ServingPlan
from simulator.clock import FIRST, Clock
from simulator.step_service import StepService
from simulator.transfer import Room, Wire
from tests.simulator.clusters import asked, cluster, pictures, pool, serve, service

RATE = 100.0


class Sender:
    """A wire, and when each transfer has landed."""

    def __init__(self, latency_s=0.0):
        self.clock = Clock()
        self.wire = Wire(self.clock, RATE, latency_s)
        self.landed = {}

    def at(self, time_s, key, n_bytes):
        self.clock.at(time_s, lambda _: self.wire.send(key, n_bytes, lambda: self._land(key)), FIRST)
        return self

    def _land(self, key):
        self.landed[key] = self.clock.now

    def then(self, time_s, call):
        self.clock.at(time_s, lambda _: call(self.wire), FIRST)
        return self

    def run(self):
        self.clock.run()
        assert not list(self.wire.audit())
        return self.landed


def test_one_transfer_takes_its_bytes_over_the_rate_and_the_latency_behind():
    assert Sender(latency_s=0.5).at(1.0, "a", 200).run() == {"a": 3.5}


def test_two_equal_transfers_take_twice_as_long():
    assert Sender().at(0.0, "a", 100).at(0.0, "b", 100).run() == pytest.approx({"a": 2.0, "b": 2.0})


def test_a_third_that_comes_midway_retimes_the_others():
    """At 1 s 150 bytes are left of each of two; a third of each second is 33 bytes; c ends, and the others share."""
    landed = Sender().at(0.0, "a", 200).at(0.0, "b", 200).at(1.0, "c", 50).run()
    assert landed == pytest.approx({"c": 2.5, "a": 4.5, "b": 4.5})


def test_who_is_dropped_leaves_its_share_to_the_others():
    sender = Sender(latency_s=0.1).at(0.0, "a", 100).at(0.0, "b", 100).then(1.0, lambda wire: wire.drop("b"))
    assert sender.run() == pytest.approx({"a": 1.6})
    assert (sender.wire.sent_bytes, sender.wire.dropped_bytes) == (100, 100)


def test_what_is_dropped_behind_its_last_byte_does_not_land():
    assert Sender(latency_s=1.0).at(0.0, "a", 100).then(1.5, lambda wire: wire.drop("a")).run() == {}


def test_a_wire_that_is_cut_waits_and_a_slow_one_takes_longer():
    sender = Sender().at(0.0, "a", 100)
    for time_s, speed in ((0.5, 0.0), (3.5, 0.25)):
        sender.then(time_s, lambda wire, speed=speed: wire.change(speed))
    assert sender.run() == pytest.approx({"a": 5.5})


@pytest.mark.parametrize("seed", range(5))
def test_a_wire_ends_as_an_ideal_processor_that_is_shared(seed):
    """The same rule, in small steps of time: each gets its share of every moment."""
    rng = np.random.default_rng(seed)
    starts, sizes = np.sort(rng.uniform(0, 10, 12)), rng.uniform(1, 200, 12)
    sender = Sender()
    for key, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        sender.at(float(start), key, float(size))
    landed = sender.run()
    left, ends, dt = sizes.copy(), np.zeros(12), 1e-3
    for step in range(40_000):
        now = step * dt
        active = (starts <= now) & (left > 0)
        if active.any():
            left[active] -= RATE * dt / active.sum()
            ends[active & (left <= 0)] = now
    assert [landed[key] for key in range(12)] == pytest.approx(ends, abs=0.02)
    assert sender.wire.busy_s == pytest.approx(sizes.sum() / RATE)


def test_room_is_given_out_in_order_of_asking():
    free, granted = [10.0], []

    def take(name, amount):
        free[0] -= amount
        granted.append(name)

    room = Room(lambda: free[0])
    for name, amount in (("a", 8.0), ("b", 5.0), ("c", 1.0)):
        room.ask(name, amount, lambda name=name, amount=amount: take(name, amount))
    assert granted == ["a"]  # c would fit, and waits behind b
    assert room.drop("b")
    assert granted == ["a", "c"]
    assert not room.drop("b")


# What is sent


def test_bytes_of_embeddings_are_what_the_service_says_of_every_item():
    counts = [2, 0, 1, 3]
    sizes = [20, 50, 20, 20, 70, 50]
    plan = cluster(pool("preprocess+encode", workers=2), pool("prefill+decode"), bandwidth_bytes_per_s=500.0)
    trace = serve(plan, asked([5] * 4, [2] * 4, items=pictures(counts, sizes)), service(embedding_token_bytes=3.0))
    assert sum(link.sent_bytes for link in trace.links) == 3.0 * sum(sizes)
    assert [link.busy_s > 0 for link in trace.links] == [True, True]  # a wire for each sending worker


@pytest.mark.parametrize("layerwise", [False, True])
def test_bytes_of_kv_are_what_the_service_says_of_every_prompt(layerwise):
    plan = cluster(pool("prefill", workers=2), pool("decode"), mode="reserve", layerwise=layerwise, per="pool")
    requests = asked([500, 70, 30], [2, 5, 1], max_output_tokens=[2, 5, 2])
    trace = serve(plan, requests, service(kv_token_bytes=8.0, kv_layers=4, chunk_tokens=64, token_s=1e-3))
    early = 8.0 * 30 * 3 / 4 if layerwise else 0.0  # of the last, nothing is needed behind its first token
    assert len(trace.links) == 1
    assert trace.links[0].sent_bytes == pytest.approx(8.0 * 570 + early)


def model_service(stages, model="qwen3-vl-8b"):
    first = Pool(name="x", stages=stages, hardware="h100-sxm5-80gb")
    plan = ServingPlan(model=model, pools=(Pool(name="all", hardware="h100-sxm5-80gb"),))
    return StepService.of_pool(plan, first)


def test_embeddings_of_a_model_with_deepstack_are_several_vectors():
    """1080p to Qwen3-VL-8B: 60 by 34 tokens of 4096 numbers of two bytes, and three levels of DeepStack besides."""
    times = model_service(("encode",))
    cost = times.media(Image(1920, 1088), 1)
    assert cost.visual_tokens == 60 * 34
    assert times.embedding_bytes(cost) == 60 * 34 * 4096 * 2 * (1 + 3)


def test_kv_of_a_prompt_is_keys_and_values_of_every_layer():
    spec = load_model("qwen3-vl-8b").decoder
    times = model_service(("prefill", "decode"))
    assert times.kv_layers == 36
    assert times.kv_bytes(1000) == 1000 * 36 * 2 * 8 * 128 * 2
    assert spec.width == 4096
