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
    Image,
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
from costmodel.families.text import load_text_configs
from costmodel.operators import Kind
from costmodel.recurrent import RecurrentSpec
from costmodel.units import UNBOUNDED
from tests.helpers import CLEAN_ERRORS, FAST_MODELS, assert_clean, load_config, representatives

ROOT = Path(costmodel.__file__).parent
HARDWARE_FILES = sorted(Path(hardware_profiles.__file__).parent.glob("*.toml"))
ENGINE_FILES = sorted((ROOT / "engines").glob("*.toml"))
CONFIG_FILES = sorted((ROOT / "model_configs").glob("*.json"))
FAMILY_FILES = sorted(
    f for f in (ROOT / "families").glob("*.py") if f.stem not in costmodel.families.HELPERS | {"__init__"}
)

UNIT = re.compile(r"_(bytes|bytes_per_s|hz|w|s|usd_per_s|count|fraction|cycles|tokens|s_per_pixel|g_per_j)$")
PURE = {
    "software_high",
    "software_low",
    "schema_version",
    "devices",
    "workers",
    "low",
    "high",
    "host_speed",
    "host_low",
    "host_high",
}  # numbers without a unit


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
                if isinstance(part, dict):
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
        owner = path.rstrip(".").rpartition(".")[2]  # a mapping by stage or codec has its unit in its own name
        assert key in PURE or UNIT.search(key) or UNIT.search(owner), path + key
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
    p = predict("qwen2.5-vl-7b", "a100-sxm4-80gb", Workload(images=[Image(640, 480)]), engine=engine)
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
    run = parts["vision"] + parts["adapter"] + parts["language"]
    assert parts["total"] == run + model.other_parameters > 0
    assert parts["active"] <= parts["total"]
    from_file = load_model(file)  # a path of the same file says the same
    assert from_file.parameters() == parts
    assert from_file.decoder == model.decoder
    assert from_file.vision == model.vision
    assert from_file.media == model.media


# Families

WITHOUT_MODEL = {"traced"}  # its files are written by people; tests/test_trace.py


@pytest.mark.parametrize("file", FAMILY_FILES, ids=lambda file: file.stem)
def test_family(file):
    module = importlib.import_module(f"costmodel.families.{file.stem}")
    assert module.__doc__
    assert module.__doc__.strip()
    assert module.MODEL_TYPES
    assert all(load_families()[model_type] is module for model_type in module.MODEL_TYPES)
    assert callable(module.read)
    assert module.read.__doc__
    used = any(load_config(name)["model_type"] in module.MODEL_TYPES for name in model_names())
    assert used != (file.stem in WITHOUT_MODEL), "no model of the catalogue uses it"


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
    for file in sorted((ROOT / "families").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name, value in vars(importlib.import_module(f"costmodel.{module}")).items():
            named = NAMED.match((value.__doc__ or "").strip()) if inspect.isclass(value) else None
            ours = named and issubclass(value, Foreign) and value.__module__ == f"costmodel.{module}"
            if ours and named[1] not in NOT_IN_TRANSFORMERS:
                yield pytest.param(value, named[1], id=name)


@functools.cache
def real_config(name):
    import transformers

    return getattr(transformers, name)()


def kinds(ours):
    """Return the `layer_types` of the decoder of an empty config."""
    mixers = [layer.mixer for layer in ours.model_validate({}).decoder("test").layers()]
    slides = ["full_attention" if mixer.window == UNBOUNDED else "sliding_attention" for mixer in mixers]
    pairs = zip(mixers, slides, strict=True)
    return ["linear_attention" if isinstance(mixer, RecurrentSpec) else slide for mixer, slide in pairs]


def settled(key, value, width, heads):
    """Return a default as a list or a number; None stands for what follows from the other keys."""
    follows = {
        "head_dim": width // heads if heads else None,
        "num_key_value_heads": heads,
        "mlp_only_layers": [],
        "use_bidirectional_attention": False,
        "word_embed_proj_dim": width,
    }
    if value is None:
        return follows.get(key)
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(("ours", "theirs"), list(config_classes()))
def test_defaults_are_those_of_transformers(ours, theirs):
    real, fields, compared = real_config(theirs), ours.model_fields, 0
    shape = [getattr(real, key, None) for key in ("hidden_size", "num_attention_heads")]
    for key, field in fields.items():
        if field.is_required() or not hasattr(real, key) or isinstance(field.default, dict):
            continue
        if (ours.__name__, key) in SETTLED_WHEN_READ:
            continue
        if key == "layer_types":
            assert kinds(ours) == list(real.layer_types or ["full_attention"] * real.num_hidden_layers)
            continue
        if key == "sliding_window" and not getattr(real, "use_sliding_window", True):
            continue  # its class drops the value while sliding is off, and so does ours where it is used
        assert settled(key, field.default, *shape) == settled(key, getattr(real, key), *shape), key
        compared += 1
    assert compared


def shallow(name):
    """Return the config of a model, with few layers where nothing else in it counts layers, and so quick to build."""
    config = load_config(name)
    if name in FAST_MODELS:
        text, vision = config.get("text_config", config), config["vision_config"]
        text["num_hidden_layers"] = 2
        vision["depth" if "depth" in vision else "num_hidden_layers"] = 3
    return config


def dropped_keys():
    from tests.oracle.transformers_counts import is_known

    for name in sorted({*FAST_MODELS, *filter(lambda name: is_known(load_config(name)), representatives())}):
        config = shallow(name)
        for part in [None, *(key for key in config if key.endswith("_config"))]:
            keys = config if part is None else config[part]
            for key in keys:
                if key == "num_hidden_layers" and "layer_types" in keys:
                    continue  # the two must agree
                yield pytest.param(name, part, key, marks=() if name in FAST_MODELS else pytest.mark.slow)


# Without these a file may be refused: what they would fall back to does not fit the rest, or is nobody's model.
MAY_BE_NEEDED = {
    "model_type",
    "text_config",
    "vision_config",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",  # where the width is no multiple of the heads
    "out_hidden_size",  # the language model's width
    "image_size",  # the side of tiles, whose grids are named beside it
    "scale_factor",  # of a shuffle that must divide the patches
    "deepstack_visual_indexes",  # layers of the tower
}
RELEASED = {("mistral-small-3.1-24b", None, "tie_word_embeddings")}
"""Where released files leave a key out and mean something else than the class."""


@pytest.mark.parametrize(("name", "part", "key"), list(dropped_keys()))
def test_a_dropped_key_falls_back_as_in_transformers(name, part, key, tmp_path):
    from huggingface_hub.errors import StrictDataclassError

    from tests.oracle import transformers_counts

    config = shallow(name)
    del (config[part] if part else config)[key]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        ours = load_model(tmp_path).parameters()
        theirs = transformers_counts.parameters(transformers_counts.build(config))
    except StrictDataclassError:  # transformers refuses it
        assert key in MAY_BE_NEEDED
        return
    except CLEAN_ERRORS as error:
        assert_clean(error)
        assert key in MAY_BE_NEEDED
        return
    assert (ours == theirs) != ((name, part, key) in RELEASED)


def test_every_text_config_names_its_class():
    unnamed = set(load_text_configs().values()) - {c.values[0] for c in config_classes()}
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
