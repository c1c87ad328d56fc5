"""Dealing out whole pieces of work over equal devices."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeVar

Piece = TypeVar("Piece")


def busiest(pieces: Sequence[Piece], copies: int, loads: Sequence[float]) -> Sequence[Piece]:
    """Return what the copy with most to do gets when pieces are dealt out, the longest first, to who has least.

    Parameters
    ----------
    pieces : sequence
    copies : int
        Those who work at the same time.
    loads : sequence of float
        Of each piece.
    """
    if copies == 1:
        return pieces
    hands: list[tuple[float, int, list[int]]] = [(0.0, i, []) for i in range(copies)]
    for index in sorted(range(len(pieces)), key=lambda index: -loads[index]):
        load, i, own = hands[0]
        heapq.heapreplace(hands, (load + loads[index], i, [*own, index]))
    return [pieces[index] for index in max(hands)[2]]
