"""Qwen3.5: the gated delta rule against `transformers`, and the laws of a state that never grows."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from costmodel import Image, Unsupported, Workload, load_engine, load_model, predict
from costmodel.catalogue import _read
from costmodel.counts import count
from costmodel.deployment import Parallelism
from costmodel.families.files import ModelFiles
from costmodel.layers import AttentionSpec
from costmodel.query import Turn, build_query
from costmodel.recurrent import RecurrentSpec
from costmodel.sums import kept_tokens
from tests.families import native_oracle as oracle
from tests.helpers import load_config
from tests.oracle.transformers_counts import build, parameters

PUBLISHED = {  # safetensors totals, the layers for multi-token prediction included
    "qwen3.5-0.8b": 873438784,
    "qwen3.5-2b": 2274069824,
    "qwen3.5-4b": 4659865088,
    "qwen3.5-9b": 9653104368,
    "qwen3.5-27b": 27781427952,
    "qwen3.5-35b-a3b": 35951822704,
    "qwen3.5-122b-a10b": 125086497008,
    "qwen3.5-397b-a17b": 403397928944,
}


def read(config):
    return _read(ModelFiles(config, source="test"), "test")


def kinds(model):
    return [type(run.layer.mixer) for run in model.decoder.runs]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_total_is_the_published_one_but_for_multi_token_prediction(name):
    model = load_model(name)
    width = model.decoder.width
    full = next(run.layer for run in model.decoder.runs if isinstance(run.layer.mixer, AttentionSpec))
    predictor = 2 * width * width + full.parameters + 3 * width  # a projection, a layer of full attention, three norms
    assert model.parameters()["total"] + predictor == PUBLISHED[name]


@pytest.mark.parametrize(
    "name", ["qwen3.5-9b", *(pytest.param(n, marks=pytest.mark.slow) for n in list(PUBLISHED)[4:])]
)
def test_parameters_and_cache_are_those_of_the_real_model(name):
    real, ours = build(load_config(name)), load_model(name)
    theirs = parameters(real)
    assert {part: ours.parameters()[part] for part in theirs} == theirs
    layers = oracle.forward(real, 8).past_key_values.layers
    grown = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if hasattr(layer, "keys"))
    assert ours.decoder.kv_bytes_per_token() == grown / 8
    states = [layer for layer in layers if hasattr(layer, "recurrent_states")]
    recurrent = sum(layer.recurrent_states[0].nbytes for layer in states)
    convolution = sum(layer.conv_states[0].nbytes for layer in states)
    # transformers keeps as many inputs as the kernel is long; the oldest is never used again, and engines drop it
    assert ours.decoder.state_bytes == recurrent + convolution * 3 / 4


def small(name, text=None, vision=None, **changes):
    config = copy.deepcopy(load_config(name))
    config["vision_config"] |= {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96} | (vision or {})
    text = {"num_hidden_layers": 5, "vocab_size": 999, "layer_types": None} | (text or {})
    config["text_config"] = {k: v for k, v in (config["text_config"] | text).items() if v is not None}
    return config | changes


VARIANTS = [
    small("qwen3.5-9b"),
    small("qwen3.5-4b", text={"full_attention_interval": 2, "attention_bias": True}),
    small("qwen3.5-4b", tie_word_embeddings=False, vision={"deepstack_visual_indexes": [0, 1]}),
    small("qwen3.5-35b-a3b", text={"linear_num_value_heads": 16, "linear_key_head_dim": 64, "num_experts": 16}),
    small("qwen3.5-35b-a3b", text={"linear_conv_kernel_dim": 3, "linear_value_head_dim": 96, "num_experts": 16}),
    small("qwen3.5-9b", text={"layer_types": ["full_attention", *(["linear_attention"] * 4)]}),
]


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_odd_variants_are_the_real_model(config):
    ours, real = read(config), build(config)
    theirs = parameters(real)
    assert {part: ours.parameters()[part] for part in theirs} == theirs
    for n_tokens in (64, 70, 200):
        flops = count(ours, Workload(text_tokens=n_tokens), convention="torch").flops
        assert (flops["prefill"], flops["decode_step"]) == oracle.prefill_and_step_flops(real, n_tokens)
    flops = count(ours, Workload(images=[Image(32 * 16, 32 * 8)]), convention="torch").flops
    assert flops["encode"] + flops["adapt"] == oracle.vision_flops(real, (1, 16, 32))


def test_the_kernel_counts_systems_and_steps_and_no_padding():
    mixer = RecurrentSpec(key_heads=2, value_heads=4, key_dim=8, value_dim=16, chunk=64)
    inside = 4 * 64 * (4 * 8 + 2 * 16)
    assert mixer.step_flops == 6 * 4 * 8 * 16
    assert mixer.block_flops(solves=False) == mixer.step_flops + inside
    assert mixer.block_flops(solves=True) == mixer.step_flops + inside + 4 * 64 * 2 * (8 + 16)
    torch, kernel = (count("qwen3.5-9b", Workload(text_tokens=65), convention=c).flops for c in ("torch", "kernel"))
    assert kernel["decode_step"] > torch["decode_step"]  # PyTorch's step is no matrix product
    one, two = (count("qwen3.5-9b", Workload(text_tokens=n)).flops["prefill"] for n in (64, 65))
    assert two - one < one / 32  # one token more, not a block more


def test_the_state_does_not_grow():
    model = load_model("qwen3.5-9b")
    assert kinds(model) == [RecurrentSpec, AttentionSpec] * 8
    for tokens in (15, 111, 99_999):  # whole blocks with the token behind
        p = predict(model, "h100-sxm5-80gb", Workload(text_tokens=tokens, output_tokens=1))
        grown = (tokens + 1) * model.decoder.kv_bytes_per_token()
        assert p.memory.kv_bytes == pytest.approx(grown + model.decoder.state_bytes, rel=1e-12), tokens
    short, long = (count(model, Workload(text_tokens=n)).kv_bytes for n in (10, 20))
    assert long - short == 10 * model.decoder.kv_bytes_per_token()


def test_a_state_is_kept_once_whatever_the_turns():
    query = build_query(load_model("qwen3.5-9b"), Workload(text_tokens=100), load_engine("ideal"))
    more = replace(query, turns=(*query.turns, Turn(0.0, 50.0, 10.0, prefix_tokens=200.0)))
    for entry in more.kv:
        if isinstance(entry.mixer, RecurrentSpec):
            assert kept_tokens(more, entry) == 1.0
            assert (entry.bits, entry.grows) == (32, False)


def test_the_cache_width_changes_no_state():
    from costmodel.deployment import Precision

    model = load_model("qwen3.5-9b")
    wide, narrow = (
        predict(model, "h100-sxm5-80gb", Workload(text_tokens=1000), precision=Precision(kv_bits=bits)).memory.kv_bytes
        for bits in (16, 8)
    )
    assert wide - model.decoder.state_bytes == pytest.approx(2 * (narrow - model.decoder.state_bytes), rel=1e-12)


def test_tensor_parallelism_shares_the_states():
    one, four = (
        predict("qwen3.5-35b-a3b", "h100-sxm5-80gb", Workload(text_tokens=1), parallelism=Parallelism(tp=tp)).memory
        for tp in (1, 4)
    )
    states = load_model("qwen3.5-35b-a3b").decoder.state_bytes
    assert one.kv_bytes - four.kv_bytes > 0.7 * states
    with pytest.raises(ValueError, match="does not divide"):
        predict("qwen3.5-9b", "h100-sxm5-80gb", Workload(), parallelism=Parallelism(tp=3))


@pytest.mark.parametrize("engine", ["ideal", "fused", "paper"])
def test_a_sweep_equals_its_points(engine):
    tokens = np.array([1.0, 63.0, 64.0, 65.0, 5000.0, 20000.0])
    swept = predict("qwen3.5-9b", "h100-sxm5-80gb", Workload(text_tokens=tokens), engine=engine)
    for i, n in enumerate(tokens):
        point = predict("qwen3.5-9b", "h100-sxm5-80gb", Workload(text_tokens=float(n)), engine=engine)
        assert swept.total_s[i] == pytest.approx(point.total_s, rel=1e-12)
    assert np.all(np.diff(swept.total_s) > 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (small("qwen3.5-9b", text={"layer_types": ["sliding_attention"] * 5}), "sliding_attention"),
        (small("qwen3.5-9b", text={"layer_types": ["full_attention"] * 4}), "4 entries"),
        (small("qwen3.5-9b", text={"linear_num_value_heads": 20}), "linear_num_value_heads"),
        (small("qwen3.5-9b", text={"num_experts": 4}), "num_experts"),
        (small("qwen3.5-9b", vision={"out_hidden_size": 100}), "out_hidden_size"),
    ],
)
def test_what_does_not_fit_is_refused(config, words):
    with pytest.raises((ValueError, Unsupported), match=words):
        read(config)
