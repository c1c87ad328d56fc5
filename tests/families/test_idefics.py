"""Idefics2, Idefics3 and SmolVLM against the real classes, processors and goldens."""

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText
from transformers.image_utils import SizeDict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import get_resize_output_image_size as idefics2_size
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from tests.families.llava_oracle import SMALL_TEXT, config_of, read, sizes
from tests.oracle.transformers_counts import build, parameters

NAMES = ("idefics3-8b", "smolvlm-256m")
ALL_NAMES = (*NAMES, "smolvlm-500m", "smolvlm-2.2b", "idefics2-8b")
TILES = {"idefics3-8b": 364, "smolvlm-256m": 512, "smolvlm-2.2b": 384}
SMALL_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 8,
}
TEXT = {**SMALL_TEXT, "model_type": "llama"}
SMALL = config_of("smolvlm-256m", vision_config=SMALL_TOWER, text_config=TEXT, scale_factor=3)
SMALL_2 = config_of(
    "idefics2-8b",
    vision_config=SMALL_TOWER,
    text_config={**TEXT, "model_type": "mistral"},
    perceiver_config={
        "hidden_size": 48,
        "resampler_n_latents": 7,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    },
)


def picture(width, height):
    return Picture.fromarray(np.full((height, width, 3), 99, dtype=np.uint8))


@pytest.mark.parametrize("name", TILES)
def test_grids_of_many_sizes(name):
    side, media = TILES[name], load_model(name).media
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})
    for width, height in sizes(1000, seed=side):
        n_tiles, rows, columns = processor.get_number_of_image_patches(height, width)
        assert media.grid(width, height) == (columns, rows), (width, height)
        assert media.image(width, height).visual_tokens == n_tiles * media.tokens_per_tile


@pytest.mark.parametrize("longest", [96, 100, 250, 5000])
def test_grids_of_the_real_processor(longest):
    media = read(SMALL, image={"size": {"longest_edge": longest}}).media
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": 96}, return_row_col_info=True
    )
    for width, height in [(1, 300), (300, 1), (64, 64), (97, 50), (50, 96), (333, 111)][: 2 if longest > 4096 else 6]:
        found = processor(picture(width, height), return_tensors="np")
        assert media.grid(width, height) == (found["cols"][0][0], found["rows"][0][0]), (width, height)
        assert media.image(width, height).visual_tokens == found["pixel_values"].shape[1] * 16


def test_without_splitting_an_image_is_one_tile():
    media = read(config_of("idefics3-8b"), image={"do_image_splitting": False}).media
    cost = media.image(4000, 3000)
    assert (cost.visual_tokens, cost.marker_tokens) == (169, 3)


def test_videos_are_one_tile_a_frame():
    media = read(config_of("smolvlm-256m"), image={"video_sampling": {"fps": 2, "max_frames": 16}}).media
    assert media.frames(Video(640, 480, seconds=5, fps=24)) == 10
    assert media.frames(Video(640, 480, seconds=60, fps=24)) == 16
    assert media.frames(Video(640, 480, seconds=0.1, fps=24)) == 1
    assert load_model("smolvlm-256m").media.frames(Video(640, 480, seconds=60, fps=24, sample_fps=0.5)) == 30
    assert media.video(16, 640, 480).visual_tokens == 16 * 64


@pytest.mark.parametrize(
    "config",
    [config_of("smolvlm-500m"), config_of("smolvlm-2.2b"), SMALL, {**SMALL, "model_type": "idefics3"}],
    ids=["500m", "2.2b", "small", "idefics3"],
)
def test_parameters_of_the_real_class(config):
    assert read(config).parameters() == parameters(build(config))


@pytest.mark.parametrize("model_type", ["idefics2", "idefics3", "smolvlm"])
@pytest.mark.parametrize("tied", [False, True])
def test_defaults_of_the_real_class(model_type, tied):
    towers = {"vision_config": SMALL_TOWER} if model_type == "idefics3" else {}
    config = {"model_type": model_type, "tie_word_embeddings": tied, **towers}
    if model_type == "smolvlm":  # 7 x 7 patches do not shuffle by 2, in `transformers` neither, but only when run
        config["vision_config"] = {"image_size": 256}
    assert read(config).parameters() == parameters(build(config))


def test_published_totals():
    totals = {name: load_model(name).parameters()["total"] for name in ("smolvlm-500m", "smolvlm-2.2b", "idefics2-8b")}
    assert totals == {"smolvlm-500m": 507_482_304, "smolvlm-2.2b": 2_246_272_880, "idefics2-8b": 8_402_768_112}


# Idefics2


@pytest.mark.parametrize("config", [config_of("idefics2-8b"), SMALL_2], ids=["8b", "small"])
def test_idefics2_parameters(config):
    assert read(config).parameters() == parameters(build(config))


def test_idefics2_sizes():
    media = read(config_of("idefics2-8b"), image={"do_image_splitting": False}).media
    limits = SizeDict(shortest_edge=378, longest_edge=980)
    for width, height in sizes(1000):
        tall, wide = idefics2_size(np.broadcast_to(np.zeros(()), (3, height, width)), limits)
        cost = media.image(width, height)
        assert cost.resized_pixels == tall * wide
        assert cost.patches == (tall // 14) * (wide // 14)
        assert (cost.visual_tokens, cost.marker_tokens) == (64, 2)


def test_idefics2_parts_are_padded_to_one_size():
    media, processor = load_model("idefics2-8b").media, Idefics2ImageProcessorPil(do_image_splitting=True)
    for width, height in ((2, 2), (401, 1999), (3000, 700)):
        found = processor(picture(width, height), return_tensors="np")
        mask, cost = found["pixel_attention_mask"][0], media.image(width, height)
        inside = [(int(m[:, 0].sum()) // 14) * (int(m[0].sum()) // 14) for m in mask]
        padded = (mask.shape[1] // 14) * (mask.shape[2] // 14)
        assert (cost.patches, cost.pairs) == (sum(inside), sum(n * n for n in inside))
        assert (cost.executed or cost).patches == 5 * padded
        assert (cost.visual_tokens, cost.marker_tokens) == (320, 6)


def test_idefics2_vision_flops():
    ours, side = read(SMALL_2, image={"do_image_splitting": False}), 384
    flops = count(ours, Workload(images=[Image(side, side)], text_tokens=1), convention="torch").flops
    parsed = CONFIG_MAPPING["idefics2"].from_dict(SMALL_2)
    real = AutoModelForImageTextToText.from_config(parsed, attn_implementation="eager")  # masks need values
    real.eval().requires_grad_(requires_grad=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        states = real.model.vision_model(torch.zeros(1, 3, side, side)).last_hidden_state
    assert counter.get_total_flops() == flops["encode"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        real.model.connector(states, attention_mask=torch.ones(1, states.shape[1], dtype=torch.bool))
    assert counter.get_total_flops() == flops["adapt"]


def test_refusals():
    for name in ("idefics3-8b", "idefics2-8b"):
        with pytest.raises(Unsupported, match="no video"):
            load_model(name).media.frames(Video(640, 480, seconds=2, fps=24))
        with pytest.raises(Unsupported, match="no video"):
            load_model(name).media.video(4, 640, 480)
    with pytest.raises(ValueError, match="enlarge it first"):
        load_model("idefics2-8b").media.image(1, 500)
    with pytest.raises(ValueError, match="image_size 364"):
        read(config_of("idefics3-8b"), image={"max_image_size": {"longest_edge": 512}})
    with pytest.raises(ValueError, match="scale_factor"):
        read(config_of("idefics3-8b", scale_factor=3))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_prediction_is_sane(name):
    prediction = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 0.01 < float(prediction.ttft_s) < 1
    assert 0.0005 < float(prediction.tpot_s) < 0.05
