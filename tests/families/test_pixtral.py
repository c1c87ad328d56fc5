"""Pixtral and Mistral 3 against the real classes, processor and goldens."""

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from tests.families.llava_oracle import (
    SMALL_TEXT,
    config_of,
    read,
    sizes,
    vision_flops,
)
from tests.oracle.transformers_counts import build, parameters

SMALL_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 256,
    "patch_size": 8,
}
TEXT = {**SMALL_TEXT, "model_type": "mistral"}
SMALL_PIXTRAL = config_of("pixtral-12b", vision_config=SMALL_TOWER, text_config=TEXT)
EARLY_PIXTRAL = config_of("pixtral-12b", vision_config=SMALL_TOWER, text_config=TEXT, vision_feature_layer=-2)
SMALL_MISTRAL = config_of(
    "mistral-small-3.1-24b",
    vision_config=SMALL_TOWER,
    text_config=TEXT,
    spatial_merge_size=3,
    multimodal_projector_bias=True,
)
TIED_MISTRAL = {**SMALL_MISTRAL, "tie_word_embeddings": True}
MODELS = {"pixtral-12b": (1024, 16), "mistral-small-3.1-24b": (1540, 28)}
"""Longest side and side of a merged patch."""


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_the_real_rule(name):
    media, (longest, side) = load_model(name).media, MODELS[name]
    for width, height in sizes(1000, seed=longest):
        canvas = np.broadcast_to(np.zeros((), dtype=np.uint8), (height, width, 3))
        resized = get_resize_output_image_size(canvas, (longest, longest), (side, side), "channels_last")
        if not min(resized):
            with pytest.raises(ValueError, match="must not vanish"):
                media.image(width, height)
            continue
        cost, rows, columns = media.image(width, height), resized[0] // side, resized[1] // side
        assert (cost.visual_tokens, cost.marker_tokens) == (rows * columns, rows)
        assert cost.resized_pixels == resized[0] * resized[1]


def test_sizes_of_the_real_processor():
    processor, media = PixtralImageProcessorPil(), load_model("pixtral-12b").media
    for width, height in ((100, 100), (1025, 700), (33, 1500)):
        picture = Picture.fromarray(np.full((height, width, 3), 99, dtype=np.uint8))
        tall, wide = processor(picture, return_tensors="np")["pixel_values"].shape[-2:]
        assert media.image(width, height).resized_pixels == tall * wide


def test_a_processor_file_sets_the_longest_side():
    model = read(config_of("pixtral-12b"), image={"size": {"longest_edge": 512}})
    assert model.media.image(1024, 1024).visual_tokens == 32**2
    with pytest.raises(ValueError, match="longest_edge"):
        read(config_of("pixtral-12b"), image={"size": {"height": 512, "width": 256}})


def test_several_images_are_one_masked_row_in_transformers():
    media = load_model("pixtral-12b").media
    alone, four = media.image(640, 480), media.image(640, 480, n_images=4)
    assert alone.executed is None
    assert 4 * four.executed.pairs == (4 * alone.rows) ** 2
    assert four.pairs == alone.pairs


@pytest.mark.parametrize(
    "config",
    [config_of("mistral-small-3.1-24b"), SMALL_PIXTRAL, EARLY_PIXTRAL, SMALL_MISTRAL, TIED_MISTRAL],
    ids=["mistral-small", "small", "early", "merge-3", "tied"],
)
def test_parameters_of_the_real_class(config):
    assert read(config).parameters() == parameters(build(config))


def test_mistral_without_a_config_is_mistral_small():
    assert read({"model_type": "mistral3"}).parameters() == load_model("mistral-small-3.1-24b").parameters()


def test_the_published_mistral_small():
    assert load_model("mistral-small-3.1-24b").parameters()["total"] == 24_011_361_280


@pytest.mark.parametrize("config", [config_of("mistral-small-3.1-24b"), SMALL_MISTRAL, EARLY_PIXTRAL])
def test_vision_flops_of_the_real_class(config):
    ours, real = read(config), build(config)
    size = (168, 336) if config["vision_config"]["patch_size"] == 14 else (96, 192)
    flops = count(ours, Workload(images=[Image(size[1], size[0])], text_tokens=1), convention="torch").flops
    pixels = torch.empty(1, 3, *size, device="meta", dtype=torch.bfloat16)

    def run():
        states = real.model.vision_tower(pixels, image_sizes=[size]).last_hidden_state.squeeze(0)
        projector = real.model.multi_modal_projector
        return projector(states, [size]) if config["model_type"] == "mistral3" else projector(states)

    encoder, adapter, features = vision_flops(run, real)
    assert (flops["encode"], flops["adapt"]) == (encoder, adapter)
    assert features.shape[0] == ours.media.image(size[1], size[0]).visual_tokens


def test_refusals():
    for name in MODELS:
        with pytest.raises(Unsupported, match="no video"):
            load_model(name).media.frames(Video(640, 480, seconds=2, fps=24))
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        read(config_of("pixtral-12b", vision_feature_select_strategy="default"))
    with pytest.raises(ValueError, match="vision_feature_layer=99"):
        read(config_of("mistral-small-3.1-24b", vision_feature_layer=99))
    with pytest.raises(LookupError, match="vision model type"):
        read(config_of("pixtral-12b", vision_config={**SMALL_TOWER, "model_type": "pixtrel"}))


@pytest.mark.parametrize("name", MODELS)
def test_prediction_is_sane(name):
    prediction = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 0.02 < float(prediction.ttft_s) < 1
    assert 0.004 < float(prediction.tpot_s) < 0.05
