"""The answer: TTFT, TPOT, memory, energy, cost, and why."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.catalogue import load_model
from costmodel.deployment import Parallelism, Precision
from costmodel.engine import EngineProfile, load_engine
from costmodel.evaluate import Evaluator, TurnTimes
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.models import ModelSpec
from costmodel.query import STAGES, Query, build_query
from costmodel.sweep import blocks, shape_of
from costmodel.techniques import Technique, compose
from costmodel.workload import Workload

if TYPE_CHECKING:
    from costmodel.memory import Memory
    from costmodel.stage_cost import StageCost

SCHEMA_VERSION = 1


def predict(
    model: str | ModelSpec,
    hardware: str | HardwareProfile,
    workload: Workload,
    *,
    techniques: Sequence[Technique] = (),
    batch: Quantity = 1.0,
    precision: Precision | None = None,
    parallelism: Parallelism | None = None,
    engine: str | EngineProfile = "fused",
) -> Prediction:
    """Predict what a request costs.

    Parameters
    ----------
    model : str or ModelSpec
        A model, or what `load_model` takes.
    hardware : str or HardwareProfile
        A device, or what `load_hardware` takes.
    workload : Workload
        What one request brings; its token counts may be arrays that broadcast.
    techniques : sequence of Technique
        Applied by place: frames first, weights last, and as given within one.
    batch : float or ndarray
        Requests that arrive and run together.
    precision : Precision, optional
        Widths of weights, activations and cache; 16 bits when not given.
    parallelism : Parallelism, optional
        Devices; one when not given.
    engine : str or EngineProfile
        What the software adds.

    Returns
    -------
    Prediction
        With arrays in the workload or the batch, TTFT, TPOT and total time are arrays and the rest is not offered.

    Raises
    ------
    LookupError
        If a name is unknown.
    ValueError
        If a value breaks a rule; `Unsupported` if something valid is not modelled.

    Examples
    --------
    >>> from costmodel import Image
    >>> p = predict("llava-1.5-7b", "a100-sxm4-80gb", Workload(images=[Image(640, 480)]), engine="ideal")
    >>> p.tokens["visual"]
    576
    """
    spec = load_model(model) if isinstance(model, str) else model
    device = load_hardware(hardware) if isinstance(hardware, str) else hardware
    profile = load_engine(engine) if isinstance(engine, str) else engine
    query = build_query(spec, workload, profile, batch=batch, precision=precision, parallelism=parallelism)
    if not techniques:
        return evaluate(query, device)
    return replace(evaluate(compose(query, techniques), device), techniques=tuple(techniques))


def evaluate(query: Query, hardware: HardwareProfile) -> Prediction:
    """Predict a query that was built, and perhaps edited, before."""
    shape = shape_of(query)
    if shape:
        return Prediction(query, hardware, *_sweep(query, hardware, shape))
    evaluator = Evaluator.of(query, hardware)
    turns = tuple(evaluator.turn(turn) for turn in query.turns)
    ttft, tpot, total = map(float, _headline(query, turns))
    return Prediction(query, hardware, ttft, tpot, total, turns, evaluator)


def _headline(query: Query, times: Iterable[TurnTimes]) -> tuple[Quantity, Quantity, Quantity]:
    """Return TTFT and TPOT of the first turn, and the expected time of all turns."""
    weighted = list(zip(query.turns, times, strict=True))
    first = weighted[0][1]
    total = sum((turn.probability * turn.repeats * t.total_s for turn, t in weighted), start=0.0)
    return first.first_token_s, first.decode_step_s, total


def _sweep(query: Query, hardware: HardwareProfile, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return TTFT, TPOT and total time of every point of a sweep."""
    result = np.empty((3, int(np.prod(shape))))
    for part, block in blocks(query, shape):
        evaluator = Evaluator.of(block, hardware, is_sweep=True)
        values = _headline(block, [evaluator.turn(turn) for turn in block.turns])
        for row, value in zip(result, values, strict=True):
            row[part] = value
    ttft, tpot, total = result.reshape(3, *shape)
    return ttft, tpot, total


@dataclass(frozen=True)
class Prediction:
    """What a request costs.

    Parameters
    ----------
    query : Query
        What was asked, resolved.
    hardware : HardwareProfile
        The device.
    ttft_s, tpot_s, total_s : float or ndarray
        Time to the first token, mean time of a further token, and time of the whole request [s].
    turns : tuple of TurnTimes
        The times of every turn, for single points.
    evaluator : Evaluator or None
        What worked them out, for single points.
    techniques : tuple of Technique
        What rewrote the query.

    Notes
    -----
    Everything else is worked out (and its module imported) when it is asked for, for single points only. Energy, CO2
    and cost are those of one request of the batch; memory is that of one device.
    """

    query: Query
    hardware: HardwareProfile
    ttft_s: Quantity
    tpot_s: Quantity
    total_s: Quantity
    turns: tuple[TurnTimes, ...] = ()
    evaluator: Evaluator | None = None
    techniques: tuple[Technique, ...] = ()

    @property
    def _evaluator(self) -> Evaluator:
        if self.evaluator is None:
            raise ValueError("a sweep has ttft_s, tpot_s and total_s alone; predict one point for more")
        return self.evaluator

    @functools.cached_property
    def stages(self) -> Mapping[str, StageCost]:
        """The stages of the first turn: preprocess, encode, adapt, prefill, decode."""
        from costmodel.stage_cost import host_stage, stage_cost

        turn = self.query.turns[0]
        evaluator, times = self._evaluator, self.turns[0]
        seconds = {
            "encode": times.encode_s,
            "adapt": times.adapt_s,
            "prefill": times.prefill_s,
            "decode": times.steps * times.decode_step_s,
        }
        found = {"preprocess": host_stage(evaluator, turn, float(times.preprocess_s))}
        for stage in STAGES[1:]:
            found[stage] = stage_cost(evaluator, stage, turn, float(seconds[stage]))
        return found

    @property
    def tokens(self) -> dict[str, int]:
        """Patches and tokens of one request: patches, visual, markers, cross, text, prompt."""
        from costmodel.counts import tokens

        return tokens(self.query)

    @functools.cached_property
    def memory(self) -> Memory:
        """Memory of one device."""
        from costmodel.memory import memory

        return memory(self.query, self.hardware, self._evaluator.structure)

    @property
    def fits(self) -> bool:
        """Whether the batch fits in what the engine may use of the device."""
        return self.memory.fits

    @functools.cached_property
    def max_batch(self) -> int:
        """Largest batch of this request that fits, 0 when not even one does."""
        from costmodel.memory import max_batch

        return max_batch(self.query, self.hardware, self._evaluator.structure)

    @property
    def n_devices(self) -> int:
        """Devices in use; a draft that works beside the target has its own."""
        draft = self.query.draft
        beside = draft.query.parallelism.devices if draft is not None and draft.parallel else 0
        return self.query.parallelism.devices + beside

    @property
    def throughput_tokens_per_s(self) -> float:
        """Output tokens of the whole batch over its time [tokens/s]."""
        return float(self.query.batch * self.query.turns[0].output_tokens / self.total_s)

    @functools.cached_property
    def stage_energy_j(self) -> dict[str, float]:
        """Energy of all devices in every stage, those that wait included, for the whole batch [J]."""
        from costmodel.energy import stage_power_w

        parallelism, engine = self.query.parallelism, self.query.engine
        joules = {}
        for name, stage in self.stages.items():
            busy_s = stage.busy_s * parallelism.busy(name)
            power = stage_power_w(self.hardware, engine, stage.share("compute"))
            joules[name] = busy_s * power + (stage.time_s * self.n_devices - busy_s) * self.hardware.idle_w
        return joules

    @functools.cached_property
    def energy_j(self) -> float:
        """Energy of all devices, those that wait included, for one request of the batch [J]."""
        return sum(self.stage_energy_j.values()) / float(self.query.batch)

    @property
    def co2_g(self) -> float:
        """CO2 of that energy [g]."""
        from costmodel.energy import co2_g

        return co2_g(self.energy_j, self.query.engine)

    @property
    def cost_usd(self) -> float | None:
        """List price of the devices' time for one request of the batch [USD]; None where no price is known."""
        from costmodel.economics import cost_usd

        seconds = float(self.total_s) * self.n_devices / float(self.query.batch)
        return cost_usd(self.hardware, device_seconds=seconds)

    @functools.cached_property
    def error_band(self) -> dict[str, tuple[float, float]] | None:
        """Band of TTFT and TPOT [s]; None for an engine that is an idealisation, not a forecast."""
        from costmodel.bands import band_s

        stages, engine = self.stages, self.query.engine
        ttft = band_s(float(self.ttft_s), [stages[name] for name in STAGES[:-1]], engine)
        a_step = 1 / max(float(self.turns[0].steps), 1.0)
        tpot = band_s(float(self.tpot_s), [stages["decode"]], engine, share=a_step)
        return None if ttft is None or tpot is None else {"ttft_s": ttft, "tpot_s": tpot}

    @property
    def quality(self) -> dict[str, Any] | None:
        """Share of the model's quality that techniques keep, as far as it was published; None without techniques."""
        from costmodel.quality import quality_dict

        return quality_dict(self.techniques)

    @property
    def provenance(self) -> dict[str, dict[str, list[str]]]:
        """Which numbers of device and engine were measured, read from a datasheet, derived or assumed.

        Under `kernels` stand the fitted curves in use: measured on this chip, or derived from others.
        """
        owners = {"hardware": self.hardware.provenance, "engine": self.query.engine.provenance}
        found: dict[str, dict[str, list[str]]] = {
            owner: {kind: list(keys) for kind, keys in kinds.items()} for owner, kinds in owners.items()
        }
        kernels: dict[str, list[str]] = {}
        curves = {kernel for stage in STAGES[1:] for kernel in self._evaluator.priced(stage).found if kernel}
        for kernel in sorted(curves, key=lambda one: (one.is_shared, one.name)):
            kernels.setdefault("derived" if kernel.is_shared else "measured", []).append(kernel.name)
        return {**found, "kernels": kernels}

    def why(self) -> list[str]:
        """Return why it costs that, one line a finding: see `costmodel.explain`."""
        from costmodel.explain import explain

        return explain(self)

    def as_dict(self) -> dict[str, Any]:
        """Return everything under the names of the JSON interface."""
        from costmodel.report import prediction_dict

        return prediction_dict(self)
