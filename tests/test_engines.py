"""Engines: laws of host time, what the traits of an engine add, codecs of pictures, and what they explain."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import (
    Image,
    Parallelism,
    Unsupported,
    Video,
    Workload,
    engine_names,
    load_engine,
    load_hardware,
    load_model,
    predict,
)
from costmodel.engine import LAUNCHED_STAGES, EngineProfile, engine_values
from costmodel.workload import CODECS
from studies.cli import main
from studies.validation.published_files import PhaseTimes, model_of, read_rows

NAMED = [name for name in engine_names() if load_engine(name).pricing == "operators"]
EAGER = [name for name in NAMED if load_engine(name).layer_host_s]
REQUEST = Workload(images=[Image(1280, 720)], text_tokens=64, output_tokens=16)
GROUPED, UNGROUPED = "qwen2.5-vl-7b", "llava-1.5-7b"
DEVICE = "a100-sxm4-80gb"
KV_BYTES = 2  # of a cached number
TIMES = ("ttft_s", "tpot_s", "total_s")


def changed(name, **values):
    """Return an engine with other values; what it says of its sources is of no interest here."""
    sources = [{"kind": "assumed", "title": "test", "covers": ["*"]}]
    return EngineProfile.model_validate({**engine_values(name), **values, "sources": sources})


def bare(name):
    """Return an engine whose host takes no time."""
    return changed(name, layer_host_s={}, step_host_s=0.0, request_host_s=0.0, sequence_host_s=0.0)


CACHE = ("decode.attention", "decode.concatenate_cache", "decode.repeat_heads")


def operators(prediction, stage):
    return {operator.name: operator for operator in prediction.stages[stage].operators}


# Files


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("ideal", "fused")])
def test_an_engine_like_another_says_the_same_but_for_its_own(name):
    values, base = engine_values(name), engine_values("fused")
    assert "like" not in values
    assert set(base) <= set(values)
    assert values["efficiency"]["gemm"] == base["efficiency"]["gemm"]
    assert values["sources"][-len(base["sources"]) :] == base["sources"]
    assert load_engine(name).spread is not None
    assert load_engine(name).host_low < 0 < load_engine(name).host_high


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("ideal", "fused")])
def test_host_times_have_a_source_of_their_own(name):
    fused = {source["title"] for source in engine_values("fused")["sources"]}
    own = [source for source in load_engine(name).sources if source.title not in fused]
    host = [key for key in load_engine(name).numbers() if "host" in key]
    assert "layer_host_s.encode" in host
    assert all(any(source.covers_key(key) for source in own) for key in host)


# Laws of host time


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMED),
    key=st.sampled_from(("step_host_s", "request_host_s", "sequence_host_s", *LAUNCHED_STAGES)),
    added=st.floats(1e-6, 1e-2),
    batch=st.sampled_from((1, 8)),
    device=st.sampled_from((DEVICE, "h100-sxm5-80gb")),
)
def test_more_host_time_never_lowers_a_time(name, key, added, batch, device):
    engine = load_engine(name)
    held = dict(engine.layer_host_s)
    more = {"layer_host_s": {**held, key: held.get(key, 0.0) + added}}
    if key not in LAUNCHED_STAGES:
        more = {key: getattr(engine, key) + added}
    before = predict(GROUPED, device, REQUEST, batch=batch, engine=engine)
    after = predict(GROUPED, device, REQUEST, batch=batch, engine=changed(name, **more))
    for field in TIMES:
        assert getattr(after, field) >= getattr(before, field) * (1 - 1e-12)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("batch", [1, 64])
def test_an_eager_engine_is_never_faster_than_with_graphs(name, batch):
    eager = predict(UNGROUPED, DEVICE, REQUEST, batch=batch, engine=load_engine(name))
    graphs = predict(UNGROUPED, DEVICE, REQUEST, batch=batch, engine=changed(name, layer_host_s={}))
    assert all(getattr(eager, field) >= getattr(graphs, field) for field in TIMES)
    if batch == 1:
        assert eager.ttft_s > graphs.ttft_s


def test_a_pass_takes_no_less_than_the_host_needs_to_issue_it():
    engine = load_engine("hf-eager")
    layers = sum(run.n_layers for run in load_model(UNGROUPED).decoder.runs)
    p = predict(UNGROUPED, DEVICE, REQUEST, engine=engine)
    parts, steps = operators(p, "decode"), REQUEST.output_tokens - 1
    cache_s = sum(part.time_s for name, part in parts.items() if name in CACHE) / steps
    assert 0 < cache_s < 0.2 * p.tpot_s
    assert p.tpot_s == pytest.approx(layers * engine.layer_host_s["decode"] + cache_s, rel=1e-9)
    assert p.stages["decode"].bound == "host"
    alongside = predict(UNGROUPED, DEVICE, REQUEST, engine=changed("hf-eager", cache_adds_to_host=False))
    assert alongside.tpot_s == pytest.approx(layers * engine.layer_host_s["decode"], rel=1e-12)


@pytest.mark.parametrize("name", EAGER)
def test_a_faster_host_never_slows_a_request(name):
    times = [
        predict(GROUPED, f"{DEVICE}:host_speed={speed}", REQUEST, engine=name).total_s for speed in (0.5, 1, 1.45, 4)
    ]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_hosts_of_one_class_have_one_speed():
    newer = ("h100-sxm5-80gb", "h200-sxm-141gb", "h20-96gb", "l40s-48gb", "b200-sxm-180gb", "mi300x-192gb")
    assert {load_hardware(name).host_speed for name in newer} == {1.45}
    assert load_hardware(DEVICE).host_speed == 1.0


@pytest.mark.parametrize("name", NAMED)
def test_a_sweep_of_batches_is_its_points(name):
    batches = np.array([1.0, 4.0, 32.0])
    sweep = predict(GROUPED, DEVICE, REQUEST, batch=batches, engine=name)
    for i, batch in enumerate(batches):
        point = predict(GROUPED, DEVICE, REQUEST, batch=float(batch), engine=name)
        assert sweep.ttft_s[i] == pytest.approx(point.ttft_s, rel=1e-12)
        assert sweep.tpot_s[i] == pytest.approx(point.tpot_s, rel=1e-12)


# Traits


def decode_bytes(model, engine, **traits):
    """Return the cache traffic of one decode step, and the keys that it sees."""
    workload = Workload(text_tokens=1000, output_tokens=2)
    p = predict(model, DEVICE, workload, engine=changed(engine, **traits))
    return p.stages["decode"].kv_bytes, 1001


@pytest.mark.parametrize("model", [GROUPED, UNGROUPED, "llama-3.1-8b"])
def test_repeated_heads_add_exactly_their_bytes(model):
    decoder = load_model(model).decoder
    mixer, layers = decoder.runs[0].layer.mixer, sum(run.n_layers for run in decoder.runs)
    without, keys = decode_bytes(model, "fused")
    with_copies, _ = decode_bytes(model, "fused", repeats_heads=True)
    copies = 2 * (mixer.kv_width + mixer.q_width)  # read, and written for every query head
    wider = 2 * (mixer.q_width - mixer.kv_width)  # what attention reads more
    expected = layers * keys * (copies + wider) * KV_BYTES if mixer.heads > mixer.kv_heads else 0
    assert with_copies - without == pytest.approx(expected, rel=1e-9, abs=1e-3)


def test_concatenation_adds_two_caches_a_step():
    mixer, layers = load_model(GROUPED).decoder.runs[0].layer.mixer, 28
    without, keys = decode_bytes(GROUPED, "fused")
    with_copies, _ = decode_bytes(GROUPED, "fused", concatenates_cache=True)
    assert with_copies - without == pytest.approx(layers * keys * 2 * (2 * mixer.kv_width) * KV_BYTES, rel=1e-9)


def test_what_pytorch_runs_in_pieces_moves_bytes_and_computes_nothing_more():
    whole = predict(GROUPED, DEVICE, REQUEST, engine=bare("fused"))
    pieces = predict(GROUPED, DEVICE, REQUEST, engine=changed("fused", fuses_elementwise=False))
    for stage in ("encode", "prefill", "decode"):
        one, other = whole.stages[stage], pieces.stages[stage]
        assert one.flops == other.flops
        assert (one.weight_bytes, one.link_bytes) == (other.weight_bytes, other.link_bytes)
        assert other.activation_bytes > one.activation_bytes
        assert other.time_s > one.time_s
    names = ("norm_attention", "norm_ffn", "activation", "rotary")
    ratio = {
        name: operators(pieces, "prefill")[f"prefill.{name}"].bytes
        / operators(whole, "prefill")[f"prefill.{name}"].bytes
        for name in names
    }
    assert ratio["norm_attention"] == pytest.approx(21 / 4)  # see `costmodel.ffns.NORM_NUMBERS`
    assert ratio["activation"] == pytest.approx(5 / 3)
    assert 4 < ratio["rotary"] < 5  # the cache is written as before


# The survey's Table 8, full cache


def table_8():
    cache_tokens = 1.73e9 / 57_344  # 28 layers, 4 heads of 128, keys and values, 2 bytes
    workload = Workload(visual_tokens=round(cache_tokens) - 64, text_tokens=64, output_tokens=128)
    return predict(GROUPED, "l40s-48gb", workload, engine="hf-eager")


def test_the_cache_comes_on_top_of_the_host_as_in_the_plot_that_says_so():
    # SparseMM (arXiv:2506.05344), read from its plot: full cache less 256 tokens a head, by context [s]
    added_s = {8_192: 52.2e-3 - 44.7e-3, 16_384: 60.1e-3 - 44.4e-3, 32_768: 76.0e-3 - 45.2e-3}
    model = "llava-v1.6-mistral-7b"
    step_s = {
        tokens: predict(
            model, "a100-sxm4-80gb", Workload(text_tokens=tokens, output_tokens=2), engine="hf-eager"
        ).tpot_s
        for tokens in (256, *added_s)
    }
    for tokens, added in added_s.items():  # the device is not stated; an A100 is assumed
        assert step_s[tokens] - step_s[256] == pytest.approx(added, rel=0.15)


def test_a_copied_engine_forgets_what_was_derived_from_the_original():
    engine = load_engine("hf-eager")
    assert engine.execution.apart
    assert engine.by_kind.shape
    other = engine.model_copy(update={"fuses_elementwise": True, "efficiency": {}})
    assert not other.execution.apart
    assert (other.by_kind != engine.by_kind).any()
    assert engine.execution.apart


def test_table_8_is_explained_by_its_parts():
    p = table_8()
    assert p.tpot_s == pytest.approx(58.94e-3, rel=0.15)
    steps, parts = 127, operators(p, "decode")
    cache = parts["decode.concatenate_cache"].bytes / 2 / steps
    assert cache == pytest.approx(1.73e9, rel=0.01)
    groups = 7  # query heads that share a key
    assert parts["decode.repeat_heads"].bytes / steps == pytest.approx((1 + groups) * cache, rel=1e-9)
    assert parts["decode.attention"].bytes / steps == pytest.approx(groups * cache, rel=1e-3)
    shares = {name: part.time_s / steps / p.tpot_s for name, part in parts.items()}
    copies = shares["decode.concatenate_cache"] + shares["decode.repeat_heads"]
    weights = sum(share for name, share in shares.items() if parts[name].kind == "gemm")
    assert copies + shares["decode.attention"] + weights == pytest.approx(1, abs=0.03)
    assert copies + shares["decode.attention"] > 0.6  # the cache, moved seventeen times over
    layers, engine = 28, load_engine("hf-eager")
    assert layers * engine.layer_host_s["decode"] / load_hardware("l40s-48gb").host_speed < p.tpot_s


def test_table_8_is_not_explained_by_a_fused_engine():
    fused = predict(GROUPED, "l40s-48gb", Workload(visual_tokens=30_105, text_tokens=64, output_tokens=128))
    assert fused.tpot_s < 0.5 * 58.94e-3


# The host times of vLLM of 2023


def test_the_rows_that_host_times_are_from_are_reproduced():
    rows = [times for times in read_rows("splitwise.csv", PhaseTimes) if times.calibration]
    assert len(rows) == 4
    for times in rows:
        p = predict(
            model_of(times.model),
            times.hardware,
            Workload(text_tokens=times.prompt_tokens, output_tokens=times.output_tokens),
            batch=times.batch,
            parallelism=Parallelism(tp=times.tp),
            engine="vllm-0.2",
        )
        assert p.tpot_s * 1e3 == pytest.approx(times.token_ms, rel=0.06)
        if times.batch == 1:
            assert p.ttft_s * 1e3 == pytest.approx(times.prompt_ms, rel=0.12)


# Codecs


def preprocess_s(codec, engine="fused"):
    workload = Workload(images=[Image(1920, 1080, codec)], text_tokens=8, output_tokens=1)
    return predict(UNGROUPED, DEVICE, workload, engine=engine).stages["preprocess"].time_s


def test_a_codec_costs_what_its_rate_says():
    rates, pixels = load_engine("fused").preprocessing.decode_s_per_pixel, 1920 * 1080
    for codec in ("jpeg", "png", "webp"):
        assert preprocess_s(codec) - preprocess_s("raw") == pytest.approx(pixels * rates[codec], rel=1e-9)
    assert preprocess_s("png") > preprocess_s("webp") > preprocess_s("jpeg") > preprocess_s("raw") > 0


def test_a_codec_without_a_rate_is_refused_in_one_line():
    with pytest.raises(Unsupported, match=r"codec='other' of an image has no decoding time; .*: jpeg, png, webp, raw"):
        preprocess_s("other")
    assert preprocess_s("other", engine="ideal") > 0  # where decoding costs nothing, no rate is missing


def test_codecs_add_up_in_a_request():
    images = [Image(640, 480, codec) for codec in ("jpeg", "png", "png")]
    rates, pixels = load_engine("fused").preprocessing.decode_s_per_pixel, 640 * 480
    mixed = predict(UNGROUPED, DEVICE, Workload(images=images)).stages["preprocess"].time_s
    raw = predict(UNGROUPED, DEVICE, Workload(images=[Image(640, 480, "raw")] * 3)).stages["preprocess"].time_s
    assert mixed - raw == pytest.approx(pixels * (rates["jpeg"] + 2 * rates["png"]), rel=1e-9)


def test_frames_of_a_video_have_their_own_rate():
    video = Video(640, 480, seconds=2.0, fps=8.0, frames=4)
    engines = [
        changed("fused", preprocessing={**engine_values("fused")["preprocessing"], "frame_s_per_pixel": rate})
        for rate in (0.0, 1e-8)
    ]
    slow, fast = (
        predict(GROUPED, DEVICE, Workload(videos=[video]), engine=engine).stages["preprocess"].time_s
        for engine in reversed(engines)
    )
    assert slow - fast == pytest.approx(4 * 640 * 480 * 1e-8, rel=1e-9)


def test_pictures_by_number_of_tokens_are_jpeg_and_sweep():
    tokens = np.array([576.0, 1152.0])
    sweep = predict(UNGROUPED, DEVICE, Workload(visual_tokens=tokens))
    for i, number in enumerate(tokens):
        point = predict(UNGROUPED, DEVICE, Workload(visual_tokens=float(number)))
        assert sweep.ttft_s[i] == pytest.approx(point.ttft_s, rel=1e-12)
    coded = dict(zip(CODECS, sweep.query.media.coded_pixels, strict=True))
    assert np.all(coded["jpeg"] > 0)
    assert not any(np.any(pixels) for codec, pixels in coded.items() if codec != "jpeg")


def test_an_engine_may_state_known_codecs_alone():
    with pytest.raises(ValueError, match=r"decode_s_per_pixel\.raw is no codec that is decoded"):
        changed("fused", preprocessing={"decode_s_per_pixel": {"raw": 1e-9}})


# The command


def test_codecs_are_typed_behind_a_size(capsys):
    request = ["predict", UNGROUPED, DEVICE, "--json", "--image"]
    assert main([*request, "640x480:png"]) == 0
    png = json.loads(capsys.readouterr().out)
    assert png["inputs"]["images"] == [{"source": "640x480:png", "width": 640, "height": 480, "codec": "png"}]
    assert main([*request, "640x480"]) == 0
    assert json.loads(capsys.readouterr().out)["ttft_s"] < png["ttft_s"]
    assert main([*request, "640x480:pgn"]) == 2
    assert (
        capsys.readouterr().err
        == "lvlm: unknown image codec 'pgn'; did you mean 'png'? known: jpeg, other, png, raw, webp\n"
    )


@pytest.mark.parametrize("name", NAMED)
def test_an_engine_is_shown_with_what_it_launches_and_runs(name, capsys):
    assert main(["engines", name, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["engines"][0]
    engine = load_engine(name)
    assert shown["launches"] == {s: "eager" if s in engine.layer_host_s else "graph" for s in LAUNCHED_STAGES}
    assert shown["kernels"] == {kind: list(libraries) for kind, libraries in engine.kernels.items()}
    assert shown["preprocessing"]["decode_s_per_pixel"] == dict(engine.preprocessing.decode_s_per_pixel)
    assert {number["key"] for number in shown["numbers"]} == set(engine.numbers())
    assert main(["engines", name]) == 0
    text = capsys.readouterr().out
    assert ("launched eagerly" in text) == bool(engine.layer_host_s)
