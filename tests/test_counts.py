"""Counts against the real `transformers` models and processors, with equality."""

import functools
import random

import pytest

from costmodel import Image, Video, Workload, load_model, model_names
from costmodel.catalogue import with_pixel_limits
from costmodel.counts import count
from costmodel.media import n_frames
from tests.check_golden import differences, pairs
from tests.helpers import FAST_MODELS, POINT, clip, images, load_config, models, takes_videos

OTHER_LAYOUT = "its repository has a class of its own, transformers has none"
WITHOUT_ORACLE = {
    "deepseek-vl2": f"{OTHER_LAYOUT}; goldens",
    "deepseek-vl2-small": f"{OTHER_LAYOUT}; decoder alone below, tower and projector in tests/families",
    "deepseek-vl2-tiny": f"{OTHER_LAYOUT}; goldens",
    "internvl2-26b": f"{OTHER_LAYOUT} for InternLM2; as a Llama below, tower and projector in tests/families",
    "internvl2-8b": f"{OTHER_LAYOUT} for InternLM2; as a Llama below, tower and projector in tests/families",
    "internvl2.5-26b": f"{OTHER_LAYOUT} for InternLM2; as a Llama below, tower and projector in tests/families",
    "kimi-vl-a3b": f"{OTHER_LAYOUT}; goldens, decoder alone below",
    "llava-video-7b": f"{OTHER_LAYOUT}; decoder alone below, the rest as a LLaVA-OneVision in tests/families",
    "minicpm-v-2.6": f"{OTHER_LAYOUT}; goldens, decoder alone below",
    "molmo-7b-d": f"{OTHER_LAYOUT}; its parts in tests/families",
    "phi-3.5-vision": f"{OTHER_LAYOUT}; goldens, decoder alone below",
}
WITHOUT_DECODER = {
    "deepseek-vl2": "the router that its config asks for is that of DeepSeek-V3, which the class of V2 lacks; goldens",
    "deepseek-vl2-tiny": "its attention has no latents, which the class of V2 needs; goldens",
    "molmo-7b-d": "its embedding has two parts; as a Qwen2 in tests/families",
}
PIXTRAL = "pixtral-12b"  # of `model_type` llava, but with a tower of its own; tests/families/test_pixtral.py
FAMILIES = ("llava", "qwen2_5_vl", "internvl")
WITH_PICTURES = [
    pytest.param(name, marks=() if name in FAST_MODELS else pytest.mark.slow)
    for name in model_names()
    if load_config(name)["model_type"] in FAMILIES and name != PIXTRAL
]
WITH_VIDEOS = [parameter for parameter in WITH_PICTURES if takes_videos(parameter.values[0])]
N_TOKENS = 77  # no whole number of blocks of any kind
DTYPE_BYTES = 2

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


def ours(name):
    """Return our parameters, cache and FLOPs of text, as `transformers` executes it, under the names of the oracle."""
    counts = count(name, Workload(text_tokens=N_TOKENS), convention="torch")
    flops = {stage: counts.flops[stage] for stage in ("prefill", "decode_step")}
    return {**counts.parameters, "kv_bytes_per_token": counts.kv_bytes_per_token, **flops}


@functools.lru_cache(maxsize=2)
def real_model(name):
    from tests.oracle import transformers_counts

    return transformers_counts.build(load_config(name))


# Against the real model on the meta device


def test_every_model_has_an_oracle():
    from tests.oracle import transformers_counts

    assert {name for name in model_names() if not transformers_counts.is_known(load_config(name))} == set(
        WITHOUT_ORACLE
    )


@pytest.mark.parametrize("name", models(name for name in model_names() if name not in WITHOUT_ORACLE))
def test_parameters_cache_and_flops_of_text_are_those_of_transformers(name):
    from tests.oracle import transformers_counts

    model = real_model(name)
    theirs = {**transformers_counts.parameters(model), **transformers_counts.language(model, N_TOKENS)}
    assert ours(name) == theirs


@pytest.mark.parametrize("name", models(name for name in WITHOUT_ORACLE if name not in WITHOUT_DECODER))
def test_decoders_are_those_of_transformers(name):
    from tests.oracle import transformers_counts

    model = transformers_counts.build(transformers_counts.decoder_alone(load_config(name)))
    theirs = {"language": model.num_parameters(), **transformers_counts.language(model, N_TOKENS)}
    assert {key: ours(name)[key] for key in theirs} == theirs


@pytest.mark.parametrize("name", model_names())
def test_bytes_are_those_of_16_bits(name):
    model, counts = load_model(name), count(name, Workload(text_tokens=N_TOKENS))
    assert counts.weight_bytes == DTYPE_BYTES * counts.parameters["total"]
    # prompts shorter than any window; a recurrence adds its state once
    assert counts.kv_bytes == N_TOKENS * counts.kv_bytes_per_token + model.decoder.state_bytes


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_vision_flops_of_an_image_are_those_of_transformers(name):
    from tests.oracle import transformers_counts, transformers_tokens

    config, model = load_config(name), real_model(name)
    for size in [(336, 336), (799, 500)]:  # the second has windows cut short on two sides, and several tiles
        image = transformers_tokens.image_input(config, *size)
        ours = count(name, images(size), convention="torch").flops
        assert ours["encode"] == transformers_counts.encode_flops(model, image)
        assert ours["adapt"] == transformers_counts.adapt_flops(model, image)


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_vision_flops_of_a_video_are_those_of_transformers(name):
    from tests.oracle import transformers_counts, transformers_tokens

    model, shape = real_model(name), (3, 350, 250)
    video = transformers_tokens.video_input(load_config(name), *shape)
    ours = count(name, Workload(videos=[clip(*shape)]), convention="torch").flops
    assert ours["encode"] == transformers_counts.encode_flops(model, video)
    assert ours["adapt"] == transformers_counts.adapt_flops(model, video)


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


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_image_tokens_are_those_of_the_processor(name):
    for size in SIZES:
        assert_image_tokens(name, *size)


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_video_tokens_are_those_of_the_processor(name):
    for shape in CLIPS:
        assert_video_tokens(name, *shape)


@pytest.mark.parametrize("n_sizes", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAST_MODELS)
def test_tokens_of_random_sizes_are_those_of_the_processor(name, n_sizes):
    dice = random.Random(20260)  # noqa: S311 - sizes, not secrets
    for _ in range(n_sizes):
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


@pytest.mark.parametrize(("name", "part"), pairs())
def test_golden(name, part):
    assert differences(name, part) == []


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
