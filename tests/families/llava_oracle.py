"""Small configs, sizes and vision FLOPs of the real LLaVA-like classes, from the meta device."""

from __future__ import annotations

import copy
import json

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from costmodel.catalogue import _read, load_model_files
from costmodel.families.files import ModelFiles

VISUAL = "@"
"""Stands for a placeholder that a processor writes."""
SMALL_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}
SMALL_SIGLIP = {**SMALL_CLIP, "model_type": "siglip_vision_model", "image_size": 384, "vision_use_head": False}
SMALL_TEXT = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def sizes(n, *, seed=0, most=4000):
    """Return sizes of every shape: even, odd, square, tiny, long strips."""
    drawn = np.random.default_rng(seed).integers(1, most + 1, (n, 2)).tolist()
    fixed = [(1, 1), (1, 4000), (4000, 1), (336, 336), (337, 335), (672, 336), (384, 384), (1000, 999), (50, 3000)]
    return fixed + [(width, height) for width, height in drawn[len(fixed) :]]


def config_of(name, **changes):
    """Return a config of the catalogue with other top-level keys; an empty value takes the key out."""
    config = copy.deepcopy(json.loads(load_model_files()[name]))
    config.update(changes)
    return {key: value for key, value in config.items() if value != ()}


def read(config, *, image=None, video=None):
    """Return our model of a config and processor files."""
    return _read(ModelFiles(config, image or {}, video or {}, source="test"), "test")


def vision_flops(run, model):
    """Return FLOPs of the encoder and of the projector when `run` is called, and what it returns."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    counts = counter.get_flop_counts()
    projector = sum(
        sum(ops.values())
        for path, ops in counts.items()
        if path.rpartition(".")[2] == type(model.model.multi_modal_projector).__name__
    )
    return sum(counts["Global"].values()) - projector, projector, result


def blank(model, n_tiles, *lead):
    """Return `n_tiles` tiles of the encoder's own size, with leading dimensions."""
    vision = model.config.vision_config
    return torch.empty(*lead, n_tiles, 3, vision.image_size, vision.image_size, device="meta", dtype=torch.bfloat16)
