"""Techniques together: what each does alone, what all do, and why that is not the product.

A factor is how many times better a number gets: less time, memory or energy, a larger batch. The product of the
factors of all techniques alone is what one would have guessed. Where together they reach less, something that none of
them touches is left standing, or two of them save the same thing twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from costmodel.hardware import HardwareProfile
from costmodel.memory import memory
from costmodel.predict import Prediction, evaluate
from costmodel.query import STAGES, Query, Stage
from costmodel.sums import decode_steps
from costmodel.techniques import Technique, compose

Metric: TypeAlias = Literal["ttft_s", "tpot_s", "peak_bytes", "max_batch", "energy_j"]
METRICS: Final[tuple[Metric, ...]] = ("ttft_s", "tpot_s", "peak_bytes", "max_batch", "energy_j")
MORE_IS_BETTER: Final = frozenset({"max_batch"})
HOST: Final = "host"
"""What of a stage no operator explains."""
OVERLAP: Final = "overlap"
"""What of its operators a stage does not wait for."""
NOTHING: Final = "nothing"
"""What explains a product that is reached."""
ROUNDING: Final = 1e-9
"""Share of a number below which a difference is rounding."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What most of a number is spent on.

    Parameters
    ----------
    part : str
        The stage that leads, or the part of memory.
    bound : str
        What binds the stage; "" for memory.
    operator : str
        The dearest operator of the stage; "" for memory.
    """

    part: str
    bound: str = ""
    operator: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it under the names of the JSON interface."""
        return {"part": self.part, "bound": self.bound, "operator": self.operator}


@dataclass(frozen=True, slots=True)
class Interaction:
    """One number of a request without, with each, and with all techniques.

    Parameters
    ----------
    metric : str
        Which number.
    plain, together : float
        Without any, and with all.
    alone : tuple of float
        With each.
    factors : tuple of float
        How many times better each makes it.
    guessed, reached : float
        The product of the factors, and how many times better all make it.
    explained_by : str
        The operator, stage or part of memory that makes most of the difference.
    """

    metric: Metric
    plain: float
    alone: tuple[float, ...]
    together: float
    factors: tuple[float, ...]
    guessed: float
    reached: float
    explained_by: str

    @property
    def surplus(self) -> float:
        """What is reached over what was guessed, less one: above zero a surplus, below a deficit."""
        return self.reached / self.guessed - 1.0 if self.guessed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it under the names of the JSON interface; what is no number is None."""
        numbers = {name: getattr(self, name) for name in ("plain", "together", "guessed", "reached", "surplus")}
        lists = {name: [_finite(value) for value in getattr(self, name)] for name in ("alone", "factors")}
        return {name: _finite(value) for name, value in numbers.items()} | lists | {"explained_by": self.explained_by}


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """A request without, with each, and with all techniques.

    Parameters
    ----------
    names : tuple of str
        The techniques, in the order in which they were given.
    on_top : tuple of bool
        Whether a technique cannot stand alone: then it was measured on top of those before it.
    plain, together : Prediction
    alone : tuple of Prediction
    bases : tuple of Prediction
        What each technique alone is compared with: the plain request, or those before it.
    """

    names: tuple[str, ...]
    on_top: tuple[bool, ...]
    plain: Prediction
    alone: tuple[Prediction, ...]
    bases: tuple[Prediction, ...]
    together: Prediction

    def interaction(self, metric: Metric) -> Interaction:
        """Return how the techniques act together on one number."""
        plain, together = value_of(self.plain, metric), value_of(self.together, metric)
        alone = tuple(value_of(one, metric) for one in self.alone)
        bases = (value_of(base, metric) for base in self.bases)
        factors = tuple(_factor(metric, base, one) for base, one in zip(bases, alone, strict=True))
        guessed, reached = math.prod(factors), _factor(metric, plain, together)
        by = self._explained(metric, guessed, reached)
        return Interaction(metric, plain, alone, together, factors, guessed, reached, by)

    @property
    def interactions(self) -> tuple[Interaction, ...]:
        """How the techniques act together on every number."""
        return tuple(self.interaction(metric) for metric in METRICS)

    def _explained(self, metric: Metric, guessed: float, reached: float) -> str:
        """Return the part whose share in what was missed is the largest.

        The product would have shrunk every part alike; what a part is beyond that, or less, adds up to the difference.
        """
        if not (math.isfinite(guessed) and math.isfinite(reached)) or abs(reached - guessed) <= ROUNDING * guessed:
            return NOTHING
        before, after = parts_of(self.plain, metric), parts_of(self.together, metric)
        missed = {part: after.get(part, 0.0) - before.get(part, 0.0) / guessed for part in before | after}
        sign = 1.0 if reached < guessed else -1.0
        if not missed:
            return "weights"
        return max(missed, key=lambda part: sign * missed[part])

    def as_dict(self) -> dict[str, Any]:
        """Return it under the names of the JSON interface."""
        alone = zip(self.names, self.on_top, self.alone, strict=True)
        return {
            "plain": _described(self.plain),
            "alone": [{"name": name, "on_top": on_top, **_described(one)} for name, on_top, one in alone],
            "together": _described(self.together),
            "interactions": {one.metric: one.as_dict() for one in self.interactions},
        }


def compose_on(query: Query, hardware: HardwareProfile, techniques: Sequence[Technique]) -> Composition:
    """Return what techniques do to a request, each alone and all together.

    Parameters
    ----------
    query : Query
        The request before any technique.
    hardware : HardwareProfile
    techniques : sequence of Technique
        At least one; in the order in which they are given.

    Raises
    ------
    ValueError
        If there are none, or they exclude each other.
    """
    if not techniques:
        raise ValueError("there is nothing to compose; give at least one technique")
    together = evaluate(compose(query, techniques), hardware)
    plain = evaluate(query, hardware)
    alone, bases, on_top = [], [], []
    for position, technique in enumerate(techniques):
        try:
            alone.append(evaluate(compose(query, [technique]), hardware))
            bases.append(plain)
        except ValueError:  # it changes what another one made
            before = techniques[:position]
            alone.append(evaluate(compose(query, [*before, technique]), hardware))
            bases.append(evaluate(compose(query, before), hardware))
        on_top.append(bases[-1] is not plain)
    names = tuple(technique.name for technique in techniques)
    return Composition(names, tuple(on_top), plain, tuple(alone), tuple(bases), together)


def value_of(prediction: Prediction, metric: Metric) -> float:
    """Return a number of a prediction."""
    if metric == "peak_bytes":
        return prediction.memory.peak_bytes
    return float(getattr(prediction, metric))


def parts_of(prediction: Prediction, metric: Metric) -> dict[str, float]:
    """Return what a number is made of: operators of stages, parts of memory, or the energy of stages.

    Of the largest batch they are the shares of the memory beside the weights that one of its requests takes.
    """
    if metric == "energy_j":
        batch = float(prediction.query.batch)
        return {stage: joules / batch for stage, joules in prediction.stage_energy_j.items()}
    if metric == "peak_bytes":
        return memory_parts(prediction)
    if metric == "max_batch":
        return _request_parts(prediction)
    if metric == "tpot_s":
        steps = max(float(decode_steps(prediction.query, prediction.query.turns[0])), 1.0)
        return {name: seconds / steps for name, seconds in _operators_s(prediction, "decode").items()}
    parts: dict[str, float] = {}
    for stage in STAGES[:-1]:
        parts |= _operators_s(prediction, stage)
    return parts


def memory_parts(prediction: Prediction) -> dict[str, float]:
    """Return the memory of one device by what it holds [bytes]."""
    held = prediction.memory
    return {
        "weights": held.weights_bytes,
        "KV cache": held.kv_bytes,
        "activations": held.activation_bytes,
        "reserve": held.reserve_bytes,
    }


def _request_parts(prediction: Prediction) -> dict[str, float]:
    """Return the share of the memory beside the weights that a request of the largest batch takes, by what it holds."""
    largest = prediction.max_batch
    if not largest:
        return {}
    full = memory(replace(prediction.query, batch=float(largest)), prediction.hardware)
    free = (full.usable_bytes - full.weights_bytes - full.reserve_bytes) * largest
    return {"KV cache": full.kv_bytes / free, "activations": full.activation_bytes / free}


def _operators_s(prediction: Prediction, stage: Stage) -> dict[str, float]:
    """Return the time of a stage by operator [s]; those of different segments of layers stand under one name.

    What no operator explains is the host's; what runs beside something else is subtracted as overlap.
    """
    cost = prediction.stages[stage]
    seconds: dict[str, float] = {}
    known = [(operator.name, operator.time_s) for operator in cost.operators]
    for name, time_s in (*known, *_added_s(prediction, stage)):
        plain = _plain_name(stage, name)
        seconds[plain] = seconds.get(plain, 0.0) + time_s
    left = cost.time_s - sum(seconds.values())
    if abs(left) <= ROUNDING * cost.time_s:
        return seconds
    return seconds | {f"{stage}.{HOST if left > 0 else OVERLAP}": left}


def _added_s(prediction: Prediction, stage: Stage) -> Iterator[tuple[str, float]]:
    """Yield the operators that techniques, and a draft's head, add to a stage, with their times [s]."""
    evaluator, query = prediction.evaluator, prediction.query
    if evaluator is None or stage == "preprocess":
        return
    draft, drafting = query.draft, evaluator.drafting
    steps = float(decode_steps(query, query.turns[0])) if stage == "decode" else 1.0
    rounds = steps / float(draft.round_tokens) if draft and stage == "decode" else steps
    yield from ((operator.name, time_s * rounds) for operator, time_s in evaluator.overheads(stage))
    if draft and drafting and draft.runs(stage):
        passes = float(draft.passes) if stage == "decode" else 1.0
        added = drafting.overheads(stage)
        yield from ((f"draft.{operator.name}", time_s * rounds * passes) for operator, time_s in added)


def _plain_name(stage: str, name: str) -> str:
    """Return the name of an operator without that of its segment: `prefill.attention0.qkv` is `prefill.qkv`."""
    whose = "draft." if name.startswith("draft.") else ""
    return f"{whose}{stage}.{name.rpartition('.')[2]}"


def bottleneck(prediction: Prediction, metric: Metric) -> Bottleneck:
    """Return what most of a number is spent on."""
    if metric in ("peak_bytes", "max_batch"):
        parts = parts_of(prediction, metric) or {"weights": 1.0}
        return Bottleneck(max(parts, key=lambda part: parts[part]))
    stages: tuple[Stage, ...] = STAGES if metric == "energy_j" else STAGES[:-1]
    if metric == "tpot_s":
        stages = ("decode",)
    weights = prediction.stage_energy_j if metric == "energy_j" else {s: prediction.stages[s].time_s for s in stages}
    leading = max(stages, key=lambda stage: weights[stage])
    operators = _operators_s(prediction, leading)
    dearest = max(operators, key=lambda name: operators[name]) if operators else ""
    return Bottleneck(leading, prediction.stages[leading].bound, dearest)


def _factor(metric: Metric, before: float, after: float) -> float:
    """Return how many times better a number got."""
    above, below = (after, before) if metric in MORE_IS_BETTER else (before, after)
    if below:
        return above / below
    return math.inf if above else 1.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _described(prediction: Prediction) -> dict[str, Any]:
    """Return the numbers of a prediction, and where its bottlenecks are."""
    numbers: dict[str, Any] = {metric: value_of(prediction, metric) for metric in METRICS}
    numbers["max_batch"] = prediction.max_batch
    where = {metric: bottleneck(prediction, metric).as_dict() for metric in METRICS}
    return {**numbers, "total_s": float(prediction.total_s), "fits": prediction.fits, "bottlenecks": where}
