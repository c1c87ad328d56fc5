"""Phi-3.5-vision and Phi-4-multimodal against `transformers`: native for the latter, in parts for the former."""

import importlib
import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from costmodel import Image, Unsupported, Workload, load_model, predict
from tests.check_golden import GOLDEN
from tests.helpers import load_config
from tests.oracle.transformers_counts import build, parameters
from tests.oracle.transformers_tokens import _torchvision

PHI3, PHI4 = "phi-3.5-vision", "phi-4-multimodal"
ODD_PHI3 = {"num_hidden_layers": 3, "num_key_value_heads": 8, "tie_word_embeddings": True, "attention_bias": True}
ODD_PHI4 = {
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "num_attention_heads": 32,
    "vision_config": {"num_hidden_layers": 5, "hidden_size": 576, "num_attention_heads": 8, "feature_layer": -3},
}


def ours(folder, config, **files):
    for name, values in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return load_model(folder)


def sizes(n, longest=4000, ratio=25):
    """Return random sizes: most up to `longest` pixels a side, all within an aspect ratio."""
    rng, found = random.Random(3), []  # noqa: S311
    while len(found) < n:
        width, height = (
            round(2 ** rng.uniform(0, 12)) if rng.random() < 0.5 else rng.randint(1, longest) for _ in "wh"
        )
        if max(width, height) <= ratio * min(width, height):
            found.append((width, height))
    return found


# Phi-3.5-vision


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, ODD_PHI3], ids=["published", "odd"])
def test_phi3_parameters_are_those_of_its_parts(changes, tmp_path):
    config = load_config(PHI3) | changes
    parts = ours(tmp_path, config).parameters()
    with torch.device("meta"):
        text = Phi3ForCausalLM(Phi3Config.from_dict(config | {"model_type": "phi3"}))
        tower = CLIPVisionModel(CLIPVisionConfig(**config["vision_config"]))
    assert parts["language"] == text.num_parameters()
    assert parts["vision"] == tower.num_parameters()


def test_phi3_needs_no_vision_config(tmp_path):
    config = load_config(PHI3)
    del config["vision_config"]  # the released file has none
    assert ours(tmp_path, config).parameters() == load_model(PHI3).parameters()


@pytest.mark.parametrize("most", [4, 16])
def test_phi3_tokens(most, tmp_path):
    model = ours(tmp_path, load_config(PHI3), preprocessor_config={"num_crops": most})
    key, tiles = ("llm_tokens", "tiles") if most == 4 else ("llm_tokens_num_crops16", "tiles_num_crops16")
    for size, row in GOLDEN[PHI3]["image_tokens"].items():
        cost = model.media.image(*map(int, size.split("x")))
        assert (cost.visual_tokens, cost.patches) == (row[key], row[tiles] * 24 * 24)
    for width, height in sizes(1000):
        cost, turned = model.media.image(width, height), model.media.image(height, width)
        crops = cost.patches // 24**2 - 1
        assert 1 <= crops <= most
        assert cost.patches == turned.patches
        rows, rest = divmod(cost.visual_tokens - 1 - (crops + 1) * 144, 12)
        assert (rest, crops % (rows - 1)) == (0, 0)  # a separator a row, one between
        assert width < height or rows - 1 <= crops // (rows - 1)
        assert cost.executed.patches == (most + 1) * 24**2


def test_phi3_refuses_strips_and_other_projectors(tmp_path):
    with pytest.raises(ValueError, match="must not be longer than 1344 times"):
        load_model(PHI3).media.image(5000, 1)
    config = load_config(PHI3)
    config["embd_layer"]["use_hd_transform"] = False
    with pytest.raises(ValueError, match="use_hd_transform"):
        ours(tmp_path, config)


# Phi-4-multimodal


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, ODD_PHI4], ids=["published", "odd"])
def test_phi4_parameters_are_those_of_transformers(changes, tmp_path):
    config = load_config(PHI4) | changes
    parts, real = ours(tmp_path, config).parameters(), build(config)
    assert parts == parameters(real)
    audio = sum(p.numel() for p in real.model.embed_tokens_extend.audio_embed.parameters())
    assert parts["total"] - parts["vision"] - parts["adapter"] - parts["language"] == audio  # loaded, never run


def real_mask(processor, width, height):
    """Return the mask of patches that the real processor makes; its resizing is not needed for that."""
    image = SimpleNamespace(shape=(3, height, width), device=torch.device("cpu"))
    return processor.dynamic_preprocess(image, 448, 14, 32, max_num=36)[1]


@pytest.fixture(scope="module")
def processor():
    with _torchvision():
        module = importlib.import_module("transformers.models.phi4_multimodal.image_processing_phi4_multimodal")
    module.tvF = SimpleNamespace(resize=lambda image, _: image, pad=lambda image, *_, **__: image)
    return module.Phi4MultimodalImageProcessor.__new__(module.Phi4MultimodalImageProcessor)


def test_phi4_tokens_are_those_of_the_processor(processor):
    media = load_model(PHI4).media
    for width, height in sizes(1000, ratio=40):
        mask = real_mask(processor, width, height)
        pooled = mask[0::2, 0::2]  # crops have an even number of patches a side
        expected = 256 + 1 + int(pooled.sum()) + int(pooled[:, 0].sum()) + 16
        cost = media.image(width, height)
        assert cost.visual_tokens == expected, (width, height)
        assert cost.patches == mask.numel() + 32 * 32


def test_phi4_refuses_the_strips_that_the_processor_refuses(processor):
    media = load_model(PHI4).media
    for width, height in [(448, 9), (5, 3000), (30000, 10), (440, 10), (1, 1), (9, 448)]:
        try:
            real_mask(processor, width, height)
        except ValueError:
            with pytest.raises(ValueError, match="10 pixels or more"):
                media.image(width, height)
        else:
            assert media.image(width, height).visual_tokens > 0


def test_phi4_takes_no_adapters_and_no_audio(tmp_path):
    flat = {k: v for k, v in load_config(PHI4).items() if not k.endswith("_config")} | {"model_type": "phi4mm"}
    assert ours(tmp_path, flat).parameters() == load_model(PHI4).parameters()
    with pytest.raises(Unsupported, match="vision_lora"):
        ours(tmp_path, flat | {"vision_lora": {"r": 256}})


@pytest.mark.parametrize("name", [PHI3, PHI4])
def test_videos_are_refused_and_pictures_priced(name):
    model = load_model(name)
    with pytest.raises(Unsupported, match="takes no video"):
        model.media.video(8, 64, 64)
    p = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 1e-3 < p.ttft_s < 1
    assert 1e-4 < p.tpot_s < 0.1
