"""LLaVA-OneVision against the real class and processors, and LLaVA-Video against what it shares with it."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from costmodel.families.llava_onevision import RESOLUTIONS
from costmodel.media import media_costs
from tests.families.llava_oracle import (
    SMALL_CLIP,
    SMALL_SIGLIP,
    SMALL_TEXT,
    VISUAL,
    blank,
    config_of,
    read,
    sizes,
    vision_flops,
)
from tests.oracle.transformers_counts import build, parameters

SIDE, PER_TILE = 384, 729
NAMES = ("llava-onevision-0.5b", "llava-onevision-7b", "llava-onevision-72b")
SMALL = config_of("llava-onevision-7b", vision_config=SMALL_SIGLIP, text_config=SMALL_TEXT)


def processor(*, pinpoints=RESOLUTIONS, aspect_ratio="anyres_max_9", n_tokens=PER_TILE, side=SIDE):
    image = LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=pinpoints)
    real = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    real.__dict__.update(
        image_processor=image,
        num_image_tokens=n_tokens,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect_ratio,
        image_token=VISUAL,
        video_token=VISUAL,
    )
    return real


def test_tokens_and_tiles_are_those_of_the_processor():
    media, real = load_model("llava-onevision-7b").media, processor()
    for width, height in sizes(1000):
        cost = media.image(width, height)
        n_tiles = image_size_to_num_patches((height, width), RESOLUTIONS, SIDE)
        assert cost.visual_tokens == real._get_number_of_features(height, width, SIDE, SIDE), (width, height)
        assert (cost.patches, cost.adapter_tokens) == (n_tiles * PER_TILE, n_tiles * PER_TILE)
        assert cost.pairs == n_tiles * PER_TILE**2


@pytest.mark.parametrize(("most", "image_size"), [(1, 384), (4, 384), (16, 384), (9, 448)])
def test_limits_and_towers_of_other_sizes(most, image_size):
    pinpoints = [[a * image_size, b * image_size] for a in (1, 2, 5) for b in (1, 3, 6)]
    vision = {**SMALL_SIGLIP, "image_size": image_size}
    aspect_ratio = f"anyres_max_{most}"
    config = {**SMALL, "vision_config": vision, "vision_aspect_ratio": aspect_ratio, "image_grid_pinpoints": pinpoints}
    n_tokens = (image_size // 14) ** 2
    real = processor(pinpoints=pinpoints, aspect_ratio=aspect_ratio, n_tokens=n_tokens, side=image_size)
    media = read(config).media
    for width, height in sizes(80, seed=most):
        tokens = real._get_number_of_features(height, width, image_size, image_size)
        assert media.image(width, height).visual_tokens == tokens


@pytest.mark.parametrize("n_images", [1, 2, 3])
def test_several_images_are_not_cut(n_images):
    pictures = [(500, 333), (64, 700), (384, 384)][:n_images]
    real = processor()
    inputs = real.image_processor([[Picture.new("RGB", size) for size in pictures]], return_tensors="np")
    costs = media_costs(load_model("llava-onevision-7b").media, Workload(images=[Image(*size) for size in pictures]))
    for index, cost in enumerate(costs):
        assert cost.visual_tokens == len(real.replace_image_token(inputs, index))
        assert cost.patches == len(inputs["pixel_values"][index]) * PER_TILE
        assert n_images == 1 or (cost.visual_tokens, cost.patches) == (PER_TILE + 1, PER_TILE)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        {**SMALL, "tie_word_embeddings": True},
        {**SMALL, "text_config": {**SMALL_TEXT, "tie_word_embeddings": True}},
        {**SMALL, "vision_feature_layer": [-1, -3], "multimodal_projector_bias": False},
        {**SMALL, "vision_config": {**SMALL_SIGLIP, "vision_use_head": True, "num_hidden_layers": 7}},
        config_of("llava-onevision-7b", vision_config=(), text_config=SMALL_TEXT),
    ],
    ids=["plain", "tied", "tied-inside", "layers", "head", "no-vision"],
)
def test_parameters_of_odd_ones(config):
    assert read(config).parameters() == parameters(build(config))


@pytest.mark.parametrize("layer", [-1, -2])
def test_vision_flops_and_tokens_of_a_real_pass(layer):
    config = {**SMALL, "vision_feature_layer": layer}
    real, model = build(config), read(config)
    width, height = 1300, 900
    n_tiles = model.media.image(width, height).patches // PER_TILE
    inputs = {"pixel_values": blank(real, n_tiles, 1), "image_sizes": torch.tensor([[height, width]])}
    encode, adapt, output = vision_flops(lambda: real.model.get_image_features(**inputs), real)
    flops = count(model, Workload(images=[Image(width, height)]), convention="torch").flops
    assert (flops["encode"], flops["adapt"]) == (encode, adapt)
    assert model.media.image(width, height).visual_tokens == output.pooler_output[0].shape[0]


def test_vision_flops_of_a_video_and_of_several_images():
    real, model = build(SMALL), read(SMALL)
    clip = Workload(videos=[Video(640, 360, seconds=1.0, fps=5.0)])
    run = real.model.get_video_features
    encode, adapt, output = vision_flops(lambda: run(pixel_values_videos=blank(real, 5, 1)), real)
    flops = count(model, clip, convention="torch").flops
    assert (flops["encode"], flops["adapt"]) == (encode, adapt)
    assert model.media.video(5, 640, 360).visual_tokens == output.pooler_output.shape[1]

    images = Workload(images=[Image(640, 360), Image(100, 900)])
    sizes_ = torch.tensor([[360, 640], [900, 100]])
    inputs = {"pixel_values": blank(real, 1, 2), "image_sizes": sizes_, "batch_num_images": torch.tensor([2])}
    encode, adapt, output = vision_flops(lambda: real.model.get_image_features(**inputs), real)
    counts = count(model, images, convention="torch")
    assert (counts.flops["encode"], counts.flops["adapt"]) == (encode, adapt)
    assert counts.tokens["visual"] == sum(features.shape[0] for features in output.pooler_output)


def test_video_tokens_are_those_of_the_processor():
    media = load_model("llava-onevision-0.5b").media
    for n_frames in (1, 7, 32):
        inputs = {"pixel_values_videos": [SimpleNamespace(shape=(n_frames, 3, SIDE, SIDE))]}
        text = processor().replace_video_token(inputs, 0)
        assert media.video(n_frames, 640, 360).visual_tokens == len(text) == 196 * n_frames + 1


def test_frames_taken():
    media = load_model("llava-onevision-7b").media
    assert media.frames(Video(640, 360, seconds=60, fps=30)) == 32
    assert media.frames(Video(640, 360, seconds=1, fps=10)) == 10
    assert media.frames(Video(640, 360, seconds=10, fps=30, sample_fps=2)) == 20


def test_refusals():
    with pytest.raises(Unsupported, match="anyres_max_9"):
        read({**SMALL, "vision_aspect_ratio": "square"})
    with pytest.raises(ValueError, match="must be 'full'"):
        read({**SMALL, "vision_feature_select_strategy": "default"})
    with pytest.raises(ValueError, match="must be 'default'"):
        read({**SMALL, "vision_config": SMALL_CLIP})


@pytest.mark.parametrize("name", NAMES[:2])
def test_prediction(name):
    p = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 0.1 < p.ttft_s < 1
    assert 0.0005 < p.tpot_s < 0.01


# LLaVA-Video: no class in transformers, but the parts of LLaVA-OneVision


def test_llava_video_has_the_parts_of_onevision():
    twin = config_of("llava-onevision-7b")
    twin["text_config"]["vocab_size"] = 152064
    assert load_model("llava-video-7b").parameters() == parameters(build(twin))
    ours, theirs = load_model("llava-video-7b").media, load_model("llava-onevision-7b").media
    for width, height in sizes(50, seed=3):
        for n_images in (1, 2):
            assert ours.image(width, height, n_images=n_images) == theirs.image(width, height, n_images=n_images)


def test_llava_video_pools_27_to_13_and_ends_every_row():
    media = load_model("llava-video-7b").media
    pooled = torch.nn.functional.avg_pool2d(torch.empty(1, 1, 27, 27), 2)
    assert pooled.shape[-1] ** 2 == 169
    cost = media.video(64, 1280, 720)
    assert cost.visual_tokens == 64 * (169 + 13) == 11648
    assert cost.adapter_tokens == cost.patches == 64 * PER_TILE


@pytest.mark.parametrize(
    ("mode", "newline", "per_frame", "rest"),
    [
        ("average", "no_token", 169, 0),
        ("average", "frame", 170, 0),
        ("max", "one_token", 169, 1),
        ("bilinear", "one_token", 196, 1),
        ("bilinear", "grid", 210, 0),
    ],
)
def test_llava_video_layouts_of_a_video(mode, newline, per_frame, rest):
    model = read(config_of("llava-video-7b", mm_spatial_pool_mode=mode, mm_newline_position=newline))
    assert model.media.video(8, 640, 360).visual_tokens == 8 * per_frame + rest


def test_llava_video_frames_taken():
    media = load_model("llava-video-7b").media
    assert media.frames(Video(640, 360, seconds=600, fps=30)) == 64
    assert media.frames(Video(640, 360, seconds=2, fps=10)) == 64  # frames are repeated
    assert media.frames(Video(640, 360, seconds=10, fps=30, sample_fps=1)) == math.ceil(300 / 30)
    assert media.frames(Video(640, 360, seconds=600, fps=30, sample_fps=2)) == 64
    unforced = read(config_of("llava-video-7b", force_sample=False)).media
    assert unforced.frames(Video(640, 360, seconds=10, fps=25)) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_faster_video": True}, "add_faster_video"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "unknown vision tower"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
    ],
)
def test_llava_video_refusals(changes, message):
    with pytest.raises((ValueError, LookupError), match=message):
        read(config_of("llava-video-7b", **changes))
