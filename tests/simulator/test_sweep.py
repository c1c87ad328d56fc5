"""Load sweeps and scaling against queues whose answers are known."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from simulator import Pool, ServingPlan, Slo, report, scalability, simulate, sweep
from simulator.assembly import scaled
from simulator.goodput import attained_share
from simulator.report import Spread
from simulator.request import requests_of
from simulator.service import LinearService
from simulator.serving_plan import Policies

TOKENS = 1000
"""Prompt tokens of a service time of one second."""
CAPACITY = LinearService().capacity
ALONE = type(CAPACITY)(kv_blocks=1 << 40, block_tokens=16, chunk_tokens=1 << 40, max_sequences=1, encoder_tokens=1)
ONE_BY_ONE = LinearService(token_s=1 / TOKENS, capacity=ALONE)
PLAN = ServingPlan(model="any", pools=(Pool(hardware="any"),))


def queue(service_s, slo, *, plan=PLAN, arrivals="poisson", seed=0):
    """Return what runs one server of these service times at a rate: the same requests, only faster."""
    tokens = np.maximum(1, np.rint(np.asarray(service_s) * TOKENS)).astype(int)
    n = len(tokens)

    def at(rate):
        rng = np.random.default_rng(seed)
        gaps = rng.exponential(1 / rate, n) if arrivals == "poisson" else np.full(n, 1 / rate)
        requests = requests_of(np.cumsum(gaps), tokens, np.ones(n, dtype=int))
        return report(simulate(plan, requests, service=ONE_BY_ONE), slo)

    return at


@pytest.fixture(scope="module")
def md1():
    return sweep(queue(np.ones(12_000), Slo(ttft_s=3.0)), tolerance=0.02)


def md1_waits_at_most_two(load):
    """Return P(W <= 2 D) of an M/D/1 queue (A. K. Erlang, 1909)."""
    return (1 - load) * (math.exp(2 * load) - load * math.exp(load))


@pytest.mark.slow
def test_the_knee_of_a_steady_server_is_at_two_thirds_of_its_capacity(md1):
    """M/D/1: T = 1 + load / (2 (1 - load)), which is twice that of one alone at 2/3."""
    assert md1.alone_s == pytest.approx(1.0, rel=1e-3)
    assert md1.knee_per_s == pytest.approx(2 / 3, rel=0.04)


@pytest.mark.slow
def test_the_knee_of_an_exponential_server_is_at_half_of_its_capacity():
    """M/M/1: T = 1 / (1 - load), and the largest power (Kleinrock) is at the same place."""
    draws = np.random.default_rng(5).exponential(1.0, 10_000)
    draws /= draws.mean()
    found = sweep(queue(draws, Slo(ttft_s=3.0)), tolerance=0.02)
    assert found.knee_per_s == pytest.approx(0.5, rel=0.06)


def test_a_server_finishes_what_it_can(md1):
    assert md1.saturation_per_s == pytest.approx(1.0, rel=1e-3)


def test_goodput_is_where_erlang_says(md1):
    expected = brentq(lambda load: md1_waits_at_most_two(load) - 0.9, 0.1, 0.99)
    assert md1.goodput_last_pass == pytest.approx(expected, rel=0.04)


def test_goodputs_are_what_their_names_say(md1):
    last, first = md1.goodput_last_pass, md1.goodput_first_violation
    assert last < first <= last * 1.02 + 1e-12
    assert all(one.passes for one in md1.tried if one.rate_per_s <= last)
    assert not next(one for one in md1.tried if one.rate_per_s == first).passes
    assert [one.rate_per_s for one in md1.tried] == sorted(one.rate_per_s for one in md1.tried)
    assert md1.goodput_last_pass == md1.goodput_steady


def test_more_must_be_kept_at_lower_rates():
    at = queue(np.ones(2000), Slo(ttft_s=3.0))
    strict, loose = (sweep(at, attained=share).goodput_last_pass for share in (0.99, 0.5))
    assert strict < loose


def test_what_one_alone_cannot_keep_no_rate_keeps():
    found = sweep(queue(np.ones(200), Slo(ttft_s=0.5)))
    assert found.goodput_last_pass is None
    assert found.goodput_first_violation == min(one.rate_per_s for one in found.tried)
    assert found.knee_per_s is not None


def test_a_run_too_short_to_be_overloaded_says_so():
    found = sweep(queue(np.ones(5), Slo(ttft_s=100.0)))
    assert found.goodput_first_violation is None
    assert found.goodput_last_pass == max(one.rate_per_s for one in found.tried)


def test_a_rate_that_passes_above_one_that_fails_is_named():
    """A deployment that is bad between 1 and 2 requests/s alone."""
    steady = queue(np.full(50, 0.01), Slo(ttft_s=1.0))(1.0)
    spread = Spread(0.01, 0.01, 0.01, 0.01, 0.01)

    def at(rate):
        good = not 1.0 <= rate <= 2.0 and rate < 50
        n = steady.requests["arrived"]
        per_s = min(rate, 60.0)
        return type(steady)(
            **{
                **{name: getattr(steady, name) for name in steady.__dataclass_fields__},
                "e2e_s": spread,
                "span_s": n / per_s,
                "throughput_requests_per_s": per_s,
                "goodput_requests_per_s": per_s if good else 0.0,
            }
        )

    found = sweep(at, low_per_s=0.7)
    assert found.goodput_steady < 1.0 <= found.goodput_first_violation < 1.06
    assert found.goodput_last_pass > 2.0


@pytest.mark.parametrize(
    ("options", "slo", "words"),
    [
        ({}, Slo(), "needs a promise"),
        ({"attained": 0.0}, Slo(ttft_s=1.0), "share of the requests"),
        ({"tolerance": 1.0}, Slo(ttft_s=1.0), "relative width"),
        ({"low_per_s": -1.0}, Slo(ttft_s=1.0), "positive number"),
    ],
)
def test_a_sweep_refuses_what_it_cannot_answer(options, slo, words):
    with pytest.raises(ValueError, match=words):
        sweep(queue(np.ones(5), slo), **options)


# Scaling


def pool_of(plan, *, requests=240, per_s=0.9, slo=None):
    """Return what runs k times a plan under k times the load, requests of one second at steady distances."""
    slo = slo or Slo(ttft_s=1.5)
    return lambda k: queue(np.ones(k * requests), slo, plan=plan(k), arrivals="uniform")(k * per_s)


def test_an_ideal_pool_scales_as_one():
    """Equal requests dealt out in turn: every worker sees what the only one sees."""
    found = scalability(pool_of(lambda k: scaled(PLAN, k)), (1, 2, 4))
    assert [one.times for one in found] == [1, 2, 4]
    for one in found:
        assert one.slo_efficiency == 1.0
        assert one.throughput_efficiency == pytest.approx(1.0, rel=0.01)
        assert one.goodput_efficiency == pytest.approx(1.0, rel=0.01)


def test_a_pool_that_does_not_grow_scales_as_its_load():
    found = scalability(pool_of(lambda _: PLAN, slo=Slo(e2e_s=1e6)), (1, 4))
    assert found[1].throughput_efficiency == pytest.approx(1 / (4 * 0.9), rel=0.02)
    late = scalability(pool_of(lambda _: PLAN), (1, 4))[1]
    assert late.slo_efficiency < 0.05
    assert late.share == pytest.approx(late.slo_efficiency)


def test_workers_that_share_a_queue_scale_better_than_one():
    """Poisson arrivals wait less at several servers that take whoever is next than at one each."""
    shortest = ServingPlan(model="any", pools=PLAN.pools, policies=Policies(router="least-requests"))

    def at(k):
        return queue(np.ones(k * 3000), Slo(ttft_s=2.0), plan=scaled(shortest, k), seed=3)(k * 0.8)

    assert scalability(at, (4,))[0].slo_efficiency > 1.05


def test_scaling_refuses_what_is_no_multiple():
    with pytest.raises(ValueError, match="whole numbers from 1"):
        scalability(pool_of(lambda _: PLAN), (0, 2))


def test_cpu_workers_and_shared_links_grow_with_the_pool():
    held = ServingPlan.model_validate(
        {
            "model": "any",
            "pools": [
                {"name": "e", "stages": ["preprocess", "encode"], "hardware": "any", "preprocess_workers": 3},
                {"name": "l", "stages": ["prefill", "decode"], "hardware": "any", "workers": 2},
            ],
            "links": [{"from": "e", "to": "l", "bandwidth_bytes_per_s": 1e9, "per": "pool"}],
        }
    )
    twice = scaled(held, 2)
    assert [(pool.workers, pool.preprocess_workers) for pool in twice.pools] == [(2, 6), (4, None)]
    assert twice.links[0].bandwidth_bytes_per_s == 2e9
    assert twice.devices == 2 * held.devices
    assert scaled(held, 1) == held


def test_the_share_that_keeps_every_promise_is_counted():
    found = queue(np.ones(50), Slo(ttft_s=2.0, e2e_s=1.5))(0.9)
    assert 0 < attained_share(found) < 1
    assert attained_share(found) == pytest.approx(found.slo_attainment["e2e"])
