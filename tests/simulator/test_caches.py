"""KV in the memory of hosts and embeddings in a store: times by hand, what leaves first, and what changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from simulator import Pool, ServingPlan, check, report, simulate
from simulator.assembly import scaled
from simulator.host_cache import HostCache, OffloadedCache, host_rate_bytes_per_s
from simulator.kv_cache import Node
from simulator.rules import Failure, Store
from simulator.trace import StoreTrace, same
from tests.simulator.clusters import asked, cluster, pictures, pool, serve, service
from tests.simulator.fuzz import crowded
from tests.simulator.test_cluster_fuzz import QUICK

EVERYTHING = "preprocess+encode+prefill+decode"
APART = ("preprocess+encode", "prefill+decode")
BLOCK, STEP_S, TOKEN_S = 10, 0.01, 1e-3
RATE = 2000.0
"""Bytes, which are tokens, that a host or a store hands over in a second."""
WITH_BLOCKS = {"step_base_s": STEP_S, "token_s": TOKEN_S, "kv_blocks": 10, "block_tokens": BLOCK}


def hosted(n_bytes=1e6, rate=RATE, **more):
    return cluster(pool(EVERYTHING, host_cache_bytes=n_bytes, host_bandwidth_bytes_per_s=rate), **more)


def repeated(text=(60, 90, 60), output=(1, 1, 1)):
    """Return a prompt, another that pushes it off the device, and the first again."""
    return asked(text, output, [0.0, 10.0, 20.0], parent=[-1, -1, 0], shared_text_tokens=[0, 0, 60])


# KV on hosts


def test_what_the_device_has_lost_comes_from_the_host_at_the_rate_of_its_link():
    trace = serve(hosted(), repeated(), service(**WITH_BLOCKS))
    ttft = trace.ttft_s
    assert ttft[0] == pytest.approx(STEP_S + 60 * TOKEN_S)
    # the second takes nine of ten blocks, so one of six is left; the last token, and with it a block, is computed
    assert ttft[2] == pytest.approx(STEP_S + 10 * TOKEN_S + 4 * BLOCK / RATE)
    assert trace.columns["cached_tokens"].tolist() == [0, 0, 50]
    assert (trace.pools[0].host_loaded_tokens, trace.pools[0].host_loaded_bytes) == (40, 40.0)
    assert trace.pools[0].host_stored_blocks == 6 + 9  # the others are there already
    figures = report(trace).shared_caches
    assert (figures["host_loaded_tokens"], figures["host_loaded_bytes"]) == (40, 40.0)


def test_without_a_host_the_same_blocks_are_computed():
    trace = serve(cluster(pool(EVERYTHING)), repeated(), service(**WITH_BLOCKS))
    assert trace.ttft_s[2] == pytest.approx(STEP_S + 50 * TOKEN_S)
    assert trace.pools[0].host_loaded_tokens == trace.pools[0].host_stored_blocks == 0


def test_what_the_device_still_has_is_not_loaded():
    trace = serve(hosted(), repeated(text=(60, 30, 60)), service(**WITH_BLOCKS))
    assert trace.columns["cached_tokens"].tolist() == [0, 0, 50]
    assert trace.pools[0].host_loaded_blocks == 0
    assert trace.ttft_s[2] == pytest.approx(STEP_S + 10 * TOKEN_S)


def test_prompts_that_start_alike_load_once_in_a_step():
    twice = asked([60, 90, 60, 60], [1] * 4, [0, 10, 20, 20], parent=[-1, -1, 0, 0], shared_text_tokens=[0, 0, 60, 60])
    trace = serve(hosted(), twice, service(**WITH_BLOCKS))
    assert trace.pools[0].host_loaded_blocks == 4
    assert trace.ttft_s[2:] == pytest.approx(STEP_S + 2 * 10 * TOKEN_S + 4 * BLOCK / RATE)


@pytest.mark.parametrize(("rate", "sign"), [(1e6, -1), (1.0, 1)], ids=["quicker than computing", "slower"])
def test_a_second_turn_after_eviction_gains_what_the_link_allows(rate, sign):
    """Its history is loaded, the answer of the first turn included; only the link says whether that pays."""
    turns = {"parent": [-1, -1, 0], "after": [-1, -1, 0], "shared_text_tokens": [0, 0, 59]}
    chat = asked([40, 90, 70], [20, 1, 1], [0.0, 5.0, 20.0], **turns)
    times = service(**WITH_BLOCKS)
    here, without = (serve(plan, chat, times) for plan in (hosted(rate=rate), cluster(pool(EVERYTHING))))
    assert here.pools[0].host_loaded_tokens == 40
    assert here.columns["cached_tokens"][2] == 50
    assert np.sign(here.ttft_s[2] - without.ttft_s[2]) == sign
    assert here.ttft_s[2] == pytest.approx(STEP_S + 20 * TOKEN_S + 40 / rate)


def test_a_preempted_sequence_comes_back_from_the_host():
    requests = asked([40, 40], [60, 60], [0.0, 0.001])
    there, without = (
        serve(plan, requests, service(**WITH_BLOCKS)) for plan in (hosted(rate=1e12), cluster(pool(EVERYTHING)))
    )
    assert there.columns["preemptions"].any()
    assert there.pools[0].host_loaded_blocks > 0
    computed = [trace.steps[0]["chunk_tokens"].sum() for trace in (there, without)]
    assert computed[0] < computed[1]


def test_runs_leave_by_last_use_and_ends_before_starts():
    root = Node(0, 4)
    one, other = Node(4, 6, root), Node(4, 8, root)
    host = HostCache(8)
    host.store([root, one], 6)
    host.store([root, other], 8)  # two blocks are free, and `one` has the two used longest ago
    assert (host.reach([root, one], 99), host.reach([root, other], 99)) == (4, 8)
    host.store([Node(0, 3)], 3)
    assert host.reach([root, other], 99) == 5  # from the end, and before what it follows on
    host.store([Node(0, 2)], 2)
    assert host.reach([root, other], 99) == 3
    assert (host.stored, host.evicted, host.free) == (15, 7, 0)
    assert not list(host.audit())


def test_a_use_keeps_a_run_and_a_run_makes_no_room_for_itself():
    first, second = Node(0, 4), Node(0, 4)
    host = HostCache(8)
    host.store([first], 4)
    host.store([second], 4)
    host.store([first], 4)
    host.store([Node(0, 2)], 2)
    assert (host.reach([first], 9), host.reach([second], 9)) == (4, 2)
    long = [Node(0, 6)]
    long.append(Node(6, 20, long[0]))
    host.store(long, 20)
    assert (host.reach(long, 99), len(host.held)) == (8, 2)
    assert not list(host.audit())


def test_an_audit_notices_what_does_not_add_up():
    root = Node(0, 4)
    cache = OffloadedCache(10, {0: Node(4, 8, root)}, 10)
    cache.hold(0, 0)
    cache.take(8)
    cache.publish(0, 8)
    cache.release(0, 8)
    assert not list(cache.audit())
    del cache.host.held[root]
    faults = list(cache.audit())
    assert len(faults) == 3
    assert "without those in front" in faults[2]


def test_a_crash_takes_the_hosts_part_with_it():
    crash = Failure(kind="crash", pool=EVERYTHING, worker=0, at_s=15.0, for_s=1.0)
    trace = serve(hosted().model_copy(update={"failures": (crash,)}), repeated(), service(**WITH_BLOCKS))
    assert trace.columns["cached_tokens"].tolist() == [0, 0, 0]
    assert (trace.pools[0].host_loaded_blocks, trace.pools[0].host_stored_blocks) == (0, 6 + 9 + 6)


@pytest.mark.parametrize("n_bytes", [0.0, BLOCK - 1.0])
def test_a_host_without_room_for_a_block_is_none_bit_by_bit(n_bytes):
    rng = np.random.default_rng(3)
    parent = np.array([rng.integers(-1, i) if i else -1 for i in range(60)])
    shared, arrival = np.full(60, 40), np.cumsum(rng.exponential(0.1, 60))
    requests = asked(np.full(60, 50), rng.integers(1, 30, 60), arrival, parent=parent, shared_text_tokens=shared)
    times = service(**WITH_BLOCKS)
    none, empty = (serve(plan, requests, times) for plan in (cluster(pool(EVERYTHING)), hosted(n_bytes)))
    assert same(none, empty)
    assert none.events == empty.events
    assert all(none.steps[0][key].tobytes() == empty.steps[0][key].tobytes() for key in none.steps[0])
    assert not same(none, serve(hosted(), requests, times))  # with room it would be another run


def test_the_host_is_shared_out_among_the_loops_of_a_worker_and_each_device_has_a_link():
    assert host_rate_bytes_per_s(Pool(hardware="h100-sxm5-80gb")) == 64e9
    assert host_rate_bytes_per_s(Pool(hardware="h100-sxm5-80gb", tp=2)) == 2 * 64e9
    assert host_rate_bytes_per_s(Pool(hardware="any", host_bandwidth_bytes_per_s=5.0)) == 5.0
    two = cluster(pool(EVERYTHING, dp=2, host_cache_bytes=100.0, host_bandwidth_bytes_per_s=RATE))
    trace = serve(two, asked([5], [1]), service(**WITH_BLOCKS))
    assert trace.pools[0].limits.host_blocks == 100 / 2 / BLOCK


@settings(max_examples=60, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(crowded())
def test_any_worker_short_of_blocks_keeps_the_laws_with_a_host(case):
    plan, requests, times = case
    trace, stepped = (simulate(plan, requests, service=times, leaps=leaps) for leaps in (True, False))
    check(trace)
    check(stepped)
    assert same(trace, stepped)
    loaded = [sum(one.host_loaded_tokens for one in x.pools) for x in (trace, stepped)]
    assert loaded[0] == loaded[1]


# Embeddings in a store

SEEN = {"step_base_s": STEP_S, "token_s": TOKEN_S, "patch_s": 1e-3}
"""A picture of 100 tokens takes 0.1 s to encode, and 100 bytes on any wire."""
LATENCY_S = 0.005


def stored(room=1e9, rate=1000.0, **more):
    store = Store(capacity_bytes=room, bandwidth_bytes_per_s=rate, latency_s=LATENCY_S)
    return cluster(*map(pool, APART)).model_copy(update={"store": store, **more})


def shown(content, arrival, tokens=100, **more):
    """Return requests with a picture each, and ten tokens of text."""
    n = len(content)
    items = pictures([1] * n, [tokens] * n, content=content)
    return asked([10] * n, [1] * n, arrival, items=items, **more)


def test_a_picture_that_the_store_has_takes_its_bytes_over_the_wire_instead_of_the_encoder():
    trace = serve(stored(), shown([7, 7], [0.0, 1.0]), service(**SEEN))
    prompt_s = STEP_S + 110 * TOKEN_S
    assert trace.columns["encoded_s"] == pytest.approx([0.1, 1.0 + 100 / 1000.0 + LATENCY_S])
    assert trace.ttft_s == pytest.approx([0.1 + prompt_s, 0.1 + LATENCY_S + prompt_s])
    store = trace.store
    assert (store.hits, store.misses, store.fetched_bytes, store.written_bytes) == (1, 1, 100.0, 100.0)
    assert (store.busy_s, trace.encoder_misses) == (pytest.approx(0.2), 1)
    figures = report(trace)
    assert [value for key, value in figures.shared_caches.items() if key.startswith("store")] == [0.5, 100.0, 100.0]
    assert figures.links["store > pools"] == pytest.approx(0.2 / trace.span_s)


def test_a_picture_is_in_the_store_when_its_last_byte_has_landed():
    """It is encoded at 0.1 s and there at 0.205 s; between them others encode it, or find it at the encoder."""
    trace = serve(stored(), shown([7, 7, 7], [0.0, 0.2, 0.21]), service(**SEEN))
    assert (trace.store.hits, trace.store.misses, trace.store.written) == (1, 2, 1)


def test_reads_and_writes_share_the_wire():
    """From 1 s on one picture is read and another, whose encoding has just ended, is written."""
    trace = serve(stored(), shown([7, 8, 7], [0.0, 0.9, 1.0]), service(**SEEN))
    assert trace.columns["encoded_s"][2] == pytest.approx(1.0 + 200 / 1000.0 + LATENCY_S)
    twice = serve(stored(), shown([7, 7, 7], [0.0, 1.0, 1.0]), service(**SEEN))
    assert twice.columns["encoded_s"][1:] == pytest.approx(1.0 + 200 / 1000.0 + LATENCY_S)


@pytest.mark.parametrize("mode", ["push", "pull", "reserve"])
@pytest.mark.parametrize("release", ["request", "item"])
def test_requests_with_pictures_from_both_places_wait_for_all(mode, release):
    items = pictures([1, 2], [100] * 3, content=[7, 7, 8])
    requests = asked([10, 10], [1, 1], [0.0, 1.0], items=items)
    plan = cluster(*map(pool, APART), mode=mode, release=release)
    trace = serve(plan.model_copy(update={"store": stored().store}), requests, service(**SEEN))
    chosen_late = release == "request" and mode != "reserve"  # then the read waits, and shares with a write
    assert trace.columns["encoded_s"][1] == pytest.approx(1.1 + 0.2 * chosen_late + LATENCY_S)
    assert (trace.store.hits, trace.store.misses) == (1, 2)


def test_what_was_used_longest_ago_leaves_the_store_first():
    trace = serve(stored(room=250.0), shown([1, 2, 1, 3, 1, 2], range(6)), service(**SEEN))
    # 3 takes the place of 2, and 2 that of 3: 1 has been used since
    assert (trace.store.hits, trace.store.misses) == (2, 4)
    assert (trace.store.written, trace.store.evicted) == (4, 2)


def test_what_is_on_its_way_is_not_evicted():
    """While the first picture is read, from 1 s to 1.1 s, the store has no room for the second, done at 1.05 s."""
    trace = serve(stored(room=150.0), shown([1, 2, 1], [0.0, 0.95, 1.0]), service(**SEEN))
    assert (trace.store.hits, trace.store.written, trace.store.evicted) == (1, 1, 0)


def test_who_gives_up_leaves_the_wire():
    patience = [np.inf, 0.05]
    trace = serve(stored(), shown([7, 7], [0.0, 1.0], patience_s=patience), service(**SEEN))
    assert (trace.store.hits, trace.store.fetched_bytes) == (1, 0.0)
    assert trace.store.busy_s == pytest.approx(0.1 + 0.05)


def test_what_a_crashed_encoder_was_writing_is_lost():
    crash = Failure(kind="crash", pool=APART[0], worker=0, at_s=0.15, for_s=0.1)
    trace = serve(stored(failures=(crash,)), shown([7, 7], [0.0, 1.0]), service(**SEEN))
    assert (trace.store.hits, trace.store.written) == (0, 1)
    assert trace.finished.all()


@pytest.mark.parametrize("room", [0.0, 99.0])
def test_a_store_without_room_is_none_bit_by_bit(room):
    rng = np.random.default_rng(4)
    requests = shown(rng.integers(0, 5, 50), np.cumsum(rng.exponential(0.1, 50)))
    none, empty = (serve(plan, requests, service(**SEEN)) for plan in (cluster(*map(pool, APART)), stored(room)))
    assert same(none, empty)
    assert none.events == empty.events
    assert not same(none, serve(stored(), requests, service(**SEEN)))


def test_a_deployment_twice_as_large_has_a_store_twice_as_large():
    store = scaled(stored(), 2).store
    assert (store.capacity_bytes, store.bandwidth_bytes_per_s, store.latency_s) == (2e9, 2000.0, LATENCY_S)


# What is noticed, and what cannot be


@pytest.mark.parametrize(
    ("store", "law"),
    [
        ({"hits": 1, "misses": 1}, "into which nothing was written"),
        ({"hits": 2, "misses": 1, "written": 1}, "3 items were looked for in the store, and there are 2"),
        ({"hits": 2, "written": 1}, "2 items came from the store and 1 were encoded, of 2"),
    ],
)
def test_a_store_that_gives_what_it_cannot_have_is_noticed(store, law):
    trace = serve(stored(), shown([7, 7], [0.0, 1.0]), service(**SEEN))
    with pytest.raises(AssertionError, match=law):
        check(replace(trace, store=StoreTrace(**store)))


@pytest.mark.parametrize(
    ("blocks", "law"),
    [
        ({"host_loaded_blocks": 6}, "60 tokens were loaded from hosts, and 50 were cached"),
        ({"host_stored_blocks": 0}, "loads 4 blocks that nobody has stored"),
    ],
)
def test_a_host_that_gives_what_it_cannot_have_is_noticed(blocks, law):
    trace = serve(hosted(), repeated(), service(**WITH_BLOCKS))
    with pytest.raises(AssertionError, match=law):
        check(replace(trace, pools=(replace(trace.pools[0], **blocks),)))


def _plan(*pools, **more):
    return ServingPlan(model="any", pools=pools or (Pool(hardware="any"),), **more)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _plan(store=Store(capacity_bytes=1, bandwidth_bytes_per_s=1)),
            "store=… needs a pool that encodes for",
        ),
        (
            lambda: _plan(Pool(hardware="any", host_cache_bytes=5), policies={"prefix_caching": False}),
            "host_cache_bytes=5 of pool 'all' needs prefix_caching",
        ),
        (
            lambda: _plan(Pool(hardware="any"), Pool(name="d", hardware="any", stages=("decode",), host_cache_bytes=5)),
            "host_cache_bytes=5 of pool 'd' is for pools that run 'prefill'",
        ),
        (
            lambda: simulate(_plan(Pool(hardware="any", host_cache_bytes=5)), asked([5], [5]), service=service()),
            "'all': host_bandwidth_bytes_per_s=None needs a device whose profile has a link to its host, and 'any'",
        ),
        (
            lambda: simulate(hosted(), asked([5], [5]), service=service(kv_token_bytes=0.0)),
            "is of a cache whose blocks have no bytes",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
