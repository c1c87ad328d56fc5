"""Counts: parameters, FLOPs by stage, KV bytes and tokens of a request, without any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from costmodel.catalogue import load_model
from costmodel.conventions import CONVENTIONS, Convention, query_flops
from costmodel.engine import EngineProfile, load_engine
from costmodel.errors import unknown
from costmodel.memory import kv_bytes_per_request
from costmodel.models import ModelSpec
from costmodel.operators import FLOPS
from costmodel.query import Query, Stage, build_query
from costmodel.stages import DEVICE_STAGES, Structure
from costmodel.sums import adapt_points, decode_points, encode_points, prefill_points
from costmodel.techniques import Technique, compose
from costmodel.workload import Workload

WEIGHT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of one request at 16 bits; see the JSON interface for the names.

    Parameters
    ----------
    flops : dict
        By stage; None where a convention does not say.
    kv_bytes : float
        Keys and values of the prompt [bytes].
    """

    parameters: dict[str, int]
    weight_bytes: int
    kv_bytes_per_token: float
    kv_bytes: float
    kv_bytes_per_image: float
    tokens: dict[str, int]
    flops: dict[str, float | None]
    convention: Convention

    def as_dict(self) -> dict[str, Any]:
        """Return the counts under the names of the JSON interface."""
        return {name: getattr(self, name) for name in self.__slots__}


def count(
    model: str | ModelSpec,
    workload: Workload,
    *,
    convention: Convention = "kernel",
    batch: float = 1.0,
    techniques: Sequence[Technique] = (),
) -> Counts:
    """Count the work of a request.

    Parameters
    ----------
    model : str or ModelSpec
        A model, or what `load_model` takes.
    workload : Workload
        What the request brings.
    convention : {"kernel", "torch", "fastv", "swiglu-mac", "gqa-mac"}
        `torch` is what transformers executes: all vision layers, the full square of attention. `kernel` is what an
        engine needs. The others are published formulas for prefill alone, see `costmodel.conventions`.
    batch : float
        Requests counted together.
    techniques : sequence of Technique
        Applied in order; what they cost themselves is not counted.

    Raises
    ------
    LookupError
        If the convention is not known.

    Examples
    --------
    >>> from costmodel import Image
    >>> count("llava-1.5-7b", Workload(images=[Image(336, 336)])).tokens["visual"]
    576
    """
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, CONVENTIONS)
    spec = load_model(model) if isinstance(model, str) else model
    query = build_query(spec, workload, counting_engine(convention), batch=batch)
    query = compose(query, techniques) if techniques else query
    parameters = query.model.parameters()
    return Counts(
        parameters=parameters,
        weight_bytes=parameters["total"] * WEIGHT_BYTES,
        kv_bytes_per_token=query.model.decoder.kv_bytes_per_token(),
        kv_bytes=float(batch * kv_bytes_per_request(_prompt_only(query))),
        kv_bytes_per_image=_cross_bytes_per_image(query),
        tokens=tokens(query),
        flops=_flops(query, convention),
        convention=convention,
    )


def _cross_bytes_per_image(query: Query) -> float:
    """Return the cache of cross-attention for the mean picture of the request [bytes]."""
    each = float(query.media.cross_tokens / np.maximum(query.media.items, 1.0))
    return each * query.model.decoder.cross_kv_bytes_per_token()


def tokens(query: Query) -> dict[str, int]:
    """Return patches and tokens of one request: patches, visual, markers, cross, text, prompt."""
    media, turn = query.media, query.turns[0]
    counts = {
        "patches": media.patches,
        "visual": query.visual_tokens,
        "markers": media.marker_tokens,
        "cross": media.cross_tokens,
        "text": turn.text_tokens,
        "prompt": query.prompt_tokens,
    }
    return {name: round(float(number)) for name, number in counts.items()}


def counting_engine(convention: Convention) -> EngineProfile:
    """Return an engine without chunks that counts as a convention does."""
    executed = convention == "torch"
    changes = {"counts_full_square": executed, "executes_everything": executed}
    return load_engine("ideal").model_copy(update=changes)


def _prompt_only(query: Query) -> Query:
    turn = replace(query.turns[0], output_tokens=0.0)
    return replace(query, turns=(turn,))


def _flops(query: Query, convention: Convention) -> dict[str, float | None]:
    if convention in ("torch", "kernel"):
        by_stage: dict[str, float | None] = {stage: stage_flops(query, stage) for stage in DEVICE_STAGES}
        return {"decode_step" if name == "decode" else name: flops for name, flops in by_stage.items()}
    return {"encode": None, "adapt": None, "prefill": float(query_flops(query, convention)), "decode_step": None}


def stage_flops(query: Query, stage: Stage) -> float:
    """Return the FLOPs of a stage of the first turn; of decode, those of the first step [FLOP]."""
    structure, turn = Structure.of(query), query.turns[0]
    if stage == "decode":
        points = decode_points(query, structure, turn, detailed=True)
        counts = np.eye(len(points.counts))[0]
    else:
        lists = {"encode": encode_points, "adapt": adapt_points, "prefill": prefill_points}
        points = lists[stage](query, structure, turn)
        counts = np.array([float(count) for count in points.counts])
    table = structure.table(stage)
    return float((table.columns(points.sums)[FLOPS] @ counts * table.repeats).sum())
