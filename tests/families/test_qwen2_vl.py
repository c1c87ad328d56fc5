"""Qwen2-VL: sizes, frames and parameters against `transformers`; the rules it shares with Qwen2.5-VL."""

import copy

import numpy as np
import pytest

from costmodel import Video, load_model
from costmodel.catalogue import _read
from costmodel.families.files import ModelFiles
from tests.families import native_oracle as oracle
from tests.helpers import load_config
from tests.oracle.transformers_counts import build, parameters

NAMES = ("qwen2-vl-2b", "qwen2-vl-7b")
HUB = (3136, 12845056)


def read(config, image=None, video=None):
    return _read(ModelFiles(config, image or {}, video or {}, source="test"), "test")


@pytest.mark.parametrize("limits", [HUB, (200704, 1003520), (1, 784)])
@pytest.mark.parametrize("name", ["qwen2-vl-7b", "qwen2.5-vl-7b"])
def test_images_are_those_of_the_processor(name, limits):
    rule = read(load_config(name), image={"min_pixels": limits[0], "max_pixels": limits[1]}).media
    for width, height in oracle.sizes(1000):
        theirs = oracle.image_patches("qwen2_vl", width, height, patch=14, merge=2, limits=limits)
        cost = rule.image(width, height)
        assert (cost.patches, 4 * cost.visual_tokens) == (theirs, theirs), (width, height)
        assert cost.visual_tokens > 0


@pytest.mark.parametrize("cap", [None, True])
def test_videos_are_those_of_the_processor(cap):
    limits, rng = (100352, 602112), np.random.default_rng(2)
    size = dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))
    rule = read(load_config("qwen2-vl-7b"), video={"size": size, "cap_pixels_per_frame": cap}).media
    for width, height in oracle.sizes(1000, seed=1, most=2000):
        n_frames = int(rng.integers(1, 700))
        settings = {"patch": 14, "merge": 2, "limits": limits, "cap_pixels_per_frame": cap}
        theirs = oracle.video_patches("qwen2_vl", n_frames, width, height, **settings)
        cost = rule.video(n_frames, width, height)
        assert (cost.patches, 4 * cost.visual_tokens) == (theirs, theirs), (n_frames, width, height)


def test_frames_are_those_of_the_processor():
    rule, rng = load_model("qwen2-vl-7b").media, np.random.default_rng(3)
    for _ in range(1000):
        total, fps = int(rng.integers(2, 4000)), float(rng.choice([1, 10, 23.976, 24, 25, 29.97, 30, 60]))
        video = Video(640, 480, seconds=total / fps, fps=fps)
        assert rule.frames(video) == oracle.sampled("qwen2_vl", video.total_frames, fps, fps=2.0), (total, fps)


def small(**changes):
    config = copy.deepcopy(load_config("qwen2-vl-2b"))
    config["vision_config"] |= {"depth": 3, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 3}
    return config | {"num_hidden_layers": 2, "vocab_size": 999} | changes


def test_flat_nested_tied_and_untied_layouts_are_the_real_model():
    flat = small(tie_word_embeddings=False)
    text_keys = {key: value for key, value in flat.items() if key not in ("model_type", "vision_config")}
    nested = {"model_type": "qwen2_vl", "text_config": text_keys, "vision_config": flat["vision_config"]}
    for config in (flat, small(), nested, nested | {"tie_word_embeddings": True}):
        assert read(config).parameters() == parameters(build(config))


def test_vision_flops_are_those_of_the_real_tower():
    from costmodel import Image, Workload
    from costmodel.counts import count

    config = small()
    flops = count(read(config), Workload(images=[Image(28 * 5, 28 * 3)]), convention="torch").flops
    assert flops["encode"] + flops["adapt"] == oracle.vision_flops(build(config), (1, 6, 10))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_config": {"hidden_size": 100}}, "hidden_size"),
        ({"num_experts": 8}, "num_experts"),
        ({"vision_config": {"hidden_size": 1536, "embed_dim": 100}}, "multiple"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        read(small(**changes))
