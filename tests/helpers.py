"""Shared by the tests: the catalogue's configs, the real models beside it, and small ways to compare."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from costmodel import Image, Video, Workload, model_names
from costmodel.catalogue import load_model_files
from costmodel.errors import Unsupported

GOLDENS = Path(__file__).parent / "goldens"
FAST_MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b", "internvl3-8b")
"""One model a family: what the fast suite runs where the slow one runs the catalogue."""
ORACLE_TYPES = {"llava", "qwen2_5_vl", "internvl"}
"""The `model_type` values that `tests.oracle` builds and counts."""
POINT = {"rel": 1e-12, "abs": 0.0}
"""Two ways to the same number: rounding alone may differ."""


def load_config(name: str) -> dict[str, Any]:
    """Return the config.json of a model of the catalogue."""
    return json.loads(load_model_files()[name])


def models(*, oracle: bool = False) -> list[Any]:
    """Return the models of the catalogue as parameters: one a family is fast, the others are slow."""
    names = [n for n in model_names() if not oracle or load_config(n).get("model_type") in ORACLE_TYPES]
    return [pytest.param(name, marks=() if name in FAST_MODELS else pytest.mark.slow) for name in names]


@functools.lru_cache(maxsize=2)
def real_model(name: str) -> Any:
    """Return the `transformers` model on the meta device."""
    from tests.oracle import transformers_counts

    return transformers_counts.build(load_config(name))


def takes_videos(name: str) -> bool:
    """Return whether a model of the catalogue takes videos."""
    return load_config(name)["model_type"] != "llava"


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
