"""GLM-4.1V and GLM-4.5V: sizes, frames, parameters and FLOPs against `transformers`."""

import copy

import numpy as np
import pytest

from costmodel import Image, Video, Workload, load_model
from costmodel.catalogue import _read
from costmodel.counts import count
from costmodel.families.files import ModelFiles
from tests.families import native_oracle as oracle
from tests.helpers import load_config
from tests.oracle.transformers_counts import build, parameters

IMAGE, CLIP = (12544, 9633792), (12544, 47040000)
BUFFERS = 45 * 128  # the routers' correction biases, which the published total counts


def read(config, image=None, video=None):
    return _read(ModelFiles(config, image or {}, video or {}, source="test"), "test")


def test_glm_4_5v_is_the_published_model():
    ours = load_model("glm-4.5v").parameters()
    assert ours["total"] + BUFFERS == 107710933120
    theirs = parameters(build(load_config("glm-4.5v")))
    assert {part: ours[part] for part in theirs} == theirs


def test_images_are_those_of_the_processor():
    rule = load_model("glm-4.1v-9b").media
    for width, height in oracle.sizes(1000):
        theirs = oracle.image_patches("glm4v", width, height, patch=14, merge=2, limits=IMAGE)
        cost = rule.image(width, height)
        assert (cost.patches, 4 * cost.visual_tokens) == (theirs, theirs), (width, height)


def test_videos_are_those_of_the_processor():
    rule, rng = load_model("glm-4.5v").media, np.random.default_rng(2)
    for width, height in oracle.sizes(1000, seed=1, most=2000):
        n_frames = int(rng.integers(2, 700))
        theirs = oracle.video_patches("glm4v", n_frames, width, height, patch=14, merge=2, limits=CLIP)
        cost = rule.video(n_frames, width, height)
        assert (cost.patches, 4 * cost.visual_tokens) == (theirs, theirs), (n_frames, width, height)


def test_frames_are_those_of_the_processor():
    rule, rng = load_model("glm-4.1v-9b").media, np.random.default_rng(3)
    for _ in range(1000):
        total, fps = int(rng.integers(1, 20000)), float(rng.choice([0.5, 1, 10, 23.976, 24, 25, 29.97, 30, 60]))
        video = Video(640, 480, seconds=total / fps, fps=fps)
        assert rule.frames(video) == oracle.sampled("glm4v", video.total_frames, fps), (total, fps)
        fast = Video(640, 480, seconds=total / fps, fps=fps, sample_fps=5.0)
        assert rule.frames(fast) == oracle.sampled("glm4v", video.total_frames, fps, fps=5.0), (total, fps)


def test_markers_stand_around_the_video_and_every_frame_pair():
    rule = load_model("glm-4.1v-9b").media
    assert rule.image(640, 480).marker_tokens == 2
    assert rule.video(8, 640, 480).marker_tokens == 2 + 4 * 3


def small(name, vision=None, text=None, **changes):
    config = copy.deepcopy(load_config(name))
    config["vision_config"] |= {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96} | (vision or {})
    config["text_config"] |= {"num_hidden_layers": 3, "vocab_size": 999} | (text or {})
    return config | changes


VARIANTS = [
    small("glm-4.1v-9b"),
    small("glm-4.1v-9b", tie_word_embeddings=True, vision={"attention_bias": True, "image_size": 112}),
    small("glm-4.1v-9b", text={"attention_bias": False, "num_key_value_heads": 8, "tie_word_embeddings": True}),
    small("glm-4.5v"),
    small("glm-4.5v", text={"first_k_dense_replace": 2, "n_shared_experts": 2, "attention_bias": False}),
    small("glm-4.5v", text={"first_k_dense_replace": 0, "n_routed_experts": 12, "num_experts_per_tok": 2}),
]


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_odd_variants_are_the_real_model(config):
    ours, real = read(config), build(config)
    theirs = parameters(real)
    assert {part: ours.parameters()[part] for part in theirs} == theirs
    flops = count(ours, Workload(text_tokens=70), convention="torch").flops
    assert (flops["prefill"], flops["decode_step"]) == oracle.prefill_and_step_flops(real, 70)
    flops = count(ours, Workload(images=[Image(28 * 12, 28 * 8)]), convention="torch").flops
    assert flops["encode"] + flops["adapt"] == oracle.vision_flops(real, (1, 16, 24))


def test_a_merger_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="out_hidden_size"):
        read(small("glm-4.1v-9b", vision={"out_hidden_size": 100}))
