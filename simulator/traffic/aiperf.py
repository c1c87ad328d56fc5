"""Records of NVIDIA aiperf: `profile_export.jsonl`, a request a line with its metadata, metrics and error.

Keys are those of its documentation [1]_. Each metric is an object with `value` and `unit`. What aiperf calls
inter-token latency is one mean a request, which is our TPOT; `inter_chunk_latency` has the gaps between the pieces
of an answer. Requests with one `x_correlation_id` are turns of a conversation.

References
----------
.. [1] https://github.com/ai-dynamo/aiperf, docs/tutorials/working-with-profile-exports.md and
   src/aiperf/common/models/record_models.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from costmodel.errors import unknown
from simulator.request import Requests, requests_of
from simulator.results import Result, statistics
from simulator.traffic.fields import Row, at_least_one, json_lines, requests
from simulator.traffic.sessions import turns_of

ABOUT = "records of aiperf (profile_export.jsonl)"
NANO: Final = 1e-9
UNITS: Final = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}
"""Of a time, in seconds."""
METRICS: Final = {"ttft_s": "time_to_first_token", "tpot_s": "inter_token_latency", "e2e_s": "request_latency"}
MEASURED: Final = "profiling"


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    first = head.splitlines()[0] if head else ""
    return first.startswith("{") and '"request_start_ns"' in first


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file; what failed, was cancelled or warmed up is left out, as notes say."""
    rows, notes = _answered(json_lines(path, n), Path(path).name)
    rows.sort(key=lambda row: row.part("metadata").whole("request_start_ns"))
    begin_ns = [row.part("metadata").whole("request_start_ns") for row in rows]
    end_ns = [row.part("metadata").whole("request_end_ns", begin) for row, begin in zip(rows, begin_ns, strict=True)]
    begin_s, end_s = (np.array([time - begin_ns[0] for time in times]) * NANO for times in (begin_ns, end_ns))
    text = at_least_one([_count(row, "input_sequence_length") for row in rows], "input", notes)
    output = at_least_one([_output(row) for row in rows], "output", notes)
    session = [str(row.part("metadata").values.get("x_correlation_id") or "") for row in rows]
    arrival_s, links = turns_of(session, begin_s, end_s, text, output)
    return requests_of(arrival_s, text, output, links=links, name="aiperf", notes=notes)


def _answered(rows: list[Row], name: str) -> tuple[list[Row], list[str]]:
    """Return the records of answered requests, and how many others there are."""
    warm = [row for row in rows if row.part("metadata").values.get("benchmark_phase", MEASURED) != MEASURED]
    rest = [row for row in rows if row not in warm] if warm else rows
    kept = [
        row for row in rest if not row.has("error") and row.part("metadata").values.get("was_cancelled") is not True
    ]
    counts = {"unanswered": len(rest) - len(kept), "of the warm-up": len(warm)}
    if not kept:
        raise ValueError(f"{name} has no request that was answered; give another run")
    return kept, [f"{requests(count)} {what}: left out" for what, count in counts.items() if count]


def _metric(row: Row, key: str) -> Row:
    return row.part("metrics").part(key)


def _count(row: Row, key: str) -> int:
    return _metric(row, key).whole("value")


def _output(row: Row) -> int:
    """Return the tokens of the answer, reasoning included where the record has them."""
    metrics = row.part("metrics")
    return _count(row, "output_sequence_length" if metrics.has("output_sequence_length") else "output_token_count")


def _unit(held: Row) -> float:
    name: Any = held.text("unit")
    if name not in UNITS:
        raise ValueError(f"{held.where}: {unknown('unit of a time', name, UNITS)}")
    return UNITS[name]


def result(path: str | Path) -> Result:
    """Return what the records say of the run."""
    every = json_lines(path)
    rows, notes = _answered(every, Path(path).name)
    latencies = {}
    for latency, key in METRICS.items():
        held = [_metric(row, key) for row in rows if row.part("metrics").has(key)]
        found = statistics([one.number("value") * _unit(one) for one in held])
        if found:
            latencies[latency] = found
    chunks = [_metric(row, "inter_chunk_latency") for row in rows if row.part("metrics").has("inter_chunk_latency")]
    gaps = statistics([gap * _unit(one) for one in chunks for gap in one.numbers("value")])
    if gaps:
        latencies["itl_s"] = gaps
    metadata = [row.part("metadata") for row in rows]
    begin = min(one.whole("request_start_ns") for one in metadata)
    span_s = (max(one.whole("request_end_ns") for one in metadata) - begin) * NANO
    return Result(
        name=Path(path).name,
        tool="aiperf",
        completed=len(rows),
        failed=len(every) - len(rows),
        requests_per_s=len(rows) / span_s if span_s else None,
        output_tokens_per_s=sum(map(_output, rows)) / span_s if span_s else None,
        latencies=latencies,
        notes=tuple(notes),
    )
