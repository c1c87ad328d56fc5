"""Clusters by hand: equal topologies, the order of what happens to one request, back-pressure, and who leaves when."""

import numpy as np
import pytest

from costmodel.units import CHANNELS, PIXEL_BYTES
from simulator.request import State
from simulator.trace import same
from tests.simulator.clusters import FAST, asked, cluster, pictures, pool, run, serve, service

LM = {"workers": 2, "max_batch": 8}
"""The pool of the language model that all topologies below share."""
ALIKE = (
    ("preprocess+encode+prefill+decode",),
    ("preprocess+prefill+decode", "encode"),
    ("prefill+decode", "preprocess+encode"),
    ("prefill+decode", "encode", "preprocess"),
    ("encode+prefill+decode", "preprocess"),
)
STEP_S = 0.1


def poisson(n, seed, rate=20.0):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / rate, n)), rng


def alike(shape):
    return [pool(stages, **(LM if "prefill" in stages else {})) for stages in shape]


def equal_columns(one, other, names):
    return [name for name in names if one.columns[name].tobytes() != other.columns[name].tobytes()]


# Equal topologies


@pytest.mark.parametrize("shape", ALIKE[1:], ids=" | ".join)
@pytest.mark.parametrize("router", ["round-robin", "least-tokens", "power-of-two", "prefix-aware"])
def test_without_pictures_all_topologies_with_the_same_language_model_pool_are_one(shape, router):
    arrival_s, rng = poisson(200, 1)
    parent = np.array([rng.integers(-1, i) if i else -1 for i in range(200)])
    text = rng.integers(40, 600, 200)
    shared = np.minimum(40, text)
    requests = asked(text, rng.integers(1, 60, 200), arrival_s, parent=parent, shared_text_tokens=shared)
    times = service(step_base_s=0.01, token_s=1e-4, key_s=1e-7, kv_blocks=1500, chunk_tokens=300)
    one, other = (
        serve(cluster(*alike(stages), policies={"router": router}), requests, times) for stages in (ALIKE[0], shape)
    )
    assert not equal_columns(one, other, one.columns)
    assert one.columns["preemptions"].any()


@pytest.mark.parametrize("shape", ALIKE[1:], ids=" | ".join)
def test_with_an_encoder_that_takes_no_time_pictures_are_text_wherever_they_are_encoded(shape):
    arrival_s, rng = poisson(100, 2)
    counts = rng.integers(0, 4, 100)
    items = pictures(counts, rng.choice([20, 150], counts.sum()))
    requests = asked(rng.integers(1, 300, 100), rng.integers(1, 60, 100), arrival_s, items=items)
    times = service(step_base_s=0.01, token_s=1e-4, chunk_tokens=200)
    one, other = (serve(cluster(*alike(stages)), requests, times) for stages in (ALIKE[0], shape))
    names = [name for name in one.columns if name != "encoded_s"]
    assert not equal_columns(one, other, names)


def test_answers_of_one_token_never_see_the_pool_that_decodes():
    arrival_s, rng = poisson(100, 3)
    requests = asked(rng.integers(1, 900, 100), np.ones(100, int), arrival_s)
    times = service(step_base_s=0.01, token_s=1e-4, chunk_tokens=300)
    one = serve(cluster(pool("preprocess+encode+prefill+decode", **LM)), requests, times)
    apart = serve(cluster(pool("preprocess+encode+prefill", **LM), pool("decode"), mode="reserve"), requests, times)
    same_but = [name for name in one.columns if name != "decode_worker"]  # its room was taken, and given back
    assert not equal_columns(one, apart, same_but)
    assert not len(apart.steps[-1]["start_s"])
    assert not apart.links or not apart.links[0].sent_bytes


@pytest.mark.parametrize("mode", ["push", "pull", "reserve"])
def test_apart_prefill_ends_sooner_and_every_token_and_byte_is_there(mode):
    arrival_s, rng = poisson(100, 4)
    requests = asked(rng.integers(1, 900, 100), rng.integers(2, 40, 100), arrival_s)
    times = service(step_base_s=0.01, token_s=1e-4, sequence_s=1e-3, chunk_tokens=300)
    one = serve(cluster(pool("preprocess+encode+prefill+decode")), requests, times)
    apart = serve(cluster(pool("preprocess+encode+prefill"), pool("decode"), mode=mode), requests, times)
    assert apart.ttft_s.mean() < one.ttft_s.mean()
    assert apart.links[0].sent_bytes == apart.prompt_tokens.sum()
    assert sum(steps["chunk_tokens"].sum() for steps in apart.steps) == apart.prompt_tokens.sum()
    assert (
        sum((steps["decoding"] * steps["steps"]).sum() for steps in apart.steps) == requests.output_tokens.sum() - 100
    )
    assert (apart.columns["decode_worker"] == 1).all()


# One request, worked out by hand


def one_request(*stages, output=2, kv_layers=4, text=10, **wires):
    """Return the trace of 10 text tokens in front of two pictures of 20 and 30, encoded at 0.1 s a token."""
    items = pictures([2], [20, 30], before=[4, 10])
    pools = [pool(name, **({"encode_items": 1} if "encode" in name else {})) for name in stages]
    times = service(step_base_s=STEP_S, token_s=0.01, patch_s=0.1, kv_layers=kv_layers)
    return serve(cluster(*pools, wires=wires.pop("wires", None), **wires), asked([text], [output], items=items), times)


def test_prefill_waits_for_all_embeddings_where_a_link_releases_requests():
    trace = one_request("preprocess+encode", "prefill+decode", bandwidth_bytes_per_s=10.0, latency_s=0.5)
    # encoded at 2 and 5 s; only then is there a receiver: 20 and 30 bytes share the wire
    assert trace.columns["encoded_s"][0] == pytest.approx(5.0 + 5.0 + 0.5)
    assert trace.ttft_s[0] == pytest.approx(10.5 + STEP_S + 60 * 0.01)


def test_reserving_the_receiver_sends_each_item_when_it_is_encoded():
    trace = one_request("preprocess+encode", "prefill+decode", bandwidth_bytes_per_s=10.0, mode="reserve")
    assert trace.columns["encoded_s"][0] == pytest.approx(5.0 + 3.0)  # the first left from 2 to 4 s
    assert trace.columns["queued_s"][0] == trace.columns["encoded_s"][0]


@pytest.mark.parametrize("mode", ["push", "reserve", "pull"])
def test_chunks_go_as_far_as_items_have_landed_where_a_link_releases_items(mode):
    """4 text tokens at once; the first picture and 6 more at 4 s; the second at 8 s."""
    how = {"bandwidth_bytes_per_s": 10.0, "mode": mode, "release": "item"}
    trace = one_request("preprocess+encode", "prefill+decode", **how)
    steps = trace.steps[1]
    assert steps["chunk_tokens"][:3].tolist() == [4, 26, 30]
    assert steps["start_s"][:3] == pytest.approx([0.0, 4.0, 8.0])
    assert trace.columns["scheduled_s"][0] == 0.0
    assert trace.ttft_s[0] == pytest.approx(8.0 + STEP_S + 30 * 0.01)


def test_pixels_go_first_where_another_pool_preprocesses():
    pixels = 50.0 * CHANNELS * PIXEL_BYTES
    wires = {("preprocess", "encode"): {"bandwidth_bytes_per_s": pixels, "latency_s": 0.25}}
    trace = one_request("preprocess", "encode", "prefill+decode", wires=wires)
    sent = {link.source: link.sent_bytes for link in trace.links}
    assert sent == {"preprocess": pixels, "encode": 50.0}
    assert trace.columns["encoded_s"][0] == pytest.approx(1.25 + 5.0)


@pytest.mark.parametrize("mode", ["push", "pull", "reserve"])
def test_kv_leaves_when_the_prompt_is_computed(mode):
    trace = one_request("preprocess+encode+prefill", "decode", bandwidth_bytes_per_s=30.0, latency_s=0.5, mode=mode)
    first = 5.0 + STEP_S + 60 * 0.01
    assert trace.columns["first_token_s"][0] == pytest.approx(first)
    assert trace.columns["joined_s"][0] == pytest.approx(first + 2.0 + 0.5)
    assert trace.columns["finish_s"][0] == pytest.approx(first + 2.5 + STEP_S)
    assert trace.itl[0].tolist() == pytest.approx([2.5 + STEP_S])  # the client waits for the transfer


def test_kv_leaves_layer_by_layer_while_prefill_runs():
    """Three quarters of 60 bytes go from the start of a step of 0.7 s that also waits 5 s for its encoder."""
    how = {"bandwidth_bytes_per_s": 30.0, "mode": "reserve", "layerwise": True}
    trace = one_request("preprocess+encode+prefill", "decode", **how)
    first = 5.0 + STEP_S + 60 * 0.01
    assert trace.columns["joined_s"][0] == pytest.approx(first + 15 / 30.0)
    assert trace.links[0].sent_bytes == pytest.approx(60.0)
    assert trace.links[0].busy_s == pytest.approx(2.0)


def test_three_pools_add_up():
    trace = one_request("preprocess+encode", "prefill", "decode", bandwidth_bytes_per_s=10.0)
    first = 5.0 + 5.0 + STEP_S + 60 * 0.01
    assert trace.columns["finish_s"][0] == pytest.approx(first + 6.0 + STEP_S)
    assert {(link.source, link.sent_bytes) for link in trace.links} == {("preprocess+encode", 50.0), ("prefill", 60.0)}


def test_pulling_waits_while_prompts_wait_at_the_receiver():
    """The picture is encoded at once; a prompt of 300 starts at 4.1 s; the receiver looks again as its step ends."""
    items = pictures([0, 0, 1], [20])
    requests = asked([400, 300, 5], [1, 1, 1], [0.0, 0.0, 0.1], items=items)
    pools = pool("preprocess+encode"), pool("prefill+decode", max_batch=1)
    times = service(step_base_s=STEP_S, token_s=0.01, patch_s=0.01, kv_blocks=1000)
    pulled, pushed = (
        serve(cluster(*pools, mode=mode, bandwidth_bytes_per_s=20.0), requests, times) for mode in ("pull", "push")
    )
    assert pushed.columns["encoded_s"][2] == pytest.approx(0.1 + 0.2 + 1.0)
    assert pulled.columns["encoded_s"][2] == pytest.approx(7.2 + 1.0)


# Back-pressure


def test_a_receiver_without_room_stalls_its_senders_and_nothing_is_lost():
    """Room for one picture at either end: encoding goes at the pace of the wire, and the wire at that of prefill."""
    n = 12
    pools = (
        pool("preprocess+encode", encoder_cache_tokens=100, encoder_budget_tokens=100),
        pool("prefill+decode", encoder_cache_tokens=100, max_batch=1),
    )
    requests = asked([1] * n, [1] * n, items=pictures([1] * n, [100] * n))
    times = service(step_base_s=1.0, patch_s=1e-3)
    trace = serve(cluster(*pools, bandwidth_bytes_per_s=1000.0), requests, times)
    encoded = trace.steps[0]["end_s"]
    assert trace.columns["encoded_s"] == pytest.approx(0.2 + 1.1 * np.arange(n))  # sent once the prompt before is done
    assert trace.columns["finish_s"] == pytest.approx(1.2 + 1.1 * np.arange(n))
    assert np.diff(encoded)[1:] == pytest.approx(np.full(n - 2, 1.1))  # and encoded once that one is gone


def test_a_full_pool_that_decodes_stalls_prefill():
    """Each prompt takes half the cache there, so two decode and two more fill the cache of prefill behind them."""
    requests = asked([40] * 8, [10] * 8)
    pools = pool("prefill", max_batch=8), pool("decode")
    times = service(step_base_s=STEP_S, kv_blocks=100, chunk_tokens=40)
    trace = serve(cluster(*pools, bandwidth_bytes_per_s=FAST), requests, times)
    taken = trace.columns["scheduled_s"]
    assert taken[:4] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert (taken[4:] >= trace.columns["finish_s"][0]).all()
    assert trace.steps[0]["kv_used_blocks"].max() <= 100


@pytest.mark.parametrize("mode", ["push", "pull", "reserve"])
@pytest.mark.parametrize("release", ["request", "item"])
def test_the_smallest_caches_serve_every_request(mode, release):
    """Room for one request at a time everywhere: whoever holds room anywhere must get on."""
    counts = [3, 0, 2, 3, 1, 3, 0, 3]
    pools = (
        pool("preprocess+encode", workers=3, encoder_cache_tokens=1, encoder_budget_tokens=1),
        pool("prefill", workers=2, encoder_cache_tokens=1),
        pool("decode", workers=2),
    )
    requests = asked([10] * 8, [8] * 8, items=pictures(counts, [20] * sum(counts)))
    times = service(step_base_s=STEP_S, patch_s=1e-3, kv_blocks=80, chunk_tokens=16)
    wires = {("prefill", "decode"): {"mode": mode, "release": "request"}}
    trace = serve(
        cluster(*pools, wires=wires, mode=mode, release=release, bandwidth_bytes_per_s=100.0), requests, times
    )
    assert trace.finished.all()


# Who leaves, and what others get of it


def test_what_the_prefix_cache_made_needless_is_dropped_with_its_request():
    """The second prompt is cached up to its own last tokens, picture and all: it ends before the picture has come."""
    plan = cluster(pool("preprocess+encode"), pool("prefill+decode"), release="item", bandwidth_bytes_per_s=10.0)
    items = pictures([1, 1, 1], [40, 40, 40], content=[1, 2, 3], before=[20, 20, 0])
    links = {"parent": [-1, 0, -1], "shared_text_tokens": [0, 50, 0], "shared_items": [0, 1, 0]}
    requests = asked([50, 80, 10], [1, 2, 1], [0.0, 100.0, 200.0], items=items, **links)
    done = run(plan, requests, service(step_base_s=STEP_S, patch_s=0.2))
    trace = done.trace(0, 0.0, 0.0)
    assert trace.columns["cached_tokens"].tolist() == [0, 90, 0]
    assert trace.columns["finish_s"] == pytest.approx([12.1, 100.2, 212.1])
    assert done.flow.pictures.encoding == {}


def test_what_the_prefix_cache_made_needless_is_dropped_when_its_prompt_leaves():
    """As above, but its KV is on its way to another worker when its picture is still on the wire."""
    wires = {("prefill", "decode"): {"release": "request"}}
    pools = pool("preprocess+encode"), pool("prefill"), pool("decode")
    plan = cluster(*pools, wires=wires, release="item", bandwidth_bytes_per_s=10.0)
    items = pictures([1, 1], [40, 40], content=[1, 2], before=[20, 20])
    links = {"parent": [-1, 0], "shared_text_tokens": [0, 50], "shared_items": [0, 1]}
    requests = asked([50, 80], [1, 3], [0.0, 100.0], items=items, **links)
    trace = serve(plan, requests, service(step_base_s=STEP_S, patch_s=0.2))
    assert trace.columns["cached_tokens"].tolist() == [0, 90]
    assert trace.columns["joined_s"][1] == pytest.approx(100.1 + 12.0)  # 8 s of encoding and 4 s on the wire are less
    assert {link.source: link.sent_bytes for link in trace.links} == {"preprocess+encode": 40.0, "prefill": 120.0}


def test_who_is_preempted_where_it_decodes_goes_on_there():
    """Its pictures come again over that pool's own link, and its KV stays."""
    pools = pool("preprocess+encode"), pool("prefill", serves="media"), pool("prefill+decode")
    requests = asked([10] * 3, [30] * 3, items=pictures([1] * 3, [20] * 3))
    trace = serve(cluster(*pools, mode="reserve"), requests, service(step_base_s=STEP_S, kv_blocks=90))
    again = trace.columns["preemptions"].sum()
    at_prefill = (trace.columns["worker"] == 1).sum()
    sent = {(link.source, link.target): link.sent_bytes for link in trace.links}
    assert again == 3
    assert sent == {
        ("preprocess+encode", "prefill"): 20.0 * at_prefill,
        ("preprocess+encode", "prefill+decode"): 20.0 * (3 - at_prefill + again),
        ("prefill", "prefill+decode"): 30.0 * at_prefill,
    }


def mixed(blocks, **more):
    """Return how three prompts are computed apart and decode where prompts are computed too, with leaps and without."""
    plan = cluster(pool("prefill"), pool("prefill+decode", serves="media"), bandwidth_bytes_per_s=20.0)
    requests = asked([10] * 3, [30, 30, 20], [0.0, 0.5, 1.2], **more)
    times = service(step_base_s=STEP_S, kv_blocks=blocks)
    return [serve(plan, requests, times, leaps=leaps) for leaps in (True, False)]


@pytest.mark.parametrize("blocks", range(40, 60))
def test_room_that_is_promised_ends_a_leap_that_might_need_it(blocks):
    leapt, stepped = mixed(blocks)
    assert same(leapt, stepped)
    assert leapt.columns["preemptions"].any()


def test_who_joins_may_be_preempted_at_once():
    trace = mixed(48)[0]
    assert trace.columns["preemptions"].tolist() == [0, 1, 2]


def test_who_had_no_budget_decodes_when_the_prompt_that_took_it_is_preempted():
    """The first, computed elsewhere, stands behind chunks of the second until these fill the cache at 0.55 s."""
    plan = cluster(
        pool("prefill"), pool("prefill+decode", token_budget=10, max_batch=4), policies={"order": "shortest"}
    )
    trace = serve(plan, asked([10, 60], [5, 1], [0.0, 0.05]), service(step_base_s=STEP_S, kv_blocks=65))
    assert trace.columns["preemptions"].tolist() == [0, 1]
    assert trace.columns["finish_s"][0] == pytest.approx(0.55 + 4 * STEP_S)


def test_what_preemption_frees_is_offered_though_the_worker_falls_idle():
    """The first preempts itself at 7.1 s and waits; the third has room from then on, and the wire with the second."""
    plan = cluster(pool("prefill"), pool("prefill+decode", serves="media"), bandwidth_bytes_per_s=2.0)
    requests = asked([10, 20, 15], [40, 2, 2], [0.0, 5.1, 6.0])
    for leaps in (True, False):
        trace = serve(plan, requests, service(step_base_s=STEP_S, kv_blocks=50), leaps=leaps)
        assert trace.columns["preemptions"].tolist() == [1, 0, 0]
        assert trace.columns["joined_s"] == pytest.approx([5.1, 22.7, 22.1])


def test_a_client_leaves_where_its_request_was_preempted():
    plan = cluster(pool("prefill"), pool("prefill+decode", serves="media"))
    requests = asked([10, 10], [30, 30], patience_s=[np.inf, 2.9])
    trace = serve(plan, requests, service(step_base_s=STEP_S, kv_blocks=45))
    assert trace.columns["preemptions"].tolist() == [0, 1]
    assert trace.columns["ended_s"][1] == 2.9
    assert trace.reasons[1] == "the client gave up"


def test_a_client_that_leaves_makes_room_where_its_request_would_have_decoded():
    """The second waits for room at both ends; the first leaves while its KV is on the wire."""
    requests = asked([40, 40], [10, 10], patience_s=[2.0, np.inf])
    plan = cluster(pool("prefill"), pool("decode"), bandwidth_bytes_per_s=10.0)
    trace = serve(plan, requests, service(step_base_s=STEP_S, kv_blocks=60, chunk_tokens=40))
    assert trace.columns["joined_s"][1] == pytest.approx(2.0 + STEP_S + 4.0)
    assert trace.links[0].sent_bytes == 40.0


def test_chunks_of_a_prompt_that_is_computed_again_leave_again_once():
    """The second prompt does not fit beside the first, which waits for its KV to leave; both use the wire."""
    pools = pool("prefill", token_budget=20, max_batch=4), pool("decode", workers=2)
    plan = cluster(
        *pools, bandwidth_bytes_per_s=10.0, mode="reserve", layerwise=True, policies={"prefix_caching": False}
    )
    trace = serve(plan, asked([40, 60], [2, 2]), service(step_base_s=STEP_S, kv_blocks=80, kv_layers=4))
    assert trace.columns["preemptions"].tolist() == [0, 1]  # and once only: it waits until all of it fits
    assert trace.links[0].sent_bytes < 200.0
    assert trace.columns["joined_s"].max() < 20.0


def test_what_was_cached_goes_with_the_last_layer():
    requests = asked([40, 60], [2, 2], [0.0, 50.0], parent=[-1, 0], shared_text_tokens=[0, 40])
    plan = cluster(pool("prefill"), pool("decode"), bandwidth_bytes_per_s=10.0, mode="reserve", layerwise=True)
    trace = serve(plan, requests, service(step_base_s=STEP_S, kv_layers=4))
    assert trace.columns["cached_tokens"].tolist() == [0, 40]
    assert trace.links[0].sent_bytes == pytest.approx(100.0)


@pytest.mark.parametrize("admission", ["queue", "ttft"])
def test_admission_counts_requests_that_are_still_at_encoders(admission):
    """Forty pictures come at once, and encoding takes longest: a limit of two lets in two, not all of them."""
    policies = {"admission": admission, "admission_limit": 2.0 if admission == "queue" else 1e-9}
    plan = cluster(pool("preprocess+encode"), pool("prefill+decode"), policies=policies)
    requests = asked([10] * 40, [2] * 40, items=pictures([1] * 40, [50] * 40))
    trace = serve(plan, requests, service(patch_s=1.0, token_s=0.01))
    assert (trace.columns["state"] == State.FINISHED).sum() == (2 if admission == "queue" else 1)
    assert set(trace.reasons.values()) == {"not admitted"}
