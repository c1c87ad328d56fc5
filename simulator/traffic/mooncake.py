"""Mooncake traces: JSON lines with timestamp [ms], input_length, output_length and the ids of blocks of 512 tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from simulator.request import NONE, Requests, requests_of

ABOUT = "Mooncake traces (JSON lines with timestamp, input_length, output_length, hash_ids)"
BLOCK_TOKENS = 512
MILLI = 1e-3


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    first = head.splitlines()[0] if head else ""
    return first.startswith("{") and '"input_length"' in first and '"hash_ids"' in head


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file.

    Notes
    -----
    An id stands for a block and all before it, so the last id that an earlier request had says how much is shared.
    """
    with Path(path).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, n)]
    rows.sort(key=lambda row: row["timestamp"])
    parent, shared = np.full(len(rows), NONE), np.zeros(len(rows), dtype=np.int64)
    seen: dict[int, int] = {}
    for index, row in enumerate(rows):
        known = list(itertools.takewhile(seen.__contains__, row["hash_ids"]))
        if known:
            parent[index] = seen[known[-1]]
            shared[index] = min(len(known) * BLOCK_TOKENS, row["input_length"])
        for block in row["hash_ids"]:
            seen.setdefault(block, index)
    lengths = {key: np.array([max(1, row[key]) for row in rows]) for key in ("input_length", "output_length")}
    times = np.array([row["timestamp"] * MILLI for row in rows])
    return requests_of(
        times - times.min(),
        lengths["input_length"],
        lengths["output_length"],
        links={"parent": parent, "shared_text_tokens": shared},
        name="mooncake",
    )
