"""Every law notices a trace that breaks it."""

from dataclasses import replace

import numpy as np
import pytest

from simulator import Pool, ServingPlan, check, simulate, traffic
from simulator.laws import broken_laws, causality
from simulator.request import State
from simulator.service import LinearService
from tests.simulator.clusters import asked, cluster, pictures, pool, serve, service

PLAN = ServingPlan(model="any", pools=(Pool(hardware="any"),))
SERVICE = LinearService(step_base_s=5e-3, token_s=1e-5, sequence_s=1e-5)


@pytest.fixture
def trace():
    return simulate(PLAN, traffic.preset("text-500-200", 5.0, 50, 0), service=SERVICE)


def changed(trace, name, row, value):
    columns = {key: column.copy() for key, column in trace.columns.items()}
    columns[name][row] = value
    return replace(trace, columns=columns)


def step_changed(trace, name, row, value):
    steps = {key: column.copy() for key, column in trace.steps[0].items()}
    steps[name][row] = value
    return replace(trace, steps=(steps,))


def test_a_run_keeps_them(trace):
    check(trace)


@pytest.mark.parametrize(
    ("name", "value", "law"),
    [
        ("state", State.WAITING, "conservation: 1 requests have no end"),
        ("finish_s", np.nan, "conservation: a request has an end time"),
        ("arrival_s", np.nan, "conservation: a request never arrived"),
        ("first_token_s", 0.0, "causality: 1 requests have first_token_s before scheduled_s"),
        ("scheduled_s", 0.0, "causality: 1 requests have scheduled_s before queued_s"),
        ("cached_tokens", 10**6, "cache conservation: a whole prompt"),
        ("cached_tokens", 16, "prompt tokens were computed"),
    ],
)
def test_a_changed_request_is_noticed(trace, name, value, law):
    with pytest.raises(AssertionError, match=law):
        check(changed(trace, name, 30, value))


@pytest.mark.parametrize(
    ("name", "value", "law"),
    [
        ("end_s", 0.0, "monotone clock"),
        ("decoding", 10**6, "tokens were decoded"),
        ("kv_used_blocks", 1e12, "cache conservation: worker 0 uses"),
        ("chunk_tokens", 10**6, "prompt tokens were computed"),
    ],
)
def test_a_changed_step_is_noticed(trace, name, value, law):
    with pytest.raises(AssertionError, match=law):
        check(step_changed(trace, name, 10, value))


def test_a_request_that_waits_while_the_worker_is_idle_is_noticed():
    sparse = simulate(PLAN, traffic.preset("text-500-200", 0.05, 20, 0), service=SERVICE)
    check(sparse)
    late = float(sparse.columns["arrival_s"][11])
    columns = {key: column.copy() for key, column in sparse.columns.items()}
    for name in ("scheduled_s", "first_token_s", "finish_s"):
        columns[name][5] += late - sparse.columns["scheduled_s"][5]
    with pytest.raises(AssertionError, match="never idle"):
        check(replace(sparse, columns=columns))


def test_faults_of_the_caches_and_held_blocks_are_noticed(trace):
    with pytest.raises(AssertionError, match="free=1 blocks"):
        check(replace(trace, faults=("free=1 blocks, and 2 are listed",)))
    with pytest.raises(AssertionError, match="3 blocks are held"):
        check(replace(trace, held_blocks=3))


@pytest.fixture
def resting():
    """A worker that waits for the second picture of a prompt that it has begun, and another prompt behind."""
    plan = cluster(pool("preprocess+encode", encode_items=1), pool("prefill+decode", max_batch=1), release="item")
    requests = asked([5, 5], [2, 2], [0.0, 1.05], items=pictures([2, 0], [10, 10]))
    return serve(plan, requests, service(step_base_s=0.1, patch_s=0.1))


def test_a_worker_that_rests_without_saying_so_is_noticed(resting):
    assert resting.pools[1].rests[0]
    silent = replace(resting, pools=(resting.pools[0], replace(resting.pools[1], rests=((),))))
    with pytest.raises(AssertionError, match="never idle: worker 1 stops while it holds requests"):
        check(silent)


def test_a_rest_that_ends_with_a_request_that_leaves_is_none_of_its_gap(resting):
    early = resting.pools[1].rests[0]
    cut = (early[0], (early[0] + early[1]) / 2, *early[2:])
    broken = list(broken_laws(replace(resting, pools=(resting.pools[0], replace(resting.pools[1], rests=(cut,))))))
    assert not [line for line in broken if "stops while it holds" in line]


def test_an_answer_before_its_pictures_is_noticed_unless_they_were_cached(resting):
    late = changed(resting, "encoded_s", 0, float(resting.columns["first_token_s"][0]) + 1.0)
    with pytest.raises(AssertionError, match="causality: 1 requests have first_token_s before encoded_s"):
        check(late)
    assert not list(causality(changed(late, "cached_tokens", 0, 16)))
