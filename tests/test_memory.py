"""Memory of one device: its parts add up, what fits fits, what is cached is what each kind of layer keeps."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from costmodel import (
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
from costmodel.memory import kv_bytes_per_request, max_batch, memory
from costmodel.query import MAX_BATCH
from tests.helpers import images
from tests.kinds import CROSS, EXPERTS, GROUPED, KINDS, LATENT, MULTI_HEAD, RECURRENT, SLIDING, TEXT_ONLY, WITH_EXPERTS

A100, H100, H200 = "a100-sxm4-80gb", "h100-sxm5-80gb", "h200-sxm-141gb"
BYTES = 2  # a number of 16 bits
SHARED = (
    Parallelism(),
    Parallelism(tp=2),
    Parallelism(pp=3, encoder_tp=1),
    Parallelism(dp=3),
    Parallelism(tp=2, pp=2, dp=2, encoder_dp=2),
    Parallelism(tp=2, dp=2, ep=4, encoder_tp=1),
)

names = st.sampled_from([*KINDS, TEXT_ONLY])
devices = st.sampled_from([A100, H200, "l40s-48gb", "mi300x-192gb"])
engines = st.sampled_from(engine_names())
pictures = st.lists(st.tuples(st.integers(20, 2500), st.integers(20, 2500)), max_size=3)
precisions = st.sampled_from([Precision(), Precision(8, 16, 8), Precision(4, 16, 4)])
shared = st.sampled_from(SHARED)
law = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def close(value, other, rel=1e-12):
    return value == pytest.approx(other, rel=rel, abs=0.0)


def workload_of(name, sizes, text, output=100):
    return images(*(sizes if load_model(name).media else []), text_tokens=text, output_tokens=output)


def setting(name, parallelism):
    """Skip what needs experts and has none, or more devices than the smallest node joins."""
    assume(parallelism.ep == 1 or load_model(name).routing is not None)


def per_request(name, workload, *, engine="ideal", tp=1):
    """Return the cache of one request when its answer ends [bytes]."""
    query = build_query(load_model(name), workload, load_engine(engine), parallelism=Parallelism(tp=tp))
    return float(kv_bytes_per_request(query))


def blocks_of(tokens, size=16):
    return math.ceil(tokens / size) * size


# A case by hand


def test_qwen_7b_on_an_a100():
    p = predict(GROUPED, A100, Workload(text_tokens=500, output_tokens=200), batch=10)
    memory_ = p.memory
    assert round(memory_.weights_bytes / 1e9, 2) == 16.58
    assert memory_.weights_bytes == 2 * 8_292_166_656
    each = 2 * 28 * 4 * 128 * BYTES
    assert each == 57_344
    assert memory_.block_bytes == 16 * each
    assert memory_.kv_bytes == 10 * 704 * each  # 700 tokens are 44 blocks of 16
    row = (2 * 3584 + 3 * 18944) * BYTES  # two residual copies; gate, up and their product
    logits = 152_064 * 4
    assert memory_.prefill_activation_bytes == 5000 * row + 10 * logits
    assert memory_.encode_activation_bytes == 0
    assert memory_.reserve_bytes == 1e9
    assert memory_.capacity_bytes == 80 * 2**30
    assert memory_.usable_bytes == 0.9 * 80 * 2**30
    free = memory_.usable_bytes - memory_.weights_bytes - memory_.activation_bytes - 1e9
    assert memory_.kv_blocks == int(free / (16 * each))
    assert p.fits


def test_the_prompts_cache_of_a_1080p_image():
    assert per_request(GROUPED, images((1920, 1080), text_tokens=40, output_tokens=9)) == 57_344 * (2691 + 2 + 40 + 9)


# Parts add up


@law
@given(
    name=names,
    device=devices,
    engine=engines,
    sizes=pictures,
    text=st.integers(1, 20_000),
    batch=st.integers(1, 64),
    precision=precisions,
    parallelism=shared,
)
def test_parts_add_up_to_the_peak(*, name, device, engine, sizes, text, batch, precision, parallelism):
    setting(name, parallelism)
    settings_ = {"precision": precision, "parallelism": parallelism, "engine": engine, "batch": batch}
    p = predict(name, device, workload_of(name, sizes, text), **settings_)
    found, values = p.memory, p.as_dict()["memory"]
    weights = found.vision_weights_bytes + found.language_weights_bytes
    activations = max(found.encode_activation_bytes, found.prefill_activation_bytes)
    assert close(found.peak_bytes, weights + found.kv_bytes + activations + found.reserve_bytes)
    assert values["weights_bytes"] == found.weights_bytes == weights
    assert values["activation_bytes"] == found.activation_bytes == activations
    parts = ("weights_bytes", "kv_bytes", "activation_bytes", "reserve_bytes")
    assert close(values["peak_bytes"], sum(values[part] for part in parts))
    assert all(value >= 0 and math.isfinite(value) for value in values.values())
    assert p.fits == (found.peak_bytes <= found.usable_bytes)
    assert found.usable_bytes <= found.capacity_bytes == load_hardware(device).memory_bytes


@law
@given(
    name=names,
    device=devices,
    sizes=pictures,
    text=st.integers(1, 20_000),
    batch=st.integers(1, 64),
    precision=precisions,
    parallelism=shared,
)
def test_the_blocks_fill_what_is_left(*, name, device, sizes, text, batch, precision, parallelism):
    setting(name, parallelism)
    settings_ = {"precision": precision, "parallelism": parallelism, "batch": batch}
    found = predict(name, device, workload_of(name, sizes, text), **settings_).memory
    beside = found.weights_bytes + found.activation_bytes + found.reserve_bytes
    assert found.block_bytes > 0
    if found.kv_blocks:
        assert beside + found.kv_blocks * found.block_bytes <= found.usable_bytes * (1 + 1e-12)
    assert beside + (found.kv_blocks + 1) * found.block_bytes > found.usable_bytes * (1 - 1e-12)


@law
@given(
    name=names,
    sizes=pictures,
    text=st.integers(1, 20_000),
    output=st.integers(1, 2000),
    precision=precisions,
    parallelism=shared,
)
def test_the_cache_of_an_engine_is_in_whole_blocks(*, name, sizes, text, output, precision, parallelism):
    setting(name, parallelism)
    engine, settings_ = load_engine("fused"), {"precision": precision, "parallelism": parallelism}
    workload = workload_of(name, sizes, text, output)
    paged = build_query(load_model(name), workload, engine, **settings_)
    exact = replace(paged, engine=engine.model_copy(update={"kv_block_tokens": 1.0}))
    more, tokens = float(kv_bytes_per_request(paged)), float(kv_bytes_per_request(exact))
    found = memory(paged, load_hardware(A100))
    assert tokens <= more < tokens + found.block_bytes
    if name in (MULTI_HEAD, GROUPED, EXPERTS, LATENT, TEXT_ONLY):
        n_blocks = more / found.block_bytes
        assert n_blocks == pytest.approx(round(n_blocks), rel=1e-12)
        total = paged.prompt_tokens + output
        assert round(n_blocks) == math.ceil(total / 16)


# The largest batch


@law
@given(
    name=names,
    device=devices,
    engine=engines,
    sizes=pictures,
    text=st.integers(1, 20_000),
    output=st.integers(1, 2000),
    precision=precisions,
    parallelism=shared,
)
def test_max_batch_is_the_last_that_fits(*, name, device, engine, sizes, text, output, precision, parallelism):
    setting(name, parallelism)
    workload = workload_of(name, sizes, text, output)
    settings_ = {"engine": engine, "precision": precision, "parallelism": parallelism}
    most = predict(name, device, workload, **settings_).max_batch
    assert most % parallelism.dp == 0 or most == MAX_BATCH
    if most:
        assert predict(name, device, workload, batch=most, **settings_).fits
    if most < MAX_BATCH:
        assert not predict(name, device, workload, batch=most + 1, **settings_).fits


ABLE = [(name, parallelism) for name in (*KINDS, TEXT_ONLY) for parallelism in SHARED]
ABLE = [(name, parallelism) for name, parallelism in ABLE if parallelism.ep == 1 or name in WITH_EXPERTS]


@pytest.mark.parametrize(("name", "parallelism"), ABLE, ids=str)
def test_max_batch_of_every_kind_of_model(name, parallelism):
    workload = workload_of(name, [(900, 600)], 3000)
    at = {"engine": "fused", "parallelism": parallelism}
    most = predict(name, H200, workload, **at).max_batch
    assert most > 1
    assert predict(name, H200, workload, batch=most, **at).fits
    assert not predict(name, H200, workload, batch=most + 1, **at).fits


def test_a_model_larger_than_the_device_has_no_batch():
    p = predict("qwen2.5-vl-72b", A100, images((640, 480)))
    assert p.max_batch == p.memory.kv_blocks == 0
    assert not p.fits


@pytest.mark.parametrize("name", [*KINDS, TEXT_ONLY])
def test_longer_requests_fit_less_often(name):
    batches = [predict(name, A100, workload_of(name, [(900, 600)], text)).max_batch for text in (10, 1000, 30_000)]
    assert batches == sorted(batches, reverse=True)
    assert batches[0] > batches[-1]


def test_devices_with_more_memory_fit_more():
    query = build_query(load_model(EXPERTS), images((900, 600)), load_engine("fused"))
    sizes = [max_batch(query, load_hardware(device)) for device in ("l40s-48gb", A100, H200, "mi300x-192gb")]
    assert sizes[0] == 0  # 62 GB of weights
    assert sizes == sorted(sizes)


# What each kind of layer keeps


def total(name, workload):
    return float(build_query(load_model(name), workload, load_engine("ideal")).prompt_tokens + workload.output_tokens)


@pytest.mark.parametrize(
    ("name", "each"),
    [
        (MULTI_HEAD, 2 * 32 * 32 * 128 * BYTES),
        (EXPERTS, 2 * 48 * 4 * 128 * BYTES),
        (LATENT, 27 * (512 + 64) * BYTES),  # one latent and one rotated key a layer
        (TEXT_ONLY, 2 * 32 * 8 * 128 * BYTES),
    ],
)
@pytest.mark.parametrize("text", [10, 777, 20_000])
def test_full_attention_keeps_every_token(name, each, text):
    workload = workload_of(name, [(900, 600)], text, 50)
    assert per_request(name, workload) == total(name, workload) * each
    assert per_request(name, workload, engine="fused") == blocks_of(total(name, workload)) * each


@pytest.mark.parametrize("text", [10, 700, 1500, 20_000])
def test_sliding_windows_keep_one_token_fewer_than_they_see(text):
    workload = Workload(text_tokens=text, output_tokens=50)
    each = 2 * 4 * 256 * BYTES  # four key/value heads
    windowed, full = 29, 5  # of 34 layers every sixth sees everything
    kept = min(text + 50, 1023)
    assert per_request(SLIDING, workload) == (full * (text + 50) + windowed * kept) * each
    assert (
        per_request(SLIDING, workload, engine="fused")
        == (full * blocks_of(text + 50) + windowed * blocks_of(kept)) * each
    )


@pytest.mark.parametrize("text", [10, 20_000])
def test_cross_attention_keeps_the_pictures_once(text):
    workload = images((1120, 1120), text_tokens=text, output_tokens=50)
    each, pictures_ = 2 * 8 * 128 * BYTES, 4 * 1601  # four tiles of 1600 patches and a class token
    tokens = total(CROSS, workload)
    assert per_request(CROSS, workload) == (32 * tokens + 8 * pictures_) * each
    assert per_request(CROSS, workload, engine="fused") == (32 * blocks_of(tokens) + 8 * pictures_) * each
    longer = images((1120, 1120), text_tokens=text, output_tokens=1050)
    assert per_request(CROSS, longer) - per_request(CROSS, workload) == 1000 * 32 * each
    words = Workload(text_tokens=text, output_tokens=50)
    assert per_request(CROSS, words) == 32 * (text + 50) * each


def test_a_recurrent_state_stays_as_the_context_grows():
    states = 30 * (
        32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * BYTES
    )  # 32 bits; the last inputs of a kernel of 4
    each = 10 * 2 * 2 * 256 * BYTES  # the other ten layers: two heads of 256
    assert load_model(RECURRENT).decoder.state_bytes == states
    for text in (1, 1000, 100_000):
        workload = Workload(text_tokens=text, output_tokens=50)
        assert per_request(RECURRENT, workload) == states + (text + 50) * each
        assert per_request(RECURRENT, workload, engine="fused") == states + blocks_of(text + 50) * each
    found = predict(RECURRENT, H200, Workload(text_tokens=1000)).memory
    assert found.block_bytes == 16 * each  # states are in no block


@pytest.mark.parametrize("name", KINDS)
def test_a_step_reads_what_is_kept(name):
    workload = workload_of(name, [(900, 600)], 3000, 2)  # one step
    step = predict(name, H200, workload, engine="ideal").stages["decode"].kv_bytes
    states = load_model(name).decoder.state_bytes  # are written too
    assert step == pytest.approx(per_request(name, workload) + states, rel=2e-3)


# Activations


@pytest.mark.parametrize("name", [*KINDS, TEXT_ONLY])
def test_chunks_bound_the_activations_of_prefill(name):
    def live(engine, text, batch=1):
        workload = Workload(text_tokens=text)
        return predict(name, H200, workload, engine=engine, batch=batch).memory.prefill_activation_bytes

    assert live("fused", 8192) == live("fused", 100_000)
    assert live("fused", 1000) < live("fused", 8000) < live("fused", 8192)
    assert live("ideal", 100_000) > 10 * live("ideal", 8192)
    logits = load_model(name).decoder.vocabulary * 4
    assert close(live("fused", 8192, batch=5) - live("fused", 8192), 4 * logits, rel=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_passes_bound_the_activations_of_the_encoder(name):
    def live(n_images, batch=1):
        workload = images(*[(896, 896)] * n_images)
        return predict(name, H200, workload, batch=batch).memory.encode_activation_bytes

    few, many = live(40), live(80)
    each = (many - few) / 40  # pixels and embeddings of an image wait for the language model
    assert 0 < each < live(1)
    assert close(live(120) - many, 40 * each, rel=1e-6)
    assert close(live(1, batch=80), live(80), rel=1e-9)


def test_the_largest_image_is_encoded_whole():
    live = [predict(GROUPED, H200, images((side, side))).memory.encode_activation_bytes for side in (1000, 2000, 3500)]
    assert live == sorted(live)
    assert live[2] > 3 * live[1] * 0.9


def test_a_sweep_of_caches_equals_its_points():
    text = np.array([10.0, 700.0, 5000.0])
    for name in KINDS:
        query = build_query(load_model(name), Workload(text_tokens=text), load_engine("fused"))
        points = [per_request(name, Workload(text_tokens=words), engine="fused") for words in text]
        assert np.asarray(kv_bytes_per_request(query)).tolist() == pytest.approx(points, rel=1e-12)
