"""Idefics3 and SmolVLM: a picture enlarged to whole square tiles, the picture itself as one more, pixel shuffle.

Row and tile tags count as one token each, as their processors count them. In the vocabularies of Idefics3-8B and
SmolVLM-2.2B a tile's tag is plain text of about seven tokens, so their prompts are some 6 tokens a tile longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from costmodel.adapters import AdapterSpec, LinearStep
from costmodel.base import Foreign
from costmodel.families.files import Count, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import no_video, tiles_cost
from costmodel.families.text import read_decoder
from costmodel.families.vits import SiglipVision
from costmodel.models import MediaCost
from costmodel.workload import Video

MODEL_TYPES = ("idefics3", "smolvlm")
VIDEO_TYPES = frozenset({"smolvlm"})
TILES_ALONG_SIDE = 4  # longest side of a picture when no processor file says (Idefics3ImageProcessor.size)
MAX_SIDE = 4096  # longest side after resizing (MAX_IMAGE_SIZE of the image processor)
TILE_TAGS = 2  # <fake_token_around_image> and <row_r_col_c>
WHOLE_TAGS = 3  # <fake_token_around_image>, <global-img>, and <fake_token_around_image> behind it
ROW_BREAKS = 1  # a new line behind a row of tiles; that of the last row is one token with the one behind it
FRAME_STAMP = 10  # "\n", "Frame", " from", " ", and "mm:ss:" with a token a digit (SmolVLM's FRAME_TIMESTAMP_MESSAGE)
MAX_FRAMES = 64
FPS = 1.0
"""`video_sampling` of the released SmolVLM2 models."""


CLASS_DEFAULTS: dict[str, Any] = {}
"""A part that a file leaves out."""


class IdeficsVision(SiglipVision):
    """`Idefics3VisionConfig` and `SmolVLMVisionConfig`: SigLIP without its pooling head."""

    model_type: Any = "idefics3_vision"  # published files say idefics3, siglip or nothing
    hidden_size: Count = 1152
    num_attention_heads: Count = 16
    patch_size: Count = 32
    vision_use_head: bool = False


class Idefics3(Foreign):
    """`Idefics3Config` and `SmolVLMConfig`."""

    vision_config: dict[str, Any] = CLASS_DEFAULTS
    text_config: dict[str, Any] = CLASS_DEFAULTS
    scale_factor: Count = 2
    tie_word_embeddings: bool = False


class Sampling(Foreign):
    """`video_sampling` of a SmolVLM processor file."""

    fps: float = Field(FPS, gt=0)
    max_frames: Count = MAX_FRAMES


class TileSizes(Foreign):
    """The parts of `preprocessor_config.json` that set the tiles."""

    size: dict[str, Any] = Field(default_factory=dict)
    max_image_size: dict[str, Any] = Field(default_factory=dict)
    do_image_splitting: bool = True
    video_sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class SplitSquares:
    """Tiles that cover a picture whose longest side has a given length, and the whole picture as one more tile.

    Parameters
    ----------
    side, patch : int
        Sides of a tile and of a patch [pixels].
    tokens_per_tile : int
        Visual tokens after pixel shuffle.
    longest : int
        Longest side of a picture, small ones enlarged [pixels].
    splits : bool
        Whether pictures are split; otherwise each is one tile.
    fps, max_frames : float, int
        Frames taken a second of a video, and at most; no frames is no video.
    """

    side: int
    patch: int
    tokens_per_tile: int
    longest: int
    splits: bool = True
    fps: float = FPS
    max_frames: int = 0

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        del n_images
        columns, rows = self.grid(width, height)
        tags = rows * (columns * TILE_TAGS + ROW_BREAKS)
        return self._cost(columns * rows + 1, tags + WHOLE_TAGS)

    def frames(self, video: Video) -> int:
        """Return how many frames are taken: by rate, up to a limit."""
        self._check_video()
        wanted = round((video.sample_fps or self.fps) * video.seconds)
        return max(1, min(wanted, self.max_frames, video.total_frames))

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames are: one tile each, whatever their size, behind its time."""
        del width, height
        self._check_video()
        return self._cost(n_frames, n_frames * (WHOLE_TAGS + FRAME_STAMP))

    def unit(self) -> MediaCost:
        """Return one tile."""
        return self._cost(1, 0)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of tiles for a picture of this size [pixels]; none where it is one tile.

        The picture is resized twice: to the longest side, then to whole tiles.

        References
        ----------
        .. [1] `Idefics3ImageProcessorPil._preprocess`, transformers 5.23.
        """
        if not self.splits:
            return 0, 0
        width, height = _even(*_scaled(width, height, self.longest))
        if max(width, height) > MAX_SIDE:
            width, height = _scaled(width, height, MAX_SIDE)
        whole = math.ceil(max(width, height) / self.side) * self.side
        columns, rows = (math.ceil(length / self.side) for length in _scaled(width, height, whole))
        return (columns, rows) if columns * rows > 1 else (0, 0)

    def _check_video(self) -> None:
        if not self.max_frames:
            raise no_video("Idefics3")

    def _cost(self, tiles: int, markers: int) -> MediaCost:
        return tiles_cost(
            tiles,
            side=self.side,
            patch=self.patch,
            visual_tokens=tiles * self.tokens_per_tile,
            marker_tokens=markers,
        )


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """Return the size with this longest side and the same aspect ratio, rounded down but never to nothing."""
    ratio = width / height
    if width >= height:
        return longest, max(1, int(longest / ratio))
    return max(1, int(longest * ratio)), longest


def _even(width: int, height: int) -> tuple[int, int]:
    """Return the size with the shorter side rounded up to an even number."""
    if width >= height:
        return width, height + height % 2
    return width + width % 2, height


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of an Idefics3 or SmolVLM model from its files."""
    config = parse(Idefics3, files.config, files.source)
    vision = parse(IdeficsVision, config.vision_config, f"{files.source}: vision_config")
    text = {"model_type": "llama", **config.text_config}
    decoder = read_decoder(text, f"{files.source}: text_config", tied=config.tie_word_embeddings)
    merged = vision.hidden_size * config.scale_factor**2
    adapter = AdapterSpec((LinearStep("linear1", merged, decoder.width, bias=False),))
    return ModelParts(decoder, vision.encoder(), adapter, _media(files, config, vision))


def _media(files: ModelFiles, config: Idefics3, vision: IdeficsVision) -> SplitSquares:
    sizes = parse(TileSizes, files.image, "preprocessor_config.json")
    video = parse(TileSizes, files.video, "video_preprocessor_config.json").video_sampling
    sampling = video or sizes.video_sampling or Sampling()
    side = sizes.max_image_size.get("longest_edge", vision.image_size)
    if side != vision.image_size:
        rule = f"must be vision_config.image_size {vision.image_size}, which sets the tokens of a tile"
        raise ValueError(f"preprocessor_config.json: max_image_size.longest_edge={side!r} {rule}")
    longest = sizes.size.get("longest_edge", TILES_ALONG_SIDE * side)
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"preprocessor_config.json: size={sizes.size} must hold a longest_edge in pixels")
    patches = vision.image_size // vision.patch_size
    per_side = divide(patches, config.scale_factor, "patches along a side by scale_factor", files.source)
    return SplitSquares(
        side=vision.image_size,
        patch=vision.patch_size,
        tokens_per_tile=per_side**2,
        longest=longest,
        splits=sizes.do_image_splitting,
        fps=sampling.fps,
        max_frames=sampling.max_frames if files.config.get("model_type") in VIDEO_TYPES else 0,
    )
