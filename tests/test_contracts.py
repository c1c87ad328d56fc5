"""Contracts of every file of the catalogues: each test finds the files by itself."""

import functools
import importlib
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

import costmodel
import costmodel.families
import hardware_profiles
from costmodel import (
    Workload,
    engine_names,
    hardware_names,
    load_engine,
    load_hardware,
    load_model,
    model_names,
    predict,
)
from costmodel.base import Foreign
from costmodel.families import load_families
from costmodel.operators import Kind
from tests.helpers import CLEAN_ERRORS, FAST_MODELS, assert_clean, images, load_config, models

ROOT = Path(costmodel.__file__).parent
HARDWARE_FILES = sorted(Path(hardware_profiles.__file__).parent.glob("*.toml"))
ENGINE_FILES = sorted((ROOT / "engines").glob("*.toml"))
CONFIG_FILES = sorted((ROOT / "model_configs").glob("*.json"))
FAMILY_FILES = sorted(
    f for f in (ROOT / "families").glob("*.py") if f.stem not in costmodel.families.HELPERS | {"__init__"}
)

UNIT = re.compile(r"_(bytes|bytes_per_s|hz|w|s|usd_per_s|count|fraction|cycles|tokens|s_per_pixel|g_per_j)$")
PURE = {"schema_version", "devices", "workers", "low", "high"}  # numbers without a unit


def stems(files):
    return [file.stem for file in files]


def numeric_keys(values, path=""):
    """Yield (path, key) of every number in a TOML document but its sources."""
    for key, value in values.items():
        if key == "sources":
            continue
        if isinstance(value, dict):
            yield from numeric_keys(value, f"{path}{key}.")
        elif isinstance(value, list):
            for part in value:
                yield from numeric_keys(part, f"{path}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, key


def test_every_file_is_found():
    assert hardware_names() == stems(HARDWARE_FILES)
    assert engine_names() == stems(ENGINE_FILES)
    assert model_names() == stems(CONFIG_FILES)
    found = {Path(inspect.getfile(module)).stem for module in load_families().values()}
    assert found == set(stems(FAMILY_FILES))


# Devices


@pytest.mark.parametrize("file", HARDWARE_FILES, ids=lambda file: file.stem)
def test_device(file):
    values, device = tomllib.loads(file.read_text(encoding="utf-8")), load_hardware(file.stem)
    assert device.name == file.stem
    assert load_hardware(str(file)) == device
    for path, key in numeric_keys(values):
        assert path == "peak_flops_per_s." or key in PURE or UNIT.search(key), path + key
    keys = [key for key, _ in device.numbers()]
    assert sorted(keys) == sorted(set(keys))
    assert sorted(key for keys in device.provenance.values() for key in keys) == sorted(keys)
    for source in device.sources:
        assert any(source.covers_key(key) for key in keys), f"{source.title} covers nothing"
        assert source.title.strip()


@pytest.mark.parametrize("name", hardware_names())
def test_device_is_plausible(name):
    device = load_hardware(name)
    assert device.precision(16) in ("bf16", "fp16")
    ridge = device.peak_flops_per_s[device.precision(16)] / device.memory_bandwidth_bytes_per_s
    assert 1 < ridge < 2000
    peaks = device.peak_flops_per_s
    assert peaks.get("fp8", peaks.get("int8", 1e30)) >= peaks[device.precision(16)]
    assert 1e9 < device.memory_bytes < 1e13
    assert device.idle_w < device.tdp_w
    assert all(link.bandwidth_bytes_per_s < device.memory_bandwidth_bytes_per_s for link in device.links)


# Engines


@pytest.mark.parametrize("file", ENGINE_FILES, ids=lambda file: file.stem)
def test_engine(file):
    values, engine = tomllib.loads(file.read_text(encoding="utf-8")), load_engine(file.stem)
    assert engine.name == file.stem
    assert engine.title
    assert engine.description
    for path, key in numeric_keys(values):
        assert key in PURE or UNIT.search(key), path + key
    keys = sorted(engine.numbers())
    assert sorted(key for keys in engine.provenance.values() for key in keys) == keys
    for source in engine.sources:
        assert any(source.covers_key(key) for key in keys), f"{source.title} covers nothing"
    banded = {kind: e.low is not None and e.high is not None for kind, e in engine.efficiency.items()}
    half = [kind for kind, e in engine.efficiency.items() if (e.low is None) != (e.high is None)]
    assert not half
    assert not any(banded.values()) or {kind for kind, has in banded.items() if has} == {k.label for k in Kind}


@pytest.mark.parametrize("engine", engine_names())
def test_an_engine_gives_a_band_when_its_file_does(engine):
    p = predict("qwen2.5-vl-7b", "a100-sxm4-80gb", images((640, 480)), engine=engine)
    has_band = any(e.low is not None for e in load_engine(engine).efficiency.values())
    assert (p.error_band is not None) == has_band
    if p.error_band:
        for field, (low, high) in p.error_band.items():
            assert 0 <= low < getattr(p, field) < high


# Models


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_model(file):
    model = load_model(file.stem)
    assert model.name == file.stem
    assert model.family in stems(FAMILY_FILES)
    parts = model.parameters()
    assert parts["total"] == parts["vision"] + parts["adapter"] + parts["language"] > 0
    assert parts["active"] <= parts["total"]
    from_file = load_model(file)  # a path of the same file says the same
    assert from_file.parameters() == parts
    assert from_file.decoder == model.decoder
    assert from_file.vision == model.vision
    assert from_file.media == model.media


@pytest.mark.parametrize("name", models())
def test_model_runs_everywhere(name):
    for device in hardware_names():
        for engine in engine_names():
            for workload in (images((1280, 720)), Workload(text_tokens=1, output_tokens=1)):
                p = predict(name, device, workload, engine=engine)
                told = json.loads(json.dumps(p.as_dict(), allow_nan=False))
                assert 0 < told["ttft_s"] <= told["total_s"]
                assert told["tpot_s"] > 0
                assert told["energy_j"] > 0
                assert told["fits"] == (told["max_batch"] >= 1)
                assert set(told["stages"]) == {"preprocess", "encode", "adapt", "prefill", "decode"}


# Families


@pytest.mark.parametrize("file", FAMILY_FILES, ids=lambda file: file.stem)
def test_family(file):
    module = importlib.import_module(f"costmodel.families.{file.stem}")
    assert module.__doc__
    assert module.__doc__.strip()
    assert module.MODEL_TYPES
    assert all(load_families()[model_type] is module for model_type in module.MODEL_TYPES)
    assert callable(module.read)
    assert module.read.__doc__
    assert any(load_config(name)["model_type"] in module.MODEL_TYPES for name in model_names()), "no model uses it"


def test_no_two_families_read_one_model_type():
    types = [
        model_type
        for file in FAMILY_FILES
        for model_type in importlib.import_module(f"costmodel.families.{file.stem}").MODEL_TYPES
    ]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("name", model_names())
def test_a_folder_of_nothing_but_the_config_is_that_model(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(load_config(name)), encoding="utf-8")
    assert load_model(tmp_path).parameters() == load_model(name).parameters()


# Defaults of config classes: a class names its `transformers` class first thing in its docstring

NOT_IN_TRANSFORMERS = {"InternLM2Config"}  # remote code of the InternVL repositories
SETTLED_WHEN_READ = {("InternVl", "tie_word_embeddings")}  # its two layouts differ; see the dropped keys below
NAMED = re.compile(r"`(\w+Config)`")


def config_classes():
    for module in ["text", *stems(FAMILY_FILES)]:
        for name, value in vars(importlib.import_module(f"costmodel.families.{module}")).items():
            named = NAMED.match((value.__doc__ or "").strip()) if inspect.isclass(value) else None
            ours = named and issubclass(value, Foreign) and value.__module__.endswith(f".{module}")
            if ours and named[1] not in NOT_IN_TRANSFORMERS:
                yield pytest.param(value, named[1], id=name)


@functools.cache
def real_config(name):
    import transformers

    return getattr(transformers, name)()


def plain(value):
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(("ours", "theirs"), list(config_classes()))
def test_defaults_are_those_of_transformers(ours, theirs):
    real, compared = real_config(theirs), 0
    for key, field in ours.model_fields.items():
        if field.is_required() or not hasattr(real, key) or isinstance(field.default, dict):
            continue
        if (ours.__name__, key) in SETTLED_WHEN_READ:
            continue
        default, expected = plain(field.default), plain(getattr(real, key))
        if default is None and key == "num_key_value_heads":
            default = ours.model_fields["num_attention_heads"].default
        if default is None and key == "head_dim":
            default = ours.model_fields["hidden_size"].default // ours.model_fields["num_attention_heads"].default
        if default is None and key == "layer_types":
            assert set(expected or ["full_attention"]) == {"full_attention"}
            continue
        if key == "sliding_window" and not getattr(real, "use_sliding_window", True):
            continue  # its class drops the value while sliding is off, and so does ours where it is used
        assert default == expected, key
        compared += 1
    assert compared


def shallow(name):
    """Return the config of a model with few layers, which the real class builds in no time."""
    config = load_config(name)
    text, vision = config.get("text_config", config), config["vision_config"]
    text["num_hidden_layers"] = 2
    vision["depth" if "depth" in vision else "num_hidden_layers"] = 3
    return config


def dropped_keys(name):
    config = shallow(name)
    for part in (None, "text_config", "vision_config"):
        if part is None or part in config:
            yield from ((part, key) for key in (config if part is None else config[part]))


# Without these a file may be refused: what they would fall back to does not fit the rest, or is nobody's model.
MAY_BE_NEEDED = {
    "model_type",
    "text_config",
    "vision_config",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
}
DROPS = [(name, *where) for name in FAST_MODELS for where in dropped_keys(name)]


@pytest.mark.parametrize(("name", "part", "key"), DROPS)
def test_a_dropped_key_falls_back_as_in_transformers(name, part, key, tmp_path):
    from tests.oracle import transformers_counts

    config = shallow(name)
    del (config[part] if part else config)[key]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        ours = load_model(tmp_path).parameters()
    except CLEAN_ERRORS as error:
        assert_clean(error)
        assert key in MAY_BE_NEEDED
        return
    theirs = transformers_counts.parameters(transformers_counts.build(config))
    assert {component: ours[component] for component in theirs} == theirs


def test_every_text_config_names_its_class():
    from costmodel.families.text import TEXT_CONFIGS

    unnamed = set(TEXT_CONFIGS.values()) - {c.values[0] for c in config_classes()}
    assert {cls.__name__ for cls in unnamed} == {"InternLm2Text"}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text"])
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3, "hidden_size": 512, "num_attention_heads": 8}])
def test_a_sparse_text_config_is_the_model_of_transformers(model_type, changes):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from costmodel.families.text import read_decoder

    kv_heads = {"num_key_value_heads": 4} if changes else {}
    sparse = {"model_type": model_type, "num_hidden_layers": 2, "tie_word_embeddings": False} | changes | kv_heads
    decoder = read_decoder(sparse, "test")
    config = CONFIG_MAPPING[model_type].from_dict(dict(sparse))
    with torch.device("meta"):
        if model_type == "qwen2_5_vl_text":
            from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

            theirs = Qwen2_5_VLTextModel(config).num_parameters() + config.vocab_size * config.hidden_size
        else:
            theirs = AutoModelForCausalLM.from_config(config).num_parameters()
    assert decoder.parameters == theirs


def test_our_errors_are_the_ones_of_the_tree():
    assert all(issubclass(error, Exception) for error in CLEAN_ERRORS)
    assert issubclass(costmodel.Unsupported, ValueError)
    assert not issubclass(costmodel.DoesNotFit, ValueError)
