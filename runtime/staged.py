"""The stages of a request, each as an action that can be timed over and over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from runtime.generate import batched, joined
from runtime.graphs import GraphedStep
from runtime.model import Lvlm
from runtime.preprocess import preprocess
from runtime.requests import Request
from runtime.settings import Blueprint
from runtime.timing import Action

OURS: Final = "ours"


@dataclass(frozen=True, slots=True, eq=False)
class StageCase:
    """One stage of one request.

    Parameters
    ----------
    kind, shape
        As in `runtime.measurement`.
    action : callable
    implementation : str
    """

    kind: str
    shape: Mapping[str, Any]
    action: Action
    implementation: str = OURS


def stage_cases(model: Lvlm, blueprint: Blueprint, request: Request, name: str, *, graph: bool) -> Iterator[StageCase]:
    """Yield the stages of a request on a model, in order.

    Parameters
    ----------
    model : Lvlm
    blueprint : Blueprint
        Its own.
    request : Request
    name : str
        What lines call the model.
    graph : bool
        Whether the decode step is measured as a CUDA graph too.
    """
    shape, prompts = request.shape(name), request.prompts(blueprint)
    batch, visual = batched(model, prompts), None
    pixels = joined([prompt.pixels for prompt in prompts if prompt.pixels])
    if pixels is not None:
        photos = request.photos()
        yield StageCase("preprocess", shape, lambda: [preprocess(blueprint, photos) for _ in range(request.batch)])
        yield StageCase("encode", shape, lambda: model.encode(pixels))
        features = model.encode(pixels)
        yield StageCase("adapt", shape, lambda: model.adapt(features))
        visual = model.adapt(features)
    tokens = batch.tokens.shape[1]
    cache = model.reserve(request.batch, tokens + 1)
    yield StageCase("prefill", shape, lambda: model.prefill(batch, visual, cache))
    token = model.prefill(batch, visual, cache).argmax(-1)
    lengths = cache.lengths.clone()

    def step() -> None:
        model.decode_step(token, cache)
        cache.lengths.copy_(lengths)  # every sample sees the same context
        cache.longest = tokens

    yield StageCase("decode_step", {**shape, "context": tokens + 1}, step)
    if graph:
        replay = GraphedStep(model, cache)

        def replayed() -> None:
            replay(token)
            cache.lengths.copy_(lengths)
            cache.longest = tokens

        yield StageCase("decode_step", {**shape, "context": tokens + 1, "graph": True}, replayed)
