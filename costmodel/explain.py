"""Why a request costs what it costs, and what would have to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from costmodel.predict import Prediction


def explain(prediction: Prediction) -> list[str]:
    """Return why, one line a finding."""
    return []
