"""Queueing theory on clusters: tandems, forks and joins, several servers, closed networks, shared wires."""

import math

import numpy as np
import pytest

from costmodel import Image
from simulator.clock import FIRST, Clock
from simulator.cpu import ahead
from simulator.request import Items
from simulator.transfer import Wire
from tests.simulator.clusters import asked, cluster, pictures, pool, serve, service
from tests.simulator.test_theory import SEEDS, agree, erlang_c, poisson

PATCH_S = 1e-3
"""A visual token in the encoder: pictures of a thousand and more make its times."""
STEP_S = 0.7
N = 4000
"""Requests of a run."""
HUGE = {"encoder_tokens": 1 << 40, "chunk_tokens": 1 << 40, "kv_blocks": 1 << 40, "max_sequences": 1}


def pictures_of(encode_s):
    """Return pictures that an encoder takes so long for; rows are requests [s]."""
    n, each = encode_s.shape
    tokens = np.maximum(1, np.rint(encode_s / PATCH_S)).astype(int)
    sizes, kind = np.unique(tokens, return_inverse=True)
    media = tuple(Image(int(size), 1) for size in sizes)
    return Items(np.arange(n + 1) * each, kind.reshape(-1), np.arange(n * each), np.zeros(n * each, dtype=int), media)


def encoded_apart(arrival_s, encode_s, *, encoders=1, step_s=0.0, concurrency=0, fronts=1, **policies):
    """Return the trace of encoders, one picture at a time, in front of a pool with one prompt at a time."""
    n = len(encode_s)
    requests = asked([1] * n, [1] * n, arrival_s, items=pictures_of(encode_s), concurrency=concurrency)
    pools = pool("preprocess+encode", workers=encoders, encode_items=1), pool("prefill+decode", workers=fronts)
    plan = cluster(*pools, policies={"encode_router": "least-requests", "router": "least-requests", **policies})
    return serve(plan, requests, service(step_base_s=step_s, patch_s=PATCH_S, **HUGE))


def wait_to_encode(trace):
    """Return how long each request waited for an encoder, where each has one picture [s]."""
    work = np.array([trace.requests.media[kind].width for kind in trace.requests.item_kind]) * PATCH_S
    return trace.columns["encoded_s"] - trace.columns["arrival_s"] - work


# Open networks


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_an_encoder_of_steady_pictures_waits_as_md1(load):
    """And steady prompts behind it, which are no longer than its pictures, never wait: it lets them through in turn."""
    found = []
    for seed in range(SEEDS):
        arrival_s = poisson(load, N, np.random.default_rng(seed))
        trace = encoded_apart(arrival_s, np.ones((N, 1)), step_s=STEP_S)
        found.append(wait_to_encode(trace)[N // 10 :].mean())
        assert trace.columns["scheduled_s"] == pytest.approx(trace.columns["encoded_s"])
    agree(found, load / (2 * (1 - load)))


def test_an_exponential_encoder_and_prefill_behind_it_stay_as_burke_says():
    """Poisson in, Poisson out: the encoder waits as M/M/1, and prefill as if it were alone (M/D/1)."""
    load, encoders, prompts = 0.6, [], []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        arrival_s = poisson(load, N, rng)
        trace = encoded_apart(arrival_s, rng.exponential(1.0, (N, 1)), step_s=STEP_S)
        encoders.append(wait_to_encode(trace)[N // 10 :].mean())
        prompts.append((trace.columns["scheduled_s"] - trace.columns["queued_s"])[N // 10 :].mean())
    rho = load * STEP_S
    agree(encoders, load / (1 - load))
    agree(prompts, rho * STEP_S / (2 * (1 - rho)))


def test_prefill_and_decode_apart_are_a_tandem():
    """One decoding step of one sequence at a time, shorter than prefill: nobody waits there."""
    n, found = N, []
    for seed in range(SEEDS):
        requests = asked([1] * n, [2] * n, poisson(0.7, n, np.random.default_rng(seed)))
        plan = cluster(pool("prefill"), pool("decode"))
        trace = serve(plan, requests, service(token_s=1.0, sequence_s=STEP_S, **HUGE))
        found.append((trace.columns["scheduled_s"] - trace.columns["arrival_s"])[N // 10 :].mean())
        assert trace.columns["joined_s"] == pytest.approx(trace.columns["first_token_s"])
        assert trace.columns["finish_s"] - trace.columns["joined_s"] == pytest.approx(np.full(n, STEP_S))
    agree(found, 0.7 / (2 * (1 - 0.7)))


def test_encoders_that_are_chosen_at_random_are_queues_of_their_own():
    """A hash splits a Poisson stream into Poisson streams: three M/M/1 queues, not one M/M/3."""
    encoders, load, found = 3, 0.6, []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        arrival_s = poisson(encoders * load, N, rng)
        trace = encoded_apart(arrival_s, rng.exponential(1.0, (N, 1)), encoders=encoders, encode_router="affinity")
        shares = np.array([steps["encoded_items"].sum() for steps in trace.steps[:encoders]]) / N
        assert shares == pytest.approx(np.full(encoders, 1 / encoders), abs=0.12)
        loads = shares * encoders * load
        expected = (shares * loads / (1 - loads)).sum()
        found.append(wait_to_encode(trace)[N // 10 :].mean() / expected)
    agree(found, 1.0)


def test_the_shortest_queue_lies_between_one_queue_and_random_ones():
    encoders, load = 3, 0.8
    rng = np.random.default_rng(0)
    arrival_s, work = poisson(encoders * load, N, rng), rng.exponential(1.0, (N, 1))
    waits = {
        name: wait_to_encode(encoded_apart(arrival_s, work, encoders=encoders, encode_router=name))[N // 10 :].mean()
        for name in ("affinity", "power-of-two", "least-requests", "least-image-tokens")
    }
    done, _ = ahead(arrival_s.tolist(), work.tolist(), encoders)
    one_queue = (np.array(done) - arrival_s - work[:, 0])[N // 10 :].mean()
    assert one_queue < waits["least-image-tokens"] < waits["least-requests"] < waits["affinity"]
    assert one_queue < waits["power-of-two"] < waits["affinity"]


def test_a_batch_is_as_many_servers_with_one_queue():
    """Sequences that decode without slowing each other down, whose answers are exponential: M/M/c in time."""
    servers, load, token_s = 3, 0.7, 0.01
    found = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        n = N
        output = 2 + rng.geometric(token_s, n)
        requests = asked([1] * n, output, poisson(servers * load, n, rng))
        plan = cluster(pool("preprocess+encode+prefill+decode", max_batch=servers))
        trace = serve(plan, requests, service(step_base_s=token_s, **{**HUGE, "max_sequences": servers}))
        mean = (output * token_s).mean()
        offered = n / trace.columns["arrival_s"][-1] * mean
        expected = erlang_c(servers, offered) * mean / (servers - offered)
        found.append((trace.columns["scheduled_s"] - trace.columns["arrival_s"])[N // 10 :].mean() / expected)
    agree(found, 1.0)


# Forks and joins


@pytest.mark.parametrize("encoders", [1, 2, 3, 6])
@pytest.mark.parametrize("n", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("router", ["round-robin", "least-requests", "least-image-tokens"])
def test_equal_pictures_of_a_request_take_whole_rounds(encoders, n, router):
    """ceil(n / E) e, and the prompt behind: what EPDServe measures of its split over images."""
    trace = encoded_apart([0.0], np.ones((1, n)), encoders=encoders, step_s=STEP_S, encode_router=router)
    assert trace.columns["encoded_s"][0] == pytest.approx(math.ceil(n / encoders))
    assert trace.ttft_s[0] == pytest.approx(math.ceil(n / encoders) + STEP_S)


EPD_IMAGES = (2, 4, 6, 8)
EPD_SPLIT_S, EPD_WHOLE_S = (0.92, 1.02, 1.14, 1.74), (1.46, 2.47, 3.37, 4.27)
"""TTFT with the split over images and without (EPDServe, arXiv:2501.05460, table 4, MiniCPM-V 2.6)."""
EPD_IMAGE_S, EPD_BASE_S, EPD_PREFILL_S = 0.440, 0.450, 0.045
"""A 4K image in the encoder, a request, and an image in prefill: one fit of all eight numbers within 7 %."""


@pytest.mark.parametrize(("encoders", "published"), [(6, EPD_SPLIT_S), (1, EPD_WHOLE_S)])
def test_the_published_split_over_images_is_rounds_of_encoders(encoders, published):
    for n, expected_s in zip(EPD_IMAGES, published, strict=True):
        tokens = 1000
        items = pictures([n], [tokens] * n)
        times = service(step_base_s=EPD_BASE_S, token_s=EPD_PREFILL_S / tokens, patch_s=EPD_IMAGE_S / tokens, **HUGE)
        plan = cluster(pool("preprocess+encode", workers=encoders, encode_items=1), pool("prefill+decode"))
        found_s = serve(plan, asked([1], [10], items=items), times).ttft_s[0]
        assert found_s == pytest.approx(expected_s, rel=0.07)


@pytest.mark.slow
def test_two_exponential_encoders_fork_and_join_as_nelson_and_tantawi_say():
    """Two pictures each, one for every encoder: (12 - rho) / 8 times the time in one queue."""
    load, n, found = 0.6, N, []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        trace = encoded_apart(
            poisson(load, n, rng), rng.exponential(1.0, (n, 2)), encoders=2, encode_router="round-robin"
        )
        found.append((trace.columns["encoded_s"] - trace.columns["arrival_s"])[N // 10 :].mean())
    agree(found, (12 - load) / 8 / (1 - load))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_prefill_of_one_picture_overlaps_with_the_encoding_of_the_next(n):
    """Items are a pipeline of two stages: n e + l where each stage is a step, not n (e + l) (RServe)."""
    encode_s, tokens, token_s = 1.0, 1000, 4e-4
    plans = [
        cluster(pool("preprocess+encode", encode_items=1), pool("prefill+decode"), release=release)
        for release in ("item", "request")
    ]
    requests = asked([n], [1], items=pictures([n], [tokens] * n, before=list(range(n))))
    times = service(token_s=token_s, patch_s=encode_s / tokens, **HUGE)
    overlapped, waited = (serve(plan, requests, times).ttft_s[0] for plan in plans)
    prefill_s = tokens * token_s
    text_s = token_s * n
    assert waited == pytest.approx(n * (encode_s + prefill_s) + text_s)
    assert overlapped == pytest.approx(n * encode_s + prefill_s + token_s, abs=2 * text_s)


# Closed networks


def throughput(users, demands):
    """Return the throughput of exponential stations by mean value analysis [1/s]."""
    queues, rate = [0.0] * len(demands), 0.0
    for n in range(1, users + 1):
        times = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        rate = n / sum(times)
        queues = [rate * time_s for time_s in times]
    return rate


@pytest.mark.parametrize("users", [1, 2, 4, 8])
def test_a_closed_network_of_encoder_and_prefill_has_the_throughput_of_mean_value_analysis(users):
    """Exponential pictures and prompts; a picture is next to nothing in a prompt."""
    n, encode_s, prefill_s, token_s, found = 2000, 0.5, 0.8, 1e-5, []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        text = np.maximum(1, np.rint(rng.exponential(prefill_s, n) / token_s)).astype(int)
        items = pictures_of(rng.exponential(encode_s, (n, 1)))
        requests = asked(text, [1] * n, np.zeros(n), items=items, concurrency=users)
        plan = cluster(pool("preprocess+encode", encode_items=1), pool("prefill+decode"))
        times = service(token_s=token_s, patch_s=PATCH_S, **HUGE)
        trace = serve(plan, requests, times)
        picture_tokens = np.array([trace.requests.media[kind].width for kind in trace.requests.item_kind])
        demands = (picture_tokens.mean() * PATCH_S, (picture_tokens + text).mean() * token_s)
        found.append(n / trace.span_s / throughput(users, demands))
    agree(found, 1.0)


@pytest.mark.parametrize("users", [1, 2, 3, 8])
def test_a_closed_network_of_steady_pools_serves_what_its_slowest_can(users):
    n, encode_s, step_s, encoders = 400, 0.9, 0.5, 2
    trace = encoded_apart(np.zeros(n), np.full((n, 1), encode_s), encoders=encoders, step_s=step_s, concurrency=users)
    assert n / trace.span_s == pytest.approx(
        min(users / (encode_s + step_s), encoders / encode_s, 1 / step_s), rel=0.01
    )


# Little, pool by pool


def mean_inside(begin, end):
    """Return the mean number inside between the first beginning and the last end, counted at every event."""
    events = np.concatenate([begin, end])
    order = np.argsort(events, kind="stable")
    inside = np.cumsum(np.repeat([1, -1], len(begin))[order])[:-1]
    return (inside * np.diff(events[order])).sum() / (end.max() - begin.min())


def test_little_holds_in_every_pool_and_on_every_link():
    n = 3000
    rng = np.random.default_rng(0)
    requests = asked(
        rng.integers(1, 400, n),
        rng.integers(2, 20, n),
        poisson(3.0, n, rng),
        items=pictures_of(rng.exponential(0.3, (n, 1))),
    )
    pools = pool("preprocess+encode", workers=2), pool("prefill"), pool("decode", workers=2)
    times = service(step_base_s=0.01, token_s=1e-4, patch_s=PATCH_S)
    trace = serve(cluster(*pools, bandwidth_bytes_per_s=4000.0, latency_s=1e-3), requests, times)
    columns = trace.columns
    stays = {
        "encode and send": ("arrival_s", "encoded_s"),
        "prefill": ("queued_s", "first_token_s"),
        "KV": ("first_token_s", "joined_s"),
        "decode": ("joined_s", "finish_s"),
        "all": ("arrival_s", "finish_s"),
    }
    for begin, end in stays.values():
        span = columns[end].max() - columns[begin].min()
        stay = (columns[end] - columns[begin]).mean()
        assert mean_inside(columns[begin], columns[end]) == pytest.approx(n / span * stay, rel=1e-9)
    running = sum((steps["running"] * (steps["end_s"] - steps["start_s"])).sum() for steps in trace.steps[3:])
    assert running == pytest.approx((columns["finish_s"] - columns["joined_s"]).sum())  # the same of the steps' log
    sent = sum(link.sent_bytes for link in trace.links if link.source == "prefill")
    assert sent == trace.prompt_tokens.sum()


def test_a_wire_is_as_busy_as_its_load():
    """Utilisation law: bytes over the rate, however the transfers overlap."""
    n = 2000
    rng = np.random.default_rng(0)
    requests = asked(rng.integers(1, 400, n), [2] * n, poisson(3.0, n, rng))
    trace = serve(
        cluster(pool("prefill"), pool("decode"), bandwidth_bytes_per_s=1000.0), requests, service(step_base_s=0.01)
    )
    assert trace.links[0].busy_s == pytest.approx(trace.links[0].sent_bytes / 1000.0)


# Wires


@pytest.mark.parametrize("law", ["steady", "exponential", "two sizes"])
def test_a_shared_wire_stays_as_processor_sharing_says_whatever_the_sizes(law):
    """M/G/1 processor sharing: the time to land is that of the mean size over 1 - rho, whatever the sizes."""
    load, n, found = 0.7, 2 * N, []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        sizes = {
            "steady": lambda _: np.ones(n),
            "exponential": lambda r: r.exponential(1.0, n),
            "two sizes": lambda r: np.where(r.random(n) < 0.8, 0.5, 3.0),
        }[law](rng)
        clock, ends = Clock(), np.zeros(n)
        wire = Wire(clock, 1.0)
        arrival_s = poisson(load, n, rng)
        for k in range(n):
            clock.at(
                float(arrival_s[k]),
                lambda _, k=k, w=wire, s=sizes, e=ends, c=clock: w.send(k, s[k], lambda: e.__setitem__(k, c.now)),
                FIRST,
            )
        clock.run()
        assert not list(wire.audit())
        found.append((ends - arrival_s)[N // 10 :].mean())
    agree(found, 1 / (1 - load))


@pytest.mark.slow
def test_embeddings_on_the_wire_of_a_pool_share_it_as_processor_sharing_says():
    """Encoders that take no time send pictures of one size at random times."""
    load, n, found = 0.6, N, []
    for seed in range(SEEDS):
        arrival_s = poisson(load, n, np.random.default_rng(seed))
        requests = asked([1] * n, [1] * n, arrival_s, items=pictures([1] * n, [1000] * n))
        plan = cluster(pool("preprocess+encode"), pool("prefill+decode"), bandwidth_bytes_per_s=1000.0, per="pool")
        trace = serve(plan, requests, service(**HUGE))
        found.append((trace.columns["encoded_s"] - arrival_s)[N // 10 :].mean())
    agree(found, 1 / (1 - load))
