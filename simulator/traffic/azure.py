"""Azure traces: `TIMESTAMP,ContextTokens,GeneratedTokens`, and with `NumImages` the multimodal one."""

from __future__ import annotations

import csv
import itertools
from datetime import datetime
from pathlib import Path

import numpy as np

from costmodel import Image
from simulator.request import Requests, requests_of
from simulator.traffic.shapes import pictures

ABOUT = "Azure LLM and LMM traces (CSV with TIMESTAMP, ContextTokens, GeneratedTokens)"
IMAGE_SIDE = 504
"""The trace says no sizes: ModServe reports a median side near 500 pixels."""
IMAGE_TOKENS = (IMAGE_SIDE // 28) ** 2
"""What such a picture is in Qwen2-VL and Qwen2.5-VL; the rest of `ContextTokens` is text."""
MICROSECOND_DIGITS = 26
"""Characters of a time up to its microseconds."""


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    first = head.splitlines()[0] if head else ""
    return "ContextTokens" in first and "GeneratedTokens" in first


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(itertools.islice(csv.DictReader(file), n))
    times = [datetime.fromisoformat(row["TIMESTAMP"].strip()[:MICROSECOND_DIGITS]) for row in rows]
    arrival_s = np.array([(time - times[0]).total_seconds() for time in times])
    order = np.argsort(arrival_s, kind="stable")
    context, output = (np.array([int(row[key]) for row in rows]) for key in ("ContextTokens", "GeneratedTokens"))
    counts = np.array([int(row.get("NumImages") or 0) for row in rows], dtype=np.int64)[order]
    text = np.maximum(1, context[order] - counts * IMAGE_TOKENS)
    size = (Image(IMAGE_SIDE, IMAGE_SIDE),)
    items = pictures(counts, np.zeros(int(counts.sum()), dtype=np.int64), size) if counts.any() else None
    at = arrival_s[order] - arrival_s.min()
    return requests_of(at, text, np.maximum(1, output[order]), items=items, name="azure")
