"""Language models alone against the real `transformers` classes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from costmodel import Image, Unsupported, Video, Workload, load_model, predict
from costmodel.counts import count
from costmodel.families import language, vision_model_types
from costmodel.families.text import load_text_configs
from tests.helpers import load_config
from tests.oracle import transformers_counts as oracle

PUBLISHED = {
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}
MIXTRAL = {"model_type": "mixtral"}  # the defaults are Mixtral-8x7B
SMALL = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3}
SPARSE = {
    "mixtral": {"model_type": "mixtral", "num_hidden_layers": 2},
    "mixtral, odd": {"model_type": "mixtral", **SMALL, "num_local_experts": 5, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "num_hidden_layers": 2},
    "phi3, odd": {"model_type": "phi3", **SMALL, "attention_bias": True, "sliding_window": 64},
    "opt": {"model_type": "opt"},
    "opt, odd": {"model_type": "opt", "num_hidden_layers": 3, "enable_bias": False, "tie_word_embeddings": False},
    "llama": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 48},
}


def ours(folder, config):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_model(folder)


def real(config):
    with torch.device("meta"):
        parsed = oracle.parse(config)
        return AutoModelForCausalLM.from_config(parsed, attn_implementation="eager", dtype=torch.bfloat16).eval()


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_totals_are_published_and_those_of_transformers(name, total):
    model = load_model(name)
    assert model.parameters() == {"total": total, "vision": 0, "adapter": 0, "language": total, "active": total}
    assert (model.family, model.vision, model.adapter, model.media) == ("language", None, None, None)
    assert real(load_config(name)).num_parameters() == total


@pytest.mark.parametrize("config", SPARSE.values(), ids=SPARSE)
def test_sparse_and_odd_configs_are_those_of_transformers(config, tmp_path):
    assert ours(tmp_path, config).parameters()["total"] == real(config).num_parameters()


@pytest.mark.parametrize("kind", ["phi3", "phi3, odd", "opt", "opt, odd", "llama"])
def test_flops_and_cache_are_those_of_transformers(kind, tmp_path):
    model, theirs = ours(tmp_path, SPARSE[kind]), real(SPARSE[kind])
    flops = count(model, Workload(text_tokens=40), convention="torch").flops
    assert flops["prefill"] == oracle.prefill_flops(theirs, 40)
    assert flops["decode_step"] == oracle.decode_step_flops(theirs, 40)
    assert (flops["encode"], flops["adapt"]) == (0, 0)
    assert model.decoder.kv_bytes_per_token() == oracle.kv_bytes_per_token(theirs)


def test_mixtral_8x7b(tmp_path):
    model = ours(tmp_path, MIXTRAL)
    assert model.parameters()["total"] == 46_702_792_704  # 47B in all, 13B active: arXiv:2401.04088, section 2.1
    assert model.parameters()["active"] == 12_879_925_248
    assert model.routing == (8, 2)


def test_llama_2_70b_on_text():
    p = predict("llama-2-70b", "h100-sxm5-80gb", Workload(text_tokens=512))
    assert p.tpot_s > 68.98e9 * 2 / 3.35e12  # no step is faster than its weights are read
    assert set(p.as_dict()["stages"]) == {"preprocess", "encode", "adapt", "prefill", "decode"}


@pytest.mark.parametrize(
    "workload",
    [
        Workload(images=[Image(640, 480)]),
        Workload(videos=[Video(640, 480, 2.0, 24.0)]),
        Workload(visual_tokens=100.0),
    ],
)
def test_a_picture_is_refused(workload):
    with pytest.raises(Unsupported, match=r"llama-3\.1-8b has no vision part"):
        count("llama-3.1-8b", workload)
    with pytest.raises(Unsupported, match=r"llama-3\.1-8b has no vision part"):
        predict("llama-3.1-8b", "h100-sxm5-80gb", workload)


@pytest.mark.parametrize("key", language.VISION_KEYS)
def test_a_vision_part_under_the_name_of_a_decoder_is_refused(key, tmp_path):
    with pytest.raises(Unsupported, match=f"{key} is a vision part"):
        ours(tmp_path, load_config("llama-3.1-8b") | {key: {"hidden_size": 1024}})


def test_an_unknown_vision_language_model_stays_an_error(tmp_path):
    config = {"model_type": "new_vl", "vision_config": {"depth": 2}, "text_config": load_config("qwen3-8b")}
    with pytest.raises(LookupError, match=r"unknown model type .*'new_vl'"):
        ours(tmp_path, config)


def test_every_decoder_stands_alone_unless_a_family_reads_its_type():
    assert set(language.MODEL_TYPES) | vision_model_types() >= set(load_text_configs())
    assert not set(language.MODEL_TYPES) & vision_model_types()
    known = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "opt", "internlm2"}
    assert known <= set(language.MODEL_TYPES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word_embed_proj_dim": 512}, "word_embed_proj_dim=512"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before"),
    ],
)
def test_the_odd_opt_is_refused(changes, message, tmp_path):
    with pytest.raises(Unsupported, match=message):
        ours(tmp_path, {"model_type": "opt", **changes})
