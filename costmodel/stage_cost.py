"""What a stage costs in detail: work, traffic, intensity, the roof that binds, and its operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from costmodel.bands import operator_bands
from costmodel.base import Array
from costmodel.evaluate import Evaluator, pixel_copy_bytes
from costmodel.operators import ACTIVATION, FLOPS, KV, LINK, WEIGHT, Kind, Operator, OperatorTable
from costmodel.priced import OperatorTimes
from costmodel.query import Stage, Turn
from costmodel.roofline import ROOFS
from costmodel.stages import WORKS
from costmodel.sums import Points

Bound = Literal["compute", "memory", "link", "start", "host", "none"]
N_KINDS = len(Kind)
N_SOURCES = N_KINDS + 2
"""Sources of error: every kind of operator, the host, and the software as a whole."""


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """One operator of a stage, all repeats.

    Parameters
    ----------
    name, kind : str
    time_s, compute_s, memory_s : float
        Its time, and the time under two of its roofs [s].
    flops, bytes : float
        Its work [FLOP] and memory traffic [bytes].
    bound : str
        The roof that binds it.
    """

    name: str
    kind: str
    time_s: float
    compute_s: float
    memory_s: float
    flops: float
    bytes: float
    bound: Bound

    @property
    def intensity_flops_per_byte(self) -> float:
        """Work over traffic [FLOP/byte]."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """The operators of a stage with their times, as columns.

    Parameters
    ----------
    table : OperatorTable
    sums : ndarray, shape (n_sums,)
        Sums of all points together.
    roofs_s : ndarray, shape (n_roofs, n_operators)
        Seconds under each roof.
    busy_s, start_s : ndarray, shape (n_operators,)
        Seconds at the binding roof, and of kernel starts.
    """

    table: OperatorTable
    sums: Array
    roofs_s: Array
    busy_s: Array
    start_s: Array

    def costs(self) -> tuple[OperatorCost, ...]:
        """Return every operator, dearest first; those of equal layers stand under one name."""
        work = self.table.columns(self.sums) * self.table.repeats
        traffic = work[WEIGHT] + work[ACTIVATION] + work[KV]
        bounds = [ROOFS[i] for i in self.roofs_s.argmax(axis=0)]
        costs = [
            OperatorCost(
                name=name,
                kind=Kind(int(self.table.kinds[i])).label,
                time_s=float(self.busy_s[i] + self.start_s[i]),
                compute_s=float(self.roofs_s[0, i]),
                memory_s=float(self.roofs_s[1, i]),
                flops=float(work[FLOPS, i]),
                bytes=float(traffic[i]),
                bound="start" if self.start_s[i] > self.busy_s[i] else bounds[i],
            )
            for i, name in enumerate(self.table.names)
        ]
        return tuple(sorted(costs, key=lambda cost: -cost.time_s))


@dataclass(frozen=True, eq=False)
class StageCost:
    """One stage of one turn.

    Parameters
    ----------
    time_s : float
        Its time; of decode, all steps together [s].
    flops, weight_bytes, activation_bytes, kv_bytes, link_bytes : float
        Its work [FLOP] and traffic on one device [bytes].
    shares : tuple of (str, float)
        Share of its time by what binds it, the largest first.
    kind_s : tuple of float
        Its time by kind of operator [s].
    below_s, above_s : tuple of float
        How far errors of each kind, of the host, and of the software as a whole may move it to either side [s].
    busy_s : float
        Its time if no two pipeline stages worked at once: what one stage of devices is busy for, stages added [s].
    step_time_s : tuple of float
        Of decode: the first, the middle and the last step [s].
    priced : Priced or None
        Its operators.
    drafts : tuple of StageCost
        The part of a draft in it.
    """

    time_s: float
    flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    kv_bytes: float = 0.0
    link_bytes: float = 0.0
    shares: tuple[tuple[Bound, float], ...] = (("none", 1.0),)
    kind_s: tuple[float, ...] = (0.0,) * N_KINDS
    below_s: tuple[float, ...] = (0.0,) * N_SOURCES
    above_s: tuple[float, ...] = (0.0,) * N_SOURCES
    busy_s: float = 0.0
    step_time_s: tuple[float, ...] = ()
    priced: Priced | None = None
    drafts: tuple[StageCost, ...] = ()

    @property
    def bound(self) -> Bound:
        """What most of its time is spent on: a roof, the start of kernels, or the host."""
        return self.shares[0][0]

    @property
    def bytes(self) -> float:
        """Traffic of device memory [bytes]."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    @property
    def intensity_flops_per_byte(self) -> float:
        """Work over memory traffic [FLOP/byte]."""
        return self.flops / self.bytes if self.bytes else 0.0

    def share(self, bound: Bound) -> float:
        """Return the share of the stage's time that this roof binds."""
        return dict(self.shares).get(bound, 0.0)

    @functools.cached_property
    def operators(self) -> tuple[OperatorCost, ...]:
        """Its operators, dearest first."""
        own = self.priced.costs() if self.priced else ()
        drafts = [replace(o, name=f"draft.{o.name}") for draft in self.drafts for o in draft.operators]
        return tuple(sorted((*own, *drafts), key=lambda cost: -cost.time_s)) if drafts else own


def host_stage(evaluator: Evaluator, turn: Turn, time_s: float) -> StageCost:
    """Return preprocessing as a stage: the host binds it, its traffic is the copy of the pixels."""
    if not time_s:
        return StageCost(0.0)
    copied, cost = float(pixel_copy_bytes(evaluator.query, turn)), evaluator.query.engine.preprocessing
    below_s, above_s = ((0.0,) * N_KINDS + (time_s * (side or 0.0), 0.0) for side in (cost.low, cost.high))
    return StageCost(time_s, activation_bytes=copied, shares=(("host", 1.0),), below_s=below_s, above_s=above_s)


def stage_cost(evaluator: Evaluator, stage: Stage, turn: Turn, time_s: float) -> StageCost:
    """Return a stage that runs on the device, a draft's part in it included.

    Parameters
    ----------
    time_s : float
        Its time as the headline has it, host and techniques included [s].
    """
    draft, drafting = evaluator.query.draft, evaluator.drafting
    if draft is None or drafting is None:
        return own_cost(evaluator, stage, turn, time_s)
    from costmodel.drafted import drafted_cost  # it needs this module

    return drafted_cost(evaluator, stage, turn, time_s)


def own_cost(evaluator: Evaluator, stage: Stage, turn: Turn, time_s: float) -> StageCost:
    """Return a stage without a draft's part in it; of decode, as if every token were a step.

    Parameters
    ----------
    time_s : float
        Its time as the headline has it, host and techniques included [s].
    """
    table = evaluator.table(stage)
    if not table.names:
        return StageCost(0.0)
    points = evaluator.points(stage, turn)
    counts, runs = (np.array([float(number) for number in numbers]) for numbers in (points.counts, points.runs))
    times = evaluator.priced(stage).operators_s(points.sums)
    weighted = points.sums @ runs
    priced = Priced(table, weighted, times.roofs_s @ counts, times.busy_s @ counts, times.start_s @ counts)
    operators_s = times.busy_s + times.start_s
    totals = table.totals @ weighted
    kind_s = np.bincount(table.kinds, weights=priced.busy_s + priced.start_s, minlength=N_KINDS)
    n_runs = float(counts[-1]) if stage == "decode" else 1.0
    added = [(operator, seconds * n_runs) for operator, seconds in evaluator.overheads(stage)]
    for operator, seconds in added:
        totals += np.array(operator.columns, dtype=float) * (operator.repeats * n_runs)
        kind_s[operator.kind] += seconds
    below_s, above_s = _spread(evaluator, stage, points, times, added=[(o.kind, s) for o, s in added], total_s=time_s)
    return StageCost(
        time_s=time_s,
        flops=float(totals[FLOPS]),
        weight_bytes=float(totals[WEIGHT]),
        activation_bytes=float(totals[ACTIVATION]),
        kv_bytes=float(totals[KV]),
        link_bytes=float(totals[LINK]),
        shares=_shares(priced, added, evaluator, time_s),
        busy_s=float(operators_s.sum(axis=0) @ runs) * evaluator.n_stages(stage) + sum(s for _, s in added),
        kind_s=tuple(kind_s.tolist()),
        below_s=below_s,
        above_s=above_s,
        step_time_s=_step_times(evaluator, points, operators_s) if stage == "decode" else (),
        priced=priced,
    )


def _spread(
    evaluator: Evaluator,
    stage: Stage,
    points: Points,
    times: OperatorTimes,
    *,
    added: Sequence[tuple[Kind, float]],
    total_s: float,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return how far errors of every kind, of the host and of the software may move a stage to either side [s].

    Where the host issues kernels more slowly than the device runs them, the device's errors move nothing but what the
    cache adds to the host's time.
    """
    engine, priced = evaluator.query.engine, evaluator.priced(stage)
    counts = np.array([float(count) for count in points.counts])
    operators_s, floor = times.busy_s + times.start_s, evaluator.host_floor_s(stage, points)
    device_s = operators_s.sum(axis=0)
    beyond = _beyond_host(evaluator, stage)
    beyond_s = operators_s[beyond].sum(axis=0)
    waits = counts if floor is None else counts * (floor <= device_s - beyond_s)
    each_waits = np.where(beyond[:, None], counts, waits)
    flat = np.bincount([kind for kind, _ in added], weights=[s for _, s in added], minlength=N_KINDS)
    host_s = max(total_s - float((operators_s * each_waits).sum()) - float(flat.sum()), 0.0)
    sides = []
    bands = operator_bands(priced.found, priced.table.kinds.tolist(), times.sizes, engine)
    for band, name in zip(bands, ("low", "high"), strict=True):
        host, software = (getattr(engine, f"{owner}_{name}") or 0.0 for owner in ("host", "software"))
        moved = np.bincount(
            priced.table.kinds, weights=(operators_s * band * each_waits).sum(axis=1), minlength=N_KINDS
        )
        stated = [getattr(engine.kind(kind), name) or 0.0 for kind in Kind]
        on_device_s = total_s - host_s
        sides.append((*(moved + flat * stated).tolist(), host_s * host, on_device_s * software))
    return sides[0], sides[1]


def _beyond_host(evaluator: Evaluator, stage: Stage) -> NDArray[np.bool_]:
    """Return which operators of a stage do not hide behind the host, shape (n_operators,)."""
    table = evaluator.table(stage)
    return table.driven_by(WORKS) if evaluator.adds_to_host(stage) else np.zeros(len(table.names), dtype=bool)


def _shares(
    priced: Priced, added: Sequence[tuple[Operator, float]], evaluator: Evaluator, total_s: float
) -> tuple[tuple[Bound, float], ...]:
    """Return the share of a stage's time by what binds it; what no operator explains is the host's."""
    times: dict[Bound, float] = dict.fromkeys(ROOFS, 0.0)
    for roof, seconds in zip(priced.roofs_s.argmax(axis=0).tolist(), priced.busy_s.tolist(), strict=True):
        times[ROOFS[roof]] += seconds
    times["start"] = float(priced.start_s.sum())
    for operator, seconds in added:
        times[evaluator.bound(operator)] += seconds
    times["host"] = total_s - sum(times.values())
    ranked = sorted(times.items(), key=lambda item: -item[1])
    least = 1e-9 * total_s  # what is left of rounding is no host time
    return tuple((bound, seconds / total_s) for bound, seconds in ranked if seconds > least) or (("none", 1.0),)


def _step_times(evaluator: Evaluator, points: Points, operators_s: Array) -> tuple[float, ...]:
    """Return the first, the middle and the last step [s]."""
    host_s = float(evaluator.overhead_s("decode", evaluator.query.turns[0]) + evaluator.host_s("decode"))
    floor = evaluator.host_floor_s("decode", points)
    steps_s = operators_s.sum(axis=0)
    if floor is not None:
        beyond_s = operators_s[_beyond_host(evaluator, "decode")].sum(axis=0)
        steps_s = np.maximum(steps_s - beyond_s, floor) + beyond_s
    return tuple((steps_s[:3] + host_s).tolist())
