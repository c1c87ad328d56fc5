"""Published measurements of methods: the rows of `techniques.csv` and `techniques_exact.csv`, and what is predicted.

A row holds a baseline and the method on one request. What it says is a ratio; the method's own value is scored beside
it where the source printed one that a prediction of a single request can be compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from costmodel import Parallelism, Precision, Prediction, Video, Workload, load_engine, predict
from costmodel.base import Frozen
from costmodel.conventions import Convention, prefill_flops
from costmodel.errors import Unsupported
from costmodel.memory import kv_bytes_per_request
from costmodel.query import Query, build_query
from costmodel.techniques import Technique, compose
from studies.parse import method
from studies.validation.published_files import (
    UNITS,
    MaybeCount,
    Positive,
    half_of_last_digit,
    model_of,
    pictures,
)
from studies.validation.requests import WHATS, band, engine_of, hardware_of, value
from studies.validation.rows import Row

MEASURED: Final = "techniques.csv"
EXACT: Final = "techniques_exact.csv"
SPEEDUP: Final = "decode_speedup"
COUNTED: Final = ("prefill_flops", "kv_bytes", "accepted_tokens")
"""Quantities that need no device."""
JOIN: Final = " + "
FEWEST_TOKENS: Final = 1
"""Text of a request where a source counts visual tokens alone; FLOPs leave it out again."""
COUNTING_ENGINE: Final = "ideal"
"""Engine of the exact rows: it counts tokens, not blocks of them."""

Printed = Annotated[Decimal, Field(gt=0)]


class MethodFigure(Frozen):
    """A published measurement of a method.

    Parameters
    ----------
    rank : int
        Its row in the project's list of measurements.
    method, source, where : str
        Which method, and where it was printed: `source` is a key of `sources.toml`.
    model, hardware : str
        Of the catalogues.
    images : str
        Pictures, such as 7x336x336.
    frames : int or None
        Frames of one video, whose size `images` then is.
    visual_tokens : int or None
        In place of pictures.
    text_tokens, output_tokens, batch, tp, weight_bits : int
        The request, and how it was served.
    techniques : str
        What the method is here, as `--technique` takes it; several are joined by " + ".
    what : str
        The quantity.
    baseline, value : Decimal
        Without and with the method, as printed, ...
    unit : str
        ... in this unit.
    ratio : Decimal
        Value over baseline.
    convention : str
        How FLOPs are counted; empty where none are.
    scored : {"both", "ratio"}
        Whether the method's own value is scored too.
    note : str
        What was assumed.
    """

    rank: Positive
    method: str
    source: str
    where: str
    model: str
    hardware: str
    images: str
    frames: MaybeCount
    visual_tokens: MaybeCount
    text_tokens: Annotated[int, Field(ge=0)]
    output_tokens: Positive
    batch: Positive
    tp: Positive
    weight_bits: Positive
    techniques: str
    what: str
    baseline: Printed
    value: Printed
    unit: str
    ratio: Printed
    convention: Annotated[Convention | Literal["iid-acceptance"] | None, BeforeValidator(lambda text: text or None)]
    scored: Literal["both", "ratio"]
    note: str

    @model_validator(mode="after")
    def _check(self) -> MethodFigure:
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r} must be one of {', '.join(UNITS)}")
        if bool(self.images) == (self.visual_tokens is not None):
            raise ValueError("visual_tokens replaces images; give one of the two")
        if abs(float(self.value / self.baseline - self.ratio)) > RATIO_ROUNDING:
            raise ValueError(f"ratio={self.ratio} is not value/baseline; it is {float(self.value / self.baseline):.4f}")
        return self

    @property
    def name(self) -> str:
        """The method and what it was measured on."""
        return f"{self.rank} {self.method} on {self.model}"

    def workload(self) -> Workload:
        """Return the request."""
        visual = None if self.visual_tokens is None else float(self.visual_tokens)
        images = pictures(self.images)
        videos = [Video(i.width, i.height, float(self.frames), 1.0, frames=self.frames) for i in images if self.frames]
        return Workload(
            images=[] if self.frames else images,
            videos=videos,
            text_tokens=float(max(self.text_tokens, FEWEST_TOKENS)),
            output_tokens=float(self.output_tokens),
            visual_tokens=visual,
        )

    def rewrites(self) -> list[Technique]:
        """Return the techniques that the method is here.

        Raises
        ------
        Unsupported
            If a primitive of it is not modelled, with the row.
        """
        try:
            return [method(text) for text in self.techniques.split(JOIN)]
        except Unsupported as error:
            raise Unsupported(f"technique row {self.rank} ({self.techniques}): {error}") from None


RATIO_ROUNDING: Final = 1e-4
DEFINED: Final = ("x", "%")
"""Units whose baseline is one by definition."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A quantity without and with a method.

    Parameters
    ----------
    baseline, value : float
        In an SI unit, or counted.
    low, high : float or None
        Band of `value`.
    """

    baseline: float
    value: float
    low: float | None = None
    high: float | None = None


def rows_of(figure: MethodFigure) -> Iterator[Row]:
    """Yield what is scored of a measurement: its ratio, and the method's own value."""
    pair = counted(figure) if figure.what in COUNTED else timed(figure)
    scale = UNITS[figure.unit][1]
    rounding = half_of_last_digit(figure.value)
    if figure.scored == "both":
        yield Row(
            figure.name,
            figure.what,
            pair.value,
            float(figure.value) * scale,
            UNITS[figure.unit][0],
            figure.source,
            low=pair.low,
            high=pair.high,
            rounding=rounding * scale,
            note=figure.note,
        )
    yield Row(
        figure.name,
        f"{figure.what} ratio",
        pair.value / pair.baseline,
        float(figure.value / figure.baseline),
        "ratio",
        figure.source,
        rounding=(rounding / float(figure.value) + _baseline_rounding(figure)) * float(figure.ratio),
        note=figure.note,
    )


def _baseline_rounding(figure: MethodFigure) -> float:
    """Return how far rounding moves a baseline, as a share; 1 x and 100 % are what they are by definition."""
    return 0.0 if figure.unit in DEFINED else half_of_last_digit(figure.baseline) / float(figure.baseline)


def timed(figure: MethodFigure) -> Pair:
    """Return a time or memory without and with the method."""
    plain, rewritten = _predict(figure, ()), _predict(figure, figure.rewrites())
    if figure.what == SPEEDUP:
        return Pair(1.0, float(plain.tpot_s) / float(rewritten.tpot_s))
    low, high = band(rewritten, figure.what) or (None, None)
    return Pair(value(plain, figure.what), value(rewritten, figure.what), low, high)


def _predict(figure: MethodFigure, techniques: Sequence[Technique]) -> Prediction:
    return predict(
        model_of(figure.model),
        hardware_of(figure.hardware, figure.source),
        figure.workload(),
        techniques=techniques,
        batch=float(figure.batch),
        precision=Precision(weight_bits=figure.weight_bits),
        parallelism=Parallelism(tp=figure.tp),
        engine=engine_of(figure.source),
    )


def counted(figure: MethodFigure) -> Pair:
    """Return a quantity that needs no device without and with the method."""
    plain = build_query(model_of(figure.model), figure.workload(), load_engine(COUNTING_ENGINE))
    techniques = figure.rewrites()
    rewritten = compose(plain, techniques)
    if figure.what == "prefill_flops":
        return Pair(layer_flops(plain, figure), layer_flops(rewritten, figure))
    if figure.what == "kv_bytes":
        return Pair(float(kv_bytes_per_request(plain)), float(kv_bytes_per_request(rewritten)))
    strict = compose(plain, techniques[:1])
    return Pair(accepted_tokens(strict), accepted_tokens(rewritten))


def layer_flops(query: Query, figure: MethodFigure) -> float:
    """Return the FLOPs of prefill as the source counts them, each layer at the tokens that reach it."""
    convention = figure.convention
    if convention is None or convention == "iid-acceptance":
        raise ValueError(f"technique row {figure.rank}: convention={convention!r} must say how FLOPs are counted")
    tokens = [
        float(segment.visual_keep * query.visual_tokens + segment.text_keep * figure.text_tokens)
        for segment in query.decoder
        for _ in range(segment.n_layers)
    ]
    return float(prefill_flops(query.model.decoder, tokens, convention))


def accepted_tokens(query: Query) -> float:
    """Return the mean accepted tokens of a round, the target's own token not among them.

    Raises
    ------
    Unsupported
        If nothing drafts.
    """
    draft: Any = getattr(query, "draft", None)
    if draft is None:
        raise Unsupported("accepted tokens are those of a draft, and the query has none; speculate")
    return float(draft.accepted_tokens)


def is_known(what: str) -> bool:
    """Return whether a quantity can be predicted."""
    return what in (*WHATS, *COUNTED, SPEEDUP)
