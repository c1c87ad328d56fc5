"""Aya Vision and the Cohere decoders against the real classes and processors."""

import pytest
import torch
from PIL import Image as Picture
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from costmodel.families.text import read_decoder
from costmodel.units import UNBOUNDED
from tests.families.llava_oracle import (
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

NAME, SIDE = "aya-vision-8b", 364
MARKERS = "<>TG"
TEXT = {**SMALL_TEXT, "model_type": "cohere2"}
VISION = {**SMALL_SIGLIP, "image_size": SIDE}
SMALL = config_of(NAME, vision_config=VISION, text_config=TEXT, alignment_intermediate_size=72)


def processor(**limits):
    image = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, **limits)
    real = AyaVisionProcessor.__new__(AyaVisionProcessor)
    real.__dict__.update(
        image_processor=image,
        patch_size=28,
        img_size=SIDE,
        img_patch_token=VISUAL,
        start_of_img_token=MARKERS[0],
        end_of_img_token=MARKERS[1],
        tile_token=MARKERS[2],
        tile_global_token=MARKERS[3],
    )
    real._merge_kwargs = lambda **_: {"images_kwargs": {"crop_to_patches": True}}  # needs a tokenizer otherwise
    return real


def test_tokens_and_tiles_are_those_of_the_processor():
    media, drawn = load_model(NAME).media, sizes(1000)
    real = processor()._get_num_multimodal_tokens([(height, width) for width, height in drawn])
    for (width, height), n_tiles, n_tokens in zip(drawn, real.num_image_patches, real.num_image_tokens, strict=True):
        cost = media.image(width, height)
        assert cost.patches == n_tiles * 676
        assert cost.visual_tokens == n_tiles * 169
        assert cost.visual_tokens + cost.marker_tokens == n_tokens
        assert cost.pairs == n_tiles * 676**2


@pytest.mark.parametrize("limits", [{"max_patches": 6}, {"min_patches": 2, "max_patches": 4}, {"max_patches": 1}])
def test_limits_of_the_processor_file(limits):
    media, drawn = read(config_of(NAME), image=limits).media, sizes(100, seed=2)
    real = processor(**limits)._get_num_multimodal_tokens([(height, width) for width, height in drawn])
    assert [media.image(*size).visual_tokens // 169 for size in drawn] == real.num_image_patches


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (50, 50)])
def test_real_pictures(size):
    real = processor()
    inputs = real.image_processor(Picture.new("RGB", size), return_tensors="np", crop_to_patches=True)
    text, cost = real.replace_image_token(inputs, 0), load_model(NAME).media.image(*size)
    assert cost.visual_tokens == text.count(VISUAL)
    assert cost.marker_tokens == sum(text.count(token) for token in MARKERS)


@pytest.mark.parametrize(
    "config",
    [
        config_of(NAME),
        SMALL,
        {**SMALL, "tie_word_embeddings": False},
        {**SMALL, "vision_feature_layer": -3, "downsample_factor": 13},
        {
            key: value
            for key, value in SMALL.items()
            if key not in ("alignment_intermediate_size", "vision_feature_layer")
        },
        {**SMALL, "text_config": {**TEXT, "attention_bias": True, "num_hidden_layers": 9}},
        {**SMALL, "text_config": {**TEXT, "model_type": "cohere", "use_qk_norm": True}},
        {**SMALL, "text_config": {key: value for key, value in TEXT.items() if key != "model_type"}},
    ],
    ids=["aya-vision-8b", "small", "untied", "layer", "defaults", "biases", "cohere", "no-type"],
)
def test_parameters(config):
    assert read(config).parameters() == parameters(build(config))


@pytest.mark.parametrize("layer", [-1, -2])
def test_vision_flops_and_tokens_of_a_real_pass(layer):
    config = {**SMALL, "vision_feature_layer": layer}
    real, model = build(config), read(config)
    n_tiles = model.media.image(800, 500).patches // 676
    run = real.model.get_image_features
    encode, adapt, output = vision_flops(lambda: run(pixel_values=blank(real, n_tiles)), real)
    flops = count(model, Workload(images=[Image(800, 500)]), convention="torch").flops
    assert (flops["encode"], flops["adapt"]) == (encode, adapt)
    assert model.media.image(800, 500).visual_tokens == output.pooler_output.shape[:2].numel()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "cohere2"},
        {"model_type": "cohere2", "sliding_window": 40, "num_hidden_layers": 8},
        {"model_type": "cohere2", "sliding_window": 40, "sliding_window_pattern": 2},
        {"model_type": "cohere2", "sliding_window": 40, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
        {"model_type": "cohere"},
    ],
)
def test_decoder_flops_and_cache(changes):
    config = {**SMALL_TEXT, **changes}
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager", dtype=torch.bfloat16)
    model = read({**SMALL, "text_config": config})
    assert model.decoder.parameters == real.num_parameters()

    def run(n_tokens, cache=None):
        embeddings = torch.empty(1, n_tokens, config["hidden_size"], device="meta", dtype=torch.bfloat16)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = real(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return counter.get_total_flops(), output.past_key_values

    prefill, cache = run(100)
    step, _ = run(1, cache)
    flops = count(model, Workload(text_tokens=100), convention="torch").flops
    assert (flops["prefill"], flops["decode_step"]) == (prefill, step)


def test_only_sliding_layers_rotate():
    layers = load_model(NAME).decoder.layers()
    assert [layer.mixer.window == UNBOUNDED for layer in layers] == [(i + 1) % 4 == 0 for i in range(32)]
    assert all(layer.mixer.rotary == (layer.mixer.window == 4096) for layer in layers)
    assert all(layer.mixer.rotary for layer in read_decoder({**SMALL_TEXT, "model_type": "cohere"}, "test").layers())


def test_aya_expanse_32b():
    """The decoder of Aya Vision 32B, by the public config of Aya Expanse 32B, has the size of its name."""
    config = {
        "model_type": "cohere",
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_attention_heads": 64,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
    }
    assert round(read_decoder(config, "test").parameters / 1e9) == 32


def test_refusals():
    media = load_model(NAME).media
    for refused in (lambda: media.video(8, 640, 360), lambda: media.frames(Video(640, 360, seconds=1, fps=8))):
        with pytest.raises(Unsupported, match="Aya Vision takes no video"):
            refused()
    with pytest.raises(ValueError, match="multiple of 4"):
        read({**SMALL, "downsample_factor": 4})
    with pytest.raises(ValueError, match="alignment_intermediate_size"):
        read({**SMALL, "alignment_intermediate_size": 71})
    with pytest.raises(ValueError, match="vision_feature_layer"):
        read({**SMALL, "vision_feature_layer": 0})
    with pytest.raises(Unsupported, match="layer_types"):
        read({**SMALL, "text_config": {**TEXT, "layer_types": ["chunked_attention"] * 3}})


def test_prediction():
    p = predict(NAME, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 0.05 < p.ttft_s < 0.5
    assert 0.004 < p.tpot_s < 0.02
