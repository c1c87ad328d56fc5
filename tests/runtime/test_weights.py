"""Folders load whole or not at all, and what is wrong with one is said in one line."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from safetensors.torch import load_file, save_file  # noqa: E402

from costmodel import DoesNotFit, Unsupported, load_model  # noqa: E402
from runtime import device as devices  # noqa: E402
from runtime.blueprint import load_blueprint  # noqa: E402
from runtime.weights import load  # noqa: E402
from tests.helpers import assert_clean  # noqa: E402
from tests.runtime import tiny  # noqa: E402

CPU, FULL = torch.device("cpu"), torch.float32
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(pairs, tmp_path):
    """Return a copy of a saved model that may be spoilt."""
    return shutil.copytree(pairs("qwen2_5_vl").folder, tmp_path / "model")


def refused(folder, words):
    with pytest.raises((ValueError, LookupError), match=words) as raised:
        load(load_blueprint(folder), CPU, FULL)
    assert_clean(raised.value)


def spoil(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_parameter_of_the_spec_is_built(pairs, name):
    ours = pairs(name).ours
    encoder = ours.spec.vision
    unread = sum(run.parameters for run in encoder.unused_runs)
    unread += 2 * encoder.width * (name.startswith("llava"))  # CLIP's last norm is in the checkpoint and not run
    assert sum(p.numel() for p in ours.parameters()) == ours.spec.parameters()["total"] - unread


def test_shards_load_as_one_file_does(pairs, tmp_path):
    both = pairs("qwen3_vl_moe")
    both.real.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = load(load_blueprint(tmp_path), CPU, FULL)
    for (name, a), b in zip(both.ours.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b), name
    shutil.copytree(tmp_path, tmp_path / "part")
    sorted((tmp_path / "part").glob("*.safetensors"))[1].unlink()
    refused(tmp_path / "part", "lacks the shard 'model-00002")


def test_names_of_transformers_5_modules_load(pairs, folder):
    real = pairs("qwen2_5_vl").real
    save_file({name: tensor.contiguous() for name, tensor in real.state_dict().items()}, folder / WEIGHTS)
    again = load(load_blueprint(folder), CPU, FULL)
    assert all(map(torch.equal, pairs("qwen2_5_vl").ours.parameters(), again.parameters()))


def test_experts_of_published_files_lie_the_other_way_round(pairs, tmp_path):
    both = pairs("qwen3_vl_moe")
    folder = shutil.copytree(both.folder, tmp_path / "model")

    def turn(tensors):
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].mT.contiguous()

    spoil(folder, turn)
    assert all(map(torch.equal, both.ours.parameters(), load(load_blueprint(folder), CPU, FULL).parameters()))


LAYER = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(folder):
    spoil(folder, lambda tensors: tensors.pop(LAYER))
    refused(folder, "lacks the tensor 'model.language_model.layers.1.mlp.up_proj.weight'")


def test_a_wrong_shape_is_named(folder):
    spoil(folder, lambda tensors: tensors.update({LAYER: torch.zeros(48, 33)}))
    refused(folder, "model.language_model.layers.1.mlp.gate_proj.weight: shapes=.*33.* make no weight of shape")


def test_a_format_with_scales_is_refused(folder):
    spoil(folder, lambda tensors: tensors.update({LAYER: tensors[LAYER].to(torch.float8_e4m3fn)}))
    refused(folder, "dtype='F8_E4M3' must be one of")


def test_tensors_that_nothing_uses_are_refused(folder):
    spoil(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    refused(folder, "belongs to no part that the config describes")


def test_a_torn_file_is_refused(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(folder, "is no whole safetensors file")


def test_weights_in_another_form_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "holds 'pytorch_model.bin' and no ")


def test_a_broken_index_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(folder, "is no index of safetensors")


def test_without_weights_they_are_random_and_repeat(folder):
    (folder / WEIGHTS).unlink()
    blueprint = load_blueprint(folder)
    one, two, other = (load(blueprint, CPU, FULL, seed=seed) for seed in (1, 1, 2))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.decoder.embedding.weight, other.decoder.embedding.weight)
    assert all(p.isfinite().all() for p in one.parameters())


def test_what_exceeds_the_memory_is_refused_before_it_is_taken(folder, monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda _: 1000)
    with pytest.raises(DoesNotFit, match=r"weights of model needs .* are usable") as raised:
        load(load_blueprint(folder), CPU, FULL)
    assert "\n" not in str(raised.value)


def test_an_allocation_that_fails_is_one_line():
    with pytest.raises(DoesNotFit, match=r"a thing needs 4611686018\.4 GB"), devices.memory_guarded("a thing", CPU):
        torch.empty(2**60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="use --device cpu") as raised:
        devices.open_device("cuda")
    assert_clean(raised.value)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps"])
def test_unknown_devices(name):
    with pytest.raises(LookupError, match="unknown device") as raised:
        devices.open_device(name)
    assert_clean(raised.value)


def test_unknown_formats():
    with pytest.raises(LookupError, match="unknown dtype 'int3'"):
        devices.dtype_of("int3")


@pytest.mark.parametrize("name", ["idefics2-8b", "llama-3.1-8b", "internvl2-8b", "pixtral-12b"])
def test_models_without_a_runtime_say_so(name):
    with pytest.raises((LookupError, Unsupported), match=r"runtime|tower") as raised:
        load_blueprint(name)
    assert_clean(raised.value)


RUNS = ["llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-2b", "qwen2.5-vl-7b", "qwen2.5-vl-72b", "qwen3-vl-8b"]
RUNS += ["qwen3-vl-235b-a22b", "internvl3-8b", "internvl3.5-30b-a3b", "gemma-3-4b", "gemma-3-27b"]


@pytest.mark.parametrize("name", RUNS)
def test_models_of_the_catalogue_are_built_to_their_last_parameter(name):
    from runtime.model import Lvlm

    with torch.device("meta"):
        ours = Lvlm(load_blueprint(name))
    spec = load_model(name)
    unread = sum(run.parameters for run in spec.vision.unused_runs) + 2 * 1024 * name.startswith("llava")
    assert sum(p.numel() for p in ours.parameters()) == spec.parameters()["total"] - unread


def change(config, **keys):
    text = config.get("text_config", config)
    text.update(keys)
    return config


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not implemented"),
        ({"rope_parameters": {"rope_type": "default", "ntk_alpha": 3}}, "ntk_alpha"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}}, "mrope_section"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not implemented"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_keys_that_change_results_are_not_passed_over(folder, keys, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config, **keys)))
    refused(folder, words)
