"""What `lvlm solve` may vary: the span of each thing, and the prediction for a value of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from costmodel import Prediction, compose, evaluate, load_hardware
from costmodel.base import Quantity
from costmodel.deployment import BITS
from costmodel.errors import DoesNotFit, unknown
from costmodel.query import Query
from costmodel.solve import Many, Span, with_bandwidth, with_keep, with_price
from costmodel.techniques import Technique
from studies import parse
from studies.options import Serving
from studies.request import Request, build_request, predict_request

LOADS: Final = ("rate", "gpus")
"""What needs requests that queue: see `studies.load`."""
LEAST_KEEP: Final = 1e-3
MOST_IMAGES: Final = 4096
WIDEST_KV: Final = 16
FACTOR: Final = 1000.0
"""How far from the device's own bandwidth to look, to either side."""
LOWEST_PRICE, HIGHEST_PRICE = 1e-8, 1.0
"""Prices between which to look [USD/s]: 0.000036 to 3,600 an hour."""


@dataclass(frozen=True, slots=True, eq=False)
class Varied:
    """Something that is varied.

    Parameters
    ----------
    span : Span
        Its values.
    make : callable
        Returns the prediction for one of them.
    many : callable or None
        Returns the sweep over an array of them.
    unit : str
        Of a value, in SI.
    """

    span: Span
    make: Callable[[float], Prediction]
    many: Many | None = None
    unit: str = ""


def varied(name: str, request: Request, hardware: str, serving: Serving) -> Varied:
    """Return what is varied under a name.

    Raises
    ------
    LookupError
        If nobody knows it.
    ValueError
        If the request has nothing of it.
    """
    if name not in VARIED:
        raise unknown("--vary", name, (*VARIED, *LOADS))
    return VARIED[name](request, hardware, serving)


def techniques_of(serving: Serving) -> list[Technique]:
    """Return the techniques of a request."""
    return [parse.method(text) for text in serving.technique]


def _keep(request: Request, hardware: str, serving: Serving) -> Varied:
    """Vary the share that a technique keeps; without one, the visual tokens before the language model."""
    device, query = load_hardware(hardware), build_request(request, serving)
    if not request.workload.has_media:
        raise ValueError("--vary keep thins visual tokens, and there are none; add --image or --video")
    if not serving.technique:

        def thinned(keep: Quantity) -> Prediction:
            return evaluate(with_keep(query, keep), device)

        return Varied(Span(LEAST_KEEP, 1.0), thinned, thinned)
    *before, last = serving.technique
    name, parameters = parse.split_method(last)

    def rebuilt(keep: Quantity) -> Prediction:
        others = [parse.method(text) for text in before]
        changed = parse.named(name, {**parameters, "keep": keep})
        return evaluate(compose(query, [*others, changed]), device)

    return Varied(Span(LEAST_KEEP, 1.0), rebuilt, rebuilt)


def _kv_bits(request: Request, hardware: str, serving: Serving) -> Varied:
    choices = tuple(float(bits) for bits in BITS if bits <= WIDEST_KV)

    def narrowed(bits: float) -> Prediction:
        return predict_request(request, hardware, replace(serving, kv_bits=int(bits)))

    return Varied(Span(choices[0], choices[-1], choices=choices), narrowed, unit="bits")


def _frames(request: Request, hardware: str, serving: Serving) -> Varied:
    videos = request.workload.videos
    if not videos:
        raise ValueError("--vary frames samples videos, and there are none; add --video")

    def sampled(frames: float) -> Prediction:
        clips = [replace(video, frames=int(frames), sample_fps=None) for video in videos]
        workload = replace(request.workload, videos=clips)
        return predict_request(replace(request, workload=workload), hardware, serving)

    return Varied(Span(1, min(video.total_frames for video in videos), whole=True), sampled)


def _images(request: Request, hardware: str, serving: Serving) -> Varied:
    given = request.workload.images
    if not given:
        raise ValueError("--vary images repeats the images, and there are none; add --image")

    def repeated(count: float) -> Prediction:
        images = [given[i % len(given)] for i in range(int(count))]
        workload = replace(request.workload, images=images)
        return predict_request(replace(request, workload=workload), hardware, serving)

    return Varied(Span(1, MOST_IMAGES, whole=True), repeated)


def _batch(request: Request, hardware: str, serving: Serving) -> Varied:
    """Vary the batch, up to the largest that fits."""
    device, techniques = load_hardware(hardware), techniques_of(serving)
    one = predict_request(request, hardware, replace(serving, batch=1))
    if not one.max_batch:
        memory = one.memory
        raise DoesNotFit(
            f"{request.model.name} with batch 1 on {one.n_devices} x {device.name}",
            required_bytes=memory.peak_bytes,
            available_bytes=memory.usable_bytes,
        )
    query: Query = build_request(request, serving)

    def together(batch: Quantity) -> Prediction:
        return evaluate(compose(replace(query, batch=batch), techniques), device)

    return Varied(Span(1, one.max_batch, whole=True), together, together)


def _bandwidth(request: Request, hardware: str, serving: Serving) -> Varied:
    device, query = load_hardware(hardware), compose(build_request(request, serving), techniques_of(serving))
    own = device.memory_bandwidth_bytes_per_s

    def faster(bytes_per_s: float) -> Prediction:
        return evaluate(query, with_bandwidth(device, bytes_per_s))

    return Varied(Span(own / FACTOR, own * FACTOR, prefers="least"), faster, unit="bytes/s")


def _price(request: Request, hardware: str, serving: Serving) -> Varied:
    device = load_hardware(hardware)
    prediction = predict_request(request, hardware, serving)

    def dearer(usd_per_s: float) -> Prediction:
        return replace(prediction, hardware=with_price(device, usd_per_s))  # a price moves no time

    return Varied(Span(LOWEST_PRICE, HIGHEST_PRICE), dearer, unit="USD/s")


VARIED: Final[dict[str, Callable[[Request, str, Serving], Varied]]] = {
    "keep": _keep,
    "kv-bits": _kv_bits,
    "frames": _frames,
    "images": _images,
    "batch": _batch,
    "bandwidth": _bandwidth,
    "price": _price,
}
