"""A model on several devices: what each degree divides, what it sends, what it costs, and what it refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import (
    Image,
    Parallelism,
    Precision,
    Workload,
    build_query,
    engine_names,
    load_engine,
    load_hardware,
    load_model,
    predict,
)
from costmodel.layers import AttentionSpec, LatentAttentionSpec, MoeSpec
from costmodel.operators import Kind
from costmodel.stages import Structure
from costmodel.sums import MAX_DEALT, busiest_share, encode_points, touched_share
from tests.helpers import CLEAN_ERRORS, POINT, assert_clean, images
from tests.kinds import CROSS, DENSE, EXPERTS, GROUPED, KINDS, LATENT, RECURRENT, TEXT_ONLY, WITH_EXPERTS

A100, H100, NVL72 = "a100-sxm4-80gb", "h100-sxm5-80gb", "gb200-nvl72-186gb"
OPERATORS = [engine for engine in engine_names() if engine != "paper"]  # the equations know no link
STAGES = ("encode", "adapt", "prefill", "decode")
BYTES = 2  # a number of 16 bits


def at(name, workload, *, engine="fused", device=H100, batch=1, precision=None, **degrees):
    """Return the prediction of a model on this many devices."""
    parallelism = Parallelism(**degrees)
    return predict(name, device, workload, batch=batch, engine=engine, precision=precision, parallelism=parallelism)


def close(value, other, rel=1e-12):
    return value == pytest.approx(other, rel=rel, abs=0.0)


def text(tokens, output=2):
    """Return a prompt of words alone; two tokens out are one decode step."""
    return Workload(text_tokens=tokens, output_tokens=output)


def experts(name):
    """Return (layers, experts, top_k, numbers of one expert, width) of the routed layers of a model."""
    runs = [run for run in load_model(name).decoder.runs if isinstance(run.layer.ffn, MoeSpec)]
    ffn, width = runs[0].layer.ffn, runs[0].layer.width
    return sum(run.n_layers for run in runs), ffn.experts, ffn.top_k, 3 * width * ffn.hidden, width


# Tensor parallelism


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("engine", OPERATORS)
def test_tensor_parallelism_divides_and_communicates(name, engine):
    one, two, four = (at(name, images((900, 600)), engine=engine, tp=tp) for tp in (1, 2, 4))
    for p, n in ((two, 2), (four, 4)):
        assert close(p.memory.weights_bytes, one.memory.weights_bytes / n)
        assert close(p.memory.kv_bytes, one.memory.kv_bytes / n)
        for stage in ("prefill", "decode"):
            assert close(p.stages[stage].flops, one.stages[stage].flops / n)
            assert close(p.stages[stage].weight_bytes, one.stages[stage].weight_bytes / n)
            assert close(p.stages[stage].kv_bytes, one.stages[stage].kv_bytes / n)
        share = p.stages["encode"].flops / one.stages["encode"].flops
        assert 1 / n <= share < 1.02 / n  # every device embeds all patches
        for stage in ("encode", "prefill", "decode"):
            assert p.stages[stage].link_bytes > 0 == one.stages[stage].link_bytes
            assert p.stages[stage].kind_s[Kind.COLLECTIVE] > 0 == one.stages[stage].kind_s[Kind.COLLECTIVE]
    assert four.stages["prefill"].link_bytes > two.stages["prefill"].link_bytes  # 2 (n - 1) / n of the buffer


@pytest.mark.parametrize("name", KINDS)
def test_more_devices_hold_and_do_less_each(name):
    one, two, four = (at(name, images((900, 600)), tp=tp) for tp in (1, 2, 4))
    for larger, smaller in ((one, two), (two, four)):
        half = larger.memory.weights_bytes / 2  # key heads beyond their number, latents and routers are held whole
        assert half <= smaller.memory.weights_bytes < 1.03 * half
        assert smaller.memory.kv_bytes <= larger.memory.kv_bytes
        for stage in ("encode", "prefill", "decode"):
            assert larger.stages[stage].flops / 2 <= smaller.stages[stage].flops < larger.stages[stage].flops


# name, layers, width, vocabulary
DIMENSIONS = [(GROUPED, 28, 3584, 152_064), (EXPERTS, 48, 2048, 151_936), (LATENT, 27, 2048, 163_840)]


@pytest.mark.parametrize(("name", "n_layers", "width", "vocabulary"), DIMENSIONS)
@pytest.mark.parametrize("n", [2, 4])
def test_tensor_parallelism_sends_what_a_ring_sends(name, n_layers, width, vocabulary, n):
    rows, batch = 1000, 3
    p = at(name, text(rows), tp=n, batch=batch)
    ring = 2 * (n - 1) / n * width * BYTES
    logits = batch * (n - 1) / n * vocabulary * BYTES
    reduced = 2 * n_layers + 1  # after attention, after the feed-forward block, and of the embedding
    assert close(p.stages["prefill"].link_bytes, reduced * batch * rows * ring + logits)
    assert close(p.stages["decode"].link_bytes, reduced * batch * ring + logits)


def test_the_encoder_reduces_over_its_own_devices():
    wide, narrow = (at(GROUPED, images((900, 600)), tp=4, encoder_tp=n).stages["encode"] for n in (4, 2))
    assert close(narrow.link_bytes / wide.link_bytes, (1 / 2) / (3 / 4))
    alone = at(GROUPED, images((900, 600)), tp=4, encoder_tp=1)
    assert alone.stages["encode"].link_bytes == alone.stages["adapt"].link_bytes == 0
    one = at(GROUPED, images((900, 600)))
    for stage in ("encode", "adapt"):
        assert close(alone.stages[stage].time_s, one.stages[stage].time_s)
    assert close(alone.memory.vision_weights_bytes, one.memory.vision_weights_bytes)
    assert close(alone.memory.language_weights_bytes, one.memory.language_weights_bytes / 4)


def test_heads_beyond_the_keys_are_copied():
    cache = {tp: at("qwen2.5-vl-3b", images((900, 600)), tp=tp).memory.kv_bytes for tp in (1, 2, 4, 8)}
    assert cache[2] == cache[4] == cache[8] == cache[1] / 2  # two key/value heads


def test_a_latent_is_kept_whole_on_every_device():
    one, four = (at(LATENT, text(1000), tp=tp) for tp in (1, 4))
    assert four.memory.kv_bytes == one.memory.kv_bytes
    reads = [p.stages["decode"].kv_bytes for p in (one, four)]
    assert close(*reads)


def test_states_of_a_recurrence_are_divided():
    one, four = (at(RECURRENT, text(1000), tp=tp).memory.kv_bytes for tp in (1, 4))
    states = load_model(RECURRENT).decoder.state_bytes
    tokens = math.ceil(1002 / 16) * 16
    full_layers, head = 10, 2 * 256 * BYTES  # two key/value heads, one a device from two devices on
    assert close(one, states + tokens * full_layers * 2 * head)
    assert close(four, states / 4 + tokens * full_layers * head)


# Pipeline parallelism


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_a_pipeline_stage_holds_its_layers(name, pp):
    decoder = load_model(name).decoder
    one, piped = at(name, images((900, 600))), at(name, images((900, 600)), pp=pp, encoder_tp=1)
    share = math.ceil(decoder.n_layers / pp) / decoder.n_layers
    layers, ends = decoder.layer_parameters * BYTES, decoder.end_parameters * BYTES
    assert close(piped.memory.language_weights_bytes, layers * share + ends)
    assert close(piped.memory.kv_bytes, one.memory.kv_bytes * share)
    assert close(piped.memory.block_bytes, one.memory.block_bytes * share)
    assert piped.memory.vision_weights_bytes == one.memory.vision_weights_bytes


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (4, 1), (4, 2)])
def test_a_pipeline_sends_hidden_states_from_stage_to_stage(pp, tp):
    rows, batch, width = 700, 2, 3584
    piped, without = (at(GROUPED, text(rows), batch=batch, tp=tp, pp=n) for n in (pp, 1))
    for stage, n_rows in (("prefill", rows * batch), ("decode", batch)):
        sent = piped.stages[stage].link_bytes * pp - without.stages[stage].link_bytes  # of all stages together
        assert sent == pytest.approx(n_rows * width * BYTES * (pp - 1) / tp, rel=1e-9)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("engine", OPERATORS)
def test_a_pipeline_does_not_shorten_one_pass(name, engine):
    one, piped = (at(name, images((900, 600)), engine=engine, pp=pp, encoder_tp=1) for pp in (1, 4))
    for stage in ("prefill", "decode"):  # what a slow host hides, the links between stages do not lengthen
        hidden = stage in load_engine(engine).layer_host_s
        longer = piped.stages[stage].time_s - one.stages[stage].time_s
        assert longer > 0 or (hidden and longer == 0)
    assert piped.stages["encode"].time_s == one.stages["encode"].time_s
    assert piped.throughput_tokens_per_s <= one.throughput_tokens_per_s
    assert piped.max_batch > one.max_batch  # what a pipeline is for


@pytest.mark.parametrize("name", KINDS)
def test_chunks_overlap_in_a_pipeline(name):
    free_link = f"{H100}:links.nvlink.bandwidth_bytes_per_s=1e20,links.nvlink.latency_s=0"
    engine = load_engine("ideal").model_copy(update={"prefill_chunk_tokens": 1000.0})
    one, two, four = (
        at(name, text(10_500), engine=engine, device=load_hardware(free_link), pp=pp).stages["prefill"].time_s
        for pp in (1, 2, 4)
    )
    assert four < two < one
    assert one - two == pytest.approx(2 * (two - four), rel=1e-9)  # a + b / pp
    others, longest = 2 * (one - two), one - 2 * (one - two)  # of ten chunks of 1000 tokens, and one of 500
    assert 9 < others / longest < 10
    assert four > one / 4


def test_a_short_last_chunk_does_not_make_a_pipeline_quicker():
    """One token beyond a chunk is another chunk, which waits behind the first one in every stage."""
    times = [at(KINDS[0], text(n), engine="fused", pp=2).stages["prefill"].time_s for n in (8192, 8193, 8300)]
    assert times[0] < times[1] < times[2] < 1.1 * times[0]


# Data parallelism


@pytest.mark.parametrize("name", [GROUPED, LATENT, CROSS])
@pytest.mark.parametrize(("batch", "dp", "busiest"), [(5, 2, 3), (8, 2, 4), (8, 3, 3), (2, 4, 1), (64, 8, 8)])
def test_replicas_share_a_batch_in_whole_requests(name, batch, dp, busiest):
    workload = images((900, 600), output_tokens=50)
    shared, alone = at(name, workload, batch=batch, dp=dp), at(name, workload, batch=busiest)
    for field in ("ttft_s", "tpot_s", "total_s"):
        assert close(getattr(shared, field), getattr(alone, field))
    assert shared.memory == alone.memory
    assert close(shared.throughput_tokens_per_s, batch * 50 / alone.total_s)
    assert close(shared.as_dict()["throughput_tokens_per_s_per_gpu"], batch * 50 / alone.total_s / dp)
    price = load_hardware(H100).price_usd_per_s
    assert close(shared.cost_usd, price * alone.total_s * dp / batch)
    assert close(shared.energy_j * batch, alone.energy_j * busiest * dp)
    assert shared.max_batch == dp * alone.max_batch


def test_replicas_that_share_evenly_cost_what_one_costs():
    one, four = at(GROUPED, images((900, 600)), batch=4), at(GROUPED, images((900, 600)), batch=16, dp=4)
    ours, theirs = four.as_dict(), one.as_dict()
    assert close(ours["throughput_tokens_per_s"], 4 * theirs["throughput_tokens_per_s"])
    for key in ("throughput_tokens_per_s_per_gpu", "energy_j", "co2_g", "cost_usd", "ttft_s", "tpot_s"):
        assert close(ours[key], theirs[key]), key


DEGREES = [
    {},
    {"tp": 2},
    {"tp": 4, "encoder_tp": 1},
    {"pp": 4},
    {"dp": 3},
    {"tp": 2, "pp": 2, "dp": 2},
    {"tp": 2, "encoder_dp": 2},
]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_money_energy_and_throughput_are_those_of_all_devices(degrees):
    p = at(GROUPED, images((900, 600), output_tokens=40), batch=6, **degrees)
    n_devices = math.prod(degrees.get(name, 1) for name in ("tp", "pp", "dp"))
    assert p.n_devices == n_devices
    values, device = p.as_dict(), load_hardware(H100)
    assert close(values["throughput_tokens_per_s"], 6 * 40 / p.total_s)
    assert close(values["throughput_tokens_per_s_per_gpu"], 6 * 40 / p.total_s / n_devices)
    assert close(values["cost_usd"], device.price_usd_per_s * p.total_s * n_devices / 6)
    assert values["energy_j"] * 6 <= n_devices * device.tdp_w * p.total_s
    assert values["energy_j"] * 6 > n_devices * device.idle_w * p.total_s
    assert close(values["co2_g"], values["energy_j"] * load_engine("fused").carbon_g_per_j)


# Expert parallelism


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize(("tp", "dp", "ep"), [(4, 1, 4), (2, 2, 2), (2, 2, 4), (1, 4, 4), (8, 1, 8)])
def test_experts_are_dealt_out(name, tp, dp, ep):
    n_layers, n_experts, _, numbers, _ = experts(name)
    routed, decoder = n_layers * n_experts * numbers, load_model(name).decoder
    p = at(name, text(100), tp=tp, dp=dp, ep=ep)
    shared = ((decoder.parameters - routed) / tp + routed / ep) * BYTES
    copied = sum(run.n_layers * held_whole(run.layer, tp) for run in decoder.runs) * BYTES
    assert close(p.memory.language_weights_bytes, shared + copied)


def held_whole(layer, tp):
    """Return what every device holds beyond its share of a layer: router, latents, key heads beyond their number."""
    mixer, copied = layer.mixer, 0.0
    if isinstance(layer.ffn, MoeSpec):
        copied += layer.width * layer.ffn.router_width * (1 - 1 / tp)
    if isinstance(mixer, LatentAttentionSpec):
        copied += layer.width * (mixer.kv_rank + mixer.rope_dim + mixer.q_rank) * (1 - 1 / tp)
    elif isinstance(mixer, AttentionSpec):
        copied += layer.width * 2 * mixer.head_dim * (max(mixer.kv_heads / tp, 1) - mixer.kv_heads / tp)
    return copied


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize(("tp", "dp", "ep"), [(2, 2, 4), (1, 4, 4), (2, 4, 8)])
def test_the_exchange_of_tokens_sends_what_leaves_a_device(name, tp, dp, ep):
    n_layers, _, top_k, _, width = experts(name)
    rows, batch = 500, 2 * dp
    p, without = (at(name, text(rows), tp=tp, dp=dp, ep=n, batch=batch) for n in (ep, 1))
    for stage, n_rows in (("prefill", 2 * rows), ("decode", 2)):  # of one replica, whose devices share them
        own = n_rows / tp
        leaving = own * top_k * width * BYTES * (ep - 1) / ep
        sent = p.stages[stage].link_bytes - without.stages[stage].link_bytes
        assert sent == pytest.approx(n_layers * 2 * leaving, rel=1e-9), stage  # out and back


def test_inside_a_replica_the_sum_after_the_experts_serves():
    dealt_out, shared = (at(EXPERTS, text(500), tp=4, ep=ep) for ep in (4, 1))
    for stage in ("prefill", "decode"):
        assert dealt_out.stages[stage].link_bytes == shared.stages[stage].link_bytes
        assert close(dealt_out.stages[stage].flops, shared.stages[stage].flops)
        assert close(dealt_out.stages[stage].weight_bytes, shared.stages[stage].weight_bytes)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_dealing_experts_out_over_more_replicas_spares_no_work(name):
    narrow, wide = (at(name, text(500), tp=2, dp=4, ep=ep, batch=8) for ep in (2, 8))
    for stage in ("prefill", "decode"):
        assert close(
            wide.stages[stage].flops, narrow.stages[stage].flops
        )  # four times the tokens, a quarter of the experts
        assert wide.stages[stage].weight_bytes < narrow.stages[stage].weight_bytes
        assert wide.stages[stage].link_bytes > narrow.stages[stage].link_bytes
    assert wide.max_batch > narrow.max_batch


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize(("tp", "dp", "ep"), [(4, 1, 4), (2, 2, 4)])
def test_imbalance_scales_the_busiest_device(name, tp, dp, ep):
    n_layers, _, top_k, numbers, _ = experts(name)
    rows, batch = 8000, 1 * dp
    even, uneven = (at(name, text(rows), tp=tp, dp=dp, ep=ep, batch=batch, expert_imbalance=x) for x in (1.0, 1.5))
    added = uneven.stages["prefill"].flops - even.stages["prefill"].flops
    share = rows * batch * top_k / ep
    assert added == pytest.approx(0.5 * n_layers * share * 2 * numbers, rel=1e-9)
    assert uneven.stages["prefill"].kind_s[Kind.MOE_GEMM] > 1.2 * even.stages["prefill"].kind_s[Kind.MOE_GEMM]
    assert uneven.memory == even.memory


def test_imbalance_needs_experts_that_are_dealt_out():
    even, uneven = (at(EXPERTS, text(500), tp=2, expert_imbalance=x) for x in (1.0, 3.0))
    assert even.ttft_s == uneven.ttft_s


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_more_sequences_touch_more_experts(name):
    n_layers, n_experts, top_k, numbers, _ = experts(name)
    read = {batch: at(name, text(10), batch=batch).stages["decode"].weight_bytes for batch in (1, 2, 8, 64, 4096)}
    every = n_layers * n_experts * numbers * BYTES
    touched = {batch: 1 - (1 - top_k / n_experts) ** batch for batch in read}
    assert close(touched[1], top_k / n_experts)
    for batch, weight_bytes in read.items():
        assert weight_bytes - read[1] == pytest.approx(every * (touched[batch] - touched[1]), rel=1e-9)
    assert list(read.values()) == sorted(set(read.values()))


@pytest.mark.parametrize(("degrees", "meeting"), [({"tp": 2, "dp": 2, "ep": 2}, 1), ({"tp": 2, "dp": 2, "ep": 4}, 2)])
def test_rows_of_replicas_that_share_experts_meet(degrees, meeting):
    query = build_query(
        load_model(EXPERTS), text(10), load_engine("fused"), batch=8, parallelism=Parallelism(**degrees)
    )
    assert close(touched_share(query, 4.0), 1 - (1 - 8 / 128) ** (4 * meeting))


def test_a_long_prefill_touches_every_expert():
    n_layers, n_experts, _, numbers, _ = experts(EXPERTS)
    p = at(EXPERTS, text(4000))
    head = 2048 * 151_936 * BYTES  # the embedding is looked up, not read
    layers = load_model(EXPERTS).decoder.layer_parameters * BYTES
    assert p.stages["prefill"].weight_bytes == pytest.approx(layers + head, rel=1e-4)  # norms are not products
    assert n_layers * n_experts * numbers * BYTES < p.stages["prefill"].weight_bytes


# Copies of the encoder


def dealt(rows, copies):
    """Return the load of every copy when the largest item always goes to the copy with least."""
    loads = np.zeros(copies)
    for row in sorted(rows, reverse=True):
        loads[int(np.argmin(loads))] += row
    return loads


def encoder_query(sizes, copies, batch=1.0, name=GROUPED):
    parallelism = Parallelism(pp=copies, encoder_tp=1, encoder_dp=copies)
    workload = images(*sizes) if sizes else text(10)
    return build_query(load_model(name), workload, load_engine("fused"), batch=batch, parallelism=parallelism)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(60, 2000), st.integers(60, 2000)), min_size=1, max_size=7),
    st.integers(2, 8),
    st.integers(1, 5),
)
def test_items_go_to_the_copy_with_least_the_longest_first(sizes, copies, batch):
    query = encoder_query(sizes, copies, float(batch))
    rows = [load_model(GROUPED).media.image(*size).rows for size in sizes] * batch
    loads = dealt(rows, copies)
    assert close(busiest_share(query), loads.max() / sum(rows))
    assert loads.max() >= max(*rows, sum(rows) / copies)
    points = encode_points(query, Structure.of(query), query.turns[0])
    assert close(points.sums[1, 0], query.media.patches * batch * loads.max() / sum(rows))


@pytest.mark.parametrize(
    ("n_items", "batch", "copies", "share"),
    [(4, 1, 2, 1 / 2), (3, 1, 2, 2 / 3), (1, 1, 4, 1), (1, 3, 2, 2 / 3), (2, 5, 4, 3 / 10), (3, 1000, 7, 110 / 768)],
)
def test_equal_items_are_shared_as_evenly_as_whole_ones_can_be(n_items, batch, copies, share):
    assert close(busiest_share(encoder_query([(600, 600)] * n_items, copies, float(batch))), share)
    assert MAX_DEALT == 256  # of a larger batch so many requests are dealt out, and the rest is taken to be like them


def test_pictures_by_number_are_shared_like_equal_ones():
    parallelism = Parallelism(tp=2, encoder_dp=2)
    workload = Workload(visual_tokens=500.0)
    query = build_query(load_model(GROUPED), workload, load_engine("fused"), batch=3.0, parallelism=parallelism)
    assert close(busiest_share(query), 2 / 3)


def test_no_pictures_are_no_work_for_any_copy():
    query = encoder_query([], 2)
    assert not encode_points(query, Structure.of(query), query.turns[0]).sums.any()


def test_a_sweep_over_the_batch_deals_out_like_its_points():
    sizes, batches = [(640, 480), (1500, 900), (300, 300)], np.array([[1.0, 2.0], [3.0, 700.0]])
    shares = busiest_share(encoder_query(sizes, 2, batches))
    assert shares.shape == batches.shape
    for index in np.ndindex(batches.shape):
        assert close(shares[index], busiest_share(encoder_query(sizes, 2, batches[index])))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n_images", [2, 3, 5, 8])
@pytest.mark.parametrize("copies", [2, 4])
def test_copies_of_the_encoder_are_never_slower_than_one(name, n_images, copies):
    pictures = images(*[(900, 600)] * n_images)
    several, one = (at(name, pictures, tp=4, encoder_tp=1, encoder_dp=n) for n in (copies, 1))
    for stage in ("encode", "adapt"):
        assert several.stages[stage].time_s < one.stages[stage].time_s
        assert several.stages[stage].link_bytes == several.stages[stage].kind_s[Kind.COLLECTIVE] == 0
    share = math.ceil(n_images / copies) / n_images
    assert close(several.stages["encode"].flops, one.stages["encode"].flops * share)
    for stage in ("preprocess", "prefill", "decode"):
        assert several.stages[stage].time_s == one.stages[stage].time_s
    assert several.memory.vision_weights_bytes == one.memory.vision_weights_bytes


def test_one_image_gains_nothing_from_copies():
    several, one = (at(GROUPED, images((900, 600)), tp=4, encoder_tp=1, encoder_dp=n) for n in (4, 1))
    assert close(several.ttft_s, one.ttft_s)


def test_copies_beat_sharing_where_there_are_many_small_pictures():
    pictures = images(*[(448, 448)] * 16)
    copied = at(GROUPED, pictures, tp=4, encoder_dp=4).stages["encode"]
    shared = at(GROUPED, pictures, tp=4, encoder_tp=4).stages["encode"]
    assert copied.time_s < shared.time_s
    both = at(GROUPED, pictures, tp=4, encoder_tp=2, encoder_dp=2).stages["encode"]
    assert 0 < both.link_bytes < shared.link_bytes


# Links


def peers(query, stage):
    table = Structure.of(query).table(stage)
    return {name.rpartition(".")[2]: n for name, n in zip(table.names, table.peers.tolist(), strict=True) if n > 1}


def test_every_exchange_takes_the_link_that_joins_its_own_devices():
    parallelism = Parallelism(tp=2, pp=4, dp=2, ep=4, encoder_tp=4, encoder_dp=2)
    query = build_query(load_model(EXPERTS), images((640, 480)), load_engine("fused"), parallelism=parallelism)
    sums = {"all_reduce_attention": 2, "all_reduce_ffn": 2, "all_reduce_embedding": 2, "all_gather_logits": 2}
    for stage in ("prefill", "decode"):
        assert peers(query, stage) == sums | {"dispatch": 4, "combine": 4, "send": 8}
    assert peers(query, "encode") == {"all_reduce_attention": 4, "all_reduce_ffn": 4}
    assert set(peers(query, "adapt").values()) == {4}


def test_a_pair_talks_over_its_bridge_and_more_over_the_bus():
    device = load_hardware("h100-nvl-94gb")  # bridges of two, a bus of eight
    pair, bus = device.link(2), device.link(4)
    assert (pair.kind, bus.kind) == ("nvlink", "pcie")
    two, four = (at(GROUPED, text(4000), device=device, tp=tp).stages["prefill"] for tp in (2, 4))
    ratio = (3 / 4) / (1 / 2) * pair.bandwidth_bytes_per_s / bus.bandwidth_bytes_per_s
    # on a bus the bandwidth falls with every device more, so measured exchanges are slower than the links alone say
    assert four.kind_s[Kind.COLLECTIVE] / two.kind_s[Kind.COLLECTIVE] > 0.9 * ratio


def test_a_mesh_gives_each_pair_its_share():
    link = load_hardware("mi300x-192gb").link(8)
    assert link.topology == "mesh"
    assert close(link.rate_bytes_per_s(8), link.bandwidth_bytes_per_s)
    assert close(link.rate_bytes_per_s(2), link.bandwidth_bytes_per_s / 7)
    switch = load_hardware(H100).link(2)
    assert switch.rate_bytes_per_s(2) == switch.bandwidth_bytes_per_s


# What is refused, each in one line


REFUSED = [
    ({"tp": 0}, "Parallelism.tp=0 must be a whole number from 1"),
    ({"pp": -1}, "Parallelism.pp=-1"),
    ({"dp": 1.5}, "Parallelism.dp=1.5"),
    ({"tp": True}, "Parallelism.tp=True"),
    ({"pp": math.nan}, "Parallelism.pp=nan"),
    ({"dp": math.inf}, "Parallelism.dp=inf"),
    ({"encoder_tp": 0}, "Parallelism.encoder_tp=0"),
    ({"encoder_dp": 4096}, "Parallelism.encoder_dp=4096"),
    ({"expert_imbalance": 0.5}, "Parallelism.expert_imbalance=0.5"),
    ({"expert_imbalance": math.nan}, "Parallelism.expert_imbalance=nan"),
    ({"tp": 2, "dp": 2, "ep": 3}, "ep=3 must be 1, tp=2 or tp x dp=4"),
    ({"tp": 2, "encoder_tp": 4}, "encoder_tp x encoder_dp=4 must not exceed tp x pp=2"),
    ({"tp": 2, "encoder_tp": 2, "encoder_dp": 2}, "encoder_tp x encoder_dp=4 must not exceed tp x pp=2"),
    ({"dp": 4, "encoder_dp": 2}, "encoder_tp x encoder_dp=2 must not exceed tp x pp=1"),
]


@pytest.mark.parametrize(("degrees", "says"), REFUSED, ids=str)
def test_degrees_that_no_deployment_has_are_refused(degrees, says):
    with pytest.raises(CLEAN_ERRORS) as raised:
        Parallelism(**degrees)
    assert_clean(raised.value)
    assert says in str(raised.value)


UNFIT = [
    (GROUPED, H100, {"tp": 3}, "tp=3 does not divide the 28 heads of qwen2.5-vl-7b; use one of 1, 2, 4, 7, 14, 28"),
    (LATENT, H100, {"tp": 5}, "tp=5 does not divide the 16 heads"),
    (RECURRENT, NVL72, {"tp": 32}, "tp=32 does not divide the 16 heads"),
    (GROUPED, NVL72, {"tp": 28, "encoder_tp": 7}, "encoder_tp=7 does not divide the 16 heads"),
    (GROUPED, NVL72, {"pp": 29}, "pp=29 exceeds the 28 layers of qwen2.5-vl-7b; use fewer"),
    (GROUPED, H100, {"tp": 2, "ep": 2}, "ep=2 needs routed experts, and qwen2.5-vl-7b has none; leave ep out"),
    (EXPERTS, NVL72, {"tp": 1, "dp": 3, "ep": 3}, "ep=3 does not divide the 128 experts"),
    ("qwen2.5-vl-72b", H100, {"tp": 16}, "16 has no link on h100-sxm5-80gb, whose node joins 8"),
    (GROUPED, H100, {"tp": 4, "pp": 4}, "16 has no link on h100-sxm5-80gb, whose node joins 8"),
    (EXPERTS, H100, {"tp": 2, "dp": 8, "ep": 16}, "16 has no link on h100-sxm5-80gb, whose node joins 8"),
    (GROUPED, "h100-nvl-94gb", {"tp": 2, "pp": 5}, "whose node joins 8"),
    (GROUPED, "jetson-thor-128gb", {"tp": 2}, "whose node joins 1"),
    (GROUPED, "cpu-epyc-9654", {"pp": 3}, "whose node joins 2"),
]


@pytest.mark.parametrize(("name", "device", "degrees", "says"), UNFIT, ids=str)
def test_degrees_that_do_not_fit_a_model_or_a_node_are_refused(name, device, degrees, says):
    with pytest.raises(CLEAN_ERRORS) as raised:
        at(name, images((640, 480)), device=device, **degrees)
    assert_clean(raised.value)
    assert says in str(raised.value)


def test_replicas_need_no_link():
    assert at(GROUPED, text(100), dp=64, batch=64).n_devices == 64
    assert at(GROUPED, text(100), device="jetson-thor-128gb", dp=2, batch=2).n_devices == 2


@pytest.mark.parametrize("name", [*KINDS, TEXT_ONLY])
@pytest.mark.parametrize("precision", [Precision(), Precision(4, 16, 8)], ids=str)
def test_every_setting_says_why(name, precision):
    workload = text(3000) if name == TEXT_ONLY else images((900, 600), (300, 300))
    ep = 4 if load_model(name).routing else 1
    for degrees in ({"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2, "encoder_dp": 2}, {"tp": 2, "dp": 2, "ep": ep}):
        for engine in engine_names():
            p = at(name, workload, engine=engine, precision=precision, batch=4, **degrees)
            lines = p.why()
            assert len(lines) >= 4
            assert all(line.strip() and "nan" not in line for line in lines)
            assert sum(share for _, share in p.stages["decode"].shares) == pytest.approx(1.0, rel=1e-6)
            assert p.as_dict()["fits"] in (True, False)


def test_an_image_is_unchanged_by_where_it_runs():
    few, many = at(GROUPED, Workload(images=[Image(900, 600)])), at(GROUPED, Workload(images=[Image(900, 600)]), tp=4)
    assert few.tokens == many.tokens
    assert few.as_dict()["parameters"] == many.as_dict()["parameters"]
    assert few.ttft_s != pytest.approx(many.ttft_s, **POINT)
