"""Sizes and tokens of the real processors of Qwen-VL and GLM-V, and the real models on the meta device."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_position_ids

from tests.oracle.transformers_counts import DTYPE, language
from tests.oracle.transformers_tokens import _torchvision

PROCESSORS = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor", "glm4v": "Glm4vVideoProcessor"}


def sizes(n, *, seed=0, most=4500):
    """Return sizes (width, height) of every shape: tiny, odd, long strips, large; none longer than 200 to 1."""
    rng = np.random.default_rng(seed)
    drawn = [*rng.integers(1, most, (n, 2)).tolist(), *rng.integers(1, 80, (n // 4, 2)).tolist()]
    fixed = [(1, 1), (1, 200), (200, 1), (13, 2000), (28, 28), (27, 29), (32, 31), (336, 336), (9000, 9000)]
    return [(w, h) for w, h in fixed + drawn if max(w, h) <= 200 * min(w, h)]


def image_patches(family, width, height, *, patch, merge, limits):
    """Return the patches of an image as the family's PIL processor counts them."""
    size = dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))
    kind = Glm4vImageProcessorPil if family == "glm4v" else Qwen2VLImageProcessorPil
    processor = kind(size=size, patch_size=patch, merge_size=merge)
    return processor.get_number_of_image_patches(height, width)


@lru_cache(maxsize=8)
def video_module(family) -> Any:
    """Return the module of a video processor, with a stand-in for torchvision during the import."""
    importlib.import_module("transformers.video_processing_utils")
    with _torchvision():
        return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")


def video_processor(family, **settings) -> Any:
    """Return the family's video processor."""
    return getattr(video_module(family), PROCESSORS[family])(**settings)


def video_patches(family, n_frames, width, height, *, patch, merge, limits, **settings):
    """Return the patches of so many frames: those of a blank clip after `resize`, whose pixels nobody computes."""
    size = dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))
    processor = video_processor(family, size=size, patch_size=patch, merge_size=merge)
    resized = {}

    def note(_, image, size, **__):
        resized["size"] = size.height, size.width
        return image

    parent = type(processor).__mro__[1]
    original, parent.resize = parent.resize, note
    try:
        clip = torch.empty(1, n_frames, 3, height, width, device="meta")
        processor.resize(clip, processor.size, None, patch * merge, temporal_factor=2, **settings)
    finally:
        parent.resize = original
    rows, columns = (side // patch for side in resized["size"])
    return -(-n_frames // 2) * rows * columns


def sampled(family, total_frames, rate, **settings):
    """Return how many frames the family's video processor takes from a clip of this rate [1/s]."""
    metadata = VideoMetadata(total_num_frames=total_frames, fps=rate, duration=total_frames / rate)
    indices = video_processor(family).sample_frames(metadata, **settings)
    return int((indices < total_frames).sum())


def forward(model, n_tokens, cache=None):
    """Run the language model on embeddings, with the head at the last position."""
    hidden = model.config.get_text_config().hidden_size
    embeddings = torch.empty(1, n_tokens, hidden, device="meta", dtype=DTYPE)
    with torch.no_grad():
        return model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)


def prefill_and_step_flops(model, n_tokens):
    """Return the FLOPs of a prompt, and of one token behind it."""
    found = language(model, n_tokens)
    return found["prefill"], found["decode_step"]


def vision_flops(model, grid):
    """Return the FLOPs of tower and mergers on a picture of (slices, rows, columns) patches: small models, on a CPU."""
    vision, real = model.config.vision_config, model.model.visual.to_empty(device="cpu").float()
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    thw = torch.tensor([grid])
    position_ids = get_vision_position_ids(thw, vision.spatial_merge_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        real(torch.zeros(int(thw.prod()), width), thw, position_ids=position_ids)
    return counter.get_total_flops()
