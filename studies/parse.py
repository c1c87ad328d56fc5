"""Pictures, pixel limits and techniques from what was typed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from costmodel import Image, Video, technique
from costmodel.techniques import Technique

NUMBER: Final = r"[-+]?[\d.]+(?:e[-+]?\d+)?"
SIZE: Final = re.compile(rf"({NUMBER})\s*[x×]\s*({NUMBER})", re.IGNORECASE)
LARGEST: Final = 1e15
"""Larger numbers are slips, and would be printed with all their digits."""
CLIP: Final = re.compile(rf"({NUMBER})s@({NUMBER})fps", re.IGNORECASE)


def image(text: str) -> Image:
    """Return an image from `WIDTHxHEIGHT` or `WIDTHxHEIGHT:CODEC`, or the one at this path.

    Examples
    --------
    >>> image("1920x1080")
    Image(width=1920, height=1080, codec='jpeg')
    >>> image("1920x1080:png")
    Image(width=1920, height=1080, codec='png')
    """
    head, colon, codec = text.strip().partition(":")
    size = SIZE.fullmatch(head)
    if size is None:
        return Image.open(text)
    width, height = _sides(size, f"image {text!r} must read WIDTHxHEIGHT in whole pixels, such as 1920x1080")
    return Image(width, height, codec.strip().lower()) if colon else Image(width, height)


def video(text: str) -> Video:
    """Return a video from `WIDTHxHEIGHT:SECONDSs@RATEfps`, or the one at this path.

    Examples
    --------
    >>> video("1280x720:5s@24fps")
    Video(width=1280, height=720, seconds=5.0, fps=24.0, frames=None, sample_fps=None)
    """
    head, colon, tail = text.strip().partition(":")
    size = SIZE.fullmatch(head.partition("@")[0])
    if size is None:
        return Video.open(text)
    rule = f"video {text!r} must read WIDTHxHEIGHT:SECONDSs@RATEfps, such as 1280x720:5s@24fps"
    clip = CLIP.fullmatch(tail) if colon else None
    if clip is None:
        raise ValueError(rule)
    width, height = _sides(size, rule)
    return Video(width, height, float(_number(clip[1], rule)), float(_number(clip[2], rule)))


def pixels(text: str) -> tuple[int, int]:
    """Return the smallest and the largest area [pixels] from `MIN:MAX`."""
    limits = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text.strip())
    if limits is None:
        raise ValueError(f"--pixels {text!r} must read MIN:MAX in whole pixels, such as 100352:602112")
    return int(limits[1]), int(limits[2])


def method(text: str) -> Technique:
    """Return a technique from `NAME` or `NAME:key=value,…`."""
    return named(*split_method(text))


def named(name: str, parameters: Mapping[str, Any]) -> Technique:
    """Return a technique by its name and parameters, which may be arrays."""
    return technique(name, **parameters)


def split_method(text: str) -> tuple[str, dict[str, float | str]]:
    """Return the name and the parameters of a technique.

    Examples
    --------
    >>> split_method("fastv:after_layer=2,keep=0.5,score=last")
    ('fastv', {'after_layer': 2.0, 'keep': 0.5, 'score': 'last'})
    """
    name, colon, rest = text.partition(":")
    parameters: dict[str, float | str] = {}
    for pair in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key.isidentifier() and equals and value):
            raise ValueError(f"--technique {text!r}: {pair!r} must read key=value, such as keep=0.5")
        if key in parameters:
            raise ValueError(f"--technique {text!r}: {key} is given twice; give it once")
        parameters[key] = _value(value)
    return name.strip(), parameters


def _value(text: str) -> float | str:
    return float(text) if re.fullmatch(NUMBER, text, re.IGNORECASE) else text


def _sides(size: re.Match[str], rule: str) -> tuple[int, int]:
    width, height = (_number(side, rule) for side in size.groups())
    if not (width.is_integer() and height.is_integer()):
        raise ValueError(rule)
    return int(width), int(height)


def _number(text: str, rule: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(rule) from None
    if abs(number) > LARGEST:
        raise ValueError(rule)
    return number
