"""Gemma 3 and Gemma 2 against the real classes and goldens."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from costmodel.families.text import read_decoder
from costmodel.units import UNBOUNDED
from tests.check_golden import GOLDEN
from tests.families.llava_oracle import SMALL_SIGLIP, config_of, read
from tests.oracle.transformers_counts import build, parameters

NAMES = ("gemma-3-4b", "gemma-3-12b")
IMAGE_TOKENS = 256
SMALL = config_of(
    "gemma-3-4b",
    mm_tokens_per_image=81,
    vision_config={**SMALL_SIGLIP, "vision_use_head": True},
    text_config={
        "model_type": "gemma3_text",
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 32,
    },
)
DEFAULTS = {"model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model", "image_size": 896}}
UNTIED = {**SMALL, "tie_word_embeddings": False, "text_config": {**SMALL["text_config"], "tie_word_embeddings": False}}


@pytest.mark.parametrize("name", NAMES)
def test_sliding_layers_keep_a_window_but_one(name):
    golden = GOLDEN[name]["kv_cache"]["sliding"]
    assert count(name, Workload(text_tokens=4096)).kv_bytes == golden["total_bytes_at_4096"]
    windows = [layer.mixer.window for layer in load_model(name).decoder.layers()]
    assert windows.count(golden["sliding_layer_tokens_kept"] + 1) == golden["sliding_layers"]
    assert windows.count(UNBOUNDED) == golden["full_layers"]


def test_tokens_of_a_picture_see_each_other():
    model, workload = load_model("gemma-3-4b"), Workload(images=[Image(640, 480)] * 2, text_tokens=60)
    one_way = replace(model, decoder=replace(model.decoder, bidirectional_media=False), cache={})
    more = count(model, workload).flops["prefill"] - count(one_way, workload).flops["prefill"]
    mixer = model.decoder.runs[0].layer.mixer
    mask = torch.ones(IMAGE_TOKENS, IMAGE_TOKENS, dtype=torch.bool).triu(1)
    assert more == 2 * int(mask.sum()) * 4 * mixer.q_width * model.decoder.n_layers


@pytest.mark.parametrize(
    "config",
    [config_of("gemma-3-27b"), SMALL, UNTIED, DEFAULTS],
    ids=["27b", "small", "untied", "defaults"],
)
def test_parameters_of_the_real_class(config):
    assert read(config).parameters() == parameters(build(config))


def test_the_published_27b():
    assert load_model("gemma-3-27b").parameters()["total"] == 27_432_406_640


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_hidden_layers": 5, "tie_word_embeddings": False, "attention_bias": True}]
)
def test_a_decoder_alone(model_type, changes):
    config = CONFIG_MAPPING[model_type](**changes)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    decoder = read_decoder({"model_type": model_type, **changes}, "test")
    assert decoder.parameters == real.num_parameters()
    windows = [layer.mixer.window for layer in decoder.layers()]
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    assert windows == [config.sliding_window if slide else UNBOUNDED for slide in slides]


def test_layer_types_decide_over_the_pattern():
    config = {"model_type": "gemma3_text", "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert {layer.mixer.window for layer in read_decoder(config, "test").layers()} == {UNBOUNDED}
    pattern = {"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window_pattern": 2}
    windows = [layer.mixer.window for layer in read_decoder(pattern, "test").layers()]
    assert windows == [4096, UNBOUNDED, 4096, UNBOUNDED]


def test_refusals():
    model = load_model("gemma-3-4b")
    with pytest.raises(Unsupported, match="no video"):
        model.media.frames(Video(640, 480, seconds=2, fps=24))
    with pytest.raises(Unsupported, match="do_pan_and_scan"):
        read(config_of("gemma-3-4b"), image={"do_pan_and_scan": True})
    with pytest.raises(ValueError, match="image_size 896"):
        read(config_of("gemma-3-4b"), image={"size": {"height": 224, "width": 224}})
    with pytest.raises(ValueError, match="mm_tokens_per_image"):
        read(config_of("gemma-3-4b", mm_tokens_per_image=5000))
    with pytest.raises(Unsupported, match="use_bidirectional_attention"):
        read_decoder({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "test")


@pytest.mark.parametrize("name", [*NAMES, "gemma-3-27b"])
def test_prediction_is_sane(name):
    prediction = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 0.01 < float(prediction.ttft_s) < 1
    assert 0.002 < float(prediction.tpot_s) < 0.05
