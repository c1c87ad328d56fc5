"""Routers and admission: who gets the next request, by what is seen of the workers."""

import itertools
from collections import Counter

import numpy as np
import pytest

from simulator.engine import Simulation
from simulator.loads import MANY, Loads
from simulator.request import NONE, RequestView, State
from simulator.routing import BALANCE, ROUTERS, router
from simulator.serving_plan import Policies, ServingPlan, Slo
from tests.simulator.clusters import asked, cluster, pictures, pool, run, serve, service

N = 8


def view(index=0, *, tokens=100, **more):
    return RequestView(index=index, arrival_s=0.0, prompt_tokens=tokens, max_output_tokens=10, n_items=0, **more)


def loads(**columns):
    found = Loads(len(next(iter(columns.values()))))
    for name, values in columns.items():
        for slot, value in enumerate(values):
            getattr(found, name)[slot] = value
    return found


def test_round_robin_goes_round_those_that_are_open():
    held = loads(requests=[0] * 4)
    held.close(2)
    assert [router("round-robin").route(view(i), held) for i in range(6)] == [0, 1, 3, 0, 1, 3]


@pytest.mark.parametrize(
    ("name", "column"),
    [("least-requests", "requests"), ("least-tokens", "tokens"), ("least-image-tokens", "image_tokens")],
)
@pytest.mark.parametrize("n", [3, MANY + 5])
def test_the_least_loaded_is_the_first_of_equals_and_open(name, column, n):
    values = [5.0, 2.0, 2.0] + [9.0] * (n - 3)
    held = loads(**{column: values})
    assert router(name).route(view(), held) == 1
    held.close(1)
    assert router(name).route(view(), held) == 2


def test_power_of_two_takes_the_lighter_of_two_and_comes_near_the_least_loaded():
    """n requests to n workers: one choice fills the fullest with log n / log log n of them, two with log log n."""
    n = 2000
    two, one, ring = Loads(n), Loads(n), router("affinity")
    for index in range(n):
        two.give(router("power-of-two").route(view(index), two), tokens=1.0)
        one.give(ring.route(view(index), one), tokens=1.0)
    assert max(two.tokens) <= 4
    assert max(one.tokens) > max(two.tokens)
    assert sum(two.tokens) == n


def test_prefix_aware_goes_where_the_prompt_is_unless_that_is_much_busier():
    held = loads(tokens=[0.0, 140.0, 160.0])
    there = {"prefix_slot": 1, "prefix_tokens": 60}
    assert router("prefix-aware").route(view(**there), held) == 1
    assert router("prefix-aware").route(view(prefix_slot=1, prefix_tokens=40), held) == 0  # too little of it
    assert router("prefix-aware").route(view(prefix_slot=2, prefix_tokens=60), held) == 0
    assert held.tokens[2] > BALANCE * 100 > held.tokens[1]
    held.close(1)
    assert router("prefix-aware").route(view(**there), held) == 0


def test_prefix_aware_finds_what_round_robin_misses():
    rng = np.random.default_rng(0)
    n = 60
    parent = np.where(np.arange(n) < 6, NONE, np.arange(n) % 6 - 0)
    requests = asked([200] * n, [4] * n, np.cumsum(rng.exponential(0.5, n)), parent=parent,
                     shared_text_tokens=np.where(parent < 0, 0, 180))  # fmt: skip
    hits = {}
    for name in ("prefix-aware", "affinity"):
        plan = cluster(pool("preprocess+encode+prefill+decode", workers=4), policies={"router": name})
        hits[name] = int(serve(plan, requests, service(step_base_s=0.01)).columns["cached_tokens"].sum())
    assert hits["prefix-aware"] == 180 * (n - 6)
    assert hits["affinity"] < 0.8 * hits["prefix-aware"]


def owners(slots, contents=4000):
    held = Loads(max(slots) + 1)
    held.open = list(slots)
    ring = router("affinity")
    return [ring.route(view(index, content=content), held) for index, content in enumerate(range(contents))]


def test_a_picture_always_goes_to_the_same_encoder_and_encoders_have_like_shares():
    found = owners(range(N))
    assert found == owners(range(N))
    shares = np.array([count for _, count in sorted(Counter(found).items())]) / len(found)
    assert len(shares) == N
    assert shares.min() > 0.5 / N
    assert shares.max() < 2.0 / N


def test_a_worker_that_comes_or_goes_moves_only_its_own_share():
    before, after = np.array(owners(range(N))), np.array(owners(range(N + 1)))
    moved = before != after
    assert (after[moved] == N).all()
    assert moved.mean() == pytest.approx(1 / (N + 1), rel=0.4)
    gone = np.array(owners([slot for slot in range(N) if slot != 3]))
    assert (gone[before != 3] == before[before != 3]).all()


def test_equal_pictures_meet_one_encoder_and_its_output_cache():
    items = pictures([1] * 40, [100] * 40, content=[k % 4 for k in range(40)])
    requests = asked([5] * 40, [1] * 40, np.arange(40) * 10.0, items=items)
    misses = {}
    for name in ("affinity", "least-requests", "round-robin"):
        plan = cluster(pool("preprocess+encode", workers=3), pool("prefill+decode"), policies={"encode_router": name})
        misses[name] = serve(plan, requests, service(step_base_s=0.1, patch_s=0.01)).encoder_misses
    assert misses["affinity"] == 4
    assert misses["round-robin"] == 12  # every encoder sees every picture


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_request_reaches_a_worker_and_all_workers_have_some(name):
    requests = asked([50] * 60, [5] * 60, np.arange(60) * 0.01, items=pictures([1] * 60, [30] * 60))
    plan = cluster(
        pool("preprocess+encode", workers=3),
        pool("prefill+decode", workers=3),
        policies={"router": "least-tokens" if name == "least-image-tokens" else name, "encode_router": name},
    )
    trace = serve(plan, requests, service(step_base_s=0.1, patch_s=0.01))
    assert trace.finished.all()
    assert all(len(steps["start_s"]) for steps in trace.steps)


# Old signals


def spread(age_s, name="least-requests"):
    """Return how many of 30 requests that come within a second each of three workers gets."""
    plan = cluster(pool("prefill+decode", workers=3), policies={"router": name, "signal_age_s": age_s})
    requests = asked([10] * 30, [1] * 30, np.arange(30) / 30)
    trace = serve(plan, requests, service(step_base_s=50.0))
    return sorted(np.bincount(trace.columns["worker"], minlength=3).tolist())


@pytest.mark.parametrize("name", ["least-requests", "least-tokens"])
def test_with_old_signals_the_herd_goes_to_one_worker(name):
    assert spread(0.0, name) == [10, 10, 10]
    assert spread(100.0, name) == [0, 0, 30]


def test_hashing_does_not_care_how_old_signals_are():
    assert spread(0.0, "affinity") == spread(100.0, "affinity")


def test_what_is_seen_is_as_old_as_it_may_be_and_no_older():
    held = Loads(2, age_s=1.0)
    assert held.seen(0.0).tokens[0] == 0.0
    held.give(0, tokens=7.0)
    assert held.seen(0.99).tokens[0] == 0.0
    held.close(1)
    assert held.seen(0.99).open == [0]
    assert held.seen(1.0).tokens[0] == 7.0


# Admission


def admitted(n=10, plan_slo=None, base_s=0.0, **policies):
    plan = cluster(pool("preprocess+encode+prefill+decode", workers=2), policies=policies)
    plan = ServingPlan(**{**dict(plan), "slo": plan_slo})
    return serve(plan, asked([100] * n, [2] * n), service(step_base_s=base_s, token_s=0.01, sequence_s=0.01))


def test_no_more_are_taken_than_workers_may_have():
    trace = admitted(admission="queue", admission_limit=3.0)
    assert trace.finished.sum() == 6
    assert set(trace.reasons.values()) == {"not admitted"}
    assert (trace.columns["state"] == State.REJECTED).sum() == 4


def test_nobody_is_taken_who_would_wait_longer_than_promised():
    """A token takes 0.01 s: behind three prompts of 100 the next would wait over 2.5 s."""
    by_limit = admitted(admission="ttft", admission_limit=2.5)
    by_promise = admitted(admission="ttft", plan_slo=Slo(ttft_s=2.5))
    assert by_limit.finished.sum() == by_promise.finished.sum() == 6
    assert set(by_limit.reasons.values()) == {"not admitted"}
    assert admitted(admission="ttft").finished.all()
    assert admitted(admission="ttft", admission_limit=2.5, base_s=1.0).finished.sum() == 4  # a prompt takes two seconds


# What policies see


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("order", ["fcfs", "priority", "shortest", "size-class"])
def test_no_policy_knows_how_long_answers_will_be(name, order):
    """Answers of other lengths, equally long at most: until one ends, every decision is the same."""
    rng = np.random.default_rng(0)
    n = 40
    items = pictures([k % 3 for k in range(n)], [30] * (n // 3 + 2 * (n // 3)))
    text, arrival_s = rng.integers(5, 300, n), np.cumsum(rng.exponential(0.05, n))
    traces = []
    for seed in (1, 2):
        output = np.random.default_rng(seed).integers(100, 200, n)
        requests = asked(text, output, arrival_s, items=items, max_output_tokens=[200] * n, priority=np.arange(n) % 3)
        policies = {"router": name, "encode_router": name, "decode_router": name, "order": order}
        pools = pool("preprocess+encode", workers=2), pool("prefill", workers=2), pool("decode", workers=2)
        plan = cluster(*pools, policies=policies, bandwidth_bytes_per_s=1e4)
        traces.append(serve(plan, requests, service(step_base_s=0.02, token_s=1e-4, patch_s=1e-3)))
    until = min(trace.columns["finish_s"].min() for trace in traces)
    assert sum((trace.columns["joined_s"] < until).sum() for trace in traces) > 10
    for column in ("scheduled_s", "encoded_s", "joined_s", "first_token_s"):
        known = [trace.columns[column] for trace in traces]
        assert (np.where(known[0] < until, known[0], 0) == np.where(known[1] < until, known[1], 0)).all()
    for column in ("worker", "decode_worker"):
        early = traces[0].columns["first_token_s"] < until
        assert (traces[0].columns[column][early] == traces[1].columns[column][early]).all()


def test_loads_are_clear_when_everybody_has_left():
    rng = np.random.default_rng(1)
    requests = asked([60] * 50, [20] * 50, np.arange(50) * 0.01, items=pictures([1] * 50, [30] * 50),
                     patience_s=np.where(rng.random(50) < 0.5, rng.exponential(1.0, 50), np.inf))  # fmt: skip
    plan = cluster(pool("preprocess+encode"), pool("prefill"), pool("decode"), bandwidth_bytes_per_s=1000.0)
    done = run(plan, requests, service(step_base_s=0.02, patch_s=1e-3))  # run looks at what is left
    assert isinstance(done, Simulation)
    assert 0 < (done.tape.columns["state"] == State.CANCELLED).sum() < 50


@pytest.mark.parametrize("name", ["router", "encode_router", "decode_router", "order", "encode_order"])
def test_unknown_policies_are_one_line(name):
    with pytest.raises(LookupError, match=r"unknown (router|order) 'fastest'") as error:
        Policies(**{name: "fastest"})
    assert "known: " in str(error.value)


def test_a_random_router_spreads_requests_evenly_and_not_in_turn():
    held = Loads(4)
    chosen = [router("random").route(view(index), held) for index in range(4000)]
    counts = np.bincount(chosen, minlength=4)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)
    assert 800 < sum(one == other for one, other in itertools.pairwise(chosen)) < 1200
    held.close(2)
    assert 2 not in [router("random").route(view(index), held) for index in range(200)]
