"""Fitted curves against held-out kernels, by device and kind."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from studies.validation.operators import fits_of, load_scored
from studies.validation.rows import Suite, pooled

TITLE: Final = "fitted curves against held-out kernels"
NOTE: Final = (
    "Families of shapes that no fit has seen; errors as the fitted files state them, or recomputed with --data. "
    "Groups are pooled by rows, so they have no median."
)


def evaluate(data: Path | None = None) -> Suite:
    """Return the errors of every fit; given raw tables, recomputed on them."""
    fits = fits_of(load_scored(data))
    names = dict.fromkeys(f"{fit.device} {fit.kind}" for fit in fits)
    groups = {name: pooled(fit.errors for fit in fits if f"{fit.device} {fit.kind}" == name) for name in names}
    return Suite("operators", TITLE, fits=tuple(fits), groups=groups, note=NOTE)
