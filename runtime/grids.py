"""Grids of patches as index arrays: their order, rows and columns, which attend to each other, learned positions.

Patches of pictures that keep their own grid lie in memory merged block by merged block, as the processors write them;
those of tiles lie row by row, which is the same with blocks of one patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array

Grid = tuple[int, int, int]
"""Slices in time, rows and columns of an item [patches]."""
Runs = tuple[tuple[int, int], ...]
"""Segments that attend to themselves alone, equal neighbours together: (how many, rows of each)."""
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the patches of all items lie.

    Parameters
    ----------
    order : ndarray of int or None
        The patch that stands at each place while layers run: window by window; None where no layer has windows.
    slices, windows : tuple of (int, int)
        What attends to itself in layers over whole slices, and in layers with windows.
    rows, columns : ndarray of int
        Of every patch in its item, as the patches arrive.
    """

    order: Indices | None
    slices: Runs
    windows: Runs
    rows: Indices
    columns: Indices


def layout(grids: Sequence[Grid], *, merge: int, window: int = 0, extra: int = 0) -> Layout:
    """Return where the patches of items lie.

    Parameters
    ----------
    grids : sequence of (int, int, int)
        One an item.
    merge : int
        Side of a merged block [patches].
    window : int
        Side of a window [merged blocks]; 0 where no layer has windows.
    extra : int
        Rows of a slice beyond its patches, such as a class token.
    """
    places = [_places(h, w, merge) for t, h, w in grids for _ in range(t)]
    sizes = [h * w + extra for t, h, w in grids for _ in range(t)]
    slices = _runs(sizes)
    columns = np.concatenate([column for _, column in places])
    rows = np.concatenate([row for row, _ in places])
    if not window:
        return Layout(None, slices, slices, rows, columns)
    orders, lengths, start = [], [], 0
    for t, h, w in grids:
        blocks, sizes = _windows(h // merge, w // merge, window)
        for _ in range(t):
            orders.append(blocks + start)
            lengths.extend(sizes)
            start += len(blocks)
    inside = np.arange(merge**2)
    order = (np.concatenate(orders)[:, None] * merge**2 + inside).ravel()
    return Layout(order, slices, _runs([size * merge**2 for size in lengths]), rows, columns)


def _places(height: int, width: int, merge: int) -> tuple[Indices, Indices]:
    """Return row and column of every patch of a slice, merged block by merged block."""
    rows, columns = np.indices((height, width))

    def blocked(index: Indices) -> Indices:
        shape = (height // merge, merge, width // merge, merge)
        return index.reshape(shape).transpose(0, 2, 1, 3).ravel()

    return blocked(rows), blocked(columns)


def _windows(height: int, width: int, window: int) -> tuple[Indices, list[int]]:
    """Return the blocks of a slice window by window and the sizes of these, the largest first.

    Where windows stand does not change what they give, so equal ones are put together: they run as one batch.
    """
    blocks = np.arange(height * width).reshape(height, width)
    cut = [
        blocks[top : top + window, left : left + window].ravel()
        for top in range(0, height, window)
        for left in range(0, width, window)
    ]
    cut.sort(key=len, reverse=True)
    return np.concatenate(cut), [len(part) for part in cut]


def _runs(sizes: Sequence[int]) -> Runs:
    return tuple((len(list(equal)), size) for size, equal in groupby(sizes))


def stretched(places: Layout, grids: Sequence[Grid], side: int) -> tuple[Indices, Array]:
    """Return the four learned positions that each patch lies between, and the weight of each.

    The corners of a picture lie on the corners of the square of learned positions.

    Parameters
    ----------
    places : Layout
        Of the patches.
    grids : sequence of (int, int, int)
    side : int
        Side of the square [positions].
    """
    counts = [t * h * w for t, h, w in grids]
    heights, widths = (np.repeat([grid[axis] for grid in grids], counts) for axis in (1, 2))
    top, bottom, down = _between(places.rows, heights, side)
    left, right, across = _between(places.columns, widths, side)
    corners = [(top, left), (top, right), (bottom, left), (bottom, right)]
    shares = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]
    indices = np.stack([row * side + column for row, column in corners], axis=-1)
    return indices, np.stack(shares, axis=-1)


def _between(index: Indices, length: Indices, side: int) -> tuple[Indices, Indices, NDArray[Any]]:
    place = index * (side - 1) / np.maximum(length - 1, 1)
    low = np.floor(place).astype(np.int64)
    return low, np.minimum(low + 1, side - 1), place - low
