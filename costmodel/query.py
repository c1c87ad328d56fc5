"""The query: everything that decides what a request costs, as the state that techniques edit.

A `Query` is frozen; a technique returns a changed copy. Totals may be arrays that broadcast, so a sweep is a query.
Structure (how the layers of a tower split into segments, which cache entries there are) is never swept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from costmodel.base import Quantity
from costmodel.deployment import Parallelism, Precision, check_parallelism
from costmodel.engine import EngineProfile
from costmodel.layers import CrossAttentionSpec, LayerRun
from costmodel.media import MediaTotals, media_totals
from costmodel.memo import remember
from costmodel.models import ModelSpec
from costmodel.recurrent import STATE_BITS, RecurrentSpec
from costmodel.speculation import Draft
from costmodel.state import STAGES, KVEntry, Overhead, Segment, Stage, Turn, causal_pairs
from costmodel.workload import Workload

__all__ = [
    "MAX_BATCH",
    "STAGES",
    "KVEntry",
    "Overhead",
    "Query",
    "Segment",
    "Stage",
    "Turn",
    "build_query",
    "cache_entries",
    "causal_pairs",
    "decoder_segments",
    "encoder_segments",
]

MAX_BATCH = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """The state that techniques edit; see the module's docstring.

    `step_rows` are the new tokens of each sequence in a decode step: more than one where a draft's are verified.
    """

    model: ModelSpec
    engine: EngineProfile
    media: MediaTotals
    turns: tuple[Turn, ...]
    encoder: tuple[Segment, ...]
    decoder: tuple[Segment, ...]
    kv: tuple[KVEntry, ...]
    overheads: tuple[Overhead, ...] = ()
    batch: Quantity = 1.0
    precision: Precision = field(default_factory=Precision)
    parallelism: Parallelism = field(default_factory=Parallelism)
    visual_tokens: Quantity = 0.0
    draft: Draft | None = None
    step_rows: Quantity = 1.0

    def without_overheads(self) -> Query:
        """Return the query as if its techniques cost nothing themselves."""
        return replace(self, overheads=())

    @property
    def replica_batch(self) -> Quantity:
        """Requests of the batch that one data-parallel replica works on: whole requests, the busiest replica's."""
        return np.ceil(self.batch / self.parallelism.dp) if self.parallelism.dp > 1 else self.batch

    @property
    def prompt_tokens(self) -> Quantity:
        """Tokens of the first turn that enter the language model."""
        turn = self.turns[0]
        return turn.visual_share * (self.visual_tokens + self.media.marker_tokens) + turn.text_tokens

    @property
    def drafting(self) -> Query | None:
        """The draft on the turns and the batch of this query; what is part of the target has its precision too."""
        if self.draft is None:
            return None
        own, inside = self.draft.query, self.draft.origin != "model"
        precision = self.precision if inside else own.precision
        return replace(own, turns=self.turns, batch=self.batch, precision=precision)


def build_query(
    model: ModelSpec,
    workload: Workload,
    engine: EngineProfile,
    *,
    batch: Quantity = 1.0,
    precision: Precision | None = None,
    parallelism: Parallelism | None = None,
) -> Query:
    """Return the query of a workload on a model before any technique.

    Raises
    ------
    Unsupported
        If the workload has pictures and the model no vision part.
    ValueError
        If a value breaks a rule.
    """
    if not (np.min(batch) >= 1 and np.max(batch) <= MAX_BATCH):
        raise ValueError(f"batch={batch!r} must be a number from 1 to 1000000")
    parallelism = parallelism or Parallelism()
    check_parallelism(model, parallelism)
    has_media = workload.has_media
    media = media_totals(model, workload, executed=engine.executes_everything)
    precision = precision or Precision()
    return Query(
        model=model,
        engine=engine,
        media=media,
        turns=(Turn(1.0, workload.text_tokens, workload.output_tokens),),
        encoder=encoder_segments(model, engine),
        decoder=decoder_segments(model, has_media=has_media),
        kv=cache_entries(model, precision.kv_bits, has_media=has_media),
        batch=batch,
        precision=precision,
        parallelism=parallelism,
        visual_tokens=media.visual_tokens,
    )


def encoder_segments(model: ModelSpec, engine: EngineProfile) -> tuple[Segment, ...]:
    """Return the layers of the vision encoder that the engine runs, in order."""
    vision = model.vision
    if vision is None:
        return ()
    runs = vision.runs + (vision.unused_runs if engine.executes_everything else ())
    return remember(model.cache, ("encoder", len(runs)), lambda: _segments(runs))


def decoder_segments(model: ModelSpec, *, has_media: bool) -> tuple[Segment, ...]:
    """Return the layers of the language model, in order; without pictures none of cross-attention."""
    return remember(model.cache, ("decoder", has_media), lambda: _segments(_run_layers(model, has_media=has_media)))


def _segments(runs: tuple[LayerRun, ...]) -> tuple[Segment, ...]:
    return tuple(Segment(run.n_layers, run.layer) for run in runs)


def _run_layers(model: ModelSpec, *, has_media: bool) -> tuple[LayerRun, ...]:
    runs = model.decoder.runs
    return runs if has_media else tuple(r for r in runs if not isinstance(r.layer.mixer, CrossAttentionSpec))


def cache_entries(model: ModelSpec, kv_bits: float, *, has_media: bool) -> tuple[KVEntry, ...]:
    """Return what the language model caches, in the order of its layers."""

    def entry(run: LayerRun) -> KVEntry:
        if isinstance(run.layer.mixer, CrossAttentionSpec):
            return KVEntry(run.n_layers, run.layer.mixer, 0.0, 0.0, 1.0, bits=kv_bits, grows=False)
        if isinstance(run.layer.mixer, RecurrentSpec):
            mixer = run.layer.mixer
            return KVEntry(run.n_layers, mixer, 0.0, 0.0, fixed_tokens=1.0, bits=STATE_BITS, grows=False)
        return KVEntry(run.n_layers, run.layer.mixer, bits=kv_bits)

    key = ("kv", kv_bits, has_media)
    return remember(model.cache, key, lambda: tuple(map(entry, _run_layers(model, has_media=has_media))))
