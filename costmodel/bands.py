"""Error bands: how far a prediction may be off, from the errors of the kinds of operators it is made of.

Errors of one kind are taken as fully correlated (a device that is slow on one matrix product is slow on all), those of
different kinds as independent; so what an error of each kind moves adds in quadrature, each side of the band by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from costmodel.base import Array
from costmodel.engine import EngineProfile
from costmodel.kernels import PLAIN, Kernel
from costmodel.operators import Kind


def operator_bands(
    found: Sequence[Kernel | None], kinds: Sequence[int], sizes: Array, engine: EngineProfile
) -> tuple[Array, Array]:
    """Return low and high of every operator at every point, as shares of its time, shape (n_operators, n_points).

    Parameters
    ----------
    found : sequence of Kernel or None
        The curve of each operator: its errors on held-out shapes of the same size; without one, what the engine states.
    kinds : sequence of int
        Kind of each operator.
    sizes : ndarray, shape (n_operators, n_points)
        What the errors of a curve are kept apart by.
    engine : EngineProfile
        States all of its bands; see `EngineProfile.spread`.
    """
    low, high = np.zeros(sizes.shape), np.zeros(sizes.shape)
    for i, (kernel, kind) in enumerate(zip(found, kinds, strict=True)):
        if kernel is not None:
            low[i], high[i] = zip(*(kernel.band(size) for size in sizes[i].tolist()), strict=True)
        if kernel is None or kind in PLAIN:  # no product that widens its weights was fitted
            stated = engine.kind(Kind(kind))
            np.minimum(low[i], stated.low or 0.0, out=low[i])
            np.maximum(high[i], stated.high or 0.0, out=high[i])
    return low, high


class Spread(Protocol):
    """Something whose time may be off: a stage."""

    @property
    def below_s(self) -> tuple[float, ...]:
        """How far errors of each kind, of the host and of the software may shorten it [s]."""

    @property
    def above_s(self) -> tuple[float, ...]:
        """How far they may lengthen it [s]."""


def band_s(
    time_s: float, parts: Sequence[Spread], engine: EngineProfile, *, share: float = 1.0
) -> tuple[float, float] | None:
    """Return the band of a time that is made of parts [s]; None for an engine that is an idealisation, not a forecast.

    Parameters
    ----------
    time_s : float
        The prediction.
    parts : sequence of Spread
        The stages in it.
    engine : EngineProfile
        Says whether its errors are known.
    share : float
        Of the parts' time that is meant: one step of many.
    """
    if engine.spread is None:
        return None
    below = [sum(moved) * share for moved in zip(*(part.below_s for part in parts), strict=True)]
    above = [sum(moved) * share for moved in zip(*(part.above_s for part in parts), strict=True)]
    return max(0.0, time_s - math.hypot(*below)), time_s + math.hypot(*above)
