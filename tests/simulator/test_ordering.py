"""Orders of waiting work: who is next, and how long anybody may have to wait."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.ordering import MIDDLE_TOKENS, ORDERS, SIZE_CLASS_S, SMALL_TOKENS, Ordered, queue_of
from tests.simulator.clusters import asked, cluster, pictures, pool, serve, service

SAND, PEBBLE, ROCK = 100, SMALL_TOKENS + 1, MIDDLE_TOKENS + 1
BIG = {"chunk_tokens": 20_000, "max_sequences": 1}
"""One prompt at a time, whole."""


def started(order, text, arrival_s=None, **links):
    """Return the order in which prompts start at a worker that takes one at a time, a second each."""
    plan = cluster(pool("preprocess+encode+prefill+decode"), policies={"order": order})
    trace = serve(plan, asked(text, [1] * len(text), arrival_s, **links), service(step_base_s=1.0, **BIG))
    return np.argsort(trace.columns["scheduled_s"]).tolist()


# Queues


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_a_queue_by_key_is_a_sorted_list(keys, data):
    queue, kept = Ordered(keys.__getitem__), []
    for request in range(len(keys)):
        queue.append(request)
        kept.append(request)
    kept.sort(key=keys.__getitem__)
    assert list(queue) == kept
    for _ in range(data.draw(st.integers(0, len(keys)))):
        request = data.draw(st.sampled_from(kept))
        kept.remove(request)
        queue.remove(request)
        assert list(queue) == kept
        assert len(queue) == len(kept)
        assert [queue[i] for i in range(len(kept))] == kept
        if not kept:
            break
    assert [queue.popleft() for _ in kept] == kept


@pytest.mark.parametrize("key", [None, float])
def test_who_comes_back_goes_before_all_others(key):
    queue = queue_of(key)
    for request in (3, 4, 5):
        queue.append(request)
    queue.appendleft(9)
    queue.appendleft(8)
    assert list(queue) == [8, 9, 3, 4, 5]
    assert isinstance(queue_of(None), deque)


def test_to_remove_who_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="request 7 is not in the queue"):
        Ordered(float).remove(7)


# Orders


@pytest.mark.parametrize(
    ("order", "expected"), [("fcfs", [0, 1, 2, 3]), ("priority", [0, 2, 3, 1]), ("shortest", [0, 3, 1, 2])]
)
def test_who_waits_starts_in_order(order, expected):
    """The first starts at once; the others wait behind it."""
    text = [SAND, 300, 500, 200]
    assert started(order, text, [0.0, 0.1, 0.2, 0.3], priority=[0, 2, 1, 1]) == expected


def test_sand_goes_before_pebbles_and_rocks_that_came_a_little_earlier():
    assert started("size-class", [SAND, ROCK, PEBBLE, SAND], [0.0, 0.1, 0.2, 0.3]) == [0, 3, 2, 1]


def test_whoever_came_a_class_earlier_goes_first():
    """Ageing: a rock goes before sand that comes more than two classes' head start later."""
    late = 2 * SIZE_CLASS_S
    text, arrival_s = [ROCK] + [SAND] * 40, np.concatenate([[0.0], np.linspace(0.0, 30.0, 40)])
    plan = cluster(pool("preprocess+encode+prefill+decode"), policies={"order": "size-class"})
    trace = serve(plan, asked(text, [1] * 41, arrival_s), service(step_base_s=2.0, **BIG))
    rock = trace.columns["scheduled_s"][0]
    ahead = trace.columns["scheduled_s"][1:] < rock
    assert ahead.sum() > 3
    assert (arrival_s[1:][ahead] <= late).all()
    assert (arrival_s[1:][~ahead] > late - 1e-9).all()


@pytest.mark.parametrize("load", [1.5, 3.0])
def test_no_rock_starves_however_much_sand_comes_later(load):
    """Only sand that came within the head start of two classes goes first, so its wait has a bound at any load."""
    rng = np.random.default_rng(0)
    before, n, step_s = 20, 600, 0.1
    arrival_s = np.concatenate([np.full(before, 0.9), [1.0], 1.0 + np.cumsum(rng.exponential(step_s / load, n))])
    text = [SAND] * before + [ROCK] + [SAND] * n
    waits = {}
    for order in ("size-class", "shortest"):
        plan = cluster(pool("preprocess+encode+prefill+decode"), policies={"order": order})
        trace = serve(plan, asked(text, [1] * len(text), arrival_s), service(step_base_s=step_s, **BIG))
        waits[order] = trace.columns["scheduled_s"][before] - 1.0
    ahead = (arrival_s <= 1.0 + 2 * SIZE_CLASS_S).sum()
    assert waits["size-class"] <= ahead * step_s
    assert waits["shortest"] > 0.9 * n * step_s


def test_encoders_take_pictures_in_an_order_of_their_own():
    """Four pictures wait behind the first; those of the shortest prompt go first."""
    items = pictures([1] * 5, [50] * 5)
    plan = cluster(
        pool("preprocess+encode", encode_items=1), pool("prefill+decode"), policies={"encode_order": "shortest"}
    )
    requests = asked([10, 400, 300, 200, 100], [1] * 5, [0.0, 0.1, 0.2, 0.3, 0.4], items=items)
    trace = serve(plan, requests, service(step_base_s=0.01, patch_s=0.02))
    assert np.argsort(trace.columns["encoded_s"]).tolist() == [0, 4, 3, 2, 1]


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("blocks", [60, 100])
def test_preempted_requests_end_in_any_order(order, blocks):
    rng = np.random.default_rng(0)
    text = rng.integers(5, 40, 30)
    requests = asked(text, rng.integers(2, 20, 30), np.arange(30) * 0.05, priority=np.arange(30) % 3)
    plan = cluster(pool("preprocess+encode+prefill+decode"), policies={"order": order})
    times = service(step_base_s=0.1, kv_blocks=blocks, chunk_tokens=64)
    trace = serve(plan, requests, times)
    assert trace.finished.all()
    assert trace.columns["preemptions"].sum() > 0
