"""Traffic: rates and burstiness as asked for, presets, conversations, traces of others."""

import json

import numpy as np
import pytest

from costmodel import Image
from simulator import Pool, ServingPlan, check, simulate, traffic
from simulator.request import Items, requests_of
from simulator.resolve import resolve
from simulator.service import LinearService
from simulator.traffic.arrivals import PROCESSES, arrival_times

SERVICE = LinearService(step_base_s=5e-3, token_s=1e-5, sequence_s=1e-5, patch_s=1e-6)
PLAN = ServingPlan(model="any", pools=(Pool(hardware="any"),))


def draw(text, rate=4.0, n=60_000, seed=0):
    return arrival_times(text, rate, n, np.random.default_rng(seed))


@pytest.mark.parametrize("name", [name for name in PROCESSES if name != "burst"])
def test_every_process_has_the_rate_that_is_asked_for(name):
    parameters = {"on-off": ":on=2,off=3", "diurnal": ":amplitude=0.8,period=500"}.get(name, "")
    times = draw(name + parameters)
    assert (np.diff(times) >= 0).all()
    assert len(times) / times[-1] == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["gamma", "weibull"])
def test_gaps_have_the_variation_that_is_asked_for(name, cv):
    gaps = np.diff(draw(f"{name}:cv={cv}"))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_on_off_is_silent_for_its_share_of_time():
    times = draw("on-off:on=5,off=15", rate=20.0)
    assert (np.histogram(times, bins=np.arange(0, times[-1], 0.5))[0] == 0).mean() == pytest.approx(0.75, abs=0.06)


def test_a_day_has_its_peak_in_its_first_half():
    times = draw("diurnal:amplitude=0.9,period=1000", n=40_000)
    first = (times % 1000 < 500).mean()
    assert first == pytest.approx(0.5 + 0.9 / np.pi, abs=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama", "did you mean 'gamma'"),
        ("gamma:cv=-1", "must be a positive number"),
        ("gamma:shape=2", "no parameter of gamma; known: cv"),
        ("poisson:cv", "must read key=number"),
        ("diurnal:amplitude=2", "must be 1 or less"),
    ],
)
def test_wrong_arrivals_are_refused_in_one_line(text, message):
    with pytest.raises((LookupError, ValueError), match=message):
        draw(text)


@pytest.mark.parametrize("name", traffic.preset_names())
def test_every_preset_runs_and_keeps_the_laws(name):
    requests = traffic.preset(name, 2.0, 64, 3)
    again = traffic.preset(name, 2.0, 64, 3)
    assert requests.arrival_s.tobytes() == again.arrival_s.tobytes()
    assert requests.text_tokens.tobytes() == again.text_tokens.tobytes()
    trace = simulate(PLAN, requests, service=SERVICE)
    check(trace)
    assert trace.finished.all()


def test_the_mean_text_preset_is_as_its_name_says():
    requests = traffic.preset("text-500-200", 1.0, 50_000, 0)
    assert requests.text_tokens.mean() == pytest.approx(500, rel=0.02)
    assert requests.output_tokens.mean() == pytest.approx(200, rel=0.02)


def test_servegen_has_the_published_pictures_and_lengths():
    requests = traffic.preset("servegen-mm-image", 1.0, 100_000, 0)
    tokens = np.array([item.width * item.height / 784 for item in requests.media])[requests.item_kind]
    assert (requests.n_items == 1).mean() == pytest.approx(0.798, abs=0.01)
    published = (
        (requests.n_items, 1.59, {95: 4, 99: 9, 99.9: 40}),
        (tokens, 650, {10: 6, 25: 234, 50: 540, 75: 1196, 90: 1224, 99: 1271}),
        (requests.text_tokens, 572, {50: 106, 75: 1032, 90: 1914, 99: 3064}),
        (requests.output_tokens, 130, {50: 100, 90: 264, 99: 587, 99.9: 2000}),
    )
    for column, mean, points in published:
        assert column.mean() == pytest.approx(mean, rel=0.02)
        for share, value in points.items():
            assert np.percentile(column, share) == pytest.approx(value, rel=0.03), (mean, share)


def test_conversations_begin_as_the_arrivals_say():
    requests = traffic.preset("text-chat", 5.0, 50_000, 0)
    gaps = np.diff(requests.arrival_s[requests.after < 0])
    assert gaps.mean() == pytest.approx(1.0, rel=0.02)  # five turns each: one conversation a second
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.03)


def test_azure_has_the_published_quantiles():
    requests = traffic.preset("azure-lmm", 1.0, 50_000, 0)
    with_pictures = requests.n_items > 0
    assert (requests.n_items[with_pictures] == 1).mean() == pytest.approx(0.66 / 0.876, abs=0.01)
    assert np.median(requests.output_tokens[with_pictures]) == pytest.approx(79, rel=0.05)
    assert np.median(requests.text_tokens[~with_pictures]) == pytest.approx(776, rel=0.05)


def test_turns_of_a_chat_follow_each_other_and_reuse_what_was_said():
    trace = simulate(PLAN, traffic.preset("text-chat", 1.0, 500, 0), service=SERVICE)
    check(trace)
    later = trace.requests.after >= 0
    assert later.mean() == pytest.approx(0.8)
    cached = trace.columns["cached_tokens"] / trace.prompt_tokens
    assert cached[later].mean() > 0.8
    assert (trace.columns["arrival_s"][later] > trace.columns["finish_s"][trace.requests.after[later]]).all()


def test_pictures_of_a_sliding_window_come_again():
    requests = traffic.preset("sliding-window-chat", 1.0, 80, 0)
    resolved = resolve(requests, SERVICE)
    assert resolved.item_content[: 1 + 2] == [0, 0, 1]
    assert requests.n_items[:8].tolist() == [1, 2, 3, 4, 5, 5, 5, 5]
    trace = simulate(PLAN, requests, service=SERVICE)
    cached = trace.columns["cached_tokens"][:8]
    assert (cached[1:5] > cached[5:].max()).all()  # a window that moves on keeps the system prompt alone


def test_a_stream_of_video_computes_every_piece_once():
    requests = traffic.preset("streaming-video", 0.1, 120, 0)
    trace = simulate(PLAN, requests, service=SERVICE)
    check(trace)
    assert trace.encoder_misses == len(requests)
    assert trace.steps[0]["chunk_tokens"].sum() < 0.3 * trace.prompt_tokens.sum()


def test_a_closed_loop_never_has_more_in_the_system():
    trace = simulate(PLAN, traffic.preset("text-500-200", None, 200, 0, concurrency=7), service=SERVICE)
    check(trace)
    begin, end = trace.columns["arrival_s"], trace.columns["finish_s"]
    inside = [((begin <= time) & (end > time)).sum() for time in begin]
    assert max(inside) == 7


def test_users_of_a_closed_loop_may_hold_conversations():
    requests = traffic.preset("text-chat", None, 50, 0, concurrency=3)
    later = requests.after >= 0
    assert requests.concurrency == 3
    assert (requests.arrival_s[~later] == 0).all()
    assert (requests.arrival_s[later] > 0).all()  # a user still thinks between the turns
    assert (requests.priority == 0).all()
    assert np.isinf(requests.patience_s).all()


# Files


def test_what_is_no_trace_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is in no known format"):
        traffic.read(path)
    with pytest.raises(FileNotFoundError, match="no trace"):
        traffic.read(tmp_path / "missing")


@pytest.mark.parametrize("name", ["mooncake/conversation_trace.jsonl", "azure/AzureLLMInferenceTrace_code.csv"])
def test_real_traces_run(shared_data, name):
    trace = simulate(PLAN, traffic.read(shared_data / "data/traces" / name, n=400), service=SERVICE)
    check(trace)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"arrival": [1.0, 0.0]}, "must not decrease"),
        ({"text": [0, 5]}, "text_tokens must be at least 1"),
        ({"parent": [1, -1]}, "must name an earlier request"),
        ({"output": [5, 0]}, "output_tokens must be at least 1"),
        ({"max_output_tokens": [4, 5]}, "must be output_tokens or more"),
        ({"priority": [0, -1]}, "priority must be 0"),
        ({"patience_s": [0.0, 1.0]}, "patience_s must be positive"),
        ({"patience_s": [np.nan, 1.0]}, "patience_s must be positive"),
        ({"patience_s": [1.0]}, "patience_s has 1 rows"),
        (
            {"items": Items(np.array([0, 1, 1]), np.zeros(1, int), np.zeros(1, int), np.array([9]), (Image(28, 28),))},
            "rise",
        ),
    ],
)
def test_columns_that_no_traffic_has_are_refused(columns, message):
    given = {"arrival": [0.0, 1.0], "text": [5, 5], "output": [5, 5], **columns}
    arrays = {key: value if key == "items" else np.array(value) for key, value in given.items()}
    arrival, text, output = (arrays.pop(key) for key in ("arrival", "text", "output"))
    with pytest.raises(ValueError, match=message):
        requests_of(arrival, text, output, items=arrays.pop("items", None), links=arrays)
