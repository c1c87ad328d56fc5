"""Llama 3.2 Vision against the real class, processor and goldens."""

import pytest
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from costmodel.families.text import read_decoder
from costmodel.layers import CrossAttentionSpec
from tests.check_golden import GOLDEN
from tests.families.llava_oracle import config_of, read, sizes
from tests.oracle.transformers_counts import build, parameters

NAME = "llama-3.2-11b-vision"
TILE_OUTPUTS = 1601  # 40 x 40 patches and a class token
SMALL = config_of(
    NAME,
    vision_config={
        "model_type": "mllama_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_global_layers": 2,
        "attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "intermediate_layers_indices": [1, 3],
        "vision_output_dim": 192,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
    text_config={
        "model_type": "mllama_text_model",
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 4],
        "pad_token_id": 0,
    },
)


def test_tokens_of_the_golden_sizes():
    media = load_model(NAME).media
    for size, row in GOLDEN[NAME]["image_tokens"].items():
        cost = media.image(*map(int, size.split("x")))
        assert (cost.visual_tokens, cost.marker_tokens) == (0, row["llm_tokens"])
        assert cost.cross_tokens == cost.adapter_tokens == row["cross_tokens_valid"] == row["tiles"] * TILE_OUTPUTS
        assert cost.executed.cross_tokens == row["cross_tokens_computed"]


@pytest.mark.parametrize("most", [1, 4, 6])
def test_canvas_of_many_sizes(most):
    media = read(config_of(NAME), image={"max_image_tiles": most}).media
    for width, height in sizes(1000, seed=most):
        canvas = get_optimal_tiled_canvas(height, width, most, 560)
        assert media.n_tiles(width, height) == int(canvas[0]) * int(canvas[1]) // 560**2, (width, height)


def test_cross_keys_are_cached_once_an_image():
    golden = GOLDEN[NAME]["kv_cache"]
    whole = count(NAME, Workload(images=[Image(1920, 1080)], text_tokens=10))
    assert whole.kv_bytes_per_image == golden["cross_kv_bytes_per_image_4tiles"]
    assert whole.kv_bytes == whole.kv_bytes_per_image + 11 * golden["bytes_per_token_bf16"]
    one_tile = count(NAME, Workload(images=[Image(336, 336)], text_tokens=10))
    assert one_tile.kv_bytes_per_image * 4 == whole.kv_bytes_per_image
    assert one_tile.flops["encode"] < whole.flops["encode"] / 4


def test_a_number_of_visual_tokens_is_what_cross_attention_sees():
    counted = count(NAME, Workload(visual_tokens=4 * TILE_OUTPUTS, text_tokens=11))
    sized = count(NAME, Workload(images=[Image(1920, 1080)], text_tokens=10))
    assert counted.flops == sized.flops
    assert counted.tokens["cross"] == sized.tokens["cross"]


@pytest.mark.parametrize("config", [config_of("llama-3.2-90b-vision"), SMALL], ids=["90b", "small"])
def test_parameters_of_the_real_class(config):
    assert read(config).parameters() == parameters(build(config))


def test_defaults_of_the_real_class():
    config = {"model_type": "mllama", "vision_config": {}, "text_config": {}}
    assert read(config).parameters() == parameters(build(config))


def test_the_decoder_alone():
    decoder = read_decoder({"model_type": "mllama_text_model"}, "test")
    cross = [i for i, layer in enumerate(decoder.layers()) if isinstance(layer.mixer, CrossAttentionSpec)]
    assert cross == [3, 8, 13, 18, 23, 28, 33, 38]
    assert decoder.parameters == GOLDEN[NAME]["parameters"]["language"]


def test_refusals():
    model = load_model(NAME)
    with pytest.raises(Unsupported, match="no video"):
        model.media.frames(Video(640, 480, seconds=2, fps=24))
    with pytest.raises(Unsupported, match="no video"):
        model.media.video(4, 640, 480)
    with pytest.raises(ValueError, match="image_size 560"):
        read(config_of(NAME), image={"size": {"height": 448, "width": 448}})
    with pytest.raises(ValueError, match="vision_output_dim=7680"):
        read(config_of(NAME, vision_config={"image_size": 560, "intermediate_layers_indices": [3]}))


def test_prediction_is_sane():
    prediction = predict(NAME, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 0.02 < float(prediction.ttft_s) < 1
    assert 0.004 < float(prediction.tpot_s) < 0.05
