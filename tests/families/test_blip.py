"""BLIP-2 and InstructBLIP against the real `transformers` classes."""

import json
import random
import sys

import pytest
import torch
from PIL import Image as Picture
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from costmodel.families.blip import INSTRUCTION_TOKENS
from tests.helpers import load_config
from tests.oracle.transformers_counts import DTYPE, build

NAMES = ("blip2-opt-2.7b", "instructblip-vicuna-7b")
ODD = {
    "published": {},
    "tied": {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
    "untied": {"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True},
    "queries": {
        "num_query_tokens": 24,
        "vision_config": {"qkv_bias": False, "num_hidden_layers": 3, "image_size": 112},
    },
    "q-former": {
        "qformer_config": {
            "num_hidden_layers": 5,
            "cross_attention_frequency": 3,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "intermediate_size": 1000,
            "use_qformer_text_input": True,
        }
    },
}


def changed(name, changes):
    """Return the config with two decoder layers and these changes."""
    config = load_config(name)
    config["text_config"]["num_hidden_layers"] = 2
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return config


def ours(folder, config):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_model(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_parameters_and_flops_are_those_of_transformers(name, changes, tmp_path, monkeypatch):
    config = changed(name, changes)
    real, model = build(config).requires_grad_(requires_grad=False), ours(tmp_path, config)
    module = sys.modules[type(real).__module__]
    monkeypatch.setattr(module, "create_bidirectional_mask", lambda **_: None)  # it looks for zeros, which meta has not
    parts = model.parameters()
    assert parts["total"] == real.num_parameters()
    assert parts["vision"] == real.vision_model.num_parameters()
    assert parts["language"] == real.language_model.num_parameters()
    side = real.config.vision_config.image_size
    inputs = {"pixel_values": torch.empty(1, 3, side, side, device="meta", dtype=DTYPE)}
    if name.startswith("instruct"):
        inputs["qformer_input_ids"] = torch.zeros(1, INSTRUCTION_TOKENS, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        real.get_image_features(**inputs)
    flops = count(model, Workload(images=[Image(640, 480)]), convention="torch").flops
    assert flops["encode"] + flops["adapt"] == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_size_becomes_the_square_of_the_processor(name):
    model, rng = load_model(name), random.Random(1)  # noqa: S311
    processor = BlipImageProcessorPil(size={"height": 224, "width": 224})
    for _ in range(1000):
        width, height = rng.randint(1, 300), rng.randint(1, 300)
        pixels = processor(Picture.new("RGB", (width, height)), return_tensors="np")["pixel_values"]
        cost = model.media.image(width, height)
        assert pixels.shape[-2:] == (224, 224)
        assert (cost.patches, cost.visual_tokens, cost.marker_tokens) == ((224 // 14) ** 2, 32, 0)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_part_takes_the_defaults_of_transformers(name, tmp_path):
    config = {"model_type": load_config(name)["model_type"]}
    assert ours(tmp_path, config).parameters()["total"] == build(config).num_parameters()


@pytest.mark.parametrize("name", NAMES)
def test_videos_are_refused(name):
    media = load_model(name).media
    for call in (lambda: media.frames(Video(64, 64, 1.0, 8.0)), lambda: media.video(8, 64, 64)):
        with pytest.raises(Unsupported, match="BLIP takes no video"):
            call()


def test_an_encoder_decoder_is_refused(tmp_path):
    config = load_config(NAMES[0])
    config["text_config"] = {"model_type": "t5"}
    with pytest.raises(LookupError, match="'t5'"):
        ours(tmp_path, config)


@pytest.mark.parametrize("name", NAMES)
def test_prediction(name):
    p = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 1e-4 < p.ttft_s < 1
    assert 1e-4 < p.tpot_s < 0.1
