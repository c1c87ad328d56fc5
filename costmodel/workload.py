"""What one request brings: images, videos, text, and how much it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import first_line, unknown

MAX_SIDE = 100_000
"""Longest side accepted [pixels]; more is a slip of the keyboard."""
MAX_COUNT = 1e9
"""Most tokens or frames accepted."""
ORIENTATION = 0x0112  # Exif tag; values from 5 on lie on their side (Exif 2.32, section 4.6.4)
FIRST_SIDEWAYS = 5
CODECS: Final = ("jpeg", "png", "webp", "raw", "other")
"""How an image file is coded; raw needs no decoding, and of other formats no engine knows the time."""
CODEC_OF: Final[Mapping[str, str]] = {
    "JPEG": "jpeg",
    "MPO": "jpeg",  # several JPEG pictures in one file, of which the first is shown
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "raw",
    "PPM": "raw",
}
"""Codecs by what Pillow calls the format of a file."""


def _check_side(owner: str, **sides: int) -> None:
    for name, value in sides.items():
        if isinstance(value, bool) or not 1 <= value <= MAX_SIDE or value != int(value):
            raise ValueError(f"{owner}.{name}={value!r} must be a whole number of pixels from 1 to {MAX_SIDE}")


@dataclass(frozen=True, slots=True)
class Image:
    """An image by its size [pixels], and how its file is coded: one of `CODECS`."""

    width: int
    height: int
    codec: str = "jpeg"

    def __post_init__(self) -> None:
        """Refuse sizes that no image has, and codecs that nobody knows."""
        _check_side("Image", width=self.width, height=self.height)
        if self.codec not in CODECS:
            raise unknown("image codec", self.codec, CODECS)

    @property
    def pixels(self) -> int:
        """Pixels of the file."""
        return self.width * self.height

    @staticmethod
    def open(path: str | Path) -> Image:
        """Read the codec of an image file, and its size as it is shown, its Exif orientation applied.

        Raises
        ------
        ValueError
            If the file is no image that Pillow reads.
        FileNotFoundError
            If there is no such file.
        """
        from PIL import Image as Picture
        from PIL import UnidentifiedImageError

        try:
            with Picture.open(path) as picture:
                width, height = picture.size
                codec = CODEC_OF.get(picture.format or "", "other")
                sideways = picture.getexif().get(ORIENTATION, 1) >= FIRST_SIDEWAYS
        except FileNotFoundError:
            raise FileNotFoundError(f"no image file {str(path)!r}; give a path, or a size such as 1920x1080") from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Picture.DecompressionBombError) as error:
            raise ValueError(f"{str(path)!r} is no image that can be read: {first_line(error)}") from None
        return Image(height, width, codec) if sideways else Image(width, height, codec)


@dataclass(frozen=True, slots=True)
class Video:
    """A video by its size, length and frame rate.

    Parameters
    ----------
    width, height : int
        Size of a frame [pixels].
    seconds : float
        Length [s].
    fps : float
        Frames a second in the file.
    frames : int or None
        Frames given to the model, whatever the file holds; None samples as the model's family does.
    sample_fps : float or None
        Frames a second given to the model; None samples as the model's family does.
    """

    width: int
    height: int
    seconds: float
    fps: float
    frames: int | None = None
    sample_fps: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no video has."""
        _check_side("Video", width=self.width, height=self.height)
        for name in ("seconds", "fps", "sample_fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < MAX_COUNT:
                raise ValueError(f"Video.{name}={value!r} must be a positive number")
        if self.frames is not None and not (1 <= self.frames <= MAX_COUNT and self.frames == int(self.frames)):
            raise ValueError(f"Video.frames={self.frames!r} must be a whole number from 1")

    @property
    def total_frames(self) -> int:
        """Frames in the file."""
        return max(1, round(self.seconds * self.fps))

    @staticmethod
    def open(path: str | Path) -> Video:
        """Read the size, length and frame rate of a video file.

        Raises
        ------
        ModuleNotFoundError
            If PyAV, the extra `media`, is not installed.
        ValueError
            If the file is no video that PyAV reads.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no video file {str(path)!r}; give a path, or a size such as 1280x720:5s@24fps")
        try:
            import av
        except ModuleNotFoundError:
            message = "reading video files needs PyAV: pip install 'lvlm-sim[media]', or give 1280x720:5s@24fps"
            raise ModuleNotFoundError(message) from None
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                fps = float(stream.average_rate or stream.guessed_rate or 0)
                seconds = container.duration / av.time_base if container.duration else stream.frames / fps
                return Video(stream.width, stream.height, float(seconds), fps)
        except (av.FFmpegError, IndexError, ZeroDivisionError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no video that can be read: {first_line(error)}") from None


def _check_count(name: str, value: Quantity, least: float) -> None:
    if np.size(value) == 0:
        raise ValueError(f"Workload.{name} is an empty array; give at least one point")
    low, high = np.min(value), np.max(value)  # NaN fails both comparisons
    if not (low >= least and high <= MAX_COUNT):
        shown = value if np.ndim(value) == 0 else f"[{low} ... {high}]"
        raise ValueError(f"Workload.{name}={shown} must be a number from {least:g} to {MAX_COUNT:g}")


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What one request brings.

    Parameters
    ----------
    images : sequence of Image
    videos : sequence of Video
    text_tokens : float or ndarray
        Text of the prompt, chat template included [tokens].
    output_tokens : float or ndarray
        Tokens to generate.
    visual_tokens : float, ndarray or None
        Visual tokens by number, in place of images and videos: for sweeps.
    """

    images: tuple[Image, ...] | list[Image] = field(default_factory=tuple)
    videos: tuple[Video, ...] | list[Video] = field(default_factory=tuple)
    text_tokens: Quantity = 64.0
    output_tokens: Quantity = 128.0
    visual_tokens: Quantity | None = None

    def __post_init__(self) -> None:
        """Refuse counts that cannot be."""
        _check_count("text_tokens", self.text_tokens, 1)
        _check_count("output_tokens", self.output_tokens, 1)
        if self.visual_tokens is not None:
            _check_count("visual_tokens", self.visual_tokens, 0)
            if self.images or self.videos:
                raise ValueError("Workload.visual_tokens replaces images and videos; give one or the other")

    @property
    def has_media(self) -> bool:
        """Whether there are pictures, by size, file or number of tokens."""
        return bool(self.images or self.videos or self.visual_tokens is not None)

    @property
    def coded_pixels(self) -> tuple[int, ...]:
        """Pixels of the image files, by codec in the order of `CODECS`."""
        return tuple(sum(image.pixels for image in self.images if image.codec == codec) for codec in CODECS)
