"""Plots of a simulated run: how latencies are spread, and what waits and runs over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from costmodel.base import Array
from simulator import Pool, Trace

FORMATS: Final = (".svg", ".png", ".pdf")
POINTS: Final = 2000
"""Points of a curve; more cannot be told apart."""


def draw(trace: Trace, path: str | Path) -> None:
    """Write four panels: latencies, gaps between tokens, requests over time, blocks over time."""
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"--plot {str(path)!r} must end in one of {', '.join(FORMATS)}")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    done = trace.finished
    for name, values in (("TTFT", trace.ttft_s), ("end to end", trace.e2e_s)):
        _cumulative(axes[0][0], values[done], None, name)
    _cumulative(axes[0][1], trace.tpot_s[done], None, "TPOT")
    _cumulative(axes[0][1], *trace.itl, "ITL")
    for axis, title in zip(axes[0], ("requests", "tokens"), strict=True):
        axis.set(xscale="log", xlabel="seconds", ylabel=f"share of {title}", ylim=(0, 1))
        axis.legend()
    for place, one in enumerate(trace.pools):
        for nth, steps in enumerate(trace.steps_of(one)):
            _over_time(axes[1], steps, one.pool, colour=f"C{place}", named=not nth)
    axes[1][0].set(xlabel="seconds", ylabel="requests")
    axes[1][1].set(xlabel="seconds", ylabel="blocks in use", ylim=(0, None))
    for blocks in {one.limits.kv_blocks for one in trace.pools if one.pool.runs("prefill") or one.pool.runs("decode")}:
        axes[1][1].axhline(blocks, linestyle=":", color="grey", label="all blocks")
    for axis in axes[1]:
        axis.legend()
    figure.savefig(path)
    plt.close(figure)


def _over_time(axes: Any, steps: Mapping[str, Array], pool: Pool, *, colour: str, named: bool) -> None:  # noqa: ANN401
    """Draw what waits and runs at one worker, and its blocks; workers of a pool share a colour and a label."""
    ends = steps["end_s"]
    pick = np.unique(np.linspace(0, max(len(ends) - 1, 0), POINTS).astype(int))[: len(ends)]
    workers = f"{pool.replicas} x {pool.name}"
    for name, line in (("waiting", "--"), ("running", "-")):
        label = f"{name}, {workers}" if named else None
        axes[0].plot(ends[pick], steps[name][pick], line, color=colour, label=label, linewidth=0.8)
    if pool.runs("prefill") or pool.runs("decode"):
        label = workers if named else None
        axes[1].plot(ends[pick], steps["kv_used_blocks"][pick], color=colour, label=label, linewidth=0.8)


def _cumulative(axis: Any, values: Array, weights: Array | None, name: str) -> None:  # noqa: ANN401 - matplotlib's
    known = ~np.isnan(values)
    counts = np.ones(int(known.sum())) if weights is None else weights[known]
    order = np.argsort(values[known])
    if not len(order):
        return
    reached = np.cumsum(counts[order]) / counts.sum()
    pick = np.unique(np.linspace(0, len(order) - 1, POINTS).astype(int))
    axis.plot(values[known][order][pick], reached[pick], label=name)
