"""LLaVA-NeXT and LLaVA-NeXT-Video against the real classes and processors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from costmodel.families.llava_next import RESOLUTIONS
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

SIDE = 336
NAMES = ("llava-v1.6-mistral-7b", "llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-13b", "llava-next-video-7b")
SMALL = config_of("llava-v1.6-mistral-7b", vision_config=SMALL_CLIP, text_config={**SMALL_TEXT, "model_type": "llama"})
SMALL_VIDEO = config_of("llava-next-video-7b", vision_config=SMALL_CLIP, text_config=SMALL_TEXT)


def processor(*, pinpoints=RESOLUTIONS, side=SIDE, strategy="default"):
    image = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    extra = 1 if strategy == "default" else 0
    real = LlavaNextProcessor.__new__(LlavaNextProcessor)
    real.__dict__.update(image_processor=image, patch_size=14, image_token=VISUAL, num_additional_image_tokens=extra)
    real.vision_feature_select_strategy = strategy
    return real


def test_tokens_and_tiles_are_those_of_the_processor():
    media, real = load_model("llava-v1.6-mistral-7b").media, processor()
    for width, height in sizes(1000):
        cost = media.image(width, height)
        n_tiles = image_size_to_num_patches((height, width), RESOLUTIONS, SIDE)
        assert cost.visual_tokens == real._get_number_of_features(height, width, SIDE, SIDE) - 1, (width, height)
        assert (cost.patches, cost.adapter_tokens, cost.rows) == (n_tiles * 576, n_tiles * 576, n_tiles * 577)
        assert cost.pairs == n_tiles * 577**2
        assert media.image(width, height, n_images=4) == cost


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (40, 30), (1600, 400)])
def test_real_pictures(size):
    real = processor()
    inputs = real.image_processor(Picture.new("RGB", size), return_tensors="np")
    cost = load_model("llava-v1.6-vicuna-7b").media.image(*size)
    assert cost.patches == len(inputs["pixel_values"][0]) * 576
    assert cost.visual_tokens == len(real.replace_image_token(inputs, 0))


def test_resolutions_may_be_others():
    pinpoints = [[336, 336], [336, 1344], [1344, 1344]]
    model = read({**SMALL, "image_grid_pinpoints": pinpoints}, image={"image_grid_pinpoints": pinpoints})
    real = processor(pinpoints=pinpoints)
    for width, height in sizes(60, seed=1):
        tokens = real._get_number_of_features(height, width, SIDE, SIDE) - 1
        assert model.media.image(width, height).visual_tokens == tokens
    without = {key: value for key, value in SMALL.items() if key != "image_grid_pinpoints"}
    assert read(without).media == load_model("llava-v1.6-mistral-7b").media
    with pytest.raises(ValueError, match="must agree"):  # the class has its own where the config has none
        read(without, image={"image_grid_pinpoints": pinpoints})


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        {**SMALL, "tie_word_embeddings": True},
        {**SMALL, "text_config": {**SMALL["text_config"], "tie_word_embeddings": True}},
        {**SMALL, "vision_feature_layer": [-2, -4, 1], "multimodal_projector_bias": False},
        {**SMALL, "vision_config": SMALL_SIGLIP, "vision_feature_select_strategy": "full"},
        SMALL_VIDEO,
        {**SMALL_VIDEO, "text_config": {**SMALL_TEXT, "tie_word_embeddings": True}},
        {**SMALL_VIDEO, "spatial_pool_mode": "max", "spatial_pool_stride": 3},
    ],
    ids=["plain", "tied", "tied-inside", "layers", "siglip", "video", "video-tied-inside", "video-max"],
)
def test_parameters_of_odd_ones(config):
    config = {**config, "image_grid_pinpoints": [[768, 384]]} if config.get("vision_config") == SMALL_SIGLIP else config
    assert read(config).parameters() == parameters(build(config))


@pytest.mark.parametrize("layers", [-2, -1, 3, [-2, -3]])
def test_vision_flops_and_tokens_of_a_real_pass(layers):
    config = {**SMALL, "vision_feature_layer": layers}
    real, model = build(config), read(config)
    width, height = 1000, 400
    n_tiles = model.media.image(width, height).patches // 576
    inputs = {"pixel_values": blank(real, n_tiles, 1), "image_sizes": torch.tensor([[height, width]])}
    encode, adapt, output = vision_flops(lambda: real.model.get_image_features(**inputs), real)
    flops = count(model, Workload(images=[Image(width, height)]), convention="torch").flops
    assert (flops["encode"], flops["adapt"]) == (encode, adapt)
    assert model.media.image(width, height).visual_tokens == output.pooler_output[0].shape[0]


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_frames_are_pooled_before_the_projector(stride):
    config = {**SMALL_VIDEO, "spatial_pool_stride": stride}
    real, model = build(config), read(config)
    frames = blank(real, 7, 1)
    encode, adapt, output = vision_flops(lambda: real.model.get_video_features(pixel_values_videos=frames), real)
    clip = Video(640, 360, seconds=1.0, fps=7.0)
    flops = count(model, Workload(videos=[clip]), convention="torch").flops
    assert (flops["encode"], flops["adapt"]) == (encode, adapt)
    assert model.media.video(7, 640, 360).visual_tokens == output.pooler_output.shape[1]


def test_video_tokens_are_those_of_the_processor():
    real = SimpleNamespace(patch_size=14, video_token=VISUAL)
    media = load_model("llava-next-video-7b").media
    for n_frames in (1, 7, 32):
        inputs = {"pixel_values_videos": [np.empty((n_frames, 3, SIDE, SIDE), dtype=np.float32)]}
        text = LlavaNextVideoProcessor.replace_video_token(real, inputs, 0)
        assert media.video(n_frames, 1920, 1080).visual_tokens == len(text) == 144 * n_frames


def test_frames_taken():
    media = load_model("llava-next-video-7b").media
    assert media.frames(Video(640, 360, seconds=60, fps=30)) == 32
    assert media.frames(Video(640, 360, seconds=1, fps=10)) == 10
    assert media.frames(Video(640, 360, seconds=10, fps=30, sample_fps=2)) == 20
    assert media.frames(Video(640, 360, seconds=1, fps=4, sample_fps=60)) == 4
    sampled = read(SMALL_VIDEO, video={"do_sample_frames": True, "num_frames": 8}).media
    assert sampled.frames(Video(640, 360, seconds=60, fps=30)) == 8
    by_rate = read(SMALL_VIDEO, video={"do_sample_frames": True, "fps": 1}).media
    assert by_rate.frames(Video(640, 360, seconds=60, fps=30)) == 60


def test_refusals():
    with pytest.raises(Unsupported, match="takes no video"):
        load_model("llava-v1.6-vicuna-7b").media.video(8, 640, 360)
    with pytest.raises(Unsupported, match="conv"):
        read({**SMALL_VIDEO, "spatial_pool_mode": "conv"})
    with pytest.raises(ValueError, match="spatial_pool_stride=25"):
        read({**SMALL_VIDEO, "spatial_pool_stride": 25})
    with pytest.raises(ValueError, match="must be 'default'"):
        read({**SMALL, "vision_feature_select_strategy": "full"})
    with pytest.raises(ValueError, match="multiple of 336"):
        read({**SMALL, "image_grid_pinpoints": [[400, 336]]})
    with pytest.raises(ValueError, match="pairs of a height and a width"):
        read({**SMALL, "image_grid_pinpoints": []})
    with pytest.raises(ValueError, match="must agree"):
        read(SMALL, image={"image_grid_pinpoints": [[336, 336]]})
    with pytest.raises(ValueError, match="vision_feature_layer"):
        read({**SMALL, "vision_feature_layer": 9})
    with pytest.raises(LookupError, match="vision model type"):
        read({**SMALL, "vision_config": {"model_type": "dinov2"}})


@pytest.mark.parametrize("name", NAMES)
def test_prediction(name):
    p = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 0.05 < p.ttft_s < 0.3
    assert 0.004 < p.tpot_s < 0.02
