"""Pictures as the encoder takes them: resized by the family's own rule, normalised, cut into patches.

Sizes are those of the media rules that the cost model counts tokens by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from costmodel.errors import Unsupported
from costmodel.families.gemma3 import PooledSquare
from costmodel.families.internvl import Tiles
from costmodel.families.llava import FixedSquare
from costmodel.families.native import NativeResolution
from costmodel.families.pictures import nearest_grid
from costmodel.models import MediaRule
from runtime.grids import Grid
from runtime.model import Pixels
from runtime.prompts import Picture
from runtime.settings import Blueprint, PictureSettings

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float32]
HIGHEST: Final = 255  # of a channel's eight bits


def preprocess(blueprint: Blueprint, images: Sequence[Image]) -> Pixels:
    """Return pictures as patches, with the tokens that each becomes.

    Parameters
    ----------
    blueprint : Blueprint
        Whose media rule sets sizes.
    images : sequence of PIL.Image.Image
    """
    rule, settings = blueprint.spec.media, blueprint.settings
    if rule is None or not images:
        raise ValueError(f"{blueprint.spec.name}: pictures={len(images)} must be at least one, of a model that sees")
    patches: list[Floats] = []
    grids: list[Grid] = []
    pictures: list[Picture] = []
    for image in images:
        cost = rule.image(image.width, image.height, n_images=len(images))
        parts = _native(rule, image, settings.pictures) if not settings.tile else _tiles(rule, image, settings.pictures)
        found = [_patches(part, rule, settings.tile) for part in parts]
        patches.extend(rows for rows, _ in found)
        grids.extend(grid for _, grid in found)
        merge = settings.adapter.merge
        t, h, w = found[0][1]
        pictures.append(Picture(cost.visual_tokens, None if settings.tile else (t, h // merge, w // merge)))
    return Pixels(torch.from_numpy(np.concatenate(patches)), tuple(grids), tuple(pictures))


def _resized(image: Image, width: int, height: int, settings: PictureSettings) -> Image:
    from PIL.Image import Resampling

    filters = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}
    return image.convert("RGB").resize((width, height), filters[settings.resampling])


def _numbers(image: Image, settings: PictureSettings) -> Floats:
    """Return normalised channels, shape (3, height, width)."""
    shares = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(HIGHEST)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (settings.mean, settings.std))
    return np.asarray((shares - mean) / std, np.float32)


def _native(rule: MediaRule, image: Image, settings: PictureSettings) -> list[Floats]:
    if not isinstance(rule, NativeResolution):
        raise _no_rule(rule)
    columns, rows = rule.image_grid(image.width, image.height)
    return [_numbers(_resized(image, columns * rule.unit_side, rows * rule.unit_side, settings), settings)]


def _tiles(rule: MediaRule, image: Image, settings: PictureSettings) -> list[Floats]:
    """Return the tiles of a picture, all of one size."""
    if isinstance(rule, PooledSquare):
        side = round(rule.unit().resized_pixels ** 0.5)
        return [_numbers(_resized(image, side, side, settings), settings)]
    if isinstance(rule, FixedSquare):
        return [_numbers(_cropped(image, rule.side, settings), settings)]
    if not isinstance(rule, Tiles):
        raise _no_rule(rule)
    side = rule.side
    columns, rows = nearest_grid(image.width, image.height, side=side, least=rule.min_tiles, most=rule.max_tiles)
    canvas = _numbers(_resized(image, columns * side, rows * side, settings), settings)
    cut = canvas.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    thumbnail = rule.thumbnail and len(cut) > 1
    return [*cut, *([_numbers(_resized(image, side, side, settings), settings)] if thumbnail else [])]


def _cropped(image: Image, side: int, settings: PictureSettings) -> Image:
    """Return the middle square of a picture whose shorter side is brought to a length [pixels]."""
    short, long = sorted((image.width, image.height))
    longer = int(side * long / short)
    width, height = (side, longer) if image.width <= image.height else (longer, side)
    left, top = (width - side) // 2, (height - side) // 2
    return _resized(image, width, height, settings).crop((left, top, left + side, top + side))


def _patches(numbers: Floats, rule: MediaRule, tile: int) -> tuple[Floats, Grid]:
    """Return the patches of a picture or tile, and its grid.

    The numbers of a patch are ordered by channel, frame, row and column; a still picture is the same frame twice.
    """
    channels, height, width = numbers.shape
    patch, merge, frames = _sizes(rule, tile, width)
    rows, columns = height // patch, width // patch
    numbers = numbers[:, : rows * patch, : columns * patch]  # a convolution leaves out what fills no patch
    shape = (channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocked = numbers.reshape(shape).transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    repeated = np.broadcast_to(blocked, (*blocked.shape[:5], frames, *blocked.shape[6:]))
    return np.ascontiguousarray(repeated.reshape(rows * columns, -1)), (1, rows, columns)


def _sizes(rule: MediaRule, tile: int, width: int) -> tuple[int, int, int]:
    """Return side of a patch [pixels], patches that lie together along a side, and frames of a patch."""
    if isinstance(rule, NativeResolution):
        return rule.patch, rule.merge, rule.temporal
    return width // tile, 1, 1


def _no_rule(rule: Any) -> Unsupported:  # noqa: ANN401
    return Unsupported(f"pictures of the rule {type(rule).__name__} have no runtime; others have")
