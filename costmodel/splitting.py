"""Runs of layers cut in two or more, so that techniques can treat what lies behind a layer differently."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TypeVar

from costmodel.query import KVEntry, Segment

Part = TypeVar("Part", Segment, KVEntry)


def split_at(parts: Sequence[Part], cuts: Sequence[int]) -> list[tuple[int, Part]]:
    """Return consecutive runs cut at these layers, each with the number of cuts in front of it.

    Parameters
    ----------
    parts : sequence of Segment or of KVEntry
        In the order of the layers.
    cuts : sequence of int
        Layers in front of each cut, rising.
    """
    pieces: list[tuple[int, Part]] = []
    ends = accumulate(part.n_layers for part in parts)
    for part, end in zip(parts, ends, strict=True):
        for first, last in _between(end - part.n_layers, end, cuts):
            piece = part if last - first == part.n_layers else replace(part, n_layers=last - first)
            pieces.append((bisect.bisect_right(cuts, first), piece))
    return pieces


def _between(start: int, end: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return the pieces of the layers from `start` to `end`."""
    return pairwise((start, *(cut for cut in cuts if start < cut < end), end))


def layer_number(what: str, layer: float, n_layers: int, tower: str) -> int:
    """Return how many layers lie in front of a place that is named by a number or by a share of the depth.

    Parameters
    ----------
    what : str
        Whose layer it is, in messages.
    layer : int or float
        Layers in front, from the end where negative; strictly between 0 and 1 a share of all layers.
    n_layers : int
        Layers of the tower.
    tower : str
        What has these layers, in messages.

    Raises
    ------
    ValueError
        If no layers would lie in front of or behind it.
    """
    if 0 < layer < 1:
        return min(max(round(layer * n_layers), 1), n_layers - 1)
    number = layer + n_layers if layer < 0 else layer
    if number != int(number) or not 0 < number < n_layers:
        rule = f"must lie inside the {tower}, which has {n_layers} layers"
        raise ValueError(f"{what}={layer!r} {rule}; give a layer from 1 to {n_layers - 1}, or a share of the depth")
    return int(number)
