"""Qwen3-VL and Qwen's experts: sizes, frames, parameters and FLOPs against `transformers`."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from costmodel import Image, Unsupported, Video, Workload, load_model
from costmodel.catalogue import _read
from costmodel.counts import count
from costmodel.families.files import ModelFiles
from costmodel.families.text import read_decoder
from costmodel.models import ModelSpec
from tests.families import native_oracle as oracle
from tests.helpers import load_config
from tests.oracle.transformers_counts import build, parameters

NAMES = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b", "qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b")
IMAGE, CLIP = (65536, 16777216), (4096, 25165824)


def read(config, image=None, video=None):
    return _read(ModelFiles(config, image or {}, video or {}, source="test"), "test")


def test_the_32b_is_the_published_size():
    config = load_config("qwen3-vl-32b")
    assert load_model("qwen3-vl-32b").parameters()["total"] == 33357390064
    assert parameters(build(config)).items() <= load_model("qwen3-vl-32b").parameters().items()


def test_images_are_those_of_the_processor():
    rule = load_model("qwen3-vl-8b").media
    for width, height in oracle.sizes(1000):
        theirs = oracle.image_patches("qwen3_vl", width, height, patch=16, merge=2, limits=IMAGE)
        cost = rule.image(width, height)
        assert (cost.patches, 4 * cost.visual_tokens) == (theirs, theirs), (width, height)


@pytest.mark.parametrize("cap", [None, True])
@pytest.mark.parametrize("limits", [CLIP, (131072, 786432)])
def test_videos_are_those_of_the_processor(limits, cap):
    size = dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))
    rule = read(load_config("qwen3-vl-8b"), video={"size": size, "cap_pixels_per_frame": cap}).media
    rng = np.random.default_rng(2)
    for width, height in oracle.sizes(1000, seed=1, most=2000):
        n_frames = int(rng.integers(2, 700))
        settings = {"patch": 16, "merge": 2, "limits": limits, "cap_pixels_per_frame": cap}
        theirs = oracle.video_patches("qwen3_vl", n_frames, width, height, **settings)
        cost = rule.video(n_frames, width, height)
        assert (cost.patches, 4 * cost.visual_tokens) == (theirs, theirs), (n_frames, width, height)
        assert cost.pairs * -(-n_frames // 2) == theirs**2


def test_frames_are_those_of_the_processor():
    rule, rng = load_model("qwen3-vl-8b").media, np.random.default_rng(3)
    for _ in range(1000):
        total, fps = int(rng.integers(1, 4000)), float(rng.choice([1, 10, 23.976, 24, 25, 29.97, 30, 60]))
        video = Video(640, 480, seconds=total / fps, fps=fps)
        assert rule.frames(video) == oracle.sampled("qwen3_vl", video.total_frames, fps), (total, fps)


def test_every_frame_pair_has_markers_and_its_time():
    rule = load_model("qwen3-vl-8b").media
    assert rule.image(640, 480).marker_tokens == 2
    assert rule.video(4, 640, 480).marker_tokens == 2 * (2 + len(["<", "0", ".", "2", " seconds", ">"]))
    assert rule.video(24, 640, 480).marker_tokens == 10 * 8 + 2 * 9  # from ten seconds on one digit more


def test_a_clip_of_one_frame_is_refused_as_its_processor_does():
    with pytest.raises(ValueError, match="must be larger"):
        oracle.video_module("qwen3_vl").smart_resize(1, 480, 640)
    with pytest.raises(ValueError, match="give it as an image"):
        load_model("qwen3-vl-8b").media.video(1, 640, 480)


def small(name="qwen3-vl-30b-a3b", vision=None, text=None, **changes):
    config = copy.deepcopy(load_config(name))
    config["vision_config"] |= {"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96}
    config["vision_config"] |= {"deepstack_visual_indexes": [0, 2]} | (vision or {})
    config["text_config"] |= {"num_hidden_layers": 3, "vocab_size": 999} | (text or {})
    return config | changes


VARIANTS = [
    small(),
    small(vision={"deepstack_visual_indexes": []}),
    small("qwen3-vl-2b"),
    small("qwen3-vl-2b", tie_word_embeddings=False),
    small("qwen3-vl-2b", text={"attention_bias": True, "head_dim": 64}),
    small(text={"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    small(tie_word_embeddings=True, text={"num_experts": 6, "num_experts_per_tok": 3}),
]


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_odd_variants_are_the_real_model(config):
    ours, real = read(config), build(config)
    theirs = parameters(real)
    assert {part: ours.parameters()[part] for part in theirs} == theirs
    flops = count(ours, Workload(text_tokens=70), convention="torch").flops
    assert (flops["prefill"], flops["decode_step"]) == oracle.prefill_and_step_flops(real, 70)
    flops = count(ours, Workload(images=[Image(32 * 16, 32 * 8)]), convention="torch").flops
    assert flops["encode"] + flops["adapt"] == oracle.vision_flops(real, (1, 16, 32))


def test_deepstack_leaves_more_vectors_and_no_more_tokens():
    deep, plain = read(small()), read(small(vision={"deepstack_visual_indexes": []}))
    assert (deep.adapter.outputs, plain.adapter.outputs) == (3, 1)
    assert load_model("qwen3-vl-8b").adapter.outputs == 4
    assert deep.media == plain.media


TEXTS = [
    {"model_type": "qwen2_moe"},
    {"model_type": "qwen2_moe", "qkv_bias": False, "num_experts": 7, "shared_expert_intermediate_size": 96},
    {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 40, "num_hidden_layers": 5},
    {"model_type": "qwen3_moe"},
    {"model_type": "qwen3_moe", "head_dim": 96, "attention_bias": True, "decoder_sparse_step": 2},
    {"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 40},
]


@pytest.mark.parametrize("changes", TEXTS, ids=range(len(TEXTS)))
def test_language_models_with_experts_are_the_real_ones(changes):
    config = {"num_hidden_layers": 3, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    config |= {"moe_intermediate_size": 64, "intermediate_size": 160, "vocab_size": 500} | changes
    with torch.device("meta"):
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        real = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager", dtype=oracle.DTYPE)
    real.set_experts_implementation("batched_mm")
    decoder = read_decoder(config, "test")
    assert decoder.parameters == real.num_parameters()
    flops = count(ModelSpec("test", "test", decoder), Workload(text_tokens=70), convention="torch").flops
    prefill, step = oracle.prefill_and_step_flops(real.eval(), 70)
    assert flops["decode_step"] == step
    assert flops["prefill"] == prefill if not changes.get("use_sliding_window") else flops["prefill"] <= prefill


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (small(vision={"out_hidden_size": 100}), "out_hidden_size"),
        (small(vision={"deepstack_visual_indexes": [4]}), "deepstack_visual_indexes"),
        (small(text={"quantization_config": {"bits": 4}}), "quantization_config"),
        (small("qwen3-vl-2b", text={"num_experts": 4}), "num_experts"),
        ({key: value for key, value in small().items() if key != "text_config"}, "text_config"),
    ],
)
def test_what_does_not_fit_is_refused(config, words):
    with pytest.raises((ValueError, Unsupported), match=words):
        read(config)
