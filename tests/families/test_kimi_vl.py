"""Kimi-VL: sizes against the resize rule that its successor brings to `transformers`, towers against plain modules."""

import ast
import copy
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from costmodel import Image, Unsupported, Video, Workload, load_model
from costmodel.counts import count
from costmodel.families import kimi_vl
from costmodel.families.files import ModelFiles
from tests.check_golden import GOLDEN
from tests.helpers import load_config

NAME = "kimi-vl-a3b"
BUFFERS = 26 * 64  # the routers' correction biases, which the published total counts
NO_LIMIT = 10**6


def navit_resize():
    """Return the function of this name in `transformers`, whose module needs torchvision to be imported whole."""
    file = Path(find_spec("transformers").origin).parent / "models/kimi_k25/image_processing_kimi_k25.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "navit_resize"]
    assert tree.body
    names = {"math": math}
    exec(compile(tree, str(file), "exec"), names)  # noqa: S102 - the installed package's own file
    return names["navit_resize"]


def test_counts_are_the_golden_ones():
    for size, row in GOLDEN[NAME]["image_tokens"].items():
        cost = load_model(NAME).media.image(*map(int, size.split("x")))
        assert cost.patches == cost.rows == row["vit_patches"]
        assert cost.resized_pixels == math.prod(row["padded_wh"])


def test_the_total_is_the_published_one():
    assert load_model(NAME).parameters()["total"] + BUFFERS == 16407656048


@pytest.mark.parametrize("limit", [4096, 16384])
def test_sizes_are_those_of_transformers(limit):
    resize, rng = navit_resize(), np.random.default_rng(limit)
    rule = kimi_vl.read(ModelFiles(load_config(NAME), image={"in_token_limit": limit})).media
    for _ in range(1000):
        width, height = map(int, rng.integers(1, 4000, 2))
        (_, _), (high, wide) = resize(height, width, 14, 2, limit, NO_LIMIT)
        if max(high, wide) >= 512 * 14:
            continue
        cost = rule.image(width, height)
        assert cost.visual_tokens == high * wide // 28**2, (width, height)
        assert cost.resized_pixels == high * wide
        assert cost.pairs == cost.patches**2


def test_strips_beyond_the_positions_are_refused():
    rule = load_model(NAME).media
    assert rule.image(7140, 28).patches == 510 * 2
    for width, height in [(7150, 28), (28, 7150), (100000, 1)]:
        with pytest.raises(ValueError, match="512"):
            rule.image(width, height)
    assert rule.image(1, 1).visual_tokens == 1


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 2, "hidden_size": 320, "intermediate_size": 700}])
def test_parameters_of_tower_and_projector(changes):
    config = copy.deepcopy(load_config(NAME))
    config["vision_config"].update(changes)
    parts = kimi_vl.read(ModelFiles(config))
    vision = config["vision_config"]
    width, hidden = vision["hidden_size"], vision["intermediate_size"]
    with torch.device("meta"):
        layer = nn.ModuleList(
            [
                nn.LayerNorm(width),
                nn.LayerNorm(width),
                nn.Linear(width, 3 * width),
                nn.Linear(width, width),
                nn.Linear(width, hidden),
                nn.Linear(hidden, width),
            ]
        )
        ends = nn.ModuleList([nn.Conv2d(3, width, 14, 14), nn.Embedding(64 * 64, width), nn.LayerNorm(width)])
        joint = nn.ModuleList([nn.LayerNorm(width), nn.Linear(4 * width, 4 * width), nn.Linear(4 * width, 2048)])
    size = {name: sum(p.numel() for p in m.parameters()) for name, m in zip("lej", (layer, ends, joint), strict=True)}
    assert parts.vision.parameters == vision["num_hidden_layers"] * size["l"] + size["e"]
    assert parts.adapter.parameters == size["j"]


def test_tokens_by_number_cost_what_the_picture_costs():
    cost = load_model(NAME).media.image(448, 448)
    by_number = count(NAME, Workload(visual_tokens=float(cost.visual_tokens))).flops
    by_size = count(NAME, Workload(images=[Image(448, 448)])).flops
    assert (by_number["encode"], by_number["adapt"]) == (by_size["encode"], by_size["adapt"])


def test_markers_are_those_of_the_chat_template():
    assert load_model(NAME).media.image(640, 480).marker_tokens == 4


def test_videos_are_refused():
    rule = load_model(NAME).media
    with pytest.raises(Unsupported, match="video"):
        rule.frames(Video(10, 10, 1, 1))
    with pytest.raises(Unsupported, match="video"):
        rule.video(8, 10, 10)


@pytest.mark.parametrize(
    ("changes", "image", "message"),
    [
        ({"merge_kernel_size": [2, 3]}, {}, "merge_kernel_size"),
        ({"model_type": "siglip"}, {}, "model_type"),
        ({"hidden_size": 1150}, {}, "hidden_size"),
        ({}, {"pad_input": False}, "pad_input"),
    ],
)
def test_what_is_not_modelled_is_refused(changes, image, message):
    config = copy.deepcopy(load_config(NAME))
    config["vision_config"].update(changes)
    with pytest.raises(ValueError, match=message):
        kimi_vl.read(ModelFiles(config, image=image))
