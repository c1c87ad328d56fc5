"""Failures by hand: what is lost, what begins anew and when it ends, what is not touched; nothing is left behind."""

import math
from itertools import pairwise

import numpy as np
import pytest

from simulator import simulate
from simulator.engine import LEFT, NOT_BACK
from simulator.flow import CRASHED
from simulator.request import State
from simulator.rules import Failure
from simulator.trace import same
from tests.simulator.clusters import asked, cluster, crash, pictures, pool, run, serve, service, troubled

ALL = "preprocess+encode+prefill+decode"
FRONT = "preprocess+encode+prefill"
STEPS = {"step_base_s": 1.0}
"""A step takes a second, whatever it holds: a prompt of one chunk and an answer of n tokens take n seconds."""
FOREVER = None


def failure(kind, pool, at_s, for_s=None, **more):
    return {"kind": kind, "pool": pool, "at_s": at_s, "for_s": for_s, **more}


def both_ways(plan, requests, times):
    """Return the trace of a run, after a look that steps one by one say the same."""
    trace = serve(plan, requests, times)
    assert same(trace, serve(plan, requests, times, leaps=False))
    return trace


def ends(trace):
    return trace.columns["finish_s"].tolist()


# Crashes where one worker does everything


def test_a_crash_loses_the_step_under_way_and_the_request_begins_anew_elsewhere():
    plan = troubled(cluster(pool(ALL, workers=2)), crash(ALL, 0, 2.5))
    trace = both_ways(plan, asked([10], [5]), service(**STEPS))
    assert ends(trace) == [7.5]
    assert trace.ttft_s.tolist() == [3.5]
    assert trace.columns["retries"].tolist() == [1]
    assert trace.columns["worker"].tolist() == [1]
    lost, again = trace.steps
    assert (lost["start_s"][0], lost["end_s"][-1]) == (0.0, 2.5)
    assert lost["steps"].sum() == 3.0
    assert (again["start_s"][0], again["end_s"][-1]) == (2.5, 7.5)


def test_who_begins_anew_waits_for_the_step_under_way_there_and_holds_up_nobody_else():
    plan = troubled(cluster(pool(ALL, workers=2)), crash(ALL, 0, 2.5))
    trace = both_ways(plan, asked([10, 10], [5, 10]), service(**STEPS))
    assert ends(trace) == [8.0, 10.0]
    assert trace.columns["retries"].tolist() == [1, 0]
    assert trace.columns["scheduled_s"].tolist() == [3.0, 0.0]


def test_a_crash_forgets_caches():
    """The third prompt starts like the first, which was computed on a worker that crashed since."""
    links = {"parent": [-1, -1, 0], "shared_text_tokens": [0, 0, 40]}
    requests = asked([40, 1, 60], [1, 1, 1], [0.0, 0.0, 5.0], **links)
    for at_s, cached in ((2.0, 0), (6.5, 40)):
        plan = troubled(cluster(pool(ALL)), crash(ALL, 0, at_s, 1.0))
        trace = both_ways(plan, requests, service(**STEPS))
        assert trace.columns["cached_tokens"][2] == cached
        assert not trace.columns["retries"].any()


@pytest.mark.parametrize("policy", [{"after_crash": "fail"}, {"most_retries": 0}])
def test_requests_of_a_crash_may_fail(policy):
    plan = troubled(cluster(pool(ALL, workers=2)), crash(ALL, 0, 2.5), **policy)
    trace = both_ways(plan, asked([10, 10], [5, 5]), service(**STEPS))
    assert trace.columns["state"].tolist() == [State.FAILED, State.FINISHED]
    assert trace.reasons == {0: CRASHED}
    assert trace.columns["ended_s"][0] == 2.5
    assert trace.columns["retries"].tolist() == [0, 0]


@pytest.mark.parametrize(("most", "finish"), [(1, math.nan), (2, 9.0)])
def test_after_so_many_retries_a_request_fails_too(most, finish):
    plan = cluster(pool(ALL, workers=2))
    plan = troubled(plan, crash(ALL, 0, 2.5, 0.2), crash(ALL, 1, 4.0), most_retries=most)
    trace = both_ways(plan, asked([10], [5]), service(**STEPS))
    assert ends(trace) == pytest.approx([finish], nan_ok=True)
    assert trace.columns["retries"].tolist() == [most]
    assert trace.reasons == ({0: CRASHED} if most == 1 else {})


def test_a_lone_worker_that_comes_back_serves_those_that_waited():
    plan = troubled(cluster(pool(ALL)), crash(ALL, 0, 2.5, 2.0))
    trace = both_ways(plan, asked([10, 10, 10], [5, 2, 1], [0.0, 3.0, 9.0]), service(**STEPS))
    assert ends(trace) == [9.5, 6.5, 10.5]
    assert trace.columns["queued_s"].tolist() == [4.5, 4.5, 9.0]
    assert trace.columns["retries"].tolist() == [1, 0, 0]
    assert [(one.kind, one.slot, one.at_s, one.until_s) for one in trace.failures] == [("crash", 0, 2.5, 4.5)]


def test_a_lone_worker_that_does_not_come_back_fails_everybody_with_a_reason():
    plan = troubled(cluster(pool(ALL)), crash(ALL, 0, 2.5))
    trace = both_ways(plan, asked([10, 10, 10], [2, 5, 1], [0.0, 0.0, 7.0]), service(**STEPS))
    assert trace.columns["state"].tolist() == [State.FINISHED, State.FAILED, State.FAILED]
    assert trace.reasons == {1: NOT_BACK, 2: NOT_BACK}
    assert trace.failures[0].until_s == math.inf


def test_no_time_passes_for_steps_that_a_crash_has_made_void():
    plan = troubled(cluster(pool(ALL)), crash(ALL, 0, 2.5))
    assert both_ways(plan, asked([10], [50]), service(**STEPS)).columns["ended_s"].tolist() == [2.5]


def test_closed_loops_end_though_the_worker_does_not_come_back():
    plan = troubled(cluster(pool(ALL)), crash(ALL, 0, 2.5))
    trace = both_ways(plan, asked([10] * 5, [2] * 5, concurrency=2), service(**STEPS))
    assert trace.reasons == {2: NOT_BACK, 3: NOT_BACK, 4: NOT_BACK}


def test_a_worker_that_crashes_while_it_is_down_comes_back_when_both_are_repaired():
    plan = troubled(cluster(pool(ALL)), crash(ALL, 0, 1.5, 2.0), crash(ALL, 0, 2.0, 4.0))
    assert ends(both_ways(plan, asked([10], [3]), service(**STEPS))) == [9.0]


# Crashes in clusters


def encoding(*failures, requests):
    """Return the trace of two encoders at 0.1 s a token in front of a worker of 1 s a step."""
    plan = cluster(pool("preprocess+encode", workers=2, encode_items=1), pool("prefill+decode"))
    return both_ways(troubled(plan, *failures), requests, service(**STEPS, patch_s=0.1))


def test_items_of_an_encoder_that_crashes_are_encoded_by_another():
    """One of two pictures is lost after 1 s. The encoder of the other ends it at 2 s, and then does the first."""
    items = pictures([2], [20, 20])
    trace = encoding(crash("preprocess+encode", 0, 1.0), requests=asked([10], [3], items=items))
    assert trace.columns["encoded_s"].tolist() == [4.0]
    assert ends(trace) == [7.0]
    assert trace.columns["retries"].tolist() == [1]


def test_who_has_its_embeddings_does_not_care_about_its_encoder():
    """The first has its picture at 0.5 s; that of the second is lost, and begins anew behind the third's."""
    items = pictures([1, 0, 1, 1], [5, 20, 40])
    requests = asked([10] * 4, [8, 8, 2, 2], [0.0, 0.0, 2.0, 2.0], items=items)
    trace = encoding(crash("preprocess+encode", 1, 3.0), requests=requests)
    assert trace.columns["retries"].tolist() == [0, 0, 1, 0]
    calm = encoding(requests=requests)
    assert ends(trace)[:2] == ends(calm)[:2]
    assert trace.columns["encoded_s"][2:].tolist() == [8.0, 6.0]


def test_a_crash_where_the_prompt_is_computed_frees_the_outputs_of_encoders():
    """Embeddings of 20 bytes leave at 10 a second from 2 s on; the receiver crashes at 3 s, and is back at 5 s."""
    plan = cluster(pool("preprocess+encode"), pool("prefill+decode"), bandwidth_bytes_per_s=10.0)
    plan = troubled(plan, crash("prefill+decode", 0, 3.0, 2.0))
    trace = both_ways(plan, asked([10], [1], items=pictures([1], [20])), service(**STEPS, patch_s=0.1))
    assert trace.columns["encoded_s"].tolist() == [7.0]  # its output is still in the encoder's cache
    assert trace.links[0].sent_bytes == 20.0
    assert ends(trace) == [8.0]


def layer_by_layer(*failures):
    """Return a prompt of 40 bytes of KV: 30 leave from its start on at 10 a second, 10 when it is computed at 1 s."""
    plan = cluster(
        pool(FRONT, workers=2), pool("decode", workers=2), bandwidth_bytes_per_s=10.0, mode="reserve", layerwise=True
    )
    return both_ways(troubled(plan, *failures), asked([40], [3]), service(**STEPS, kv_layers=4))


def test_a_prefill_worker_that_crashes_while_kv_leaves_layer_by_layer():
    calm = layer_by_layer()
    assert calm.columns["joined_s"].tolist() == [4.0]
    trace = layer_by_layer(crash(FRONT, 0, 0.5))
    assert trace.columns["worker"].tolist() == [1]
    assert trace.ttft_s.tolist() == [1.5]
    assert trace.columns["joined_s"].tolist() == [4.5]
    assert ends(trace) == [6.5]
    assert {link.slot: link.sent_bytes for link in trace.links} == {0: 0.0, 1: 40.0}


def test_a_prefill_worker_that_crashes_once_its_kv_has_landed_takes_nothing_with_it():
    trace = layer_by_layer(crash(FRONT, 0, 4.5))
    assert trace.columns["retries"].tolist() == [0]
    assert ends(trace) == ends(layer_by_layer())


@pytest.mark.parametrize("at_s", [0.5, 2.0, 5.5])
def test_where_a_request_decodes_crashes_while_its_kv_comes_or_later(at_s):
    """The step under way is over first, for it cannot be stopped: the prompt begins anew behind it."""
    trace = layer_by_layer(crash("decode", 0, at_s))
    begin = max(at_s, 1.0)
    assert trace.columns["scheduled_s"].tolist() == [begin]
    assert trace.columns["decode_worker"].tolist() == [3]
    assert ends(trace) == [begin + 4.0 + 2.0]
    assert trace.columns["retries"].tolist() == [1]


def test_who_decodes_elsewhere_is_not_touched():
    plan = cluster(pool(FRONT), pool("decode", workers=2))
    plan = troubled(plan, crash("decode", 0, 4.5))
    trace = both_ways(plan, asked([40, 40], [9, 9], [0.0, 0.0]), service(**STEPS))
    assert trace.columns["retries"].tolist() == [1, 0]
    assert ends(trace) == [14.0, 9.0]  # computed again by 5.5 s, and behind the step under way there


def test_whose_only_decode_worker_is_down_waits_with_its_kv():
    """Computed at 1 s, moved once the receiver is back at 6 s; it lost nothing."""
    plan = cluster(pool(FRONT), pool("decode"), bandwidth_bytes_per_s=10.0)
    plan = troubled(plan, crash("decode", 0, 0.5, 5.5))
    trace = both_ways(plan, asked([40], [3]), service(**STEPS))
    assert trace.columns["retries"].tolist() == [0]
    assert trace.columns["joined_s"].tolist() == [10.0]
    assert ends(trace) == [12.0]


def test_chunks_on_a_lost_link_end_with_an_answer_of_one_token():
    """The client may get more tokens than one, so its KV leaves layer by layer; it does not arrive."""
    plan = cluster(pool(FRONT), pool("decode"), bandwidth_bytes_per_s=10.0, mode="reserve", layerwise=True)
    plan = troubled(plan, failure("link", FRONT, 0.5, to="decode"))
    trace = both_ways(plan, asked([40], [1], max_output_tokens=[5]), service(**STEPS, kv_layers=4))
    assert ends(trace) == [1.0]
    assert trace.links[0].sent_bytes == 0.0


# Stragglers


@pytest.mark.parametrize(
    ("failures", "finish"),
    [
        ([(0.25, 1.0, 2.0)], 5.5),  # a second at half the pace
        ([(2.25, 1.0, 2.0)], 5.5),
        ([(2.25, FOREVER, 2.0)], 2.25 + 2.75 * 2),
        ([(2.0, 1.0, 4.0)], 5.75),
        ([(1.0, 2.0, 2.0), (2.0, 2.0, 3.0)], 7.0),  # 1 s at 1/2, 1 s at 1/6, 1 s at 1/3
        ([(6.0, 1.0, 9.0)], 5.0),
    ],
)
def test_a_straggler_is_slower_at_once_and_as_fast_as_ever_afterwards(failures, finish):
    more = [failure("straggler", ALL, at_s, for_s, worker=0, slowdown=slow) for at_s, for_s, slow in failures]
    trace = both_ways(troubled(cluster(pool(ALL)), *more), asked([10], [5]), service(**STEPS))
    assert ends(trace) == pytest.approx([finish], rel=1e-12)


def test_a_straggler_holds_up_nobody_else():
    plan = troubled(cluster(pool(ALL, workers=2)), failure("straggler", ALL, 0.0, worker=1, slowdown=3.0))
    assert ends(both_ways(plan, asked([10, 10], [5, 5]), service(**STEPS))) == [5.0, 15.0]


def test_a_slow_step_of_the_encoder_is_slow_as_a_whole():
    """0.5 s of a step of 3 s, of which the encoder takes 2, at full speed; the rest at half."""
    plan = troubled(cluster(pool(ALL)), failure("straggler", ALL, 0.5, worker=0, slowdown=2.0))
    trace = both_ways(plan, asked([10], [1], items=pictures([1], [20])), service(**STEPS, patch_s=0.1))
    assert ends(trace) == [5.5]
    assert trace.steps[0]["encode_s"].tolist() == pytest.approx([2.0 * 5.5 / 3.0])


# Links


def moving(*failures, latency_s=0.0, patience_s=math.inf):
    """Return 40 bytes of KV on their way at 10 a second from 1 s on."""
    plan = cluster(pool(FRONT), pool("decode"), bandwidth_bytes_per_s=10.0, latency_s=latency_s)
    more = [failure("link", FRONT, at_s, for_s, to="decode", bandwidth_left=left) for at_s, for_s, left in failures]
    return both_ways(troubled(plan, *more), asked([40], [3], patience_s=[patience_s]), service(**STEPS))


@pytest.mark.parametrize(
    ("failures", "joined"),
    [
        ([], 5.0),
        ([(2.0, 3.0, 0.0)], 8.0),
        ([(0.0, 3.0, 0.0)], 7.0),  # cut before the first transfer makes the wire
        ([(2.0, 2.0, 0.5)], 6.0),
        ([(2.0, FOREVER, 0.25)], 14.0),
        ([(2.0, 2.0, 0.5), (3.0, 2.0, 0.5)], 6.75),  # 1 s at a half, 1 s at a quarter, 1 s at a half
        ([(2.0, 4.0, 0.5), (3.0, 1.0, 0.0)], 7.5),
        ([(5.5, 9.0, 0.0)], 5.0),
    ],
)
def test_transfers_under_way_are_as_fast_as_their_link(failures, joined):
    trace = moving(*failures)
    assert trace.columns["joined_s"].tolist() == pytest.approx([joined], rel=1e-12)
    assert ends(trace) == pytest.approx([joined + 2.0], rel=1e-12)
    assert trace.links[0].sent_bytes == 40.0


def test_what_is_sent_lands_though_the_link_is_cut_behind_it():
    assert moving((5.5, FOREVER, 0.0), latency_s=1.0).columns["joined_s"].tolist() == [6.0]


def test_a_link_that_is_lost_for_ever_fails_who_needs_it():
    trace = moving((2.0, FOREVER, 0.0))
    assert trace.reasons == {0: NOT_BACK}
    assert trace.links[0].sent_bytes == 0.0


def test_a_link_that_is_lost_for_ever_is_nothing_to_who_needs_none():
    plan = cluster(pool(FRONT), pool("decode"))
    plan = troubled(plan, failure("link", FRONT, 0.5, to="decode"))
    trace = both_ways(plan, asked([40, 40], [3, 1]), service(**STEPS))
    assert trace.finished.tolist() == [False, True]


@pytest.mark.parametrize("for_s", [1000.0, FOREVER])
def test_behind_a_lost_link_nobody_is_preempted_again_and_again(for_s):
    """The second prompt is computed as far as there is room beside the first, which cannot leave; and stays cached."""
    plan = cluster(pool(FRONT, token_budget=20, max_batch=4), pool("decode"))
    plan = troubled(plan, failure("link", FRONT, 0.0, for_s, to="decode"))
    trace = both_ways(plan, asked([40, 60], [2, 2]), service(**STEPS, kv_blocks=80))
    assert trace.columns["preemptions"].tolist() == [0, 1]
    assert ends(trace) == pytest.approx([1001.0, 1002.0] if for_s else [math.nan] * 2, nan_ok=True)
    assert trace.events < 100


# CPUs


def test_tasks_that_begin_while_cpus_are_slow_take_longer():
    """One CPU, 2 s a picture: begun at 0, at 2 while all takes three times as long, at 8 when it is over."""
    plan = troubled(cluster(pool(ALL)), failure("preprocessing", ALL, 1.0, 2.0, slowdown=3.0))
    requests = asked([10] * 3, [1] * 3, items=pictures([1] * 3, [20] * 3))
    trace = both_ways(plan, requests, service(step_base_s=0.25, pixel_s=0.1))
    assert trace.columns["queued_s"].tolist() == pytest.approx([2.0, 8.0, 10.0])
    assert trace.pools[0].preprocess_busy_s == pytest.approx(10.0)


# Clients that leave


def test_clients_leave_while_their_worker_is_down():
    plan = troubled(cluster(pool(ALL)), crash(ALL, 0, 2.5, 10.0))
    requests = asked([10, 10, 10], [5, 5, 5], [0.0, 3.0, 3.0], patience_s=[4.0, 2.0, np.inf])
    trace = both_ways(plan, requests, service(**STEPS))
    assert trace.reasons == {0: LEFT, 1: LEFT}
    assert trace.columns["ended_s"][:2].tolist() == [4.0, 5.0]
    assert ends(trace)[2] == 17.5


@pytest.mark.parametrize(("at_s", "for_s", "left"), [(2.0, 9.0, 0.0), (2.0, FOREVER, 0.0), (2.0, FOREVER, 0.1)])
def test_clients_leave_while_their_link_is_lost_or_slow(at_s, for_s, left):
    trace = moving((at_s, for_s, left), patience_s=4.0)
    assert trace.reasons == {0: LEFT}
    assert trace.columns["ended_s"].tolist() == [4.0]
    assert trace.links[0].sent_bytes == 0.0


def test_clients_leave_a_straggler():
    plan = troubled(cluster(pool(ALL)), failure("straggler", ALL, 0.5, worker=0, slowdown=10.0))
    requests = asked([10, 10], [2, 2], [0.0, 1.0], patience_s=[3.0, np.inf])
    trace = both_ways(plan, requests, service(**STEPS))
    assert trace.reasons == {0: LEFT}
    assert ends(trace)[1] == 25.5  # behind the step under way, 0.5 and 0.5 s ten times as long


def test_clients_leave_slow_cpus():
    plan = troubled(cluster(pool(ALL)), failure("preprocessing", ALL, 0.0, slowdown=10.0))
    requests = asked([10, 10], [1, 1], items=pictures([1, 1], [20, 20]), patience_s=[5.0, np.inf])
    trace = both_ways(plan, requests, service(**STEPS, pixel_s=0.1))
    assert trace.reasons == {0: LEFT}
    assert ends(trace)[1] == pytest.approx(41.0)


# At random


def at_random(seed, **more):
    given = {"kind": "crash", "pool": ALL, "mean_time_between_s": 2.0, "for_s": 1.0, **more}
    plan = troubled(cluster(pool(ALL, workers=3)), given, most_retries=1000)
    return serve(plan, asked([10] * 40, [12] * 40, np.arange(40.0)), service(**STEPS), seed=seed)


def test_failures_at_random_are_those_of_the_seed():
    one, again, other = at_random(1), at_random(1), at_random(2)
    assert same(one, again)
    assert one.failures == again.failures
    assert not same(one, other)
    assert {failure.slot for failure in one.failures} == {0, 1, 2}  # any of them
    assert one.columns["retries"].any()


def test_the_time_between_failures_is_right_in_the_mean():
    """From a repair to the next failure, exponentially: the mean and the spread of many."""
    mean_s, for_s = 10.0, 2.0
    plan = cluster(pool(FRONT), pool("decode"))
    given = {"kind": "link", "pool": FRONT, "to": "decode", "mean_time_between_s": mean_s, "for_s": for_s}
    done = run(troubled(plan, given), asked([10], [30_000]), service(**STEPS), seed=3).trace(0, 0.0, 0.0)
    found = done.failures
    gaps = np.array([b.at_s - a.until_s for a, b in pairwise(found)])
    assert len(gaps) > 2000
    assert gaps.mean() == pytest.approx(mean_s, rel=4 / len(gaps) ** 0.5)
    assert gaps.std() == pytest.approx(mean_s, rel=0.1)
    assert [one.until_s - one.at_s for one in found[:-1]] == pytest.approx([for_s] * len(gaps))


def test_a_run_without_failures_is_that_of_a_plan_without_any():
    plan, requests = cluster(pool(FRONT), pool("decode", workers=2)), asked([10] * 9, range(1, 10), np.arange(9.0))
    later = troubled(plan, crash("decode", 1, 1e6), failure("link", FRONT, 1e6, to="decode"))
    assert same(serve(plan, requests, service(**STEPS)), serve(later, requests, service(**STEPS)))


def test_a_failure_that_comes_after_the_last_request_does_not_make_the_run_longer():
    plan = troubled(cluster(pool(ALL)), Failure(kind="crash", pool=ALL, mean_time_between_s=50.0, for_s=1.0))
    trace = simulate(plan, asked([10], [3]), service=service(**STEPS), seed=1)
    assert trace.end_s == 3.0
    assert not trace.failures
