"""Encoder and CPU times of pictures under techniques: every picture's work by itself, added up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from costmodel.base import Array
from costmodel.evaluate import Evaluator
from costmodel.hardware import HardwareProfile
from costmodel.media import MediaTotals
from costmodel.models import MediaCost
from costmodel.query import Query, Stage
from costmodel.stages import PASSES
from simulator.dealing import busiest
from simulator.prompting import SUMMED, Asking

TEXT_TOKENS, OUTPUT_TOKENS = 64.0, 64.0
"""Of the request that a picture stands in while its own work is worked out; encoders do not see them."""


def totals(items: Sequence[MediaCost]) -> MediaTotals:
    """Return what items are to the encoder together."""
    sums = {name: float(sum([getattr(item, name) for item in items])) for name in SUMMED}
    made = (item.visual_tokens if item.adapter_tokens is None else item.adapter_tokens for item in items)
    return MediaTotals(
        items=float(len(items)),
        largest_rows=float(max(item.largest_rows for item in items)),
        adapter_tokens=float(sum(made)),
        item_rows=tuple(float(item.rows) for item in items),
        **sums,  # type: ignore[arg-type]
    )


class ItemTimes:
    """Times of items under techniques.

    Parameters
    ----------
    asking : Asking
    hardware : HardwareProfile

    Notes
    -----
    Rows and pairs of items that are encoded together add up, and passes are those of all of them.
    """

    __slots__ = ("_evaluators", "_pairs", "asking", "copies", "hardware")

    def __init__(self, asking: Asking, hardware: HardwareProfile) -> None:
        self.asking = asking
        self.hardware = hardware
        self.copies = asking.parallelism.encoder_dp
        self._evaluators: dict[MediaCost, Evaluator] = {}
        self._pairs: dict[MediaCost, Evaluator] = {}

    def _alone(self, item: MediaCost) -> Evaluator:
        found = self._evaluators.get(item)
        if found is None:
            found = self._evaluators[item] = self.of(totals((item,)))
        return found

    def query(self, item: MediaCost) -> Query:
        """Return the query of a request of one item."""
        return self._alone(item).query

    def of(self, media: MediaTotals) -> Evaluator:
        """Return a request of these pictures on the device."""
        return Evaluator.of(self.asking.query(media, TEXT_TOKENS, OUTPUT_TOKENS), self.hardware)

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time of one forward pass of encoder and adapter, on the copy that has most of it [s]."""
        own = busiest(items, self.copies, [float(item.rows) for item in items])
        return self._stage_s("encode", own) + self._stage_s("adapt", own)

    def _stage_s(self, stage: Stage, items: Sequence[MediaCost]) -> float:
        alone = [self._alone(item) for item in items]
        points = [found.points(stage, found.query.turns[0]).sums for found in alone]
        if len({len(one) for one in points}) > 1:  # layers part otherwise by item: one pass each
            return float(sum(found.stage_s(stage, found.query.turns[0]) for found in alone))
        sums: Array = np.sum(points, axis=0)
        engine = self.asking.engine
        tokens = sum(float(found.query.media.adapter_tokens) for found in alone)
        sums[PASSES] = min(
            np.ceil(tokens / engine.encoder_chunk_tokens), sum(float(f.query.media.items) for f in alone)
        )
        time_s = float(alone[0].priced(stage).total_s(sums)[0]) + self._added_s(stage, items, alone)
        beside = (found.waiting_s(stage, found.query.turns[0], 0.0) for found in alone)
        return max(time_s, float(sum(beside)))

    def _added_s(self, stage: Stage, items: Sequence[MediaCost], alone: Sequence[Evaluator]) -> float:
        """Return what techniques add for items: what starts of kernels cost once, and the rest of every item [s]."""
        own = [float(found.overhead_s(stage, found.query.turns[0])) for found in alone]
        if len(items) == 1 or not any(own):
            return sum(own)
        once = [max(0.0, 2.0 * one - self._twice_s(stage, item)) for item, one in zip(items, own, strict=True)]
        return sum(own) - sum(once) + max(once)

    def _twice_s(self, stage: Stage, item: MediaCost) -> float:
        """Return what techniques add for two requests of an item [s]."""
        found = self._pairs.get(item)
        if found is None:
            query = self.asking.query(totals((item,)), TEXT_TOKENS, OUTPUT_TOKENS, batch=2.0)
            found = self._pairs[item] = Evaluator.of(query, self.hardware)
        return float(found.overhead_s(stage, found.query.turns[0]))

    def preprocess_s(self, media: MediaTotals) -> float:
        """Return the time of one CPU worker for pictures, and of their copy [s]."""
        found = self.of(media)
        return float(found.stage_s("preprocess", found.query.turns[0]))
