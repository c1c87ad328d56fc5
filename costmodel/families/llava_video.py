"""LLaVA-Video, in the layout of the LLaVA-NeXT repository: the images of LLaVA-OneVision, and videos of 64 frames.

All keys of the language model lie at the top level. A frame's projected features are pooled, and learned vectors end
each row of it, each frame or the video (`mm_newline_position`). The SigLIP tower is cut before its last layer when it
is loaded, whatever `mm_vision_select_layer` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from costmodel.errors import Unsupported, unknown
from costmodel.families.anyres import AnyRes, AnyResConfig, Frames, Newlines, grid_resolutions, parts, read_tower
from costmodel.families.files import Count, ModelFiles, ModelParts, parse
from costmodel.families.llava_onevision import RESOLUTIONS, SIGLIP_SO400M_384, most_tiles
from costmodel.workload import Video

MODEL_TYPES = ("llava_qwen",)

TOWERS = {"google/siglip-so400m-patch14-384": SIGLIP_SO400M_384}
"""Towers that the repository loads by name, as it cuts them (siglip_encoder.py)."""
MAX_FRAMES = 64  # the repository's example (docs/LLaVA_Video_1003.md) and the released models' evaluation
NEWLINES: dict[str, Newlines] = {"no_token": "none", "one_token": "video", "frame": "frame", "grid": "row"}


class LlavaVideo(AnyResConfig):
    """A config.json of the LLaVA-NeXT repository, `LlavaQwenConfig`."""

    image_grid_pinpoints: list[list[Count]] = RESOLUTIONS
    vision_feature_layer: int | list[int] = -1
    mm_vision_tower: str
    mm_projector_type: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    mm_resampler_type: None = None
    mm_patch_merge_type: Literal["spatial_unpad"] = "spatial_unpad"
    mm_spatial_pool_mode: Literal["average", "max", "bilinear"] = "bilinear"
    mm_spatial_pool_stride: Count = 2
    mm_newline_position: Literal["grid", "frame", "one_token", "no_token"] = "one_token"
    image_aspect_ratio: str = "anyres_max_9"
    force_sample: bool = False
    add_faster_video: bool = False


@dataclass(frozen=True, slots=True)
class SteppedFrames(Frames):
    """Frames as `load_video` of the repository takes them: one in so many, or so many evenly when that is too many."""

    def taken(self, video: Video) -> int:
        """Return how many frames are taken from a video."""
        if self.repeats and not video.sample_fps:
            return self.number
        step = max(1, round(video.fps / (video.sample_fps or 1.0)))
        return min(math.ceil(video.total_frames / step), self.number)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a LLaVA-Video model from its files."""
    config = parse(LlavaVideo, files.config, files.source)
    if config.add_faster_video:
        raise Unsupported(f"{files.source}: add_faster_video is not modelled; set it to false")
    if config.mm_vision_tower not in TOWERS:
        raise unknown(f"vision tower (in {files.source})", config.mm_vision_tower, TOWERS)
    tower = read_tower({"model_type": "siglip_vision_model", **TOWERS[config.mm_vision_tower]}, files.source)
    media = AnyRes(
        family="LLaVA-Video",
        side=tower.image_size,
        patch=tower.patch_size,
        class_token=False,
        resolutions=grid_resolutions(config, files, tower.image_size),
        most_tiles=most_tiles(config.image_aspect_ratio, "image_aspect_ratio", files.source),
        tiles_several=False,
        frames_rule=_frames(config, tower.image_size // tower.patch_size),
    )
    text = {**files.config, "model_type": "qwen2"}
    return parts(config, files, tower=tower, text=text, media=media, tied=config.tie_word_embeddings)


def _frames(config: LlavaVideo, per_side: int) -> Frames:
    """Return how frames are pooled: bilinear pooling keeps an incomplete window, the others drop it (get_2dPool)."""
    pooled = per_side / config.mm_spatial_pool_stride
    return SteppedFrames(
        tokens_per_side=math.ceil(pooled) if config.mm_spatial_pool_mode == "bilinear" else max(1, math.floor(pooled)),
        newlines=NEWLINES[config.mm_newline_position],
        pools_first=False,
        number=MAX_FRAMES,
        repeats=config.force_sample,
    )
