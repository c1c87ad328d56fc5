"""MiniCPM-V 2.6: slices against the rules that its successor brings to `transformers`, towers against plain modules."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from costmodel import Image, Unsupported, Video, Workload, load_model
from costmodel.counts import count
from costmodel.families import minicpmv
from costmodel.families.files import ModelFiles
from tests.check_golden import GOLDEN
from tests.helpers import load_config

NAME = "minicpm-v-2.6"
SUCCESSOR_PATCH = {"patch_size": 3.5, "downsample_mode": "16x"}  # it rounds to four patches where 2.6 rounds to one


def test_counts_are_the_golden_ones():
    rule = load_model(NAME).media
    for size, row in GOLDEN[NAME]["image_tokens"].items():
        width, height = map(int, size.split("x"))
        cost = rule.image(width, height)
        assert cost.patches == cost.rows == row["vit_patches"]
        assert cost.visual_tokens + cost.marker_tokens == row["llm_tokens_with_image_id"]
        assert rule.grid(width, height, 9) == (tuple(row["slice_grid_xy"]) if row["slice_grid_xy"] else None)
        assert [[w, h] for _, w, h in rule.pieces(width, height, 9)] == row["slice_px"]
        plain = minicpmv.read(ModelFiles(load_config(NAME), image={"use_image_id": False})).media.image(width, height)
        assert plain.visual_tokens + plain.marker_tokens == row["llm_tokens"]


@pytest.mark.parametrize("most", [2, 9, 16])
def test_slices_are_those_of_transformers(most):
    theirs, rule, rng = MiniCPMV4_6ImageProcessorPil(), load_model(NAME).media, np.random.default_rng(most)
    for _ in range(1000):
        width, height = map(int, rng.integers(1, 3000, 2))
        size = (height, width)
        grid = theirs.get_sliced_grid(size, most, 448)
        whole = theirs.find_best_resize(size, 448, allow_upscale=grid is None, **SUCCESSOR_PATCH)
        expected = [(1, *whole[::-1])]
        if grid:
            high, wide = theirs.get_refine_size(size, grid, 448, allow_upscale=True, **SUCCESSOR_PATCH)
            expected.append((math.prod(grid), wide // grid[1], high // grid[0]))
        assert rule.pieces(width, height, most) == expected, (width, height)
        assert rule.grid(width, height, most) == ((grid[1], grid[0]) if grid else None)


class Resampler(nn.Module):
    """The modules of a resampler with 64 queries, run on one slice."""

    def __init__(self, kv_width, width):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(64, width))
        self.kv_proj = nn.Linear(kv_width, width, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.attn = nn.MultiheadAttention(width, width // 128, batch_first=True)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, patches):
        keys = self.norms[1](self.kv_proj(patches))
        queries = self.norms[0](self.query)[None]
        out = self.attn(queries, keys + 0, keys, need_weights=True)[0]
        return self.norms[2](out) @ self.proj


@pytest.mark.parametrize("width", [3584, 1280])
def test_the_resampler(width):
    heads = width // 128
    changes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads}
    parts = minicpmv.read(ModelFiles(load_config(NAME) | changes))
    with torch.device("meta"):
        real = Resampler(1152, width)
        patches = torch.empty(1, 1024, 1152)
    assert parts.adapter.parameters == sum(p.numel() for p in real.parameters())
    if width == 3584:  # the catalogue's model; a square picture is one slice of 1024 patches
        with FlopCounterMode(display=False) as counter:
            real(patches)
        assert count(NAME, Workload(images=[Image(336, 336)])).flops["adapt"] == counter.get_total_flops()


@pytest.mark.parametrize("drops", [False, True])
def test_the_tower_is_siglip_without_a_head(drops):
    config = copy.deepcopy(load_config(NAME))
    config["drop_vision_last_layer"] = drops
    config["vision_config"]["num_hidden_layers"] = 3
    theirs = SiglipVisionConfig(**minicpmv.SIGLIP_980 | {"num_hidden_layers": 3 - drops}, vision_use_head=False)
    with torch.device("meta"):
        expected = SiglipVisionModel(theirs).num_parameters()
    assert minicpmv.read(ModelFiles(config)).vision.parameters == expected


def test_image_numbers_grow_with_the_images():
    rule = load_model(NAME).media
    assert rule.image(300, 300, n_images=10).marker_tokens == rule.image(300, 300).marker_tokens
    assert rule.image(300, 300, n_images=11).marker_tokens == rule.image(300, 300).marker_tokens + 1


def test_videos_are_frames_of_few_slices():
    rule = load_model(NAME).media
    assert rule.frames(Video(640, 480, seconds=10, fps=30)) == 10
    assert rule.frames(Video(640, 480, seconds=1000, fps=30)) == 64
    assert rule.frames(Video(640, 480, seconds=0.1, fps=30)) == 1
    assert rule.frames(Video(640, 480, seconds=10, fps=30, sample_fps=2)) == 20
    frame, clip = rule.video(1, 1920, 1080), rule.video(8, 1920, 1080)
    assert frame.visual_tokens == 3 * 64
    assert clip.visual_tokens == 8 * frame.visual_tokens
    assert clip.pairs == 8 * frame.pairs
    assert rule.video(1, 300, 300).visual_tokens == 64


def test_no_picture_is_free():
    rule = load_model(NAME).media
    for width, height in [(1, 1), (1, 100000), (100000, 1), (100000, 100000), (500, 1)]:
        cost = rule.image(width, height)
        assert min(cost.patches, cost.pairs, cost.visual_tokens) > 0


def test_a_slice_by_number_costs_what_a_square_costs():
    by_number = count(NAME, Workload(visual_tokens=64.0)).flops
    by_size = count(NAME, Workload(images=[Image(448, 448)])).flops
    assert (by_number["encode"], by_number["adapt"]) == (by_size["encode"], by_size["adapt"])


def test_slicing_may_be_off():
    for files in ({"image": {"slice_mode": False}}, {"image": {"max_slice_nums": 1}}):
        rule = minicpmv.read(ModelFiles(load_config(NAME), **files)).media
        assert rule.image(4000, 3000).visual_tokens == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 4.0}, "version=4"),
        ({"text_model_type": "llama"}, "text_model_type"),
        ({"vision_encoder": "vit_so400m_patch14_siglip_384.webli"}, "vision_encoder"),
        ({"hidden_size": 3000, "num_attention_heads": 4, "num_key_value_heads": 4}, "hidden_size"),
        ({"slice_config": {"max_slice_nums": "many"}}, "max_slice_nums"),
        ({"audio_config": {"model_type": "whisper"}}, "audio_config"),
    ],
)
def test_what_is_not_modelled_is_refused(changes, message):
    with pytest.raises((ValueError, Unsupported), match=message):
        minicpmv.read(ModelFiles(load_config(NAME) | changes))
