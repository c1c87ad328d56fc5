"""Which rows the experts of a benchmark got: the balanced rule, and the power law that aiconfigurator draws from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from costmodel.efficiency import Routing

DRAWS: Final = 4
"""The benchmark drew once and did not keep it; the mean over a few draws stands for it."""
TOP_SHARE: Final = 0.8
"""Largest number of tokens of one expert, as a share of all, before the numbers are scaled to their sum."""
FEW: Final = (0.01, 2.0)
"""Bounds of the law when there are fewer rows than experts."""


def routing_of(work: Mapping[str, NDArray[Any]], *, seed: int = 0) -> Routing:
    """Return the rows of the experts of the busiest device of every measured shape.

    Parameters
    ----------
    work : mapping
        Columns tokens, top_k, experts, ep and routing (`balanced` or `power_law_<exponent>`).
    seed : int
        Of the draws.
    """
    balanced = Routing.balanced(
        work["tokens"], top_k=work["top_k"], experts=work["experts"], expert_shares=work["ep"].astype(float)
    )
    rows, active, tiles = balanced.rows.copy(), balanced.active.copy(), balanced.tiles.copy()
    law = np.array([str(name).rpartition("_")[2] for name in work["routing"]])
    uneven = np.flatnonzero(law != "balanced")
    for experts in np.unique(work["experts"][uneven]).tolist():
        chosen = uneven[work["experts"][uneven] == experts]
        some = {key: work[key][chosen] for key in ("tokens", "top_k", "ep")}
        draws = [_draw(some, law[chosen].astype(float), experts, seed + i) for i in range(DRAWS)]
        rows[chosen] = np.mean([draw.rows for draw in draws], axis=0)
        active[chosen] = np.mean([draw.active for draw in draws], axis=0)
        tiles[chosen] = np.mean([draw.tiles for draw in draws], axis=0)
    return Routing(np.maximum(rows, 1.0), np.maximum(active, 1.0), np.maximum(tiles, 1.0))


def _draw(work: Mapping[str, NDArray[Any]], exponent: Array, experts: int, seed: int) -> Routing:
    """Return one draw for shapes with the same number of experts."""
    total = (work["tokens"] * work["top_k"]).astype(float)
    many = total > experts
    lowest = np.where(many, 1.0, FEW[0])
    highest = np.where(many, np.maximum(TOP_SHARE * work["tokens"], 1.0 + 1e-9), FEW[1])
    power = 1 - exponent
    uniform = np.random.default_rng(seed).random((len(total), experts))
    bounds = lowest**power, highest**power
    values = (bounds[0][:, None] + (bounds[1] - bounds[0])[:, None] * uniform) ** (1 / power)[:, None]
    counts = np.round(values / values.sum(axis=1, keepdims=True) * total[:, None])
    counts = _corrected(counts, total)
    return Routing.of(_busiest(counts, work["ep"]))


def _corrected(counts: Array, total: Array) -> Array:
    """Give or take single rows, the largest experts first, until the sum is right."""
    missing = (total - counts.sum(axis=1)).astype(int)
    rank = np.argsort(np.argsort(-counts, axis=1, kind="stable"), axis=1, kind="stable")
    change = np.sign(missing)[:, None] * (rank < np.abs(missing)[:, None])
    result: Array = np.maximum(counts + change, 0.0)
    return result


def _busiest(counts: Array, shares: NDArray[Any]) -> Array:
    """Return the experts of the device with most rows, the others' set to zero."""
    experts = counts.shape[1]
    owner = np.arange(experts)[None, :] * shares[:, None] // experts
    loads = np.zeros((len(counts), int(shares.max())))
    np.add.at(loads, (np.arange(len(counts))[:, None], owner), counts)
    result: Array = np.where(owner == loads.argmax(axis=1)[:, None], counts, 0.0)
    return result
