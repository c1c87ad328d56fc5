"""Qwen2.5-VL: native resolution, a ViT that attends inside windows in most layers, pairs of video frames.

The window of a layer is `window_size` pixels, so 8x8 patches; the layers of `fullatt_block_indexes` attend over a
whole image, or over one frame pair of a video. Windows at the right and lower edge are smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from costmodel.base import Foreign
from costmodel.families.files import Area, Count, Json, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.text import read_decoder
from costmodel.models import (
    AdapterSpec,
    AttentionSpec,
    LayerRun,
    LayerSpec,
    MediaCost,
    MlpSpec,
    VisionEncoderSpec,
)
from costmodel.workload import Video

MODEL_TYPES = ("qwen2_5_vl",)
MAX_ASPECT_RATIO = 200  # transformers refuses longer strips
WRAPPER_TOKENS = 2  # <|vision_start|> and <|vision_end|>


class Qwen25Vision(Foreign):
    """`Qwen2_5_VLVisionConfig`."""

    depth: Layers = 32
    hidden_size: Count = 3584
    intermediate_size: Count = 3420
    num_heads: Count = 16
    in_channels: Count = 3
    patch_size: Count = 14
    spatial_merge_size: Count = 2
    temporal_patch_size: Count = 2
    window_size: Count = 112
    out_hidden_size: Count = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def merged_width(self) -> int:
        """Width of the patches that one visual token merges."""
        return self.hidden_size * self.spatial_merge_size**2

    def layer(self, *, full: bool) -> LayerSpec:
        """Return one layer, with attention over the whole item or inside windows."""
        head_dim = divide(self.hidden_size, self.num_heads, "hidden_size by num_heads", "vision_config")
        mixer = AttentionSpec(
            self.num_heads,
            self.num_heads,
            head_dim,
            causal=False,
            grouping="sequence" if full else "window",
            qkv_bias=True,
            out_bias=True,
        )
        return LayerSpec(self.hidden_size, mixer, MlpSpec(self.intermediate_size, gated=True, bias=True), "rms")

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower: its layers in order, equal neighbours as one run."""
        runs: list[LayerRun] = []
        for index in range(self.depth):
            layer = self.layer(full=index in self.fullatt_block_indexes)
            n_equal = runs.pop().n_layers if runs and runs[-1].layer == layer else 0
            runs.append(LayerRun(n_equal + 1, layer))
        patch_width = self.in_channels * self.temporal_patch_size * self.patch_size**2
        return VisionEncoderSpec(width=self.hidden_size, runs=tuple(runs), patch_width=patch_width)

    def adapter(self) -> AdapterSpec:
        """Return the merger: a norm over each patch, then two linear layers over the merged ones."""
        widths = (self.merged_width, self.merged_width, self.out_hidden_size)
        return AdapterSpec(widths, norm_width=self.merged_width, norm_parameters=self.hidden_size)


@dataclass(frozen=True, slots=True)
class NativeResolution:
    """Sides rounded to whole merged patches, the area kept between two limits.

    Parameters
    ----------
    patch, merge, temporal : int
        Patch side [pixels], patches merged along a side, frames in a patch.
    window : int
        Side of an attention window [merged patches].
    min_pixels, max_pixels : int
        Limits of an image's area [pixels].
    video_min_pixels, video_max_pixels : int
        Limits of a frame's area [pixels].
    fps : float
        Frames taken a second.
    min_frames, max_frames : int
        Limits of their number.
    """

    patch: int
    merge: int
    temporal: int
    window: int
    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    fps: float
    min_frames: int
    max_frames: int

    @property
    def _unit_side(self) -> int:
        return self.patch * self.merge

    def image(self, width: int, height: int) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        columns, rows = self._grid(width, height, self.min_pixels, self.max_pixels)
        return self._cost(columns, rows, slices=1, frames=1)

    def frames(self, video: Video) -> int:
        """Return how many frames are taken: by rate, within limits, a whole number of pairs."""
        total = video.total_frames
        wanted = total / video.fps * (video.sample_fps or self.fps)
        most = math.floor(min(self.max_frames, total) / self.temporal) * self.temporal
        least = math.ceil(self.min_frames / self.temporal) * self.temporal
        n_frames = math.floor(min(max(wanted, least), most, total) / self.temporal) * self.temporal
        return max(1, n_frames)

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames of this size [pixels] are to the model."""
        columns, rows = self._grid(width, height, self.video_min_pixels, self.video_max_pixels)
        return self._cost(columns, rows, slices=math.ceil(n_frames / self.temporal), frames=n_frames)

    def unit(self) -> MediaCost:
        """Return one merged patch in a picture that is square in windows."""
        per_token = self.merge**2
        window_pairs = per_token * per_token * self.window**2
        return MediaCost(per_token, per_token, 0, window_pairs, 1, 0, per_token, self._unit_side**2)

    def with_pixel_limits(self, least: int, most: int) -> NativeResolution:
        """Return the rule with other limits of an image's and a frame's area [pixels]."""
        return replace(self, min_pixels=least, max_pixels=most, video_min_pixels=least, video_max_pixels=most)

    def _grid(self, width: int, height: int, least: int, most: int) -> tuple[int, int]:
        """Return the merged patches along each side."""
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            rule = f"must not be longer than {MAX_ASPECT_RATIO} times its shorter side"
            raise ValueError(f"picture {width}x{height} {rule}; crop it, as the model's own processor refuses it too")
        side = self._unit_side
        columns, rows = round(width / side), round(height / side)
        if columns * rows * side**2 > most:
            shrink = math.sqrt(width * height / most)
            columns, rows = max(1, math.floor(width / shrink / side)), max(1, math.floor(height / shrink / side))
        elif columns * rows * side**2 < least:
            grow = math.sqrt(least / (width * height))
            columns, rows = math.ceil(width * grow / side), math.ceil(height * grow / side)
        return columns, rows

    def _cost(self, columns: int, rows: int, *, slices: int, frames: int) -> MediaCost:
        tokens = columns * rows
        per_token = self.merge**2
        patches = tokens * per_token
        squares = _sum_of_squares(columns, self.window) * _sum_of_squares(rows, self.window)
        return MediaCost(
            patches=slices * patches,
            rows=slices * patches,
            pairs=slices * patches**2,
            window_pairs=slices * squares * per_token**2,
            visual_tokens=slices * tokens,
            marker_tokens=WRAPPER_TOKENS,
            largest_rows=slices * patches,
            resized_pixels=frames * tokens * self._unit_side**2,
        )


def _sum_of_squares(length: int, window: int) -> int:
    """Return the sum of squared lengths when a line is cut into windows, the last one shorter."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2


class Edges(Foreign):
    """`size` of a processor file: areas under the names of edges."""

    shortest_edge: Area | None = None
    longest_edge: Area | None = None
    min_pixels: Area | None = None
    max_pixels: Area | None = None


class PixelLimits(Foreign):
    """The parts of a processor file that set sizes; the hub's values for the released models are the defaults."""

    min_pixels: Area | None = None
    max_pixels: Area | None = None
    size: Edges = Field(default_factory=Edges)
    fps: Annotated[float, Field(gt=0, le=1000)] = 2.0
    min_frames: Count = 4
    max_frames: Count = 768

    @model_validator(mode="after")
    def _check_frames(self) -> PixelLimits:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames={self.min_frames} exceeds max_frames={self.max_frames}")
        return self

    def limits(self, least: int, most: int) -> tuple[int, int]:
        """Return the smallest and largest area [pixels]."""
        low = self.min_pixels or self.size.shortest_edge or self.size.min_pixels or least
        high = self.max_pixels or self.size.longest_edge or self.size.max_pixels or most
        if low > high:
            raise ValueError(f"processor file: the smallest area {low} exceeds the largest {high} [pixels]")
        return low, high


HUB_MIN_PIXELS = 3136
HUB_MAX_PIXELS = 12845056
"""`preprocessor_config.json` of the released Qwen2.5-VL models; the class defaults differ."""


def _text_config(config: Json) -> tuple[dict[str, Any], bool]:
    """Return the language model's keys and whether its head is tied, which either level may say."""
    nested = config.get("text_config")
    text = {"model_type": "qwen2_5_vl_text", **nested} if isinstance(nested, dict) else dict(config)
    return text, any(bool(level.get("tie_word_embeddings", False)) for level in (config, text))


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Qwen2.5-VL model from its files; flat and nested layouts load."""
    vision = parse(Qwen25Vision, files.config.get("vision_config"), f"{files.source}: vision_config")
    text, tied = _text_config(files.config)
    decoder = read_decoder(text, files.source, tied=tied)
    if vision.out_hidden_size != decoder.width:
        rule = f"must equal the language model's hidden_size {decoder.width}"
        raise ValueError(f"{files.source}: vision_config.out_hidden_size={vision.out_hidden_size} {rule}")
    return ModelParts(decoder, vision.encoder(), vision.adapter(), _media(files, vision))


def _media(files: ModelFiles, vision: Qwen25Vision) -> NativeResolution:
    image = parse(PixelLimits, files.image, "preprocessor_config.json")
    video = parse(PixelLimits, files.video, "video_preprocessor_config.json")
    least, most = image.limits(HUB_MIN_PIXELS, HUB_MAX_PIXELS)
    video_least, video_most = video.limits(least, most)
    side = vision.patch_size * vision.spatial_merge_size
    return NativeResolution(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal=vision.temporal_patch_size,
        window=max(1, vision.window_size // side),
        min_pixels=least,
        max_pixels=most,
        video_min_pixels=video_least,
        video_max_pixels=video_most,
        fps=video.fps,
        min_frames=video.min_frames,
        max_frames=video.max_frames,
    )
