"""What a stage costs in detail: work, traffic, intensity, the roof that binds, and its operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from costmodel.base import Array
from costmodel.evaluate import Evaluator, pixel_copy_bytes
from costmodel.operators import ACTIVATION, FLOPS, KV, LINK, WEIGHT, Kind, OperatorTable
from costmodel.query import Stage, Turn
from costmodel.roofline import ROOFS

Bound = Literal["compute", "memory", "link", "start", "host", "none"]
N_KINDS = len(Kind)


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
class StageCost:
    """One stage of one turn.

    Parameters
    ----------
    time_s : float
        Its time; of decode, all steps together [s].
    flops, weight_bytes, activation_bytes, kv_bytes, link_bytes : float
        Its work [FLOP] and traffic on one device [bytes].
    bound : str
        What most of its time is spent on: a roof, the start of kernels, or the host.
    shares : dict
        Share of its time by what binds.
    kind_s : ndarray, shape (n_kinds,)
        Its time by kind of operator [s].
    step_time_s : tuple of float
        Of decode: the first, the middle and the last step [s].
    operators : tuple of OperatorCost
        Its operators, dearest first.
    """

    time_s: float
    flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    kv_bytes: float = 0.0
    link_bytes: float = 0.0
    bound: Bound = "none"
    shares: tuple[tuple[Bound, float], ...] = ()
    kind_s: tuple[float, ...] = (0.0,) * N_KINDS
    step_time_s: tuple[float, ...] = ()
    operators: tuple[OperatorCost, ...] = ()

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


def host_stage(evaluator: Evaluator, turn: Turn, time_s: float) -> StageCost:
    """Return preprocessing as a stage: the host binds it, its traffic is the copy of the pixels."""
    if not time_s:
        return StageCost(0.0)
    copied = float(pixel_copy_bytes(evaluator.query, turn))
    return StageCost(time_s, activation_bytes=copied, bound="host", shares=(("host", 1.0),))


def stage_cost(evaluator: Evaluator, stage: Stage, turn: Turn, time_s: float) -> StageCost:
    """Return a stage that runs on the device.

    Parameters
    ----------
    time_s : float
        Its time as the headline has it, host and techniques included [s].
    """
    points = evaluator.points(stage, turn, detailed=stage == "decode")
    counts = np.array([float(np.squeeze(count)) for count in points.counts])
    priced = evaluator.priced(stage)
    roofs, starts = priced.operators_s(points.sums)
    if not roofs.shape[1]:
        return StageCost(0.0)
    work = evaluator.table(stage).columns(points.sums) @ counts * priced.table.repeats
    by_roof = _by_roof(roofs, starts, counts)
    shares = _shares({**by_roof, "host": time_s - sum(by_roof.values())}, time_s)
    operators = _operators(priced.table, roofs, starts, counts, work)
    return StageCost(
        time_s=time_s,
        flops=float(work[FLOPS].sum()),
        weight_bytes=float(work[WEIGHT].sum()),
        activation_bytes=float(work[ACTIVATION].sum()),
        kv_bytes=float(work[KV].sum()),
        link_bytes=float(work[LINK].sum()),
        bound=shares[0][0],
        shares=shares,
        kind_s=_by_kind(priced.table, (roofs.max(axis=0) + starts) @ counts),
        step_time_s=_step_times(evaluator, roofs, starts) if stage == "decode" else (),
        operators=operators,
    )


def _by_kind(table: OperatorTable, busy_s: Array) -> tuple[float, ...]:
    return tuple(np.bincount(table.kinds, weights=busy_s, minlength=N_KINDS).tolist())


def _by_roof(roofs: Array, starts: Array, counts: Array) -> dict[Bound, float]:
    """Return the time spent at each roof, and on starting kernels [s]."""
    binding = roofs.argmax(axis=0)
    highest = roofs.max(axis=0) * counts
    times: dict[Bound, float] = {}
    for i, roof in enumerate(ROOFS[: len(roofs)]):
        times[roof] = float(highest[binding == i].sum())
    times["start"] = float((starts @ counts).sum())
    return times


def _shares(times: dict[Bound, float], total_s: float) -> tuple[tuple[Bound, float], ...]:
    ranked = sorted(times.items(), key=lambda item: -item[1])
    least = 1e-9 * total_s  # what is left of rounding is no host time
    return tuple((bound, seconds / total_s) for bound, seconds in ranked if seconds > least) or (("none", 1.0),)


def _step_times(evaluator: Evaluator, roofs: Array, starts: Array) -> tuple[float, ...]:
    """Return the first, the middle and the last step [s]."""
    host_s = float(np.squeeze(evaluator.overhead_s("decode"))) + evaluator.query.engine.step_host_s
    return tuple(((roofs.max(axis=0) + starts).sum(axis=0)[:3] + host_s).tolist())


def _operators(
    table: OperatorTable, roofs: Array, starts: Array, counts: Array, work: Array
) -> tuple[OperatorCost, ...]:
    """Return every operator, dearest first; those of equal layers stand under one name."""
    under = roofs @ counts
    busy, start = (roofs.max(axis=0) @ counts).tolist(), (starts @ counts).tolist()
    binding = under.argmax(axis=0).tolist()
    traffic = (work[WEIGHT] + work[ACTIVATION] + work[KV]).tolist()
    flops, compute, memory = work[FLOPS].tolist(), under[0].tolist(), under[1].tolist()
    costs = [
        OperatorCost(
            name,
            Kind(int(table.kinds[i])).label,
            busy[i] + start[i],
            compute[i],
            memory[i],
            flops[i],
            traffic[i],
            "start" if start[i] > busy[i] else ROOFS[binding[i]],
        )
        for i, name in enumerate(table.names)
    ]
    return tuple(sorted(costs, key=lambda cost: -cost.time_s))
