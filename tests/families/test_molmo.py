"""Molmo: crops against the tiling rule in `transformers`, towers and pooling against plain modules."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.molmo2.image_processing_molmo2 import select_tiling

from costmodel import Image, Unsupported, Video, Workload, load_model
from costmodel.counts import count
from costmodel.families import molmo
from costmodel.families.files import ModelFiles
from tests.helpers import load_config

NAME = "molmo-7b-d"
CROP, WINDOW, MARGINS = 336, 224, 112


def test_the_total_is_the_published_one():
    parts = load_model(NAME).parameters()
    assert parts["total"] == 8021025280  # 8.02B; the repository's 32-bit weights are 29.9 GiB
    assert round(4 * parts["total"] / 2**30, 1) == 29.9


def layout(rows, columns):
    """Return the tokens of a picture as the processor lays them out: text of `p`atches and `m`arkers."""
    whole = "m" + ("p" * 12 + "m") * 12 + "m"
    high, wide = ((n * WINDOW + MARGINS) // 28 for n in (rows, columns))
    return whole + "m" + ("p" * wide + "m") * high + "m"


def test_crops_are_those_of_transformers():
    rule, rng = load_model(NAME).media, np.random.default_rng(0)
    for _ in range(1000):
        width, height = (int(2 ** rng.uniform(0, 13)) for _ in range(2))
        if MARGINS in (width, height):
            continue
        rows, columns = select_tiling(height - MARGINS, width - MARGINS, WINDOW, 12)
        cost = rule.image(width, height)
        assert rule.grid(width, height) == (rows, columns), (width, height)
        assert cost.patches == (1 + rows * columns) * 576
        assert cost.rows == (1 + rows * columns) * 577
        assert cost.adapter_tokens == (1 + rows * columns) * 144
        tokens = layout(rows, columns)
        assert cost.visual_tokens == tokens.count("p")
        assert cost.marker_tokens == tokens.count("m")


def test_a_picture_of_the_margins_is_one_crop():
    rule = load_model(NAME).media
    for size in [(112, 112), (1, 1), (60, 100)]:
        assert rule.grid(*size) == (1, 1)
    assert rule.image(112, 112).visual_tokens == 288


def test_the_decoder_is_a_qwen2_with_more_embeddings():
    config = load_config(NAME) | {"num_hidden_layers": 2}
    theirs = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=2,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        expected = Qwen2ForCausalLM(theirs).num_parameters() + 128 * 3584
    assert molmo.read(ModelFiles(config)).decoder.parameters == expected


def test_norms_over_heads_and_a_tied_head():
    plain = molmo.read(ModelFiles(load_config(NAME))).decoder
    normed = molmo.read(ModelFiles(load_config(NAME) | {"attention_layer_norm": True})).decoder
    assert normed.parameters - plain.parameters == 28 * (3584 + 4 * 128)
    tied = molmo.read(ModelFiles(load_config(NAME) | {"weight_tying": True})).decoder
    assert plain.parameters - tied.parameters == 152064 * 3584


def clip(layers):
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        return CLIPVisionModel._from_config(config, attn_implementation="eager").eval()


def test_the_tower_is_clip_without_its_last_norm():
    ours, theirs = load_model(NAME).vision, clip(23)
    assert ours.parameters == theirs.num_parameters() - 2 * 1024
    assert [run.n_layers for run in ours.runs + ours.unused_runs] == [22, 1]


@torch.no_grad()
def test_flops_of_the_tower():
    crops = load_model(NAME).media.image(640, 480).patches // 576
    pixels = torch.empty(crops, 3, CROP, CROP, device="meta")
    for convention, layers in (("torch", 23), ("kernel", 22)):
        with FlopCounterMode(display=False) as counter:
            clip(layers)(pixels)
        ours = count(NAME, Workload(images=[Image(640, 480)]), convention=convention).flops["encode"]
        assert ours == counter.get_total_flops()


class Pooling(nn.Module):
    """The modules behind the tower, run on crops of 24 x 24 patches with two layers side by side."""

    def __init__(self):
        super().__init__()
        self.pad_embed = nn.Parameter(torch.zeros(2, 2048))
        self.wq, self.wk, self.wv = (nn.Linear(2048, 1024) for _ in range(3))
        self.wo = nn.Linear(1024, 1024)
        self.w1, self.w3 = (nn.Linear(1024, 18944, bias=False) for _ in range(2))
        self.w2 = nn.Linear(18944, 3584, bias=False)

    def forward(self, patches):
        crops = patches.shape[0]
        windows = patches.view(crops, 12, 2, 12, 2, 2048).transpose(2, 3).reshape(-1, 4, 2048)
        query = self.wq(windows.mean(1, keepdim=True)).view(-1, 1, 16, 64).transpose(1, 2)
        key, value = (w(windows).view(-1, 4, 16, 64).transpose(1, 2) for w in (self.wk, self.wv))
        pooled = (query @ key.transpose(2, 3)).softmax(-1) @ value
        out = self.wo(pooled.transpose(1, 2).reshape(-1, 1024))
        return self.w2(self.w1(out) * self.w3(out))


@torch.no_grad()
def test_the_adapter():
    model = load_model(NAME)
    with torch.device("meta"):
        real = Pooling()
        patches = torch.empty(model.media.image(1920, 1080).patches // 576, 576, 2048)
    assert model.adapter.parameters == sum(p.numel() for p in real.parameters())
    with FlopCounterMode(display=False) as counter:
        real(patches)
    assert count(NAME, Workload(images=[Image(1920, 1080)])).flops["adapt"] == counter.get_total_flops()


def test_two_crops_by_number_cost_what_the_smallest_picture_costs():
    by_number = count(NAME, Workload(visual_tokens=288.0)).flops
    by_size = count(NAME, Workload(images=[Image(336, 336)])).flops
    assert (by_number["encode"], by_number["adapt"]) == (by_size["encode"], by_size["adapt"])


def test_no_picture_is_free():
    rule = load_model(NAME).media
    for width, height in [(1, 1), (1, 100000), (100000, 1), (100000, 100000), (112, 5000)]:
        cost = rule.image(width, height)
        assert min(cost.patches, cost.pairs, cost.visual_tokens, cost.adapter_tokens) > 0


def test_videos_are_refused():
    rule = load_model(NAME).media
    with pytest.raises(Unsupported, match="video"):
        rule.frames(Video(10, 10, 1, 1))
    with pytest.raises(Unsupported, match="video"):
        rule.video(8, 10, 10)


@pytest.mark.parametrize(
    ("changes", "image", "message"),
    [
        ({"moe_num_experts": 64}, {}, "moe_num_experts"),
        ({"intermediate_size": 37889}, {}, "intermediate_size"),
        ({"layer_norm_type": "default"}, {}, "layer_norm_type"),
        ({}, {"overlap_margins": [3, 4]}, "margins"),
        ({}, {"base_image_input_size": [336, 350]}, "squares"),
    ],
)
def test_what_is_not_modelled_is_refused(changes, image, message):
    with pytest.raises((ValueError, Unsupported), match=message):
        molmo.read(ModelFiles(load_config(NAME) | changes, image=image))
