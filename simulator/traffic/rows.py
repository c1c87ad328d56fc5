"""Our own tables: CSV with arrival_s, text_tokens, output_tokens and, if there are pictures, number and size."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np

from costmodel import Image
from simulator.request import Requests, requests_of
from simulator.traffic.shapes import pictures

ABOUT = "tables (CSV with arrival_s, text_tokens, output_tokens; optional images, width, height)"
NEEDED = ("arrival_s", "text_tokens", "output_tokens")


def matches(head: str) -> bool:
    """Return whether a file begins like this format; what `lvlm simulate -o` writes does."""
    first = head.splitlines()[0].split(",") if head else []
    return all(name in first for name in NEEDED)


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(itertools.islice(csv.DictReader(file), n))
    times = np.array([float(row["arrival_s"]) for row in rows])
    order = np.argsort(times, kind="stable")
    rows = [rows[i] for i in order]
    text, output = (np.array([int(float(row[key])) for row in rows]) for key in NEEDED[1:])
    counts = np.array([int(row.get("images") or 0) for row in rows], dtype=np.int64)
    items = None
    if counts.any():
        wanted = [Image(int(row["width"]), int(row["height"])) for row in rows for _ in range(int(row["images"] or 0))]
        sizes = list(dict.fromkeys(wanted))
        items = pictures(counts, np.array([sizes.index(size) for size in wanted]), sizes)
    return requests_of(times[order] - times.min(), text, output, items=items, name=Path(path).stem)
