"""Settings are those of the `transformers` configs: their defaults, both layouts, every model of the catalogue."""

import copy
import dataclasses
import json

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from costmodel import load_model, model_names  # noqa: E402
from costmodel.catalogue import load_model_files  # noqa: E402
from runtime.blueprint import FAMILIES, load_blueprint  # noqa: E402
from tests.runtime import tiny  # noqa: E402

RUNS = [name for name in model_names() if load_model(name).family in FAMILIES and load_model(name).vision]
RUNS = [name for name in RUNS if json.loads(load_model_files()[name])["model_type"] != "internvl_chat"]
RUNS.remove("pixtral-12b")


def settings(config, folder):
    (folder / "config.json").write_text(json.dumps(config))
    return load_blueprint(folder).settings


@pytest.mark.parametrize("name", RUNS)
def test_what_transformers_fills_in_is_what_we_assume(name, tmp_path):
    # A config as published, and the same after transformers has read it and written every default into it.
    config = json.loads(load_model_files()[name])
    filled = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()
    assert settings(config, tmp_path) == settings(filled, tmp_path)


KEYS = ("rope_parameters", "rms_norm_eps", "hidden_act", "hidden_activation", "layer_norm_eps", "image_token_id")


def bare(config):
    """Take out every key that settings read and sizes do not need."""
    return {key: bare(value) if isinstance(value, dict) else value for key, value in config.items() if key not in KEYS}


@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if not name.startswith("qwen")])
def test_defaults_are_those_of_the_classes(name, tmp_path):
    config = bare(tiny.CONFIGS[name])
    filled = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()
    assert settings(config, tmp_path) == settings(filled, tmp_path)


QWEN_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 256}
"""The default sections fill heads of 128."""


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_defaults_of_qwen_are_those_of_the_classes(name, tmp_path):
    config = bare(tiny.CONFIGS[name])
    config["text_config"] |= QWEN_HEADS
    config["vision_config"] |= {"out_hidden_size": 256} if name != "qwen2_vl" else {"hidden_size": 256}
    filled = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()
    ours = settings(config, tmp_path)
    assert filled["text_config"]["rope_parameters"]["rope_theta"] == ours.decoder.rotation.theta
    filled["text_config"].pop("pad_token_id", None)
    real = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(real)
    rotary = model.model.language_model.rotary_emb
    sections = getattr(rotary, "mrope_section", None) or [16, 24, 24]  # Qwen2-VL's published config; no class default
    assert list(ours.decoder.rotation.sections) == list(sections)
    assert dataclasses.replace(settings(filled, tmp_path), decoder=ours.decoder) == ours


def test_pictures_of_a_folder_are_normalised_as_its_file_says(tmp_path):
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    found = settings(tiny.CONFIGS["llava"], tmp_path).pictures
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
