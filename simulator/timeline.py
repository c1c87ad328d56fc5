"""A timeline of a run for https://ui.perfetto.dev, in the Chrome trace format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from costmodel.base import Array
from simulator.trace import Trace

MICRO: Final = 1e6
"""The format counts microseconds."""
MOST_REQUESTS: Final = 20_000
MOST_STEPS: Final = 500_000
"""Rows that are written: the viewer holds no more; the first ones are kept."""
WORKERS, REQUESTS = 1, 2
PHASES: Final = (
    ("preprocess", "arrival_s", "queued_s"),
    ("queue", "queued_s", "scheduled_s"),
    ("prefill", "scheduled_s", "first_token_s"),
    ("decode", "first_token_s", "finish_s"),
)
ELSEWHERE: Final = (("move", "first_token_s", "joined_s"), ("decode", "joined_s", "finish_s"))
"""What stands for the last phase where another worker decodes."""


def write_timeline(trace: Trace, path: str | Path) -> None:
    """Write a timeline; gzip if the name ends in .gz."""
    with _opened(path) as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for index, event in enumerate(events(trace)):
            file.write((",\n" if index else "") + json.dumps(event))
        file.write("\n]}\n")


def _opened(path: str | Path) -> TextIO:
    if str(path).endswith(".gz"):
        return gzip.open(path, "wt", encoding="utf-8")
    return Path(path).open("w", encoding="utf-8")


def events(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the events: steps and counters of every worker, phases of every request."""
    for process, name in ((WORKERS, "workers"), (REQUESTS, "requests")):
        yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    for worker, steps in enumerate(trace.steps):
        name = f"worker {worker} ({trace.pool_of(worker).pool.name})"
        yield {"ph": "M", "pid": WORKERS, "tid": worker, "name": "thread_name", "args": {"name": name}}
        yield from _steps(worker, steps)
    yield from _requests(trace)


def _steps(worker: int, steps: Mapping[str, Array]) -> Iterator[dict[str, Any]]:
    names = list(steps)
    for row in np.column_stack(list(steps.values()))[:MOST_STEPS].tolist():
        held = dict(zip(names, row, strict=True))
        start, end = held.pop("start_s"), held.pop("end_s")
        encode_s = held.pop("encode_s")
        if encode_s:
            items = {"items": held["encoded_items"]}
            yield _slice("encode", worker, (start, start + encode_s), items)
        if held["chunk_tokens"] or held["decoding"]:  # workers that encode for others do nothing else
            yield _slice(_name(held), worker, (start + encode_s, end), held)
        for counter in ("waiting", "running", "kv_used_blocks"):
            label = f"{counter} of worker {worker}"
            yield {"ph": "C", "pid": WORKERS, "name": label, "ts": end * MICRO, "args": {counter: held[counter]}}


def _name(step: Mapping[str, float]) -> str:
    if step["chunk_tokens"] and step["decoding"]:
        return "prefill + decode"
    return "prefill" if step["chunk_tokens"] else "decode"


def _slice(name: str, worker: int, span_s: tuple[float, float], arguments: Mapping[str, float]) -> dict[str, Any]:
    start_s, end_s = span_s
    span = {"ts": start_s * MICRO, "dur": (end_s - start_s) * MICRO}
    return {"ph": "X", "pid": WORKERS, "tid": worker, "name": name, **span, "args": dict(arguments)}


def _requests(trace: Trace) -> Iterator[dict[str, Any]]:
    columns = trace.columns
    for request in np.flatnonzero(trace.finished)[:MOST_REQUESTS].tolist():
        moved = not np.isnan(columns["joined_s"][request])
        for name, start, end in (*PHASES[:-1], *ELSEWHERE) if moved else PHASES:
            first, last = float(columns[start][request]), float(columns[end][request])
            if last > first:
                same = {"cat": "request", "id": request, "pid": REQUESTS, "tid": 0, "name": name}
                yield {"ph": "b", "ts": first * MICRO, **same, "args": {"request": request}}
                yield {"ph": "e", "ts": last * MICRO, **same}
