"""Shared by the tests: the catalogue's configs, the real models beside it, and small ways to compare."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from costmodel import Image, Video, Workload, load_model, model_names
from costmodel.catalogue import load_model_files
from costmodel.errors import Unsupported

GOLDENS = Path(__file__).parent / "goldens"
FAST_MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b", "internvl3-8b")
"""Models whose pictures and files `tests.oracle` builds with the real processors."""
POINT = {"rel": 1e-12, "abs": 0.0}
"""Two ways to the same number: rounding alone may differ."""


def load_config(name: str) -> dict[str, Any]:
    """Return the config.json of a model of the catalogue."""
    return json.loads(load_model_files()[name])


@functools.cache
def representatives() -> list[str]:
    """Return one model a `model_type`, the smallest: what the fast suite runs where the slow one runs the catalogue."""
    by_size = sorted(model_names(), key=lambda name: load_model(name).parameters()["total"])
    smallest = {load_config(name)["model_type"]: name for name in reversed(by_size)}
    return sorted(smallest.values())


def models(names: Iterable[str] | None = None) -> list[Any]:
    """Return models as parameters, all of the catalogue if none are named: one a `model_type` is fast."""
    fast = representatives()
    names = model_names() if names is None else names
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@functools.cache
def seeing_models() -> list[str]:
    """Return the models of the catalogue that have a vision part."""
    return [name for name in model_names() if load_model(name).media]


def takes_videos(name: str) -> bool:
    """Return whether a model of the catalogue takes videos."""
    try:
        load_model(name).media.video(8, 640, 480)
    except Unsupported:
        return False
    return True


def images(*sizes: tuple[int, int], text_tokens: Any = 64, output_tokens: Any = 32) -> Workload:
    """Return a workload of images of these sizes."""
    return Workload(
        images=[Image(width, height) for width, height in sizes], text_tokens=text_tokens, output_tokens=output_tokens
    )


def clip(n_frames: int, width: int, height: int) -> Video:
    """Return a video of which so many frames are given to the model."""
    return Video(width, height, seconds=float(n_frames), fps=1.0, frames=n_frames)


CLEAN_ERRORS = (ValueError, LookupError, Unsupported)


def assert_clean(error: BaseException) -> None:
    """Check that an error is one of ours, in one line that a person can read."""
    message = str(error)
    assert type(error) in CLEAN_ERRORS, f"{type(error).__name__}: {message}"
    assert message, type(error).__name__
    assert "\n" not in message, message
    assert len(message.partition(" known: ")[0]) < 400, message  # behind it stands a list of names
