"""Our own tables: CSV with arrival_s, text_tokens, output_tokens and, if there are pictures, number and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from costmodel import Image
from simulator.request import Items, Requests, requests_of
from simulator.traffic.fields import Row, csv_rows
from simulator.traffic.shapes import pictures

ABOUT = "tables (CSV with arrival_s, text_tokens, output_tokens; optional images, width, height, priority, patience_s)"
NEEDED = ("arrival_s", "text_tokens", "output_tokens")


def matches(head: str) -> bool:
    """Return whether a file begins like this format; what `lvlm simulate -o` writes does."""
    first = [name.strip() for name in head.splitlines()[0].split(",")] if head else []
    return all(name in first for name in NEEDED)


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file."""
    rows = csv_rows(path, NEEDED, n)
    times = np.array([row.number("arrival_s") for row in rows])
    order = np.argsort(times, kind="stable")
    rows = [rows[i] for i in order]
    text, output = (np.array([row.whole(key, 1) for row in rows], dtype=np.int64) for key in NEEDED[1:])
    links = {
        "priority": np.array([row.whole("priority") if row.has("priority") else 0 for row in rows], dtype=np.int64),
        "patience_s": np.array([_patience_s(row) for row in rows]),
    }
    at = times[order] - times.min()
    return requests_of(at, text, output, items=_items(rows), name=Path(path).stem, links=links)


def _patience_s(row: Row) -> float:
    if row.has("patience_s") and row.number("patience_s") == 0:
        raise row.wrong("patience_s", "must be more than 0")
    return row.number("patience_s") if row.has("patience_s") else np.inf


def _items(rows: list[Row]) -> Items | None:
    counts = np.array([row.whole("images") if row.has("images") else 0 for row in rows], dtype=np.int64)
    for row, count in zip(rows, counts.tolist(), strict=True):
        if row.has("items") and row.whole("items") != count:
            raise row.wrong("items", "has no images, width and height beside it; write the run as .jsonl instead")
    if not counts.any():
        return None
    wanted = [
        Image(row.whole("width", 1), row.whole("height", 1))
        for row, count in zip(rows, counts.tolist(), strict=True)
        for _ in range(count)
    ]
    sizes = list(dict.fromkeys(wanted))
    index = {size: kind for kind, size in enumerate(sizes)}
    return pictures(counts, np.array([index[size] for size in wanted], dtype=np.int64), sizes)
