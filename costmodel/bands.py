"""Error bands: how far a prediction may be off, from the errors of the kinds of operators it is made of.

Errors of one kind are taken as fully correlated (a device that is slow on one matrix product is slow on all), those of
different kinds as independent; so what an error of each kind moves adds in quadrature, each side of the band by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def band_s(time_s: float, below_s: Sequence[float], above_s: Sequence[float]) -> tuple[float, float]:
    """Return the band of a time [s].

    Parameters
    ----------
    time_s : float
        The prediction.
    below_s, above_s : sequence of float
        How far an error of each kind, and of the host, may move it to either side.
    """
    return max(0.0, time_s - math.hypot(*below_s)), time_s + math.hypot(*above_s)
