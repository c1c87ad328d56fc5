"""LLaVA-OneVision: a SigLIP tower on tiles, two linear layers, a Qwen2; large feature maps are shrunk.

A request with several images gets one tile for each. A frame of a video is one tile whose projected features are
halved along each side, and one learned vector ends the whole video.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from costmodel.errors import Unsupported
from costmodel.families.anyres import (
    AnyRes,
    AnyResConfig,
    Frames,
    SamplingFile,
    check_class_token,
    grid_resolutions,
    parts,
    read_tower,
)
from costmodel.families.files import Count, ModelFiles, ModelParts, parse
from costmodel.families.vits import ClipVision

MODEL_TYPES = ("llava_onevision",)

DECODER: dict[str, object] = {"model_type": "qwen2"}
"""The language model of a config that names none."""
SIGLIP_SO400M_384: dict[str, object] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
"""The tower of a config that names none: SigLIP-so400m without its last layer and its head."""
SIDES = range(384, 2304 + 1, 384)
RESOLUTIONS = [[height, width] for height in SIDES for width in SIDES]
POOLING = 2  # LlavaOnevisionModel.apply_pooling
DEFAULT_FRAMES = 32  # training, and lmms-eval's wrapper of the model; the video processor has no default


class LlavaOnevision(AnyResConfig):
    """`LlavaOnevisionConfig`."""

    vision_config: dict[str, object] | None = SIGLIP_SO400M_384
    text_config: dict[str, object] | None = DECODER
    image_grid_pinpoints: list[list[Count]] = RESOLUTIONS
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    vision_aspect_ratio: str = "anyres_max_9"


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a LLaVA-OneVision model from its files."""
    config = parse(LlavaOnevision, files.config, files.source)
    values = {"model_type": "siglip_vision_model", **(config.vision_config or SIGLIP_SO400M_384)}
    tower = read_tower(values, f"{files.source}: vision_config")
    check_class_token(config, tower, files.source)
    sampling = parse(SamplingFile, files.video, "video_preprocessor_config.json")
    media = AnyRes(
        family="LLaVA-OneVision",
        side=tower.image_size,
        patch=tower.patch_size,
        class_token=isinstance(tower, ClipVision),
        resolutions=grid_resolutions(config, files, tower.image_size),
        most_tiles=most_tiles(config.vision_aspect_ratio, "vision_aspect_ratio", files.source),
        tiles_several=False,
        frames_rule=Frames(
            tokens_per_side=math.ceil(tower.image_size // tower.patch_size / POOLING),
            newlines="video",
            pools_first=False,
            number=sampling.number(DEFAULT_FRAMES),
            fps=sampling.rate(),
        ),
    )
    text = {**DECODER, **(config.text_config or {})}
    return parts(config, files, tower=tower, text=text, media=media, tied=config.tie_word_embeddings or None)


def most_tiles(aspect_ratio: str, key: str, source: str) -> int:
    """Return the tiles whose feature map is not shrunk, from a rule such as `anyres_max_9`."""
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", aspect_ratio)
    if not found:
        raise Unsupported(f"{source}: {key}={aspect_ratio!r} is not modelled; anyres_max_N, such as anyres_max_9, is")
    return int(found[1])
