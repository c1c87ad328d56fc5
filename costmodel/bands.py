"""Error bands: how far a prediction may be off, from the errors of the kinds of operators it is made of.

Errors of one kind are taken as fully correlated (a device that is slow on one matrix product is slow on all), those of
different kinds as independent; so the shares of the kinds add in quadrature, each side of the band by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from costmodel.engine import EngineProfile


def band_s(
    time_s: float, kind_s: Sequence[float], engine: EngineProfile, preprocess_s: float
) -> tuple[float, float] | None:
    """Return the band of a time [s], None when the engine states no errors.

    Parameters
    ----------
    time_s : float
        The prediction.
    kind_s : sequence of float
        Its parts by kind of operator.
    preprocess_s : float
        Its part on the host.
    """
    if engine.spread is None:
        return None
    parts = (*kind_s, preprocess_s)
    below, above = (math.hypot(*(p * e for p, e in zip(parts, side, strict=True))) for side in engine.spread)
    return max(0.0, time_s - below), time_s + above
