"""The published figures that ship with the project: `published/*.csv`, and where they are from, `sources.toml`."""

from __future__ import annotations

import csv
import functools
import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from costmodel import Image, load_model
from costmodel.base import Frozen, FrozenMap
from costmodel.conventions import Convention
from costmodel.errors import one_line, unknown
from costmodel.models import ModelSpec

FOLDER: Final = Path(__file__).with_name("published")
SOURCES: Final = "sources.toml"
UNITS: Final[Mapping[str, tuple[str, float]]] = {
    "ms": ("s", 1e-3),
    "s": ("s", 1.0),
    "%": ("share", 1e-2),
    "GB": ("bytes", 1e9),
    "MB": ("bytes", 1e6),
    "bytes": ("bytes", 1.0),
    "GiB": ("bytes", 2.0**30),
    "T": ("FLOP", 1e12),
    "tokens": ("tokens", 1.0),
    "parameters": ("parameters", 1.0),
    "FLOP/byte": ("FLOP/byte", 1.0),
    "x": ("times", 1.0),
}
"""Printed units: the SI unit, and how many of it one is."""
PICTURES: Final = re.compile(r"(?:(?P<count>\d+)x)?(?P<width>\d+)x(?P<height>\d+)")

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
MaybeCount = Annotated[Count | None, BeforeValidator(lambda text: text or None)]
SomeRow = TypeVar("SomeRow", bound=Frozen)


class SourceSettings(Frozen):
    """What is known of the machine or the clock of a source, beyond its engine: the same for all of its rows.

    Parameters
    ----------
    kernels_alone : bool
        Whether it reports the time of the device, so that no host is waited for.
    host_speed : float or None
        Speed of the measured host, as `HardwareProfile.host_speed`; that of the device's usual host if not given.
    request_host_s : float or None
        What a request waits for beside the device [s]; that of the engine if not given.
    calibration : tuple of str
        Rows of `end_to_end.csv`, unoptimised baselines all, that the numbers were derived from; they are not scored.
    why : str
        How they were derived, or where the source says so.
    """

    kernels_alone: bool = False
    host_speed: Annotated[float, Field(gt=0)] | None = None
    request_host_s: Annotated[float, Field(ge=0)] | None = None
    calibration: tuple[str, ...] = ()
    why: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> SourceSettings:
        numbers = self.host_speed is not None or self.request_host_s is not None
        if numbers != bool(self.calibration):
            raise ValueError("calibration must name the baselines that numbers were derived from, and no others")
        return self


class PublishedSource(Frozen):
    """Where figures are from.

    Parameters
    ----------
    title, url, licence : str
        The document.
    software : str
        What was measured; empty for figures that need no machine.
    engine : str
        The engine that stands for it: one a source.
    settings : SourceSettings or None
        What is known of its machine and its clock.
    """

    title: str
    url: str
    licence: str = ""
    software: str = ""
    engine: str = ""
    settings: SourceSettings | None = None


class _Sources(Frozen):
    schema_version: Literal[1]
    sources: FrozenMap[PublishedSource]


class Figure(Frozen):
    """A printed figure and the request that it belongs to.

    Parameters
    ----------
    name, where : str
        What it is, and where in its source.
    source : str
        Key of `sources.toml`.
    model, hardware : str
        Of the catalogue, or a folder of `published/`.
    what : str
        The quantity.
    published : Decimal
        As printed, ...
    unit : str
        ... in this unit, a key of `UNITS`.
    images : str
        Pictures, such as 4x1920x1080 for four of them.
    visual_tokens : int or None
        In place of pictures, where the source gives tokens.
    text_tokens : int
    note : str
        What was assumed.
    """

    name: str
    source: str
    where: str
    model: str
    hardware: str
    what: str
    published: Annotated[Decimal, Field(gt=0)]
    unit: str
    images: str
    visual_tokens: MaybeCount
    text_tokens: Count
    note: str

    @model_validator(mode="after")
    def _check(self) -> Figure:
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r} must be one of {', '.join(UNITS)}")
        if self.images and self.visual_tokens is not None:
            raise ValueError("visual_tokens replaces images; give one or the other")
        self.pictures()
        return self

    @property
    def measured(self) -> float:
        """The figure in its SI unit."""
        return float(self.published) * UNITS[self.unit][1]

    @property
    def rounding(self) -> float:
        """Half of its last printed digit, in its SI unit."""
        digits = half_of_last_digit(self.published, whole=self.unit in WHOLE)
        return digits * UNITS[self.unit][1]

    @property
    def si_unit(self) -> str:
        """The unit of `measured`."""
        return UNITS[self.unit][0]

    def pictures(self) -> list[Image]:
        """Return the pictures of the request."""
        return pictures(self.images)


def pictures(text: str) -> list[Image]:
    """Return the pictures that a cell such as 4x1920x1080 stands for.

    Raises
    ------
    ValueError
        If it reads otherwise.
    """
    found: list[Image] = []
    for group in text.split(";") if text else ():
        parts = PICTURES.fullmatch(group.strip())
        if parts is None:
            raise ValueError(f"images={group!r} must read WIDTHxHEIGHT or COUNTxWIDTHxHEIGHT")
        found += [Image(int(parts["width"]), int(parts["height"]))] * int(parts["count"] or 1)
    return found


def half_of_last_digit(printed: Decimal, *, whole: bool = False) -> float:
    """Return half of the last printed digit; 0 for a whole number of what is printed in full."""
    exponent = printed.as_tuple().exponent
    assert isinstance(exponent, int)  # noqa: S101 - it is finite
    return 0.5 * float(10.0**exponent) if exponent < 0 or not whole else 0.0


WHOLE: Final = ("tokens", "parameters", "bytes")
"""Units whose figures are printed in full."""


class EndToEnd(Figure):
    """A figure of a served request.

    Parameters
    ----------
    output_tokens, batch, tp, weight_bits : int
        How it was served.
    """

    output_tokens: Positive
    batch: Positive
    tp: Positive
    weight_bits: Positive


class CountFigure(Figure):
    """A figure that needs no machine.

    Parameters
    ----------
    convention : str
        How FLOPs are counted; empty where none are.
    """

    convention: Convention | Literal[""]


class PhaseTimes(Frozen):
    """Medians of Splitwise: one prompt phase and one decode step.

    Parameters
    ----------
    model, hardware : str
    tp, prompt_tokens, output_tokens, batch, runs : int
        Devices, request, requests together, and runs that the medians are of.
    prompt_ms, token_ms, e2e_ms : float
        Times of the prompt phase, of a step, and of the request [ms].
    calibration : bool
        Whether the engine's host times were derived from it, so that it is not scored.
    """

    model: str
    hardware: str
    tp: Positive
    prompt_tokens: Positive
    output_tokens: Positive
    batch: Positive
    runs: Positive
    prompt_ms: Annotated[float, Field(gt=0)]
    token_ms: Annotated[float, Field(gt=0)]
    e2e_ms: Annotated[float, Field(gt=0)]
    calibration: bool


@functools.cache
def load_sources() -> Mapping[str, PublishedSource]:
    """Return the sources of published figures by key."""
    values: Any = tomllib.loads((FOLDER / SOURCES).read_text(encoding="utf-8"))
    try:
        return _Sources.model_validate(values).sources
    except ValidationError as error:
        raise one_line(error, SOURCES) from None


def source_of(key: str) -> PublishedSource:
    """Return a source.

    Raises
    ------
    LookupError
        If `sources.toml` has none of this key.
    """
    if key not in load_sources():
        raise unknown("source", key, load_sources())
    return load_sources()[key]


def read_rows(name: str, form: type[SomeRow]) -> list[SomeRow]:
    """Return the rows of a file of `published/`.

    Raises
    ------
    ValueError
        If a row is not what it must be, with one line that says where.
    """
    rows: list[SomeRow] = []
    with (FOLDER / name).open(encoding="utf-8", newline="") as lines:
        for number, values in enumerate(csv.DictReader(lines), start=2):
            try:
                rows.append(form.model_validate(values))
            except ValidationError as error:
                raise one_line(error, f"{name} line {number}") from None
    return rows


def model_of(name: str) -> ModelSpec:
    """Return a model of the catalogue, or that of a folder of `published/`."""
    folder = FOLDER / name
    return load_model(folder if name and folder.is_dir() else name)
