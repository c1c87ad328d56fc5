"""What holds of every model of the catalogue, whatever its family: it runs everywhere, and nothing seen is free."""

import itertools
import json

import numpy as np
import pytest

from costmodel import (
    Image,
    Precision,
    Unsupported,
    Video,
    Workload,
    engine_names,
    hardware_names,
    load_hardware,
    load_model,
    model_names,
    predict,
)
from costmodel.counts import count
from tests.helpers import CLEAN_ERRORS, POINT, assert_clean, clip, images, representatives, seeing_models, takes_videos

H100 = "h100-sxm5-80gb"
WORDS = Workload(text_tokens=64, output_tokens=32)
SIZES = [(1, 1), (28, 28), (100, 100), (336, 336), (640, 480), (500, 2000), (1920, 1080), (4000, 3000)]
CLIPS = [(2, 64, 64), (3, 640, 480), (32, 1280, 720)]
TOKENS = np.array([1.0, 7.0, 256.0, 1000.0, 30_000.0])
STAGES = {"preprocess", "encode", "adapt", "prefill", "decode"}
SEEING = seeing_models()
READING = [name for name in model_names() if name not in SEEING]
SWEPT = ("ttft_s", "tpot_s", "total_s")
SEVERAL = 3 * [(640, 480)]  # from three images on no family cuts fewer tiles of each


def assert_adds_up(p, model):
    memory = p.memory
    assert memory.weights_bytes == 2 * model.parameters()["total"]
    parts = memory.weights_bytes + memory.kv_bytes + memory.activation_bytes + memory.reserve_bytes
    assert memory.peak_bytes == pytest.approx(parts, **POINT)
    assert memory.peak_bytes > 0
    assert memory.usable_bytes <= memory.capacity_bytes
    assert memory.fits == (memory.peak_bytes <= memory.usable_bytes) == (p.max_batch >= 1)


def assert_runs(name, devices, engines):
    model = load_model(name)
    seen = Workload(images=[Image(1280, 720)]) if model.media else Workload(text_tokens=500)
    for device in devices:
        for engine in engines:
            for workload in (seen, Workload(text_tokens=1, output_tokens=1)):
                p = predict(model, device, workload, engine=engine)
                told = json.loads(json.dumps(p.as_dict(), allow_nan=False))
                assert 0 < told["ttft_s"] <= told["total_s"]
                assert told["tpot_s"] > 0
                assert told["energy_j"] > 0
                assert told["fits"] == (told["max_batch"] >= 1)
                assert set(told["stages"]) == STAGES
                assert_adds_up(p, model)


@pytest.mark.parametrize("name", model_names())
def test_every_model_runs_on_every_device(name):
    turn = model_names().index(name)
    for i, device in enumerate(hardware_names()):  # a third of all; the slow suite runs the rest
        assert_runs(name, [device], [engine_names()[(turn + i) % len(engine_names())]])


@pytest.mark.slow
@pytest.mark.parametrize("name", model_names())
def test_every_model_runs_on_every_device_and_engine(name):
    assert_runs(name, hardware_names(), engine_names())


def test_devices_without_bf16_compute_16_bits_in_fp16():
    old = [name for name in hardware_names() if "bf16" not in load_hardware(name).peak_flops_per_s]
    assert any(name.startswith("v100") for name in old)
    for device in old:
        assert load_hardware(device).precision(16) == "fp16"
        for name in representatives():
            assert predict(name, device, images((640, 480)) if load_model(name).media else WORDS).ttft_s > 0


@pytest.mark.parametrize("name", model_names())
def test_narrow_weights_take_less_memory_and_no_more_time(name):
    wide, narrow = (predict(name, H100, WORDS, precision=Precision(weight_bits=bits)) for bits in (16, 8))
    model = load_model(name)
    halved = model.decoder.layer_parameters
    assert wide.memory.weights_bytes - narrow.memory.weights_bytes == pytest.approx(halved, rel=1e-9)
    assert narrow.tpot_s < wide.tpot_s


# Nothing that is seen is free


def assert_not_free(name, workload, *, than=WORDS):
    """Check that a workload with pictures costs more than one with fewer in every count."""
    less, more = count(name, than), count(name, workload)
    assert more.tokens["prompt"] + more.tokens["cross"] > less.tokens["prompt"] + less.tokens["cross"]
    assert more.tokens["prompt"] == more.tokens["visual"] + more.tokens["markers"] + more.tokens["text"]
    assert more.tokens["patches"] > less.tokens["patches"]
    for stage in ("encode", "adapt", "prefill"):
        assert more.flops[stage] > less.flops[stage], stage
    assert more.flops["decode_step"] >= less.flops["decode_step"]  # equal where every layer slides or recurs
    assert more.kv_bytes > less.kv_bytes
    executed = count(name, workload, convention="torch").flops
    assert all(executed[stage] >= more.flops[stage] for stage in ("encode", "adapt"))
    assert predict(name, H100, workload).ttft_s > predict(name, H100, than).ttft_s


@pytest.mark.parametrize("name", SEEING)
def test_no_image_is_free(name):
    n_priced = 0
    for size in SIZES:
        try:
            count(name, images(size))
        except CLEAN_ERRORS as error:
            assert_clean(error)
            continue
        n_priced += 1
        assert_not_free(name, images(size))
        assert_not_free(name, images(size, *SEVERAL), than=images(*SEVERAL))
    assert n_priced >= len(SIZES) - 1  # one family refuses the smallest picture, as its processor does


@pytest.mark.parametrize("name", [name for name in SEEING if takes_videos(name)])
def test_no_video_is_free(name):
    for shape in CLIPS:
        video = Workload(videos=[clip(*shape)], text_tokens=64, output_tokens=32)
        assert_not_free(name, video)
        both = Workload(videos=[clip(*shape)], images=[Image(640, 480)], text_tokens=64, output_tokens=32)
        assert_not_free(name, both, than=video)
    sampled = Workload(videos=[Video(640, 480, 20.0, 25.0)], text_tokens=64, output_tokens=32)
    assert_not_free(name, sampled)


@pytest.mark.parametrize("name", [name for name in SEEING if not takes_videos(name)])
def test_videos_are_refused_where_none_are_taken(name):
    for video in (clip(3, 640, 480), Video(640, 480, 20.0, 25.0)):
        with pytest.raises(Unsupported) as raised:
            count(name, Workload(videos=[video]))
        assert_clean(raised.value)


@pytest.mark.parametrize("name", READING)
def test_pictures_are_refused_where_nothing_sees(name):
    for workload in (images((640, 480)), Workload(videos=[clip(3, 640, 480)]), Workload(visual_tokens=100.0)):
        with pytest.raises(Unsupported, match="no vision part") as raised:
            predict(name, H100, workload)
        assert_clean(raised.value)


# A number of visual tokens


@pytest.mark.parametrize("name", SEEING)
def test_a_sweep_over_visual_tokens_equals_its_points(name):
    for engine in engine_names():
        swept = predict(name, H100, Workload(visual_tokens=TOKENS, text_tokens=64, output_tokens=32), engine=engine)
        for i, n_tokens in enumerate(TOKENS):
            point = Workload(visual_tokens=float(n_tokens), text_tokens=64, output_tokens=32)
            p = predict(name, H100, point, engine=engine)
            for field in SWEPT:
                assert getattr(swept, field)[i] == pytest.approx(getattr(p, field), **POINT), (engine, n_tokens, field)


@pytest.mark.parametrize("name", SEEING)
def test_more_visual_tokens_cost_more(name):
    counts = [count(name, Workload(visual_tokens=float(n), text_tokens=64)) for n in TOKENS]
    for less, more in itertools.pairwise(counts):
        assert all(more.flops[stage] > less.flops[stage] for stage in ("encode", "adapt", "prefill"))
        assert more.kv_bytes > less.kv_bytes
