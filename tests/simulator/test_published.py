"""Published serving results: closed forms through injected service times, and the curve of vLLM on four A100s."""

import math

import numpy as np
import pytest

from costmodel import Image, load_engine
from simulator import Pool, ServingPlan, check, simulate
from simulator.request import Items, requests_of
from simulator.service import Capacity, LinearService
from simulator.topology import Link
from studies.validation import nvidia_ttft
from studies.validation.encoder_apart import EncoderApart, EncodesOnly, Instance, LoadsEmbeddings
from studies.validation.one_server import Lockstep, OneServer
from studies.validation.serving_curve import (
    OVERLOAD,
    THROUGHPUT,
    TPOT,
    TTFT,
    CurvePoint,
    goodput_rate,
    measured_points,
    plateau,
)
from studies.validation.vllm_epd import (
    IMAGES,
    LANGUAGE,
    MODEL,
    PICTURE,
    PREDICTIONS,
    PROMPTS,
    RANKS,
    TOPOLOGIES,
    dp4,
    drawn,
    fitted_engine,
    independent4,
    one_encoder,
    predict_curves,
    predict_run,
    traffic,
)

TOKENS = 100
ROOM = Capacity(kv_blocks=1 << 20, block_tokens=16, chunk_tokens=8192, max_sequences=1, encoder_tokens=8192)
ENCODE_S, WHOLE_S, SPLIT_S = 30.5e-3, 15.4e-3, 13e-3
"""vLLM pull request 41567, Qwen3.5-35B-A3B on GB200: one set of an encoder's time and the language model's on one and
two devices, derived from the three throughputs (the answers have two tokens)."""
USERS, BENCHMARK_REQUESTS = 96, 1000


def closed(service, n=BENCHMARK_REQUESTS):
    items = Items.same(n, 1, Image(280, 280))
    two = np.full(n, 2)
    requests = requests_of(np.zeros(n), np.ones(n, int), two, items=items, concurrency=USERS)
    trace = simulate(ServingPlan(model="any", pools=(Pool(hardware="any", max_batch=1),)), requests, service=service)
    check(trace)
    return trace


def linear(encode_s, language_s, cpu_s=0.0):
    """Return a worker that takes these times a request of one picture of TOKENS patches and an answer of two tokens."""
    return LinearService(step_base_s=language_s / 2, patch_s=encode_s / TOKENS, pixel_s=cpu_s / 280**2, capacity=ROOM)


@pytest.mark.parametrize(
    ("service", "published"),
    [
        (linear(ENCODE_S, WHOLE_S), 21.76),
        (linear(ENCODE_S, SPLIT_S), 22.96),
        (linear(0.0, WHOLE_S, cpu_s=ENCODE_S), 32.75),  # the encoder is a station of its own in front of the worker
    ],
    ids=["one device", "two devices share both", "an encoder apart"],
)
def test_a_closed_loop_of_96_users_reaches_the_published_throughput(service, published):
    trace = closed(service)
    throughput = BENCHMARK_REQUESTS / trace.span_s
    assert throughput == pytest.approx(published, rel=0.03)
    steady = slice(2 * USERS, -USERS)
    assert trace.e2e_s[steady].mean() == pytest.approx(USERS / throughput, rel=0.03)  # Little


@pytest.mark.parametrize("load", [1.3, 2.0, 3.0])
def test_overload_waits_as_the_drain_of_a_finite_queue(load):
    n, service_s = PROMPTS, 0.1
    rng = np.random.default_rng(7)
    arrival_s = np.cumsum(rng.exponential(service_s / load, n))
    items, one = Items.same(n, 1, Image(280, 280)), np.ones(n, int)
    trace = simulate(
        ServingPlan(model="any", pools=(Pool(hardware="any"),)),
        requests_of(arrival_s, one, one, items=items),
        service=LinearService(pixel_s=service_s / 280**2),
    )
    throughput, rate = n / trace.span_s, n / arrival_s[-1]
    expected = 0.99 * n * (1 / throughput - 1 / rate)
    assert np.percentile(trace.ttft_s, 99) == pytest.approx(expected, rel=0.03)


# Ranks that step together


RANK = LinearService(step_base_s=2e-3, token_s=1e-4, sequence_s=1e-4, key_s=1e-7, patch_s=1e-4, request_s=0.03)


def test_ranks_in_step_take_the_time_of_the_busiest():
    group = Lockstep(RANK, 1, 4)
    alone = RANK.step_s([(0, 500, None)], 1, 10, [1000.0])
    assert group.step_s([(0, 500, None)], 1, 40, [4000.0]) == pytest.approx(alone)
    assert group.step_s([(0, 500, None)] * 4, 4, 40, [4000.0]) == pytest.approx(alone)
    assert group.step_s([(0, 500, None)] * 5, 5, 40, [4000.0]) > alone
    assert group.step_s([(0, 500, None), (0, 20, None)], 2, 40, [4000.0]) == pytest.approx(alone)
    assert group.capacity.kv_blocks == 4 * RANK.capacity.kv_blocks


def test_pictures_of_a_request_stay_on_one_rank():
    cost, group = RANK.media(Image(280, 280), 2), Lockstep(RANK, 2, 4)
    assert group.encode_s([cost] * 2) == RANK.encode_s([cost] * 2)
    assert group.encode_s([cost] * 8) == RANK.encode_s([cost] * 2)
    assert group.encode_s([cost] * 10) == RANK.encode_s([cost] * 4)


@pytest.mark.parametrize("decoding", [1, 3, 4, 9, 128])
def test_leaps_of_ranks_in_step_are_their_steps(decoding):
    group = Lockstep(RANK, 1, 4)
    keys, growth = [700.0 * decoding], [float(decoding)]
    steps = [group.step_s((), 0, decoding, [keys[0] + i * growth[0]]) for i in range(5)]
    assert group.decode_steps_s(decoding, keys, growth, 5) == pytest.approx(steps)


def test_one_rank_in_step_is_a_worker_behind_a_server():
    assert Lockstep(RANK, 3, 1).capacity == RANK.capacity
    for service in (Lockstep(RANK, 3, 1), OneServer(RANK, 3)):
        assert service.step_s([(5, 60, None)], 1, 7, [90.0]) == pytest.approx(
            RANK.step_s([(5, 60, None)], 1, 7, [90.0])
        )
        cost = RANK.media(Image(280, 280), 3)
        assert 3 * service.preprocess_s(Image(280, 280), cost) == pytest.approx(RANK.request_s)
        assert service.request_s == 0.0
    with pytest.raises(ValueError, match="n_images=0 must be at least 1"):
        OneServer(RANK, 0)


# The curve of vLLM on four A100s


ENGINE = load_engine("vllm-0.11")


@pytest.mark.parametrize("n_images", IMAGES)
def test_plateaus_are_within_a_tenth(n_images):
    found = predict_run(dp4(n_images, ENGINE), traffic(400, n_images, 24.0))
    assert found[THROUGHPUT] == pytest.approx(plateau(measured_points(), n_images), rel=0.10)


def test_the_server_sets_the_plateau_and_not_the_devices():
    requests = traffic(400, 4, 24.0)
    together, apart = (predict_run(topology(4, ENGINE), requests) for topology in (dp4, independent4))
    assert together[THROUGHPUT] == pytest.approx(apart[THROUGHPUT], rel=0.05)
    assert together[TPOT] > 2 * apart[TPOT]  # everybody waits for whoever prefills
    faster = fitted_engine(request_s=18e-3, picture_s=9e-3, layer_s=ENGINE.layer_host_s["decode"])
    assert predict_run(dp4(4, faster), requests)[THROUGHPUT] > 1.3 * together[THROUGHPUT]


def test_tpot_of_the_curve_is_near_over_all_loads():
    points = [p for p in measured_points() if p.metric == TPOT and p.offered_rps % 4 == 0]
    deployments = {n: dp4(n, ENGINE) for n in IMAGES}
    missed = [
        math.log(predict_run(deployments[p.images], traffic(400, p.images, p.offered_rps))[TPOT] / p.value)
        for p in points
    ]
    assert len(points) > 10
    assert np.mean(np.abs(missed)) < 0.2


def test_predictions_are_those_of_the_engine_file():
    held = {}
    for line in PREDICTIONS.read_text(encoding="utf-8").splitlines()[1:]:
        text, images, topology, rate, metric, value = line.split(",")
        held[int(text), int(images), topology, float(rate), metric] = float(value)
    assert len(held) == 2 * 3 * 4 * 21 * 3
    for point in predict_curves(texts=(800,), images=(2,), rates=(6, 20)):
        assert held[(*point.run, point.metric)] == pytest.approx(point.value, rel=1e-4)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_longer_texts_never_finish_more(topology):
    curves = predict_curves({topology: TOPOLOGIES[topology]}, images=(4,), rates=(6, 24))
    by_text = {(p.text_tokens, p.offered_rps, p.metric): p.value for p in curves}
    for rate in (6, 24):
        for metric, sign in ((THROUGHPUT, -1), (TTFT, 1), (TPOT, 1)):
            values = [sign * by_text[text, rate, metric] for text in (400, 800, 2000)]
            assert values == sorted(values), (rate, metric)


def test_the_published_curve_is_what_the_plan_serves():
    points = measured_points()
    assert {p.topology for p in points} == {"DP4"}
    assert {p.text_tokens for p in points} == {400}
    assert all(isinstance(p, CurvePoint) and p.value > 0 for p in points)
    over = [p for p in points if p.metric == THROUGHPUT and p.offered_rps > OVERLOAD * p.value]
    assert {p.images for p in over} == set(IMAGES)
    assert dp4(1, ENGINE).plan.model == MODEL
    assert dp4(1, ENGINE).service.capacity.max_sequences == RANKS * 256


@pytest.mark.parametrize(("n_images", "rate"), [(1, 23), (4, 6)])
def test_goodput_of_the_published_curve_is_the_published_one(n_images, rate):
    points = [point for point in measured_points() if point.images == n_images]
    assert goodput_rate(points) == rate


# An encoder of its own


HERE = ServingPlan(model="any", pools=(Pool(hardware="any"),))
WHOLE = LinearService(step_base_s=2e-3, token_s=1e-4, key_s=1e-7, patch_s=2e-4, pixel_s=4e-7, request_s=0.01)
NO_SERVER = LinearService(step_base_s=2e-3, token_s=1e-4, key_s=1e-7)


def some_traffic(n_images, rate, n=300):
    arrival_s = np.cumsum(np.random.default_rng(5).exponential(1 / rate, n))
    items = Items.same(n, n_images, Image(280, 280))
    return requests_of(arrival_s, np.full(n, 50), np.full(n, 20), items=items)


def test_instances_one_by_one_are_the_cluster_without_a_second_server():
    requests = some_traffic(1, 30.0)
    coder = LinearService(patch_s=WHOLE.patch_s, pixel_s=WHOLE.pixel_s)
    apart = EncoderApart(
        Instance(HERE, EncodesOnly(coder, step_host_s=0.0, copy_s=0.0)),
        Instance(HERE, LoadsEmbeddings(NO_SERVER, 1, copy_s=0.0)),
        lambda n: np.arange(n) % 3,
    )
    pools = (
        Pool(name="e", stages=("preprocess", "encode"), hardware="any"),
        Pool(name="pd", stages=("prefill", "decode"), hardware="any", workers=3),
    )
    links = (Link.model_validate({"from": "e", "to": "pd", "bandwidth_bytes_per_s": 1e30}),)
    plan = ServingPlan(model="any", pools=pools, links=links)
    trace = simulate(plan, requests, service={"e": coder, "pd": NO_SERVER})
    check(trace)
    times = apart.served(requests)
    assert times.first_token_s == pytest.approx(trace.columns["first_token_s"])
    assert times.finish_s == pytest.approx(trace.columns["finish_s"])
    assert (trace.columns["first_token_s"] - trace.columns["arrival_s"]).max() > 0.2  # some had to wait


def test_a_request_alone_takes_what_stands_on_its_way():
    encodes = EncodesOnly(WHOLE, step_host_s=1e-3, copy_s=5e-3)
    loads = LoadsEmbeddings(WHOLE, 1, copy_s=3e-3)
    apart = EncoderApart(Instance(HERE, encodes), Instance(HERE, loads), lambda n: np.zeros(n, int))
    requests = some_traffic(1, 0.01, n=1)
    times = apart.served(requests)
    cost = WHOLE.media(Image(280, 280), 1)
    server_s = WHOLE.preprocess_s(Image(280, 280), cost) + WHOLE.request_s
    prompt_s = WHOLE.step_s([(0, 50 + TOKENS, None)], 1, 0, [0.0])
    expected = 2 * server_s + (1e-3 + WHOLE.encode_s([cost]) + 5e-3) + (3e-3 + prompt_s)
    assert times.first_token_s - times.arrival_s == pytest.approx(expected)


def test_the_encoder_saturates_at_its_own_time_a_picture():
    n_images, deployment = 4, one_encoder(4, ENGINE)
    cost = deployment.encoder.service.media(PICTURE, 1)
    picture_s = deployment.encoder.service.encode_s([cost])
    found = predict_run(deployment, traffic(400, n_images, 24.0))
    assert found[THROUGHPUT] == pytest.approx(1 / (n_images * picture_s), rel=0.05)
    slower = one_encoder(n_images, ENGINE, encoder_answers=False)
    assert predict_run(slower, traffic(400, n_images, 24.0))[THROUGHPUT] < 0.6 * found[THROUGHPUT]


def test_the_proxy_uses_all_instances_about_equally():
    counts = np.bincount(drawn(PROMPTS), minlength=LANGUAGE)
    assert len(counts) == LANGUAGE
    assert counts.min() > 0.8 * PROMPTS / LANGUAGE


def test_decode_is_steadier_where_nobody_encodes():
    requests = traffic(400, 3, 8.0)
    together, apart = (predict_run(topology(3, ENGINE), requests) for topology in (dp4, one_encoder))
    assert apart[TPOT] < 0.6 * together[TPOT]
    assert apart[THROUGHPUT] == pytest.approx(together[THROUGHPUT], rel=0.02)


def test_pictures_of_many_sizes_are_refused():
    requests = some_traffic(2, 1.0, n=2)
    items = Items(np.array([0, 1, 3]), np.zeros(3, int), np.arange(3), np.zeros(3, int), requests.media)
    mixed = requests_of(requests.arrival_s, requests.text_tokens, requests.output_tokens, items=items)
    apart = EncoderApart(
        Instance(HERE, EncodesOnly(WHOLE, step_host_s=0.0, copy_s=0.0)),
        Instance(HERE, LoadsEmbeddings(WHOLE, 1, copy_s=0.0)),
        lambda n: np.zeros(n, int),
    )
    with pytest.raises(ValueError, match="must be one size, in equal numbers"):
        apart.served(mixed)


# NVIDIA's attribution of TTFT


def test_parts_of_ttft_beside_nvidias():
    parts = nvidia_ttft.attribution(nvidia_ttft.served(4000), nvidia_ttft.alone())
    error = {part.name: part.error for part in parts}
    assert abs(error["ViT"]) < 0.10
    assert abs(error["executor queue, M/D/1"]) < 0.05
    assert abs(error["executor queue"]) < 0.15
    ours, _, theirs = nvidia_ttft.cpu_shares(parts)
    assert theirs == pytest.approx(0.73, abs=0.005)
    assert ours == pytest.approx(theirs, abs=0.05)
