"""What the LLaVA models of any resolution share: tiles of the best-fitting grid, pooled video frames, a projector.

An image is resized into one of a list of resolutions and cut into tiles; the whole image is a further tile. Of the
feature map of the tiles the rows and columns that only show padding are dropped, a map larger than a limit is shrunk,
and a learned vector ends each row. Frames of a video are one tile each, pooled.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from costmodel.adapters import AdapterSpec, projector
from costmodel.base import Foreign
from costmodel.errors import shown, unknown
from costmodel.families.files import Count, Json, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import no_video, tiles_cost
from costmodel.families.text import read_decoder
from costmodel.families.vits import ClipVision, SiglipVision, used_layers
from costmodel.models import MediaCost, VisionEncoderSpec
from costmodel.workload import Video

SHRINKS_FROM = 1.1
"""A feature map is shrunk when its side exceeds the limit's by this factor (LlavaOnevision's pack_image_features)."""
ROUNDING = 7
"""Decimals to which the side without padding is rounded before it is cut to a whole number (unpad_image)."""

Newlines = Literal["none", "video", "frame", "row"]


@dataclass(frozen=True, slots=True)
class Frames:
    """How frames of a video are taken and pooled.

    Parameters
    ----------
    tokens_per_side : int
        Of a pooled frame.
    newlines : {"none", "video", "frame", "row"}
        What a learned vector ends.
    pools_first : bool
        Whether the projector runs behind the pooling.
    number : int
        Frames taken from a video.
    fps : float or None
        Frames taken a second, in place of a number.
    repeats : bool
        Whether a video of fewer frames gives some twice.
    """

    tokens_per_side: int
    newlines: Newlines
    pools_first: bool
    number: int
    fps: float | None = None
    repeats: bool = False

    def taken(self, video: Video) -> int:
        """Return how many frames are taken from a video."""
        rate = video.sample_fps or self.fps
        if rate:
            return max(1, min(int(video.total_frames / video.fps * rate), video.total_frames))
        return self.number if self.repeats else min(self.number, video.total_frames)

    def tokens(self, n_frames: int) -> int:
        """Return the visual tokens of so many frames, learned vectors included."""
        side = self.tokens_per_side
        ends = {"none": 0, "video": 1, "frame": n_frames, "row": n_frames * side}
        return n_frames * side**2 + ends[self.newlines]


@dataclass(frozen=True, slots=True)
class AnyRes:
    """Tiles of the grid that fits best, and the whole image as a further tile.

    Parameters
    ----------
    family : str
        Name in messages.
    side, patch : int
        Sides of a tile and of a patch [pixels].
    class_token : bool
        Whether each tile carries one through the encoder; it is dropped behind it.
    resolutions : tuple of (int, int)
        Heights and widths that an image may be resized into [pixels].
    most_tiles : int or None
        Tiles whose feature map is not shrunk.
    tiles_several : bool
        Whether images are still cut when a request has more than one.
    frames_rule : Frames or None
        How videos are taken; None refuses them.
    """

    family: str
    side: int
    patch: int
    class_token: bool
    resolutions: tuple[tuple[int, int], ...]
    most_tiles: int | None = None
    tiles_several: bool = True
    frames_rule: Frames | None = None

    @property
    def _per_side(self) -> int:
        return self.side // self.patch

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model, one of so many in the request."""
        per_tile = self._per_side**2
        if n_images > 1 and not self.tiles_several:
            return self._cost(1, per_tile + 1, per_tile)
        tall, wide = self._resolution(width, height)
        n_tiles = (tall // self.side) * (wide // self.side) + 1
        rows, columns = self._feature_map(width, height, tall // self.side, wide // self.side)
        return self._cost(n_tiles, per_tile + rows * (columns + 1), n_tiles * per_tile)

    def frames(self, video: Video) -> int:
        """Return how many frames are taken from a video."""
        return self._video_rule().taken(video)

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames are to the model: one tile each, whatever their size."""
        del width, height
        rule = self._video_rule()
        projected = rule.tokens_per_side if rule.pools_first else self._per_side
        return self._cost(n_frames, rule.tokens(n_frames), n_frames * projected**2)

    def unit(self) -> MediaCost:
        """Return one tile."""
        return self._cost(1, self._per_side**2, self._per_side**2)

    def _video_rule(self) -> Frames:
        if self.frames_rule is None:
            raise no_video(self.family)
        return self.frames_rule

    def _resolution(self, width: int, height: int) -> tuple[int, int]:
        """Return the height and width that keep most of the image's pixels, and of those the smallest."""
        best, kept, wasted = self.resolutions[0], 0, math.inf
        for tall, wide in self.resolutions:
            scale = min(wide / width, tall / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            waste = tall * wide - pixels
            if pixels > kept or (pixels == kept and waste < wasted):
                best, kept, wasted = (tall, wide), pixels, waste
        return best

    def _feature_map(self, width: int, height: int, tall: int, wide: int) -> tuple[int, int]:
        """Return the rows and columns of features that show the image, shrunk where they are too many."""
        rows, columns = tall * self._per_side, wide * self._per_side
        if width / height > columns / rows:
            rows -= _padding(rows, height * (columns / width))
        else:
            columns -= _padding(columns, width * (rows / height))
        if self.most_tiles:
            ratio = math.sqrt(rows * columns / (self.most_tiles * self._per_side**2))
            if ratio > SHRINKS_FROM:
                return int(rows // ratio), int(columns // ratio)
        return rows, columns

    def _cost(self, n_tiles: int, visual_tokens: int, adapter_tokens: int) -> MediaCost:
        return tiles_cost(
            n_tiles,
            side=self.side,
            patch=self.patch,
            visual_tokens=visual_tokens,
            class_token=self.class_token,
            adapter_tokens=adapter_tokens,
        )


def _padding(side: int, shown: float) -> int:
    """Return how many of a side's features show padding; as many are dropped at either end."""
    return (side - int(round(shown, ROUNDING))) // 2 * 2


class AnyResConfig(Foreign):
    """What `LlavaNextConfig`, `LlavaNextVideoConfig` and `LlavaOnevisionConfig` have in common."""

    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    image_grid_pinpoints: list[list[Count]]


class GridFile(Foreign):
    """The part of `preprocessor_config.json` that sets the tiles."""

    image_grid_pinpoints: list[list[Count]] | None = None


class SamplingFile(Foreign):
    """The parts of `video_preprocessor_config.json` that set the number of frames; off unless `do_sample_frames`."""

    do_sample_frames: bool = False
    num_frames: Count | None = None
    fps: Annotated[float, Field(gt=0)] | None = None

    def number(self, default: int) -> int:
        """Return the frames taken from a video where no rate is given."""
        return (self.num_frames if self.do_sample_frames else None) or default

    def rate(self) -> float | None:
        """Return the frames taken a second, if that is how they are taken."""
        return self.fps if self.do_sample_frames and not self.num_frames else None


Tower = ClipVision | SiglipVision
TOWERS: dict[str, type[ClipVision | SiglipVision]] = {
    "clip_vision_model": ClipVision,
    "siglip_vision_model": SiglipVision,
}


def read_tower(values: Json, source: str) -> Tower:
    """Return the checked config of a CLIP or SigLIP tower."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in TOWERS:
        raise unknown(f"vision model type (in {source})", model_type, TOWERS)
    return parse(TOWERS[model_type], values, source)


def feature_layers(layers: int | list[int], n_layers: int, source: str) -> list[int]:
    """Return how many layers lie before each output that is read; -1 is the last, and 0 the embedding, is none."""
    indices = [layers] if isinstance(layers, int) else layers
    if not indices:
        raise ValueError(f"{source}: vision_feature_layer={layers} must name some of {n_layers} layers")
    return [used_layers(index, n_layers, f"{source}: vision_feature_layer") for index in indices]


def parts(
    config: AnyResConfig, files: ModelFiles, *, tower: Tower, text: Json, media: AnyRes, tied: bool | None
) -> ModelParts:
    """Return the parts of a model whose projector is two linear layers and whose rows end in a learned vector."""
    decoder = read_decoder(text, f"{files.source}: text_config", tied=tied)
    layers = feature_layers(config.vision_feature_layer, tower.num_hidden_layers, files.source)
    widths = (tower.hidden_size * len(layers), decoder.width, decoder.width)
    adapter = AdapterSpec(projector(widths, bias=config.multimodal_projector_bias), extra_parameters=decoder.width)
    encoder: VisionEncoderSpec = tower.encoder(max(layers))
    return ModelParts(decoder, encoder, adapter, media)


def check_class_token(config: AnyResConfig, tower: Tower, source: str) -> None:
    """Refuse to keep a class token, or to drop a patch in its place: a tile's features must fill a square."""
    strategy = config.vision_feature_select_strategy
    fitting = "default" if isinstance(tower, ClipVision) else "full"
    if strategy != fitting:
        rule = f"must be {fitting!r} for a {tower.model_type}, so that the features of a tile fill a square"
        raise ValueError(f"{source}: vision_feature_select_strategy={strategy!r} {rule}")


def grid_resolutions(config: AnyResConfig, files: ModelFiles, side: int) -> tuple[tuple[int, int], ...]:
    """Return the resolutions that an image may be resized into; both files must say the same."""
    ours = config.image_grid_pinpoints
    processors = parse(GridFile, files.image, "preprocessor_config.json").image_grid_pinpoints
    if processors and ours != processors:
        raise ValueError(f"{files.source}: image_grid_pinpoints differ from preprocessor_config.json; they must agree")
    odd = [pair for pair in ours if len(pair) != len(("height", "width"))][:1]
    if odd or not ours:
        raise ValueError(f"{files.source}: image_grid_pinpoints={shown(odd)} must be pairs of a height and a width")
    for length in itertools.chain(*ours):
        divide(length, side, "image_grid_pinpoints by image_size", files.source)
    return tuple((height, width) for height, width in ours)
