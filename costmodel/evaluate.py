"""From a query and a device to times: every turn, every stage, one point or a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.hardware import HardwareProfile
from costmodel.kernels import Kernels
from costmodel.memo import remember
from costmodel.operators import Operator, OperatorTable
from costmodel.priced import PricedTable, operator_s, priced
from costmodel.query import Query, Stage, Turn
from costmodel.stages import PASSES, WORKS, Structure
from costmodel.sums import Points, adapt_points, decode_points, decode_steps, encode_points, prefill_points
from costmodel.units import PIXEL_BYTES
from costmodel.workload import CODECS


@dataclass(frozen=True, slots=True, eq=False)
class TurnTimes:
    """Times of one turn [s]; `decode_step_s` is the mean step."""

    preprocess_s: Quantity
    encode_s: Quantity
    adapt_s: Quantity
    prefill_s: Quantity
    decode_step_s: Quantity
    steps: Quantity

    @property
    def first_token_s(self) -> Quantity:
        """Time until prefill ends."""
        return self.preprocess_s + self.encode_s + self.adapt_s + self.prefill_s

    @property
    def total_s(self) -> Quantity:
        """Time until the last token."""
        return self.first_token_s + self.steps * self.decode_step_s


@dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """A query on a device: the operator tables it needs, found once; `drafting` is that of the query's draft."""

    query: Query
    hardware: HardwareProfile
    structure: Structure
    kernels: Kernels
    is_sweep: bool = False
    kept_points: dict[tuple[Stage, int], Points] = field(default_factory=dict)
    drafting: Evaluator | None = None

    @staticmethod
    def of(query: Query, hardware: HardwareProfile, *, is_sweep: bool = False) -> Evaluator:
        """Return the evaluator of a query on a device, and with it that of its draft."""
        drafts = query.drafting
        drafting = None if drafts is None else Evaluator.of(drafts, hardware, is_sweep=is_sweep)
        structure, kernels = Structure.of(query), kernels_of(query, hardware)
        return Evaluator(query, hardware, structure, kernels, is_sweep, drafting=drafting)

    def table(self, stage: Stage) -> OperatorTable:
        """Return the operators of a stage."""
        return self.structure.table(stage)

    def n_stages(self, stage: Stage) -> int:
        """Return the pipeline stages that a stage of the request runs through."""
        return self.query.parallelism.pp if stage in ("prefill", "decode") else 1

    def priced(self, stage: Stage) -> PricedTable:
        """Return the operators of a stage with the device's rates."""
        return priced(self.table(stage), self.kernels)

    def points(self, stage: Stage, turn: Turn) -> Points:
        """Return the sums of a stage in a turn, worked out once."""
        key = (stage, id(turn))
        found = self.kept_points.get(key)
        if found is None:
            detail = {"detailed": not self.is_sweep} if stage == "decode" else {}
            found = self.kept_points[key] = POINTS[stage](self.query, self.structure, turn, **detail)
        return found

    def overheads(self, stage: Stage) -> list[tuple[Operator, float]]:
        """Return the operators that techniques add to a stage (of decode, to one step) with their times [s].

        Hidden ones count for what the stage waits for them.
        """
        turn = self.query.turns[0]
        found = [(o, float(operator_s(o, self.kernels))) for o in self._added(stage, turn, hidden=False)]
        hidden = [(o, float(operator_s(o, self.kernels))) for o in self._added(stage, turn, hidden=True)]
        together = sum(seconds for _, seconds in hidden)
        if together:
            waits = float(self.waiting_s(stage, turn, self._serial_s(stage, turn)))
            found += [(o, seconds * waits / together) for o, seconds in hidden]
        return found

    def _added(self, stage: Stage, turn: Turn, *, hidden: bool) -> list[Operator]:
        wanted = (o for o in self.query.overheads if o.stage == stage and o.hidden == hidden)
        return [operator for overhead in wanted for operator in overhead.in_turn(turn)]

    def overhead_s(self, stage: Stage, turn: Turn) -> Quantity:
        """Return what techniques add to a stage one after another, of decode to one step [s]."""
        if not self.query.overheads:
            return 0.0
        return sum((operator_s(o, self.kernels) for o in self._added(stage, turn, hidden=False)), start=0.0)

    def waiting_s(self, stage: Stage, turn: Turn, stage_s: Quantity) -> Quantity:
        """Return how long a stage, of decode one step, waits for what techniques run beside it [s]."""
        if not self.query.overheads:
            return 0.0
        beside = sum((operator_s(o, self.kernels) for o in self._added(stage, turn, hidden=True)), start=0.0)
        return np.maximum(beside - stage_s, 0.0)

    def bound(self, operator: Operator) -> Literal["compute", "memory"]:
        """Return the roof that binds an operator of a technique."""
        ridge = self.hardware.peak_flops_per_s[self.hardware.precision(operator.bits)]
        traffic = operator.weight_bytes + operator.activation_bytes + operator.kv_bytes
        busy = operator.flops / ridge, traffic / self.hardware.memory_bandwidth_bytes_per_s
        return "compute" if busy[0] > busy[1] else "memory"

    def host_floor_s(self, stage: Stage, points: Points) -> Array | None:
        """Return the time in which the host issues the kernels of every point; None where graphs are replayed [s]."""
        layer_s = self.query.engine.layer_host_s.get(stage)
        if not layer_s:
            return None
        floor: Array = points.sums[PASSES] * (layer_s * self.structure.n_layers(stage) / self.hardware.host_speed)
        return floor

    def adds_to_host(self, stage: Stage) -> bool:
        """Return whether what a stage does to the cache comes on top of the time in which the host issues kernels."""
        return stage == "decode" and self.query.engine.cache_adds_to_host

    def _beyond_host_s(self, stage: Stage, points: Points) -> Array | float:
        """Return the device's time at every point that does not hide behind the host's [s]."""
        if not self.adds_to_host(stage):
            return 0.0
        return priced(self.table(stage).apart(WORKS), self.kernels).total_s(points.sums)

    def host_s(self, stage: Literal["prefill", "decode"]) -> Quantity:
        """Return the time of the host that a prefill, or a decode step, waits for beside the kernels [s]."""
        engine = self.query.engine
        once = engine.request_host_s if stage == "prefill" else engine.step_host_s
        return (once + engine.sequence_host_s * self.query.replica_batch) / self.hardware.host_speed

    def _point_times(self, stage: Stage, turn: Turn) -> list[Quantity]:
        """Return the time of every point of a stage, of a sweep as arrays [s]."""
        points = self.points(stage, turn)
        times, floor = self.priced(stage).total_s(points.sums), self.host_floor_s(stage, points)
        if floor is not None:
            beyond = self._beyond_host_s(stage, points)
            times = np.maximum(times - beyond, floor) + beyond
        return list(times.reshape(len(points.counts), -1)) if self.is_sweep else times.tolist()

    def _serial_s(self, stage: Stage, turn: Turn) -> Quantity:
        """Return the time of a stage, of decode of the mean step, before it waits for anything beside it [s]."""
        if stage == "preprocess":
            return preprocess_s(self.query, self.hardware, turn) + self.overhead_s(stage, turn)
        times = self._point_times(stage, turn)
        if stage == "decode":
            return times[-1] + self.overhead_s(stage, turn) + self.host_s(stage)
        counts = self.points(stage, turn).counts
        total = sum(
            (count * time for count, time in zip(counts, times, strict=True)), start=self.overhead_s(stage, turn)
        )
        return total + self.host_s(stage) if stage == "prefill" else total

    def own_s(self, stage: Stage, turn: Turn) -> Quantity:
        """Return the time of a stage without a draft's part in it, of decode of the mean step [s]."""
        serial = self._serial_s(stage, turn)
        return serial + self.waiting_s(stage, turn, serial)

    def draft_s(self, stage: Stage, turn: Turn) -> Quantity:
        """Return the time of the draft in a stage, of decode of all its passes in a round [s].

        The host is waited for once a round; what it takes to issue the kernels of a pass is the pass's own.
        """
        draft, drafting = self.query.draft, self.drafting
        if draft is None or drafting is None or not draft.runs(stage):
            return 0.0
        own = drafting.own_s(stage, turn)
        return draft.passes * (own - drafting.host_s("decode")) if stage == "decode" else own

    def stage_s(self, stage: Stage, turn: Turn) -> Quantity:
        """Return the time of a stage, of decode of the mean step: a round shared out over its tokens [s]."""
        own, draft = self.own_s(stage, turn), self.query.draft
        if draft is None:
            return own
        joined = draft.joined_s(stage, own, self.draft_s(stage, turn))
        return joined / draft.round_tokens if stage == "decode" else joined

    def turn(self, turn: Turn) -> TurnTimes:
        """Return the times of a turn, as arrays of one or more points."""
        return TurnTimes(
            preprocess_s=self.stage_s("preprocess", turn),
            encode_s=self.stage_s("encode", turn),
            adapt_s=self.stage_s("adapt", turn),
            prefill_s=self.stage_s("prefill", turn),
            decode_step_s=self.stage_s("decode", turn),
            steps=decode_steps(self.query, turn),
        )


def kernels_of(query: Query, hardware: HardwareProfile) -> Kernels:
    """Return the curves of a device under a query's engine, from the model's cache when they were found before."""
    key = ("kernels", id(hardware), id(query.engine))
    return remember(query.model.cache, key, lambda: Kernels(hardware, query.engine))


POINTS: Final[Mapping[Stage, Callable[..., Points]]] = {
    "encode": encode_points,
    "adapt": adapt_points,
    "prefill": prefill_points,
    "decode": decode_points,
}


def preprocess_s(query: Query, hardware: HardwareProfile, turn: Turn) -> Quantity:
    """Return the time of the host for the pictures of a turn, and of the copy of their pixels to the device [s]."""
    media, cost = query.media, query.engine.preprocessing
    coded = zip(CODECS, media.coded_pixels, strict=True)
    files = sum((cost.decode_s(codec, pixels) for codec, pixels in coded if np.any(pixels)), start=0.0)
    decoding = files + media.frame_pixels * cost.frame_s_per_pixel
    work = (decoding + media.resized_pixels * cost.resize_s_per_pixel) * turn.visual_share
    rounds = np.ceil(query.replica_batch / cost.workers)  # requests are dealt out whole
    return work * rounds + pixel_copy_bytes(query, turn) / _pixel_bandwidth_bytes_per_s(hardware)


def pixel_copy_bytes(query: Query, turn: Turn) -> Quantity:
    """Return the pixel values that go to the device in a turn [bytes]; the survey's equations know no host."""
    vision = query.model.vision
    if vision is None or query.engine.pricing == "equations":
        return 0.0
    return query.media.patches * query.replica_batch * turn.visual_share * vision.patch_width * PIXEL_BYTES


def _pixel_bandwidth_bytes_per_s(hardware: HardwareProfile) -> float:
    links = [link.bandwidth_bytes_per_s for link in hardware.links if link.kind == "pcie"]
    return max(links, default=np.inf)
