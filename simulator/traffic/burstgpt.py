"""BurstGPT traces: `Timestamp,Model,Request tokens,Response tokens,…`, times in seconds."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np

from simulator.request import Requests, requests_of

ABOUT = "BurstGPT traces (CSV with Timestamp, Request tokens, Response tokens)"


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    first = head.splitlines()[0] if head else ""
    return "Request tokens" in first and "Response tokens" in first


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file; rows without an answer, which failed, are left out."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = [row for row in itertools.islice(csv.DictReader(file), n) if int(row["Response tokens"]) > 0]
    times = np.array([float(row["Timestamp"]) for row in rows])
    order = np.argsort(times, kind="stable")
    text, output = (np.array([int(row[key]) for row in rows])[order] for key in ("Request tokens", "Response tokens"))
    return requests_of(times[order] - times.min(), np.maximum(1, text), output, name="burstgpt")
