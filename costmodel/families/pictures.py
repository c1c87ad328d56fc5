"""Rules that the picture processors of several families share."""

from __future__ import annotations

import math
from typing import ClassVar

from costmodel.errors import Unsupported
from costmodel.models import MediaCost
from costmodel.workload import Video


def patches_along(picture: int, patch: int, source: str) -> int:
    """Return the whole patches along a side [pixels], of which there must be one."""
    if picture < patch:
        raise ValueError(f"{source}: image_size={picture} must hold a patch of {patch} pixels")
    return picture // patch


def nearest_grid(width: int, height: int, *, side: int, least: int = 1, most: int) -> tuple[int, int]:
    """Return the columns and rows of the grid of square tiles whose aspect ratio is nearest to a picture's.

    Among equally near ones the larger grid is taken when the picture has more than half of its pixels.

    Parameters
    ----------
    width, height : int
        Size of the picture [pixels].
    side : int
        Side of a tile [pixels].
    least, most : int
        Limits of the number of tiles.
    """
    ratio, area = width / height, width * height
    nearest, best = math.inf, (1, 1)
    for columns, rows in _grids(least, most):
        distance = abs(ratio - columns / rows)
        larger_suits = distance == nearest and area > 0.5 * side * side * columns * rows
        if distance < nearest or larger_suits:
            nearest, best = distance, (columns, rows)
    return best


def _grids(least: int, most: int) -> list[tuple[int, int]]:
    sides = range(1, most + 1)
    grids = [(c, r) for c in sides for r in range(1, most // c + 1) if c * r >= least]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def tiles_cost(
    n_tiles: int,
    *,
    side: int,
    patch: int,
    visual_tokens: int,
    marker_tokens: int = 0,
    class_token: bool = False,
    adapter_tokens: int | None = None,
    executed: MediaCost | None = None,
) -> MediaCost:
    """Return what so many equal squares are, each of which attends to itself alone.

    Parameters
    ----------
    n_tiles : int
        Squares that are encoded together.
    side, patch : int
        Sides of a square and of a patch [pixels].
    class_token : bool
        Whether each square carries one through the encoder.
    visual_tokens, marker_tokens, adapter_tokens, executed
        As in `MediaCost`, of all squares.
    """
    patches = (side // patch) ** 2
    rows = patches + class_token
    return MediaCost(
        patches=n_tiles * patches,
        rows=n_tiles * rows,
        pairs=n_tiles * rows**2,
        window_pairs=n_tiles * rows**2,
        visual_tokens=visual_tokens,
        marker_tokens=marker_tokens,
        largest_rows=n_tiles * rows,
        resized_pixels=n_tiles * side**2,
        adapter_tokens=adapter_tokens,
        executed=executed,
    )


def no_video(family: str) -> Unsupported:
    """Return the refusal of a video."""
    return Unsupported(f"{family} takes no video; give the frames as images (--image, once a frame)")


class StillsOnly:
    """The half of a media rule that refuses videos, for families that were not trained on them."""

    __slots__ = ()
    family: ClassVar[str]

    def frames(self, video: Video) -> int:
        """Refuse: the family takes no video."""
        del video
        raise no_video(self.family)

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Refuse: the family takes no video."""
        del n_frames, width, height
        raise no_video(self.family)
