"""InternVL 2, 2.5 and 3.5 against the real `transformers` class, which the original layout is turned into."""

import json
import random

import pytest
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from costmodel import Image, Workload, load_model, predict
from costmodel.counts import count
from tests.helpers import load_config
from tests.oracle import transformers_counts as oracle

ORIGINAL = ("internvl2-8b", "internvl2-26b", "internvl2.5-26b")
QWEN3 = ("internvl3.5-8b", "internvl3.5-30b-a3b")
PUBLISHED = {
    "internvl2-8b": 8_075_365_376,
    "internvl2-26b": 25_514_186_112,
    "internvl2.5-26b": 25_514_186_112,
    "internvl3.5-8b": 8_528_318_464,
    "internvl3.5-30b-a3b": 30_848_730_112,
}


def converted(config):
    """Return a config of the original layout in that of `transformers`, InternLM2 as the Llama that it is."""
    if config["model_type"] == "internvl":
        return config
    text, vision = config["llm_config"], config["vision_config"]
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "norm_type")
    return {
        "model_type": "internvl",
        "tie_word_embeddings": False,
        "downsample_ratio": config["downsample_ratio"],
        "vision_feature_layer": config["select_layer"],
        "text_config": {**text, "model_type": "llama", "attention_bias": text["bias"]},
        "vision_config": {key: vision[key] for key in kept}
        | {"model_type": "internvl_vision", "image_size": [vision["image_size"]] * 2, "patch_size": [14, 14]}
        | {"attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"]},
    }


def shallow(name):
    config = load_config(name)
    config["llm_config" if "llm_config" in config else "text_config"]["num_hidden_layers"] = 2
    config["vision_config"]["num_hidden_layers"] = 4
    return config


def ours(folder, config, **files):
    for name, values in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return load_model(folder)


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_published_totals(name, total):
    assert load_model(name).parameters()["total"] == total


def test_the_8b_of_both_layouts_is_one_model():
    left, right = load_model("internvl2-8b"), load_model("internvl2.5-8b")
    assert (left.decoder, left.vision, left.adapter, left.media) == (
        right.decoder,
        right.vision,
        right.adapter,
        right.media,
    )


@pytest.mark.parametrize("name", [*ORIGINAL, *QWEN3])
@pytest.mark.parametrize("layer", [-1, -3])
def test_parameters_and_vision_flops_are_those_of_transformers(name, layer, tmp_path):
    config = shallow(name) | {"select_layer": layer, "vision_feature_layer": layer}
    real, model = oracle.build(converted(config)), ours(tmp_path, config)
    parts = model.parameters()
    theirs = oracle.parameters(real)
    assert {component: parts[component] for component in theirs} == theirs
    flops = count(model, Workload(images=[Image(448, 448)]), convention="torch").flops
    assert flops["encode"] == oracle.encode_flops(real, 1)
    assert flops["adapt"] == oracle.adapt_flops(real, 1)
    needed = count(model, Workload(images=[Image(448, 448)])).flops
    assert (needed["encode"] < flops["encode"]) == (layer != -1)


@pytest.mark.parametrize("name", [*ORIGINAL, QWEN3[0]])
def test_language_flops_are_those_of_transformers(name, tmp_path):
    config = shallow(name)
    real, model = oracle.build(converted(config)), ours(tmp_path, config)
    flops = count(model, Workload(text_tokens=50), convention="torch").flops
    assert flops["prefill"] == oracle.prefill_flops(real, 50)
    assert flops["decode_step"] == oracle.decode_step_flops(real, 50)


@pytest.mark.parametrize("most", [6, 12])
def test_tiles_are_those_of_the_processor(most, tmp_path):
    model = ours(tmp_path, load_config("internvl2-26b") | {"max_dynamic_patch": most})
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=most)
    rng = random.Random(5)  # noqa: S311
    for _ in range(1000):
        width, height = rng.randint(1, 4000), rng.randint(1, 4000)
        tiles = processor.get_number_of_image_patches(height, width)
        cost = model.media.image(width, height)
        assert (cost.patches, cost.visual_tokens) == (tiles * 1024, tiles * 256), (width, height)


def test_a_bare_original_config_has_the_defaults_of_its_classes(tmp_path):
    config = {"model_type": "internvl_chat", "vision_config": {"model_type": "intern_vit_6b", "image_size": 448}}
    config["llm_config"] = {"model_type": "qwen2", "num_hidden_layers": 2}
    model = ours(tmp_path, config)
    run = model.vision.runs[0]  # configuration_intern_vit.py: InternViT-6B whole
    assert (run.n_layers, run.layer.width, run.layer.mixer.heads, run.layer.norm) == (48, 3200, 25, "rms")
    assert (run.layer.mixer.qkv_bias, run.layer.mixer.extra_parameters) == (False, 6400)
    assert model.media.image(4000, 1000).patches == 1024  # dynamic_image_size is off


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="select_layer=-99 must name one of 45 layers"):
        ours(tmp_path, load_config("internvl2-26b") | {"select_layer": -99})


@pytest.mark.parametrize("name", [*ORIGINAL, *QWEN3])
def test_prediction(name):
    p = predict(name, "h100-sxm5-80gb", Workload(images=[Image(1920, 1080)]))
    assert 1e-3 < p.ttft_s < 3
    assert 1e-3 < p.tpot_s < 0.1
