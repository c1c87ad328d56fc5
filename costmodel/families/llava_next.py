"""LLaVA-NeXT (LLaVA-1.6): a CLIP tower on tiles, two linear layers, a Llama or Mistral; and LLaVA-NeXT-Video.

The language model reads the layer before the tower's last (`vision_feature_layer`), so an engine need not run that;
`transformers` does. In LLaVA-NeXT-Video each frame of a video is one tile, its features pooled before the projector.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from costmodel.errors import Unsupported
from costmodel.families.anyres import (
    AnyRes,
    AnyResConfig,
    Frames,
    SamplingFile,
    Tower,
    check_class_token,
    grid_resolutions,
    parts,
    read_tower,
)
from costmodel.families.files import Count, ModelFiles, ModelParts, parse
from costmodel.families.llava import CLIP_LARGE_336
from costmodel.families.vits import ClipVision

MODEL_TYPES = ("llava_next", "llava_next_video")

DECODER: dict[str, object] = {"model_type": "llama"}
"""The language model of a config that names none."""
RESOLUTIONS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
DEFAULT_FRAMES = 32  # model card of LLaVA-NeXT-Video-7B-hf: "sampled uniformly to be 32 frames"


class LlavaNext(AnyResConfig):
    """`LlavaNextConfig` and `LlavaNextVideoConfig`."""

    vision_config: dict[str, object] | None = CLIP_LARGE_336
    text_config: dict[str, object] | None = DECODER
    image_grid_pinpoints: list[list[Count]] = RESOLUTIONS
    spatial_pool_mode: Literal["average", "max", "conv"] = "average"
    spatial_pool_stride: Count = 2


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a LLaVA-NeXT or LLaVA-NeXT-Video model from its files."""
    config = parse(LlavaNext, files.config, files.source)
    values = {"model_type": "clip_vision_model", **(config.vision_config or CLIP_LARGE_336)}
    tower = read_tower(values, f"{files.source}: vision_config")
    check_class_token(config, tower, files.source)
    takes_videos = files.config.get("model_type") == "llava_next_video"
    media = AnyRes(
        "LLaVA-NeXT",
        tower.image_size,
        tower.patch_size,
        isinstance(tower, ClipVision),
        grid_resolutions(config, files, tower.image_size),
    )
    if takes_videos:
        media = replace(media, frames_rule=_frames(config, files, tower))
    text = {**DECODER, **(config.text_config or {})}
    # LlavaNextVideoConfig takes over what the text part says, LlavaNextConfig does not
    tied = True if config.tie_word_embeddings else (None if takes_videos else False)
    return parts(config, files, tower=tower, text=text, media=media, tied=tied)


def _frames(config: LlavaNext, files: ModelFiles, tower: Tower) -> Frames:
    if config.spatial_pool_mode == "conv":
        way_out = "average and max are"
        raise Unsupported(f"{files.source}: spatial_pool_mode='conv' is not modelled; {way_out}")
    per_side = tower.image_size // tower.patch_size
    if config.spatial_pool_stride > per_side:
        rule = f"must not exceed the {per_side} patches along a frame's side"
        raise ValueError(f"{files.source}: spatial_pool_stride={config.spatial_pool_stride} {rule}")
    sampling = parse(SamplingFile, files.video, "video_preprocessor_config.json")
    return Frames(
        tokens_per_side=per_side // config.spatial_pool_stride,
        newlines="none",
        pools_first=True,
        number=sampling.number(DEFAULT_FRAMES),
        fps=sampling.rate(),
    )
