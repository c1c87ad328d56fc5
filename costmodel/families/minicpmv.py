"""MiniCPM-V 2.6: an overview and up to nine slices, each resampled to the same number of tokens, and a Qwen2.

A slice keeps about the area of one square of `scale_resolution` but not its shape, so its patches differ in number; 64
learned queries read them. The tower is SigLIP with positions for pictures of 980 pixels. Versions of the same
`model_type` with another decoder are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from costmodel.adapters import AdapterSpec, AttentionStep, ElementwiseStep, LinearStep, Step
from costmodel.base import Foreign
from costmodel.errors import Unsupported
from costmodel.families.files import Count, Json, ModelFiles, ModelParts, divide, parse
from costmodel.families.text import read_decoder
from costmodel.families.vits import SiglipVision
from costmodel.layers import norm_parameters
from costmodel.models import MediaCost
from costmodel.workload import Video

MODEL_TYPES = ("minicpmv",)
VERSION = 2.6
RESAMPLER_HEAD_DIM = 128  # the resampler has a head for every 128 numbers
SCALE_RESOLUTION, MAX_SLICES = 448, 9  # class defaults of the image processor, and the released values
SLICE_MARKERS = 2  # <image> … </image>, <slice> … </slice>
IMAGE_ID_MARKERS = 2  # <image_id> … </image_id> around the digits
VIDEO_SLICES = 2  # `max_slice_nums` of the model card's video example, which leaves image ids out as well
VIDEO_FPS, MAX_FRAMES = 1.0, 64  # the same example: a frame a second, thinned out evenly beyond 64
SIGLIP_980: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
"""The tower of a config that names none, and the values that a named one may leave out."""


class SliceLimit(Foreign):
    """The slices in the original `config.json`; the processor's own value goes before it."""

    max_slice_nums: Count = MAX_SLICES


class MiniCpmV(Foreign):
    """The original `config.json`; the decoder's keys lie beside these."""

    hidden_size: Count = 4096
    query_num: Count = 64
    drop_vision_last_layer: bool = True
    use_image_id: bool = True
    slice_mode: bool = True
    slice_config: SliceLimit | None = None
    vision_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def adapter(self, kv_width: int) -> AdapterSpec:
        """Return the resampler: queries attend over the patches of a slice."""
        width = self.hidden_size
        heads = divide(width, RESAMPLER_HEAD_DIM, "hidden_size by the resampler's head", "config")
        norm = norm_parameters("layer", width)
        keys: list[Step] = []
        if kv_width != width:
            keys = [LinearStep("keys", kv_width, width, bias=False, per_token=0.0, per_patch=1.0)]
        steps: list[Step] = [
            *keys,
            ElementwiseStep("norm_keys", 2 * width, parameters=norm, per_token=0.0, per_patch=1.0),
            ElementwiseStep("norm_queries", 2 * width, parameters=norm),
            LinearStep("attention_queries", width, width),
            LinearStep("attention_keys", width, width, per_token=0.0, per_patch=1.0),
            LinearStep("attention_values", width, width, per_token=0.0, per_patch=1.0),
            AttentionStep("attention", heads, RESAMPLER_HEAD_DIM, pairs_per_patch=float(self.query_num)),
            LinearStep("attention_out", width, width),
            ElementwiseStep("norm_after", 2 * width, parameters=norm),
            LinearStep("projection", width, width, bias=False),
        ]
        return AdapterSpec(tuple(steps), extra_parameters=self.query_num * width)


class Processor(Foreign):
    """The parts of `preprocessor_config.json` that set slices."""

    max_slice_nums: Count | None = None
    scale_resolution: Count = SCALE_RESOLUTION
    slice_mode: bool = True
    use_image_id: bool | None = None


@dataclass(frozen=True, slots=True)
class Slices:
    """An overview, and a grid of slices for a picture larger than one square.

    Parameters
    ----------
    scale : int
        Side of a square with the area of a slice [pixels].
    patch : int
        Side of a patch [pixels].
    tokens_per_slice : int
        Queries of the resampler.
    most_slices : int
        Limit of the grid.
    image_ids : bool
        Whether every image is numbered in the prompt.
    """

    scale: int
    patch: int
    tokens_per_slice: int
    most_slices: int = MAX_SLICES
    image_ids: bool = True

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model; numbers of many are taken as long as the last."""
        digits = len(str(n_images - 1))
        return self._cost(width, height, self.most_slices, markers=(IMAGE_ID_MARKERS + digits) * self.image_ids)

    def frames(self, video: Video) -> int:
        """Return how many frames are taken: one a second unless another rate is asked for, 64 at most."""
        step = max(1, round(video.fps / (video.sample_fps or VIDEO_FPS)))
        return min(MAX_FRAMES, math.ceil(video.total_frames / step))

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames are: images of an overview and two slices at most, without numbers."""
        return self._cost(width, height, min(VIDEO_SLICES, self.most_slices), frames=n_frames)

    def unit(self) -> MediaCost:
        """Return one square slice."""
        patches = max(1, round(self.scale / self.patch)) ** 2
        tokens, pixels = self.tokens_per_slice, patches * self.patch**2
        return MediaCost(patches, patches, patches**2, patches**2, tokens, 0, patches, pixels)

    def grid(self, width: int, height: int, most: int) -> tuple[int, int] | None:
        """Return the columns and rows of the slices nearest in shape, or None for a picture that fits in one."""
        wanted = min(math.ceil(width * height / self.scale**2), most)
        if wanted <= 1:
            return None
        numbers = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= most]
        grids = [(columns, n // columns) for n in numbers for columns in range(1, n + 1) if n % columns == 0]
        shape = math.log(width / height)
        return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))

    def pieces(self, width: int, height: int, most: int) -> list[tuple[int, int, int]]:
        """Return number, width and height [pixels] of the overview and of the slices."""
        grid = self.grid(width, height, most)
        if grid is None:
            return [(1, *self._fitted(width, height, grows=True))]
        columns, rows = grid
        whole = [_multiple(length, parts) / parts for length, parts in ((width, columns), (height, rows))]
        return [(1, *self._fitted(width, height)), (columns * rows, *self._fitted(*whole, grows=True))]

    def _fitted(self, width: float, height: float, *, grows: bool = False) -> tuple[int, int]:
        """Return the sides of a piece: its shape at the area of a slice, in whole patches."""
        if grows or width * height > self.scale**2:
            shape = width / height
            height = int(self.scale / math.sqrt(shape))
            width = int(height * shape)
        return _multiple(width, self.patch), _multiple(height, self.patch)

    def _cost(self, width: int, height: int, most: int, *, frames: int = 1, markers: int = 0) -> MediaCost:
        pieces = [(n, (w // self.patch) * (h // self.patch)) for n, w, h in self.pieces(width, height, most)]
        number, patches = sum(n for n, _ in pieces), sum(n * p for n, p in pieces)
        pairs = sum(n * p * p for n, p in pieces)
        grid = self.grid(width, height, most)
        line_breaks = grid[1] - 1 if grid else 0
        return MediaCost(
            patches=frames * patches,
            rows=frames * patches,
            pairs=frames * pairs,
            window_pairs=frames * pairs,
            visual_tokens=frames * number * self.tokens_per_slice,
            marker_tokens=frames * (number * SLICE_MARKERS + line_breaks + markers),
            largest_rows=frames * patches,
            resized_pixels=frames * patches * self.patch**2,
        )


def _multiple(length: float, part: int) -> int:
    """Return the whole multiple of a part that is nearest, at least one."""
    return max(round(length / part), 1) * part


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a MiniCPM-V 2.6 model from its files."""
    _check(files)
    config = parse(MiniCpmV, files.config, files.source)
    decoder = read_decoder({**files.config, "model_type": "qwen2"}, files.source, tied=config.tie_word_embeddings)
    vision = _tower(config, files.source)
    return ModelParts(
        decoder, vision.encoder(), config.adapter(vision.hidden_size), _media(config, files.image, vision)
    )


def _check(files: ModelFiles) -> None:
    """Refuse other versions: their decoders and image rules differ."""
    for values, name in ((files.config, files.source), (files.image, "preprocessor_config.json")):
        version = str(values.get("version", VERSION))
        if version != str(VERSION):
            raise Unsupported(f"{name}: version={version} of minicpmv is not modelled; {VERSION} is")
    for key in ("vision_encoder", "text_model_type"):
        if files.config.get(key, "qwen2") != "qwen2":
            raise Unsupported(
                f"{files.source}: {key} belongs to another MiniCPM-V than {VERSION}, which is not modelled"
            )


def _tower(config: MiniCpmV, source: str) -> SiglipVision:
    """Return the tower without a pooling head; a last layer that is dropped is not in the checkpoint either."""
    fixed = {"model_type": "siglip_vision_model", "vision_use_head": False}
    tower = parse(SiglipVision, {**SIGLIP_980, **(config.vision_config or {}), **fixed}, f"{source}: vision_config")
    return tower.model_copy(
        update={"num_hidden_layers": max(1, tower.num_hidden_layers - config.drop_vision_last_layer)}
    )


def _media(config: MiniCpmV, image: Json, vision: SiglipVision) -> Slices:
    limits = parse(Processor, image, "preprocessor_config.json")
    sliced = config.slice_mode and limits.slice_mode
    most = limits.max_slice_nums or (config.slice_config.max_slice_nums if config.slice_config else MAX_SLICES)
    ids = config.use_image_id if limits.use_image_id is None else limits.use_image_id
    return Slices(limits.scale_resolution, vision.patch_size, config.query_num, most if sliced else 1, ids)
