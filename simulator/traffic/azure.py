"""Azure traces: `TIMESTAMP,ContextTokens,GeneratedTokens`, and with `NumImages` the multimodal one.

The columns are those of the data set's own description [1]_; the traces name no sizes of pictures.

References
----------
.. [1] https://github.com/Azure/AzurePublicDataset, AzureLMMInferenceDataset2025.md and AzureLLMInferenceDataset2023.md.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from costmodel import Image
from costmodel.base import Array
from costmodel.errors import unknown
from simulator.request import Ints, Items, Requests, requests_of
from simulator.traffic.fields import Row, at_least_one, csv_rows, requests
from simulator.traffic.shapes import pictures

ABOUT = "Azure LLM and LMM traces (CSV with TIMESTAMP, ContextTokens, GeneratedTokens; optional NumImages)"
NEEDED = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
IMAGE_SIDE = 504
"""The trace says no sizes: ModServe reports a median side near 500 pixels."""
IMAGE_TOKENS = (IMAGE_SIDE // 28) ** 2
"""What such a picture is in Qwen2-VL and Qwen2.5-VL; the rest of `ContextTokens` is text."""
READINGS: Final = ("pictures", "tiles")
"""What `NumImages` counts. ModServe took it for pictures; its steps at perfect squares look like tiles of one."""
BEYOND_MICROSECONDS: Final = re.compile(r"(\.\d{6})\d+")


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    first = head.splitlines()[0] if head else ""
    return "ContextTokens" in first and "GeneratedTokens" in first


def load(path: str | Path, n: int | None = None, *, images: str = "pictures") -> Requests:
    """Return the requests of a file.

    Parameters
    ----------
    path : str or Path
    n : int, optional
        Rows that are read.
    images : str
        What `NumImages` counts: pictures, each of `IMAGE_SIDE`, or the tiles of one picture.
    """
    if images not in READINGS:
        raise unknown("reading of NumImages", images, READINGS)
    rows = csv_rows(path, NEEDED, n)
    arrival_s = _times(rows)
    order = np.argsort(arrival_s, kind="stable")
    rows = [rows[i] for i in order]
    notes: list[str] = []
    context = np.array([row.whole("ContextTokens") for row in rows], dtype=np.int64)
    output = at_least_one([row.whole("GeneratedTokens") for row in rows], "generated", notes)
    counts = np.array([row.whole("NumImages") if row.has("NumImages") else 0 for row in rows], dtype=np.int64)
    text = context - counts * IMAGE_TOKENS
    short = int((text < 1).sum())
    if short:
        notes.append(f"{requests(short)} with no context tokens beside the pictures: text counted as one")
    items = _items(counts, images) if counts.any() else None
    return requests_of(arrival_s[order], np.maximum(1, text), output, items=items, name="azure", notes=notes)


def _times(rows: list[Row]) -> Array:
    """Return when requests came, after the first of them [s]."""
    found = []
    for row in rows:
        text = BEYOND_MICROSECONDS.sub(r"\1", row.text("TIMESTAMP").strip())
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise row.wrong("TIMESTAMP", "must be a date and time such as 2023-11-16 18:17:03.9799600") from None
        found.append(time.replace(tzinfo=time.tzinfo or UTC))
    first = min(found)
    return np.array([(time - first).total_seconds() for time in found])


def _items(counts: Ints, reading: str) -> Items:
    if reading == "pictures":
        size = (Image(IMAGE_SIDE, IMAGE_SIDE),)
        return pictures(counts, np.zeros(int(counts.sum()), dtype=np.int64), size)
    different, kind = np.unique(counts[counts > 0], return_inverse=True)
    return pictures(np.minimum(counts, 1), kind, [_tiled(int(tiles)) for tiles in different])


def _tiled(tiles: int) -> Image:
    """Return a picture of so many tiles, about as wide as high and of exactly their area."""
    high = max(1, round(tiles**0.5))
    return Image(round(IMAGE_SIDE * tiles / high), IMAGE_SIDE * high)
