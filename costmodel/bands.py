"""Error bands: how far a prediction may be off, from the errors of the kinds of operators it is made of.

Errors of one kind are taken as fully correlated (a device that is slow on one matrix product is slow on all), those of
different kinds as independent; so the shares of the kinds add in quadrature, each side of the band by itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from costmodel.engine import EngineProfile


def band_s(time_s: float, kind_s: ArrayLike, engine: EngineProfile, preprocess_s: float) -> tuple[float, float] | None:
    """Return the band of a time [s], None when the engine states no errors.

    Parameters
    ----------
    time_s : float
        The prediction.
    kind_s : array_like, shape (n_kinds,)
        Its parts by kind of operator.
    preprocess_s : float
        Its part on the host.
    """
    spread = engine.by_kind[3:]
    if np.isnan(spread).any():
        return None
    host = engine.preprocessing
    low = np.append(spread[0], host.low or 0.0)
    high = np.append(spread[1], host.high or 0.0)
    parts = np.append(kind_s, preprocess_s)
    below, above = np.sqrt(np.sum((parts * low) ** 2)), np.sqrt(np.sum((parts * high) ** 2))
    return max(0.0, float(time_s - below)), float(time_s + above)
