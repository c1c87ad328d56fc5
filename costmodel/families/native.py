"""Pictures at their own resolution, as Qwen-VL and GLM-V take them: sides of whole merged patches, a limited area."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from pydantic import Field, model_validator

from costmodel.base import Foreign
from costmodel.families.files import Area, Count, ModelFiles, parse
from costmodel.models import DecoderSpec, MediaCost
from costmodel.workload import Video

MAX_ASPECT_RATIO = 200  # transformers refuses longer strips
WRAPPER_TOKENS = 2  # one before and one behind a picture
LEAST_SHARE = 1.05  # of the least area: what `cap_pixels_per_frame` leaves to every frame
CONTEXT_SHARE = 0.9  # of `max_video_tokens`: what the Qwen2-VL video processor spends on a clip under that cap


def fit_area(width: int, height: int, *, side: int, least: int, most: int) -> tuple[int, int]:
    """Return columns and rows of merged patches when the limits are on the area of a picture.

    Parameters
    ----------
    width, height : int
        Size of the picture [pixels].
    side : int
        Side of a merged patch [pixels].
    least, most : int
        Limits of the resized area [pixels].

    Raises
    ------
    ValueError
        If the picture is too long a strip.

    References
    ----------
    .. [1] `smart_resize` of the Qwen2-VL image processor, transformers 5.23; rounding is half to even there too.
    """
    _check_ratio(width, height)
    columns, rows = round(width / side), round(height / side)
    if columns * rows * side**2 > most:
        shrink = math.sqrt(height * width / most)
        columns, rows = max(1, math.floor(width / shrink / side)), max(1, math.floor(height / shrink / side))
    elif columns * rows * side**2 < least:
        grow = math.sqrt(least / (height * width))
        columns, rows = math.ceil(width * grow / side), math.ceil(height * grow / side)
    return columns, rows


def fit_clip(
    n_frames: int, width: int, height: int, *, side: int, temporal: int, least: int, most: int
) -> tuple[int, int]:
    """Return columns and rows of merged patches when the limits are on frames x area, and short sides grow first.

    Parameters
    ----------
    n_frames : int
        Frames that share the limits; an image counts as a whole patch of frames.
    temporal : int
        Frames in a patch.
    width, height, side, least, most
        As in `fit_area`.

    Raises
    ------
    ValueError
        If there are too few frames, or the picture is too long a strip.

    References
    ----------
    .. [1] `smart_resize` of the GLM-4.1V image processor and of the Qwen3-VL video processor, transformers 5.23.
    """
    if n_frames < temporal:
        raise ValueError(f"a video of {n_frames} frame must have at least {temporal}; give it as an image")
    if height < side or width < side:
        scale = max(side / height, side / width)
        width, height = int(width * scale), int(height * scale)
    _check_ratio(width, height)
    columns, rows = round(width / side), round(height / side)
    volume = round(n_frames / temporal) * temporal * columns * rows * side**2
    if volume > most:
        shrink = math.sqrt(n_frames * height * width / most)
        columns, rows = max(1, math.floor(width / shrink / side)), max(1, math.floor(height / shrink / side))
    elif volume < least:
        grow = math.sqrt(least / (n_frames * height * width))
        columns, rows = math.ceil(width * grow / side), math.ceil(height * grow / side)
    return columns, rows


def _check_ratio(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        rule = f"must not be longer than {MAX_ASPECT_RATIO} times its shorter side"
        raise ValueError(f"picture {width}x{height} {rule}; crop it, as the model's own processor refuses it too")


@dataclass(frozen=True, slots=True)
class NativeResolution:
    """Sides rounded to whole merged patches, the area kept between two limits: the rule of Qwen2-VL and Qwen2.5-VL.

    Parameters
    ----------
    patch, merge, temporal : int
        Patch side [pixels], patches merged along a side, frames in a patch.
    min_pixels, max_pixels : int
        Limits of an image [pixels].
    video_min_pixels, video_max_pixels : int
        Limits of a video [pixels]: of one frame here, of all frames together in families that say so.
    fps : float
        Frames taken a second.
    min_frames, max_frames : int
        Limits of their number.
    window : int
        Side of an attention window [merged patches]; 0 where no layer has windows.
    frame_tokens : int
        `max_video_tokens` of a processor that caps the pixels of a frame; 0 where none does.
    """

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    fps: float
    min_frames: int
    max_frames: int
    window: int = 0
    frame_tokens: int = 0

    @property
    def unit_side(self) -> int:
        """Side of a merged patch [pixels]."""
        return self.patch * self.merge

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        del n_images
        columns, rows = self.image_grid(width, height)
        return self.cost(columns, rows, slices=1, frames=1, markers=WRAPPER_TOKENS)

    def image_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of an image [merged patches]."""
        return fit_area(width, height, side=self.unit_side, least=self.min_pixels, most=self.max_pixels)

    def frames(self, video: Video) -> int:
        """Return how many frames are taken: by rate, within limits, a whole number of patches."""
        total = video.total_frames
        wanted = total / video.fps * (video.sample_fps or self.fps)
        most = math.floor(min(self.max_frames, total) / self.temporal) * self.temporal
        least = math.ceil(self.min_frames / self.temporal) * self.temporal
        n_frames = math.floor(min(max(wanted, least), most, total) / self.temporal) * self.temporal
        return max(1, n_frames)

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames of this size [pixels] are to the model."""
        columns, rows = self.video_grid(n_frames, width, height)
        slices = math.ceil(n_frames / self.temporal)
        return self.cost(columns, rows, slices=slices, frames=n_frames, markers=self.video_markers(slices))

    def video_grid(self, n_frames: int, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of each frame of a video [merged patches]."""
        least, most = self.video_min_pixels, self.video_max_pixels
        if self.frame_tokens:
            clip = int(self.frame_tokens * self.unit_side**2 * CONTEXT_SHARE) * self.temporal
            most = max(min(most, clip // n_frames), int(least * LEAST_SHARE))
        return fit_area(width, height, side=self.unit_side, least=least, most=most)

    def video_markers(self, slices: int) -> int:
        """Return the tokens around and between the frames of a video."""
        del slices
        return WRAPPER_TOKENS

    def unit(self) -> MediaCost:
        """Return one merged patch in a picture that is square in windows."""
        per_token = self.merge**2
        window_pairs = per_token * per_token * self.window**2
        return MediaCost(per_token, per_token, 0, window_pairs, 1, 0, per_token, self.unit_side**2)

    def with_pixel_limits(self, least: int, most: int) -> NativeResolution:
        """Return the rule with other limits of an image's and a video's area [pixels]."""
        return replace(self, min_pixels=least, max_pixels=most, video_min_pixels=least, video_max_pixels=most)

    def cost(self, columns: int, rows: int, *, slices: int, frames: int, markers: int) -> MediaCost:
        """Return what so many slices of columns x rows merged patches are; attention stays inside a slice."""
        tokens = columns * rows
        per_token = self.merge**2
        patches = tokens * per_token
        squares = tokens**2
        if self.window:
            squares = sum_of_squares(columns, self.window) * sum_of_squares(rows, self.window)
        return MediaCost(
            patches=slices * patches,
            rows=slices * patches,
            pairs=slices * patches**2,
            window_pairs=slices * squares * per_token**2,
            visual_tokens=slices * tokens,
            marker_tokens=markers,
            largest_rows=slices * patches,
            resized_pixels=frames * tokens * self.unit_side**2,
        )


def sum_of_squares(length: int, window: int) -> int:
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
    """The parts of a processor file that set sizes."""

    min_pixels: Area | None = None
    max_pixels: Area | None = None
    size: Edges = Field(default_factory=Edges)
    fps: Annotated[float, Field(gt=0, le=1000)] = 2.0
    min_frames: Count = 4
    max_frames: Count = 768
    cap_pixels_per_frame: bool | None = None
    max_video_tokens: Count | None = None

    @model_validator(mode="after")
    def _check_frames(self) -> PixelLimits:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames={self.min_frames} exceeds max_frames={self.max_frames}")
        return self

    def limits(self, least: int, most: int) -> tuple[int, int]:
        """Return the smallest and largest area [pixels], these where the file gives none."""
        low = self.min_pixels or self.size.shortest_edge or self.size.min_pixels or least
        high = self.max_pixels or self.size.longest_edge or self.size.max_pixels or most
        if low > high:
            raise ValueError(f"processor file: the smallest area {low} exceeds the largest {high} [pixels]")
        return low, high

    def frame_tokens(self, default: int) -> int:
        """Return `max_video_tokens` if the file caps the pixels of a frame, else 0."""
        return (self.max_video_tokens or default) if self.cap_pixels_per_frame else 0


class MergingTower(Foreign):
    """What the vision configs of these families have in common: patches of frames, merged behind the tower."""

    in_channels: Count = 3
    patch_size: Count = 14
    spatial_merge_size: Count = 2
    temporal_patch_size: Count = 2

    @property
    def patch_width(self) -> int:
        """Numbers of a patch, over all its frames."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


Rule = TypeVar("Rule", bound=NativeResolution)


def read_rule(
    rule: type[Rule],
    files: ModelFiles,
    vision: MergingTower,
    *,
    pixels: tuple[int, int],
    clip_pixels: tuple[int, int] | None = None,
    context_tokens: int = 0,
    window: int = 0,
) -> Rule:
    """Return a rule for pictures, with the limits of the processor files where there are any.

    Parameters
    ----------
    rule : type
        The family's own.
    files : ModelFiles
        Whose processor files are read.
    vision : MergingTower
        The checked vision part of the config.
    pixels, clip_pixels : tuple of (int, int)
        Limits of an image and of a video that say none [pixels]; without the latter, those of an image hold for both.
    context_tokens : int
        `max_video_tokens` of the video processor's class.
    window : int
        Side of an attention window [merged patches].
    """
    image = parse(PixelLimits, files.image, "preprocessor_config.json")
    video = parse(PixelLimits, files.video, "video_preprocessor_config.json")
    least, most = image.limits(*pixels)
    video_least, video_most = video.limits(*(clip_pixels or (least, most)))
    return rule(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal=vision.temporal_patch_size,
        window=window,
        min_pixels=least,
        max_pixels=most,
        video_min_pixels=video_least,
        video_max_pixels=video_most,
        fps=video.fps,
        min_frames=video.min_frames,
        max_frames=video.max_frames,
        frame_tokens=video.frame_tokens(context_tokens) if context_tokens else 0,
    )


def check_width(out_width: int, decoder: DecoderSpec, source: str, key: str = "out_hidden_size") -> None:
    """Refuse a merger that does not fit the language model."""
    if out_width != decoder.width:
        rule = f"must equal the language model's hidden_size {decoder.width}"
        raise ValueError(f"{source}: vision_config.{key}={out_width} {rule}")
