"""Tiny models of every family that runs: the real one with random weights, its folder, ours, prompts with pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from runtime.blueprint import load_blueprint
from runtime.generate import Prompt
from runtime.model import Lvlm, Pixels
from runtime.prompts import Picture
from runtime.weights import load

IMAGE = 100  # the image token
SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SQUARE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
VIT = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def rope(*sections: int, interleaved: bool = False, **more: Any) -> dict[str, Any]:
    values = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return {"rope_parameters": values | ({"mrope_interleaved": True} if interleaved else {})}


def qwen3(kind: str, **more: Any) -> dict[str, Any]:
    text = {"model_type": f"{kind}_text", **SIZES, "head_dim": 16, **rope(4, 2, 2, interleaved=True), **more}
    vision = {**VIT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    return {"model_type": kind, "image_token_id": IMAGE, "text_config": text, "vision_config": vision}


def intern(text: dict[str, Any], **vision: Any) -> dict[str, Any]:
    square = {**SQUARE, "image_size": [56, 56], "patch_size": [14, 14], **vision}
    return {
        "model_type": "internvl",
        "image_token_id": IMAGE,
        "text_config": {**SIZES, **text},
        "vision_config": square,
    }


def gemma(**text: Any) -> dict[str, Any]:
    sizes = {**SIZES, "head_dim": 16, "num_hidden_layers": 7, "sliding_window": 9, "query_pre_attn_scalar": 20}
    return {
        "model_type": "gemma3",
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
        "text_config": {"model_type": "gemma3_text", **sizes, **text},
        "vision_config": {**SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False},
    }


def llava(text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "text_config": {"model_type": "llama", **SIZES, **(text or {})},
        "vision_config": {**SQUARE, "model_type": "clip_vision_model"},
        **more,
    }


QWEN25 = {**VIT, "fullatt_block_indexes": [1], "window_size": 56}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": llava(),
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "image_token_id": IMAGE,
        "text_config": {"model_type": "qwen2_5_vl_text", **SIZES, **rope(1, 1, 2)},
        "vision_config": QWEN25,
    },
    "qwen3_vl": qwen3("qwen3_vl"),
    "qwen3_vl_moe": qwen3("qwen3_vl_moe", **EXPERTS),
    "internvl": intern({"model_type": "qwen2"}, attention_bias=True),
    "gemma3": gemma(),
    # rarer kinds of the same families
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "image_token_id": IMAGE,
        "text_config": {"model_type": "qwen2_vl_text", **SIZES, **rope(1, 1, 2)},
        "vision_config": {"depth": 3, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32},
    },
    "llava_mistral": llava({"model_type": "mistral", "sliding_window": 6, "rms_norm_eps": 1e-5}),
    "llava_keeps_class_token": llava(vision_feature_select_strategy="full", vision_feature_layer=-1),
    "llava_tied": llava({"tie_word_embeddings": True}, tie_word_embeddings=True),
    "internvl_6b": intern({"model_type": "qwen3", "head_dim": 16}, norm_type="rms_norm", use_qk_norm=True),
    "internvl_norm_behind": intern({"model_type": "llama"}, use_mean_pooling=False),
    "internvl_experts": intern({"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": False, **EXPERTS}),
    "gemma3_stretched": gemma(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
    ),
    "qwen3_vl_tied": {**qwen3("qwen3_vl"), "tie_word_embeddings": True},
}
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "gemma3")
QWEN_GRIDS = ((1, 8, 12), (1, 6, 10))
"""Pictures of several windows of different sizes."""


@dataclass(frozen=True)
class Pair:
    """The real model and ours with the same weights."""

    name: str
    folder: Path
    real: Any
    ours: Lvlm


def real_model(name: str, *, seed: int = 0) -> Any:
    """Return the real model with weights large enough that attention is sharp and every part shows."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(copy.deepcopy(CONFIGS[name]))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    return model


def pair(name: str, folder: Path) -> Pair:
    """Return the real model, saved into a folder by itself, and ours read from there."""
    real = real_model(name)
    real.save_pretrained(folder)
    return Pair(name, folder, real, load(load_blueprint(folder), torch.device("cpu"), torch.float32))


def pictures(ours: Lvlm, *, seed: int = 0) -> tuple[Pixels, dict[str, torch.Tensor]]:
    """Return two random pictures, as ours takes them and as the real model does."""
    generator = torch.Generator().manual_seed(seed)
    width = ours.vision.patch_embedding.in_features
    if not ours.settings.tile:
        merge = ours.settings.adapter.merge
        rows = sum(t * h * w for t, h, w in QWEN_GRIDS)
        patches = torch.randn(rows, width, generator=generator)
        found = tuple(Picture(t * h * w // merge**2, (t, h // merge, w // merge)) for t, h, w in QWEN_GRIDS)
        return Pixels(patches, QWEN_GRIDS, found), {"pixel_values": patches, "image_grid_thw": torch.tensor(QWEN_GRIDS)}
    tile, patch = ours.settings.tile, round((width / 3) ** 0.5)
    pixels = torch.randn(2, 3, tile * patch, tile * patch, generator=generator)
    patches = pixels.reshape(2, 3, tile, patch, tile, patch).permute(0, 2, 4, 1, 3, 5).reshape(-1, width)
    found = (Picture(ours.spec.media.unit().visual_tokens),) * 2
    return Pixels(patches, ((1, tile, tile),) * 2, found), {"pixel_values": pixels}


def ids(pixels: Pixels | None, *, seed: int = 0) -> list[int]:
    """Return a prompt: text, pictures between it, text."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, IMAGE - 1, 5).tolist()
    for picture in pixels.pictures if pixels else ():
        found += [IMAGE] * picture.tokens + rng.integers(1, IMAGE - 1, 4).tolist()
    return found


def real_inputs(name: str, tokens: list[int], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the real model takes for such a prompt."""
    row = torch.tensor([tokens])
    marks = {"qwen": "mm_token_type_ids", "gemm": "token_type_ids"}
    kinds = {marks[name[:4]]: (row == IMAGE).long()} if values and name[:4] in marks else {}
    return {"input_ids": row, **values, **kinds}


def prompt(ours: Lvlm, *, seed: int = 0) -> tuple[Prompt, dict[str, torch.Tensor]]:
    """Return a prompt with two pictures, as ours takes it, and the pictures as the real model takes them."""
    pixels, values = pictures(ours, seed=seed)
    return Prompt(ids(pixels, seed=seed), pixels), values
