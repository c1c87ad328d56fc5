"""Workloads by name; where their numbers come from stands beside each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from costmodel import Image, Video, Workload
from costmodel.errors import unknown
from simulator.request import NONE, Requests, requests_of
from simulator.traffic import sessions
from simulator.traffic.arrivals import arrival_times
from simulator.traffic.shapes import (
    Draw,
    Drawn,
    Generator,
    exponential_tokens,
    fixed,
    from_quantiles,
    pictures,
    pictures_of_tokens,
    whole,
)

FULL_HD, PHOTO_12M = Image(1920, 1080), Image(4032, 3024)


@dataclass(frozen=True, slots=True, eq=False)
class Preset:
    """A workload.

    Parameters
    ----------
    about, source : str
        What a request brings, and where that comes from.
    draw : callable
        Draws so many requests.
    """

    about: str
    source: str
    draw: Draw


def _text(n: int, rng: Generator) -> Drawn:
    return Drawn(exponential_tokens(500, n, rng), exponential_tokens(200, n, rng))


def _visionarena(n: int, rng: Generator) -> Drawn:
    sizes = (Image(640, 480), Image(1024, 768), Image(1280, 960), Image(1920, 1080), Image(768, 1024))
    kind = rng.integers(0, len(sizes), n)
    return Drawn(
        exponential_tokens(40, n, rng), exponential_tokens(150, n, rng), pictures(np.ones(n, dtype=int), kind, sizes)
    )


def _muirbench(n: int, rng: Generator) -> Drawn:
    counts = np.clip(2 + rng.poisson(2.3, n), 2, 9)  # 11,264 pictures for 2,600 questions: 4.3 each
    sizes = (Image(512, 512), Image(640, 480), Image(800, 600))
    kind = rng.integers(0, len(sizes), int(counts.sum()))
    return Drawn(exponential_tokens(60, n, rng), np.full(n, 2), pictures(counts, kind, sizes))


def _sharegpt4o(n: int, rng: Generator) -> Drawn:
    sizes = (Image(336, 336), Image(512, 512), Image(802, 652), Image(1024, 768))
    kind = rng.integers(0, len(sizes), n)
    return Drawn(
        exponential_tokens(30, n, rng), exponential_tokens(200, n, rng), pictures(np.ones(n, dtype=int), kind, sizes)
    )


def _documents(n: int, rng: Generator) -> Drawn:
    sizes = (Image(1275, 1650), Image(1530, 2088), Image(1786, 2526))
    kind = rng.integers(0, len(sizes), n)
    return Drawn(np.full(n, 50), np.full(n, 1024), pictures(np.ones(n, dtype=int), kind, sizes))


AZURE_IMAGE_IN: Final = (
    (0.05, 343), (0.10, 427), (0.25, 866), (0.50, 1408), (0.75, 3977), (0.90, 9411), (0.95, 19506), (0.99, 35413),
)  # fmt: skip
AZURE_TEXT_IN: Final = (
    (0.05, 136), (0.10, 175), (0.25, 366), (0.50, 776), (0.75, 1440), (0.90, 3051), (0.95, 4066), (0.99, 11737),
)  # fmt: skip
AZURE_IMAGE_OUT: Final = ((0.10, 14), (0.25, 33), (0.50, 79), (0.75, 175), (0.90, 396), (0.95, 502), (0.99, 756))
AZURE_TEXT_OUT: Final = ((0.10, 8), (0.25, 25), (0.50, 144), (0.75, 217), (0.90, 461), (0.95, 740), (0.99, 1188))
AZURE_IMAGES: Final = ((0.66, 1), (0.709, 4), (0.858, 9), (0.876, 16))
"""Pictures of a request up to 16, as ModServe uses them; the longer tail is read as tiles."""
AZURE_IMAGE_SHARE: Final = 0.6
"""Requests with pictures: 50 to 150 a minute beside 30 to 100 of text."""
AZURE_IMAGE_SIDE: Final = 504
"""ModServe: the median side is near 500 pixels; a multiple of 28."""


def _azure(n: int, rng: Generator) -> Drawn:
    """Draw quantiles of the published plots: tokens are those of text and pictures together."""
    has = rng.random(n) < AZURE_IMAGE_SHARE
    shares = np.array([share for share, _ in AZURE_IMAGES]) / AZURE_IMAGES[-1][0]
    drawn = np.array([count for _, count in AZURE_IMAGES])[np.searchsorted(shares, rng.random(n))]
    counts = np.where(has, drawn, 0)
    tokens = np.where(has, from_quantiles(AZURE_IMAGE_IN, n, rng), from_quantiles(AZURE_TEXT_IN, n, rng))
    each = (AZURE_IMAGE_SIDE // 28) ** 2
    text = np.maximum(32, tokens - counts * each)
    output = np.where(has, from_quantiles(AZURE_IMAGE_OUT, n, rng), from_quantiles(AZURE_TEXT_OUT, n, rng))
    kind = np.zeros(int(counts.sum()), dtype=np.int64)
    size = (Image(AZURE_IMAGE_SIDE, AZURE_IMAGE_SIDE),)
    return Drawn(whole(text), whole(output), pictures(counts, kind, size))


SERVEGEN_IMAGES: Final = (
    (0.006, 0), (0.804, 1), (0.870, 2), (0.946, 3), (0.967, 4), (0.977, 5), (0.981, 6), (0.985, 7), (0.988, 8),
    (0.991, 9), (0.993, 10), (0.995, 13), (0.997, 20), (0.9985, 30), (0.9993, 40), (1.0, 45),
)  # fmt: skip
SERVEGEN_IMAGE_TOKENS: Final = (
    (0.0, 4), (0.08, 6), (0.11, 6), (0.18, 160), (0.25, 234), (0.30, 252), (0.40, 324), (0.50, 540), (0.60, 1000),
    (0.65, 1130), (0.70, 1196), (0.85, 1196), (0.90, 1224), (0.99, 1271), (1.0, 1280),
)  # fmt: skip
SERVEGEN_TEXT: Final = (
    (0.0, 29), (0.05, 41), (0.10, 63), (0.25, 79), (0.45, 94), (0.50, 106), (0.55, 130), (0.60, 170), (0.70, 440),
    (0.75, 1032), (0.90, 1914), (0.95, 2330), (0.99, 3064), (1.0, 3900),
)  # fmt: skip
SERVEGEN_OUT: Final = (
    (0.0, 2), (0.10, 6), (0.15, 8), (0.20, 20), (0.25, 34), (0.50, 100), (0.75, 186), (0.90, 264), (0.95, 345),
    (0.99, 587), (0.995, 900), (0.999, 2000), (1.0, 2000),
)  # fmt: skip
"""Quantiles of all 35 clients as published; those between are of the 25 clients whose files are at hand, moved so that
the means are the published ones: 1.59 pictures, 650 tokens a picture, 572 of text, 130 of the answer."""


def _servegen(n: int, rng: Generator) -> Drawn:
    """Draw every column by itself; a folder of ServeGen keeps what a client's columns have to do with each other."""
    shares = np.array([share for share, _ in SERVEGEN_IMAGES])
    counts = np.array([count for _, count in SERVEGEN_IMAGES])[np.searchsorted(shares, rng.random(n))]
    kind, sizes = pictures_of_tokens(whole(from_quantiles(SERVEGEN_IMAGE_TOKENS, int(counts.sum()), rng)))
    text, output = from_quantiles(SERVEGEN_TEXT, n, rng), from_quantiles(SERVEGEN_OUT, n, rng)
    return Drawn(whole(text), whole(output), pictures(counts, kind, sizes))


def _videomme(frames: int) -> Draw:
    return fixed(128, 10, [Video(width=1280, height=720, seconds=64.0, fps=24.0, frames=frames)])


VLLM_BENCH = "vLLM benchmark `random-mm`: squares, 400 tokens of text, 150 out"
SGLANG_BLOG = "SGLang's blog on encoder disaggregation: 1080p, 128 tokens of text, 256 out"
EPD = "EPDServe (arXiv:2501.05460): photos of 4032x3024, 10 tokens out; 64 tokens of text are assumed"
VIDEOMME = "VideoMME by frames; 720p, 128 tokens of text and 10 out are assumed"

PRESETS: Final[Mapping[str, Preset]] = {
    "text-500-200": Preset("500 tokens in, 200 out, exponential around them", "for speed and saturation", _text),
    "image-1080p-1": Preset("one 1920x1080 image, 64 tokens in, 150 out", "for speed", fixed(64, 150, [FULL_HD])),
    **{f"epd-4k-{k}": Preset(f"{k} photos, 10 tokens out", EPD, fixed(64, 10, [PHOTO_12M] * k)) for k in (2, 4, 6, 8)},
    **{f"videomme-{k}": Preset(f"a video of {k} frames", VIDEOMME, _videomme(k)) for k in (8, 16, 32, 64)},
    **{
        f"vllm-random-mm-{side}": Preset(
            f"one image of {side}x{side}", VLLM_BENCH, fixed(400, 150, [Image(side, side)])
        )
        for side in (640, 1024)
    },
    **{
        f"sglang-image-1080p-{k}": Preset(f"{k} images of 1080p", SGLANG_BLOG, fixed(128, 256, [FULL_HD] * k))
        for k in (1, 2, 4, 8)
    },
    "visionarena": Preset("one image, short question", "VisionArena-Chat; sizes and lengths are assumed", _visionarena),
    "muirbench": Preset("2 to 9 images, 2 tokens out", "MUIRBench: 4.3 images a question; sizes assumed", _muirbench),
    "sharegpt4o": Preset(
        "one image, an answer of 200 tokens", "ShareGPT-4o; sizes and lengths are assumed", _sharegpt4o
    ),
    "document-pages": Preset(
        "one page of 1275x1650 to 1786x2526, 1024 out", "vLLM issue 58266 and OCR use", _documents
    ),
    "sliding-window-chat": Preset(
        "8 turns, the last 5 images in the prompt", "HydraInfer", sessions.sliding_window_chat
    ),
    "text-chat": Preset("5 turns of text under 4 system prompts of 800 tokens", "assumed", sessions.text_chat),
    "streaming-video": Preset("a piece of video every 4 s, 12 pieces", "assumed", sessions.streaming_video),
    "azure-lmm": Preset("1 to 16 images or text alone", "ModServe's Azure trace, quantiles off its plots", _azure),
    "servegen-mm-image": Preset("1.6 images, 572 tokens of text", "ServeGen mm-image: quantiles of 818,610", _servegen),
}


def preset_names() -> list[str]:
    """Return the names of the workloads."""
    return list(PRESETS)


def preset(
    name: str,
    rate: float | None = None,
    n: int = 1000,
    seed: int = 0,
    *,
    arrivals: str = "poisson",
    concurrency: int = 0,
) -> Requests:
    """Return requests of a workload.

    Parameters
    ----------
    name : str
        Its name.
    rate : float or None
        Requests a second; of conversations, counted over all turns. None with `concurrency`, or for a burst.
    n : int
        Requests.
    seed : int
        Equal seeds give equal requests.
    arrivals : str
        See `simulator.traffic.arrivals`.
    concurrency : int
        A closed loop of so many users in place of a rate.

    Raises
    ------
    LookupError
        If there is no workload of this name.
    ValueError
        If neither a rate nor a concurrency is given, or both.
    """
    if name not in PRESETS:
        raise unknown("workload", name, PRESETS)
    return _drawn(name, PRESETS[name].draw, Arrivals(rate, n, seed, arrivals, concurrency))


def repeated(
    workload: Workload,
    rate: float | None = None,
    n: int = 1000,
    seed: int = 0,
    *,
    arrivals: str = "poisson",
    name: str = "repeated",
) -> Requests:
    """Return requests that all bring the same, with pictures that differ.

    Parameters
    ----------
    workload : Workload
        What one brings.
    rate, n, seed, arrivals
        As in `preset`.
    name : str
        What they are called.
    """
    draw = fixed(int(workload.text_tokens), int(workload.output_tokens), [*workload.images, *workload.videos])
    return _drawn(name, draw, Arrivals(rate, n, seed, arrivals))


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How many requests come, and when; see `preset`."""

    rate: float | None
    n: int
    seed: int
    process: str
    concurrency: int = 0

    def __post_init__(self) -> None:
        """Refuse what no traffic is."""
        if self.n < 1:
            raise ValueError(f"requests={self.n} must be at least 1")
        if self.concurrency and self.rate is not None:
            raise ValueError("rate and concurrency exclude each other; give one of them")
        if not self.concurrency and self.rate is None and self.process != "burst":
            raise ValueError("rate=None needs concurrency, or arrivals='burst'; give a rate in requests a second")


def _drawn(name: str, draw: Draw, when: Arrivals) -> Requests:
    lengths, times = (np.random.default_rng([when.seed, part]) for part in (0, 1))
    n = when.n
    drawn = draw(n, lengths)
    first = drawn.links.get("after", np.full(n, NONE)) < 0
    begin = int(first.sum())  # conversations begin as the arrivals say; their later turns follow
    arrival_s = np.zeros(n) if drawn.think_s is None else drawn.think_s.copy()
    rate = (when.rate or 1.0) * begin / n
    arrival_s[first] = 0.0 if when.concurrency else arrival_times(when.process, rate, begin, times)
    return requests_of(
        arrival_s,
        drawn.text,
        drawn.output,
        items=drawn.items,
        concurrency=when.concurrency,
        name=name,
        links=drawn.links,
    )
