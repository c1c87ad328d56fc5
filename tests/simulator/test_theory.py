"""Queueing theory through injected service times: means inside confidence bounds over several seeds."""

import math

import numpy as np
import pytest
from scipy.stats import t

from costmodel import Image
from simulator import Pool, ServingPlan, check, simulate
from simulator.clock import FIRST, Clock
from simulator.cpu import Station, ahead
from simulator.request import Items, requests_of
from simulator.service import LinearService

SEEDS = 8
TOKEN_S = 1e-6
"""A prompt token of the servers below: prompts of a million tokens make service times that are nearly continuous."""


PIXEL_S = 2.5e-4
"""A pixel on the CPU: pictures of some thousand pixels make its times."""


def plan(**pool):
    return ServingPlan(model="any", pools=(Pool(hardware="any", **pool),))


def single(arrival_s, service_s):
    """Return the trace of one server: one sequence at a time, one token out, prompts as long as the service."""
    tokens = np.maximum(1, np.rint(service_s / TOKEN_S)).astype(int)
    capacity = LinearService().capacity
    roomy = type(capacity)(kv_blocks=1 << 40, block_tokens=16, chunk_tokens=1 << 40, max_sequences=1, encoder_tokens=1)
    service = LinearService(token_s=TOKEN_S, capacity=roomy)
    trace = simulate(plan(), requests_of(arrival_s, tokens, np.ones(len(tokens), dtype=int)), service=service)
    check(trace)
    return trace


def waits(trace):
    return trace.columns["scheduled_s"] - trace.columns["arrival_s"]


def agree(samples, expected, level=0.999):
    """Assert that theory lies in the confidence interval of the runs' means, and that this is narrow enough to tell."""
    samples = np.array(samples)
    half = t.ppf((1 + level) / 2, len(samples) - 1) * samples.std(ddof=1) / math.sqrt(len(samples))
    assert half < 0.25 * expected
    assert abs(samples.mean() - expected) < half, (samples.mean(), expected, half)


def poisson(rate, n, rng):
    return np.cumsum(rng.exponential(1 / rate, n))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_exponential_server_waits_as_mm1(load):
    rngs = [np.random.default_rng(seed) for seed in range(SEEDS)]
    found = [waits(single(poisson(load, 12_000, r), r.exponential(1.0, 12_000)))[1000:].mean() for r in rngs]
    agree(found, load / (1 - load))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_steady_server_waits_as_md1(load):
    rngs = [np.random.default_rng(seed) for seed in range(SEEDS)]
    found = [waits(single(poisson(load, 12_000, r), np.ones(12_000)))[1000:].mean() for r in rngs]
    agree(found, load / (2 * (1 - load)))


def test_any_server_waits_as_pollaczek_and_khinchine_say():
    load = 0.7
    rngs = [np.random.default_rng(seed) for seed in range(SEEDS)]

    def service(rng, n):  # half as long, or three times: mean 1, second moment 2.2
        return np.where(rng.random(n) < 0.8, 0.5, 3.0)

    found = [waits(single(poisson(load, 15_000, r), service(r, 15_000)))[1500:].mean() for r in rngs]
    second = 0.8 * 0.25 + 0.2 * 9.0
    agree(found, load * second / (2 * (1 - load)))


def cpu_trace(arrival_s, pictures, *, servers=1, step_s=0.0, concurrency=0, by="request"):
    """Return the trace of CPU workers in front of a server; pictures are rows of their times on the CPU."""
    n, each = pictures.shape
    sizes, kind = np.unique(np.maximum(1, np.rint(pictures / PIXEL_S)).astype(int), return_inverse=True)
    media = tuple(Image(int(size), 1) for size in sizes)
    items = Items(np.arange(n + 1) * each, kind.reshape(-1), np.arange(n * each), np.zeros(n * each, dtype=int), media)
    service = LinearService(pixel_s=PIXEL_S, preprocess_workers=servers, step_base_s=step_s)
    requests = requests_of(arrival_s, np.ones(n, int), np.ones(n, int), items=items, concurrency=concurrency)
    trace = simulate(plan(max_batch=1, preprocess_by=by), requests, service=service)
    check(trace)
    return trace


def erlang_c(servers, offered):
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - offered / servers)
    return last / (sum(terms) + last)


@pytest.mark.slow
def test_several_servers_wait_as_mmc():
    servers, load = 3, 0.75
    found = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        trace = cpu_trace(poisson(servers * load, 12_000, rng), rng.exponential(1.0, (12_000, 1)), servers=servers)
        found.append(
            (trace.columns["queued_s"] - trace.columns["arrival_s"] - trace.columns["preprocess_s"])[1500:].mean()
        )
    agree(found, erlang_c(servers, servers * load) / (servers * (1 - load)))


def test_steady_tasks_fork_and_join_in_whole_rounds():
    trace = cpu_trace(np.arange(20) * 100.0, np.full((20, 7), 1.0), servers=3, by="item")
    took = trace.columns["queued_s"] - trace.columns["arrival_s"]
    assert took == pytest.approx(np.full(20, math.ceil(7 / 3)))


def test_two_exponential_queues_fork_and_join_as_nelson_and_tantawi_say():
    load, n, found = 0.6, 15_000, []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        clock, ends = Clock(), np.zeros(n)
        station = Station(clock, 2, lambda job, c=clock, e=ends: e.__setitem__(job, c.now), own_queues=True)
        arrival_s, tasks = poisson(load, n, rng), rng.exponential(1.0, (n, 2))
        for job in range(n):
            clock.at(arrival_s[job], lambda _, j=job, s=station, w=tasks: s.submit(j, w[j].tolist()), FIRST)
        clock.run()
        found.append((ends - arrival_s)[1500:].mean())
    agree(found, (12 - load) / 8 / (1 - load))


def test_what_is_known_ahead_is_what_happens():
    rng = np.random.default_rng(3)
    arrival_s, tasks = poisson(2.0, 500, rng), [rng.exponential(0.4, k).tolist() for k in rng.integers(1, 4, 500)]
    clock, ends = Clock(), [0.0] * 500
    station = Station(clock, 2, lambda job: ends.__setitem__(job, clock.now))
    for job in range(500):
        clock.at(float(arrival_s[job]), lambda _, j=job: station.submit(j, tasks[j]), FIRST)
    clock.run()
    done, order = ahead(arrival_s.tolist(), tasks, 2)
    assert done == ends
    assert [done[i] for i in order] == sorted(done)


@pytest.mark.slow
def test_cpu_and_worker_in_tandem_stay_as_burke_says():
    """Poisson in, Poisson out: the worker behind an exponential station waits as if it were alone (M/D/1)."""
    cpu_load, found, step_s = 0.6, [], 0.7
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        trace = cpu_trace(poisson(cpu_load, 12_000, rng), rng.exponential(1.0, (12_000, 1)), step_s=step_s)
        found.append((trace.columns["scheduled_s"] - trace.columns["queued_s"])[1000:].mean())
    rho = cpu_load * step_s
    agree(found, rho * step_s / (2 * (1 - rho)))


@pytest.mark.parametrize("users", [1, 2, 3, 8])
def test_a_closed_network_serves_what_its_slowest_station_can(users):
    n, cpu_s, step_s = 400, 0.5, 0.2
    trace = cpu_trace(np.zeros(n), np.full((n, 1), cpu_s), step_s=step_s, concurrency=users)
    expected = min(users / (cpu_s + step_s), 1 / max(cpu_s, step_s))
    assert n / trace.span_s == pytest.approx(expected, rel=0.01)


def test_little_holds_over_the_whole_run():
    rng = np.random.default_rng(5)
    trace = single(poisson(0.7, 5000, rng), rng.exponential(1.0, 5000))
    events = np.concatenate([trace.columns["arrival_s"], trace.columns["finish_s"]])
    steps = np.concatenate([np.ones(5000), -np.ones(5000)])
    order = np.argsort(events)
    inside = np.cumsum(steps[order])[:-1]
    mean_inside = (inside * np.diff(events[order])).sum() / trace.span_s
    assert mean_inside == pytest.approx(len(trace) / trace.span_s * trace.e2e_s.mean(), rel=1e-9)
