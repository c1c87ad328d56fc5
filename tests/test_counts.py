"""Counts against the real `transformers` models and processors, with equality."""

import json
import random

import pytest

from costmodel import Image, Video, Workload, load_model, model_names
from costmodel.catalogue import with_pixel_limits
from costmodel.counts import count
from costmodel.media import n_frames
from tests.helpers import (
    GOLDENS,
    ORACLE_TYPES,
    POINT,
    clip,
    images,
    load_config,
    models,
    real_model,
    takes_videos,
)

GOLDEN = json.loads((GOLDENS / "transformers_counts.json").read_text(encoding="utf-8"))
GOLDEN_MODELS = [name for name in GOLDEN if name != "source"]
WITH_ORACLE = models(oracle=True)
WITH_VIDEOS = [parameter for parameter in WITH_ORACLE if takes_videos(parameter.values[0])]
WITHOUT_ORACLE: set[str] = set()  # a model whose family has no oracle stands here, with its reason

SIZES = [
    (336, 336),
    (448, 448),
    (640, 480),
    (1024, 768),
    (1280, 720),
    (1920, 1080),
    (1080, 1920),
    (3840, 2160),
    (100, 100),
    (1, 1),
    (13, 27),
    (27, 5000),
    (5000, 27),
    (28, 28),
    (42, 70),  # both sides halfway between two multiples of 28: Python rounds to the even one
    (799, 1201),
    (1000, 200),
    (500, 2000),
    (1343, 337),
    (2999, 1777),
]
CLIPS = [(2, 448, 448), (3, 640, 480), (8, 640, 480), (7, 1280, 720), (16, 200, 1000)]
N_RANDOM = 300


def test_every_model_has_an_oracle():
    without = {name for name in model_names() if load_config(name)["model_type"] not in ORACLE_TYPES}
    assert without == WITHOUT_ORACLE


# Against the real model on the meta device


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_parameters_are_those_of_transformers(name):
    from tests.oracle import transformers_counts

    theirs = transformers_counts.parameters(real_model(name))
    ours = load_model(name).parameters()
    assert {part: ours[part] for part in theirs} == theirs
    assert ours["active"] == ours["total"]


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_cache_bytes_per_token_are_those_of_transformers(name):
    from tests.oracle import transformers_counts

    counts = count(name, Workload(text_tokens=77))
    assert counts.kv_bytes_per_token == transformers_counts.kv_bytes_per_token(real_model(name))
    assert counts.kv_bytes == 77 * counts.kv_bytes_per_token
    assert counts.weight_bytes == 2 * counts.parameters["total"]


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_vision_flops_of_an_image_are_those_of_transformers(name):
    from tests.oracle import transformers_counts, transformers_tokens

    config, model = load_config(name), real_model(name)
    for size in [(336, 336), (799, 500)]:  # the second has windows cut short on two sides, and several tiles
        image = transformers_tokens.image_input(config, *size)
        ours = count(name, images(size), convention="torch").flops
        assert ours["encode"] == pytest.approx(transformers_counts.encode_flops(model, image).total, **POINT)
        assert ours["adapt"] == pytest.approx(transformers_counts.adapt_flops(model, image).total, **POINT)


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_vision_flops_of_a_video_are_those_of_transformers(name):
    from tests.oracle import transformers_counts, transformers_tokens

    model, shape = real_model(name), (3, 350, 250)
    video = transformers_tokens.video_input(load_config(name), *shape)
    ours = count(name, Workload(videos=[clip(*shape)]), convention="torch").flops
    assert ours["encode"] == pytest.approx(transformers_counts.encode_flops(model, video).total, **POINT)
    assert ours["adapt"] == pytest.approx(transformers_counts.adapt_flops(model, video).total, **POINT)


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_language_flops_are_those_of_transformers(name):
    from tests.oracle import transformers_counts

    model = real_model(name)
    for n_tokens in (1, 777):
        ours = count(name, Workload(text_tokens=n_tokens), convention="torch").flops
        assert ours["prefill"] == pytest.approx(transformers_counts.prefill_flops(model, n_tokens).total, **POINT)
        step = transformers_counts.decode_step_flops(model, n_tokens).total
        assert ours["decode_step"] == pytest.approx(step, **POINT)


def test_flops_of_a_batch_are_those_of_its_requests():
    one = count("qwen2.5-vl-7b", images((640, 480)), convention="kernel")
    five = count("qwen2.5-vl-7b", images((640, 480)), convention="kernel", batch=5)
    assert five.flops == pytest.approx({stage: 5 * flops for stage, flops in one.flops.items()}, **POINT)
    assert five.kv_bytes == pytest.approx(5 * one.kv_bytes, **POINT)
    assert five.tokens == one.tokens


# Against the real processors


def assert_image_tokens(name, width, height):
    from tests.oracle import transformers_tokens

    theirs = transformers_tokens.image_tokens(load_config(name), width, height)
    ours = count(name, images((width, height))).tokens
    assert {kind: ours[kind] for kind in theirs} == theirs, f"{width}x{height}"
    assert ours["prompt"] == ours["visual"] + ours["markers"] + ours["text"]


def assert_video_tokens(name, frames, width, height):
    from tests.oracle import transformers_tokens

    theirs = transformers_tokens.video_tokens(load_config(name), frames, width, height)
    ours = count(name, Workload(videos=[clip(frames, width, height)])).tokens
    assert {kind: ours[kind] for kind in theirs} == theirs, f"{frames} frames of {width}x{height}"


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_image_tokens_are_those_of_the_processor(name):
    for size in SIZES:
        assert_image_tokens(name, *size)


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_video_tokens_are_those_of_the_processor(name):
    for shape in CLIPS:
        assert_video_tokens(name, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", [p for p in WITH_ORACLE if not p.marks])
def test_tokens_of_random_sizes_are_those_of_the_processor(name):
    dice = random.Random(20260)  # noqa: S311 - sizes, not secrets
    for _ in range(N_RANDOM):
        width = round(10 ** dice.uniform(0, 3.4))
        height = min(max(1, round(width * 10 ** dice.uniform(-1.3, 1.3))), 4000)
        if max(width, height) > 200 * min(width, height):
            continue  # the processor refuses; tested on its own
        assert_image_tokens(name, width, height)
        if takes_videos(name):
            assert_video_tokens(name, dice.randint(1, 70), width, height)


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (4021, 20)])
def test_strips_that_the_processor_refuses_are_refused(size):
    from tests.oracle import transformers_tokens

    with pytest.raises(ValueError, match="aspect ratio"):
        transformers_tokens.image_input(load_config("qwen2.5-vl-7b"), *size)
    with pytest.raises(ValueError, match="200 times"):
        count("qwen2.5-vl-7b", images(size))
    assert count("qwen2.5-vl-7b", images((200, 1))).tokens["visual"] > 0


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ((3136, 12845056), [(4, 9), (1, 36), (2, 288), (5, 245), (1, 1)]),
        ((3136, 401408), [(1103, 2206), (1466, 2932), (640, 480), (5000, 40)]),
        ((100352, 602112), [(1602, 2136), (30, 40), (775, 777), (776, 776), (4000, 3000)]),
        ((65536, 602112), [(1704, 1278), (256, 256), (255, 255)]),
        ((200704, 1003520), [(2635, 2108), (448, 448), (447, 448), (1920, 1080)]),
    ],
)
def test_pixel_limits_are_those_of_the_processor(limits, sizes):
    from tests.oracle import transformers_tokens

    config = load_config("qwen2.5-vl-7b")
    limited = with_pixel_limits(load_model("qwen2.5-vl-7b"), *limits)
    for size in sizes:
        theirs = transformers_tokens.image_tokens(config, *size, pixels=limits)
        assert count(limited, images(size)).tokens["visual"] == theirs["visual"], size


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "internvl3-8b"])
@pytest.mark.parametrize("sample_fps", [0.5, 1.0, 2.0, 7.5])
def test_sampled_frames_are_those_of_the_processor(name, sample_fps):
    from tests.oracle import transformers_tokens

    rule, config = load_model(name).media, load_config(name)
    for fps in (8.0, 24.0, 29.97, 30.0):
        for seconds in (0.5, 3.0, 5.0, 61.3, 600.0):
            video = Video(640, 480, seconds, fps, sample_fps=sample_fps)
            if name.startswith("internvl") and seconds * sample_fps < 1:
                assert n_frames(rule, video) == 1  # the processor divides by zero
                continue
            theirs = transformers_tokens.sample_frames(config, video.total_frames, fps, target_fps=sample_fps)
            assert n_frames(rule, video) == theirs, video


def test_frames_taken_when_none_are_asked_for():
    from tests.oracle import transformers_tokens

    config = load_config("qwen2.5-vl-7b")
    for seconds in (0.1, 1.0, 5.0, 47.9, 1000.0):
        video = Video(640, 480, seconds, 25.0)
        theirs = transformers_tokens.sample_frames(config, video.total_frames, 25.0)
        assert n_frames(load_model("qwen2.5-vl-7b").media, video) == theirs, video
    assert n_frames(load_model("internvl3-8b").media, Video(640, 480, 5.0, 24.0)) == 8  # model cards' examples


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "internvl3-8b"])
@pytest.mark.parametrize("sample_fps", [11.0, 30.0, 1000.0])
def test_a_clip_never_gives_more_frames_than_it_has(name, sample_fps):
    # Qwen2.5-VL caps; InternVL's processor raises ValueError
    video = Video(640, 480, 3.0, 10.0, sample_fps=sample_fps)
    try:
        taken = n_frames(load_model(name).media, video)
    except ValueError:
        return
    assert taken <= video.total_frames


def test_llava_takes_no_video_and_says_so():
    with pytest.raises(ValueError, match="frames as images"):
        count("llava-1.5-7b", Workload(videos=[clip(8, 640, 480)]))


# Against the goldens: every number of the file, and the needed work beside the executed one


def total(flops):
    return flops["total"]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_goldens_of_parameters_and_cache(name):
    golden, counts = GOLDEN[name], count(name, Workload())
    assert {part: counts.parameters[part] for part in golden["parameters"]} == golden["parameters"]
    assert counts.kv_bytes_per_token == golden["kv_cache"]["bytes_per_token_bf16"]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_goldens_of_image_tokens(name):
    for size, golden in GOLDEN[name]["image_tokens"].items():
        width, height = map(int, size.split("x"))
        tokens = count(name, images((width, height))).tokens
        assert tokens["visual"] == golden["feature_tokens"], size
        assert tokens["patches"] == golden.get("vit_patches", tokens["patches"]), size
        wrappers = golden.get("wrapper_tokens", golden["llm_tokens"] - golden["feature_tokens"])
        assert tokens["markers"] == wrappers, size


@pytest.mark.parametrize("name", [name for name in GOLDEN_MODELS if GOLDEN[name]["video_tokens"]])
def test_goldens_of_video_tokens(name):
    for shape, golden in GOLDEN[name]["video_tokens"].items():
        tokens = count(name, Workload(videos=[clip(*map(int, shape.split("x")))])).tokens
        assert tokens["visual"] == golden.get("hf_processor_tokens", golden.get("feature_tokens")), shape
        with_text = golden.get("llm_tokens_plus_frame_text")
        assert with_text is None or tokens["visual"] + tokens["markers"] == with_text, shape


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_goldens_of_vision_flops(name):
    for size, golden in GOLDEN[name]["vision_flops"].items():
        width, height = map(int, size.split("x"))
        executed = count(name, images((width, height)), convention="torch").flops
        needed = count(name, images((width, height)), convention="kernel").flops
        assert executed["encode"] == pytest.approx(total(golden["vision"]), **POINT), size
        assert executed["adapt"] == pytest.approx(total(golden["projector"]), **POINT), size
        assert needed["adapt"] == executed["adapt"]
        share = golden.get("layers_needed", 1) / golden["layers"] if "layers_needed" in golden else 1.0
        layers = golden["vision"]["linear"] + golden["vision"]["attn_core"]
        assert needed["encode"] == pytest.approx(layers * share + golden["vision"]["conv"], **POINT), size


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_goldens_of_prefill_flops(name):
    for n_tokens, golden in GOLDEN[name]["prefill_flops"].items():
        workload, head = Workload(text_tokens=int(n_tokens)), golden["lm_head_last_position"]
        executed = count(name, workload, convention="torch").flops["prefill"]
        needed = count(name, workload, convention="kernel").flops["prefill"]
        assert executed == pytest.approx(total(golden["layers"]) + head, **POINT), n_tokens
        causal = golden["layers"]["linear"] + golden["attn_core_causal_half"]
        assert needed == pytest.approx(causal + head, **POINT), n_tokens


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_goldens_of_decode_flops(name):
    for n_cached, golden in GOLDEN[name]["decode_flops"].items():
        for convention in ("torch", "kernel"):
            flops = count(name, Workload(text_tokens=int(n_cached)), convention=convention).flops
            assert flops["decode_step"] == pytest.approx(golden["total"], **POINT), n_cached


def test_an_unknown_convention_lists_the_known_ones():
    with pytest.raises(LookupError, match="gqa-mac"):
        count("llava-1.5-7b", Workload(), convention="mac")


def test_pictures_add_up_in_any_mix():
    name, parts = "qwen2.5-vl-7b", [(640, 480), (1000, 200)]
    both = count(name, Workload(images=[Image(*size) for size in parts], videos=[clip(4, 320, 240)])).tokens
    alone = [count(name, images(size)).tokens for size in parts]
    alone.append(count(name, Workload(videos=[clip(4, 320, 240)])).tokens)
    for kind in ("patches", "visual", "markers"):
        assert both[kind] == sum(tokens[kind] for tokens in alone)
