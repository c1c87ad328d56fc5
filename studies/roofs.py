"""The roofs over the stages of a prediction, as plain numbers: for tables and figures alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from costmodel import Prediction
from costmodel.hardware import HardwareProfile
from costmodel.stage_cost import OperatorCost, StageCost


@dataclass(frozen=True, slots=True)
class Roof:
    """The matrix rate of one number format.

    Parameters
    ----------
    name : str
        The format.
    bits : int
        Its width.
    peak_flops_per_s, ridge_flops_per_byte : float
        The rate, and the intensity from which on it is the limit.
    """

    name: str
    bits: int
    peak_flops_per_s: float
    ridge_flops_per_byte: float

    @staticmethod
    def of(hardware: HardwareProfile, bits: int) -> Roof:
        """Return the roof of matrix products of this width."""
        name = hardware.precision(bits)
        peak = hardware.peak_flops_per_s[name]
        return Roof(name, bits, peak, peak / hardware.memory_bandwidth_bytes_per_s)


def device_stages(prediction: Prediction) -> dict[str, StageCost]:
    """Return the stages that run on the device and take time."""
    return {name: stage for name, stage in prediction.stages.items() if stage.priced is not None and stage.time_s > 0}


def operator_bits(stage: StageCost) -> Mapping[str, int]:
    """Return the width of the matrix product of every operator."""
    if stage.priced is None:
        return {}
    table = stage.priced.table
    return {name: int(bits) for name, bits in zip(table.names, table.bits, strict=True)}


def stage_roof(prediction: Prediction, stage: StageCost) -> Roof | None:
    """Return the roof of the width in which most of a stage's work is done; None when it does none."""
    work: dict[int, float] = {}
    bits = operator_bits(stage)
    for operator in stage.operators:
        work[bits[operator.name]] = work.get(bits[operator.name], 0.0) + operator.flops
    widest = max(work, key=lambda width: work[width], default=None)
    return Roof.of(prediction.hardware, widest) if widest is not None and work[widest] else None


def roofs(prediction: Prediction) -> list[Roof]:
    """Return the roofs that any operator with work is under, the highest first."""
    used: set[int] = set()
    for stage in device_stages(prediction).values():
        bits = operator_bits(stage)
        used |= {bits[operator.name] for operator in stage.operators if operator.flops}
    found = [Roof.of(prediction.hardware, width) for width in used]
    return sorted(found, key=lambda roof: -roof.peak_flops_per_s)


def rate_flops_per_s(cost: OperatorCost | StageCost) -> float:
    """Return the rate that a stage or an operator reaches [FLOP/s]."""
    return cost.flops / cost.time_s if cost.time_s else 0.0
