"""DeepSeek-VL2: tiles and tokens against the rule in `transformers`, towers against equivalents of its parts."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.image_processing_utils import select_best_resolution

from costmodel import Image, Unsupported, Video, Workload, load_model
from costmodel.counts import count
from costmodel.families import deepseek_vl2
from costmodel.families.files import ModelFiles
from tests.check_golden import GOLDEN
from tests.helpers import load_config

NAMES = ("deepseek-vl2-tiny", "deepseek-vl2-small", "deepseek-vl2")
SIDE, MERGED = 384, 14


@pytest.mark.parametrize("name", ["deepseek-vl2-tiny", "deepseek-vl2"])
def test_counts_are_the_golden_ones(name):
    rule = load_model(name).media
    for size, row in GOLDEN[name]["image_tokens"].items():
        width, height = map(int, size.split("x"))
        cost = rule.image(width, height)
        assert cost.patches == row["tiles"] * 27 * 27
        assert cost.visual_tokens + cost.marker_tokens == row["llm_tokens"]
        for n_images in (1, 2):
            assert rule.image(width, height, n_images=n_images) == cost
        assert rule.image(width, height, n_images=3).visual_tokens == row["llm_tokens_if_more_than_2_images"]


def test_tiles_are_those_of_the_rule_in_transformers():
    model = load_model("deepseek-vl2-small")
    candidates = [(height, width) for width, height in model.media.candidates]
    rng = np.random.default_rng(0)
    for _ in range(1000):
        width, height = (int(2 ** rng.uniform(0, 13)) for _ in range(2))
        best_height, best_width = select_best_resolution((height, width), candidates)
        rows, columns = best_height // SIDE, best_width // SIDE
        cost = model.media.image(width, height)
        assert cost.patches == (1 + rows * columns) * 27**2, (width, height)
        tokens = MERGED * (MERGED + 1) + 1 + rows * MERGED * (columns * MERGED + 1)
        assert cost.visual_tokens == tokens, (width, height)
        assert cost.adapter_tokens == (1 + rows * columns) * MERGED**2


def test_small_has_the_published_parameters():
    parts = load_model("deepseek-vl2-small").parameters()
    assert parts["total"] == 16148349504  # README: 16.1B; the repository's weights are 30.1 GiB
    assert round(2 * parts["total"] / 2**30, 1) == 30.1
    idle = parts["total"] - parts["active"]
    embedding = 102400 * 2048
    assert 2.4e9 < parts["language"] - idle - embedding < 2.5e9  # README: "activated 2.4B" beside the tower


@pytest.mark.parametrize(
    "changes",
    [{}, {"depth": 3}, {"mlp_ratio": 2}, {"depth": 4, "mlp_ratio": 3}],
)
def test_the_projector_is_that_of_the_repository(changes):
    config = copy.deepcopy(load_config("deepseek-vl2-tiny"))
    config["projector_config"].update(changes)
    joint = {"depth": 2, "mlp_ratio": 1} | changes
    hidden = 1280 * joint["mlp_ratio"]
    with torch.device("meta"):
        inner = [nn.Linear(hidden, hidden) for _ in range(1, joint["depth"] - 1)]
        layers = nn.ModuleList([nn.Linear(4 * 1152, hidden), *inner, nn.Linear(hidden, 1280)])
    theirs = sum(p.numel() for p in layers.parameters()) + 2 * 1280
    assert deepseek_vl2.read(ModelFiles(config)).adapter.parameters == theirs


def test_the_tower_is_siglip_with_its_head():
    config = copy.deepcopy(load_config("deepseek-vl2-tiny"))
    config["vision_config"]["layers"] = 3
    config["vision_config"]["mlp_ratio"] = 2.5
    ours = deepseek_vl2.read(ModelFiles(config)).vision
    theirs = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=2880,
        num_hidden_layers=3,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    with torch.device("meta"):
        assert ours.parameters == SiglipVisionModel(theirs).num_parameters()


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_is_a_view(name):
    unit, view = load_model(name).media.unit(), load_model(name).media.image(384, 384)
    assert unit.visual_tokens == 210
    assert 2 * unit.patches == view.patches
    assert view.visual_tokens == 2 * unit.visual_tokens + 1
    one = count(name, Workload(visual_tokens=2.0 * unit.visual_tokens)).flops
    two = count(name, Workload(images=[Image(384, 384)])).flops
    assert one["encode"] == two["encode"]
    assert one["adapt"] == two["adapt"]


def test_no_picture_is_free():
    rule = load_model("deepseek-vl2").media
    for width, height in [(1, 1), (1, 100000), (100000, 1), (100000, 100000)]:
        cost = rule.image(width, height)
        assert min(cost.patches, cost.rows, cost.pairs, cost.visual_tokens, cost.adapter_tokens) > 0


def test_processor_files_may_name_other_candidates():
    config = load_config("deepseek-vl2-tiny")
    only = deepseek_vl2.read(ModelFiles(config, image={"candidate_resolutions": [[768, 384]]})).media
    assert only.image(100, 100).patches == 3 * 27**2


def test_videos_are_refused():
    rule = load_model("deepseek-vl2").media
    with pytest.raises(Unsupported, match="video"):
        rule.frames(Video(10, 10, 1, 1))
    with pytest.raises(Unsupported, match="video"):
        rule.video(8, 10, 10)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"tile_tag": "1D"}, "tile_tag"),
        (None, {"candidate_resolutions": [[400, 384]]}, "multiples"),
        ("projector_config", {"projector_type": "linear"}, "projector_type"),
        ("projector_config", {"token_pooling": True}, "token_pooling"),
        ("projector_config", {"n_embed": 2048}, "n_embed"),
        ("vision_config", {"width": 1024}, "input_dim"),
    ],
)
def test_what_is_not_modelled_is_refused(part, changes, message):
    config = copy.deepcopy(load_config("deepseek-vl2-tiny"))
    (config[part] if part else config).update(changes)
    with pytest.raises(ValueError, match=message):
        deepseek_vl2.read(ModelFiles(config))
