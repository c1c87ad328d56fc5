"""Bands for a device that was not measured: as wide as the farthest device that was left out, on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from costmodel.base import Array
from runtime.fitting import Bands, Scored, quantiles

LEVELS: Final = (0.05, 0.5, 0.95)
MARGIN: Final = 1.2
"""How much farther the next device may lie, in logarithms. Chosen on train families: with it, the bands of the others
hold 80 % of those rows for all but 2 of 118 left-out devices, without it for all but 11."""
PAIR: Final = 2


def envelope(parts: Sequence[Scored], edges: tuple[float, ...], *, devices: int) -> Bands:
    """Return the band that holds an unseen device, from devices that were left out of a fit in turn.

    Each gives its 5 % and 95 % quantiles by size. An unseen device may lie as far on either side as any of them, and
    a little farther: the scatter about a device's own median is kept, the median counts with both signs. Of a pair
    of devices, the errors of one are those of the other with the signs turned, so there the scatter counts with both
    signs too.

    Parameters
    ----------
    parts : sequence of Scored
        Residuals of left-out devices.
    edges : tuple of float
        Upper ends of the ranges of sizes but the last.
    devices : int
        Devices of the group, of which some may not be among the parts.
    """
    found = widest([_either_side(quantiles(part, edges, LEVELS), pair=devices == PAIR) for part in parts])
    return Bands(found.by_size * MARGIN, found.of_all * MARGIN)


def _either_side(found: Bands, *, pair: bool) -> Bands:
    turn = _both_signs if pair else _mirrored
    return Bands(turn(found.by_size), turn(found.of_all))


def _mirrored(levels: Array) -> Array:
    """Return a band about zero from low, median and high: the scatter, moved by the median to both sides."""
    low, middle, high = np.moveaxis(levels, -1, 0)
    reach = np.abs(middle)
    return np.stack([low - middle - reach, high - middle + reach], axis=-1)


def _both_signs(levels: Array) -> Array:
    """Return the narrowest band that is symmetric about zero and holds low, median and high."""
    reach = np.abs(levels).max(axis=-1)
    return np.stack([-reach, reach], axis=-1)


def widest(bands: Sequence[Bands]) -> Bands:
    """Return the band that holds all of these, by size."""
    return Bands(
        _hull(np.stack([band.by_size for band in bands])),
        _hull(np.stack([band.of_all for band in bands])),
    )


def _hull(stacked: Array) -> Array:
    return np.stack([stacked[..., 0].min(axis=0), stacked[..., 1].max(axis=0)], axis=-1)
