"""Reports of guidellm: `benchmarks.json`, a benchmark a rate, each with its metrics and its requests.

Keys are those of its schemas [1]_: `benchmarks[].metrics.time_to_first_token_ms.successful` with mean and percentiles,
and `benchmarks[].requests.successful[]` with `prompt_tokens`, `output_tokens`, `request_start_time` (`start_time`
before version 0.4), `request_latency` [s], `time_to_first_token_ms`, `inter_token_latency_ms`. What guidellm calls
inter-token latency is one mean a request without its first token, which is our TPOT; it keeps no gaps between tokens.

References
----------
.. [1] https://github.com/vllm-project/guidellm, src/guidellm/schemas/request_stats.py and statistics.py,
   src/guidellm/benchmark/schemas/generative/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from simulator.request import Requests, requests_of
from simulator.results import MILLI, STATISTICS, Result, statistics
from simulator.traffic.fields import Row, at_least_one, json_object, requests

ABOUT = "reports of guidellm (benchmarks.json)"
UNANSWERED: Final = ("incomplete", "errored")
METRICS: Final = {
    "ttft_s": ("time_to_first_token_ms", MILLI),
    "tpot_s": ("inter_token_latency_ms", MILLI),
    "e2e_s": ("request_latency", 1.0),
}
"""By latency, the key and its unit [s]."""
STARTS: Final = ("request_start_time", "start_time")


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    return head.lstrip().startswith("{") and ('"benchmarks"' in head or "guidellm" in head)


def load(path: str | Path, n: int | None = None, *, benchmark: str = "") -> Requests:
    """Return the answered requests of a benchmark.

    Parameters
    ----------
    path : str or Path
    n : int, optional
        Requests that are kept, from the first.
    benchmark : str
        Which one, from 0; needed where the report has several.
    """
    one = _benchmark(json_object(path), benchmark)
    rows = one.part("requests").parts("successful")
    if not rows:
        raise one.part("requests").wrong("successful", "must have requests")
    key = next((key for key in STARTS if rows[0].has(key)), STARTS[0])
    rows = sorted(rows, key=lambda row: row.number(key))[:n]
    times = np.array([row.number(key) for row in rows])
    notes = _notes(one)
    text = at_least_one([row.whole("prompt_tokens") for row in rows], "prompt", notes)
    output = at_least_one([row.whole("output_tokens") for row in rows], "output", notes)
    return requests_of(times - times[0], text, output, name="guidellm", notes=notes)


def _benchmark(held: Row, wanted: str) -> Row:
    found = held.parts("benchmarks")
    if not found:
        raise held.wrong("benchmarks", "must have a benchmark")
    if not wanted and len(found) > 1:
        raise ValueError(f"{held.where}: benchmarks has {len(found)}; name one, such as {held.where}:benchmark=0")
    index = int(wanted) if wanted.isdigit() else 0 if not wanted else len(found)
    if index >= len(found):
        raise ValueError(f"benchmark={wanted} must be 0 to {len(found) - 1}, as {held.where} has {len(found)}")
    return found[index]


def _unanswered(one: Row) -> int:
    held = one.part("requests")
    return sum(len(held.sequence(key)) for key in UNANSWERED if held.has(key))


def _notes(one: Row) -> list[str]:
    lost, kept = _unanswered(one), len(one.part("requests").sequence("successful"))
    answered = _answered(one)
    notes = [f"{requests(lost)} not answered: left out"] if lost else []
    if answered is not None and answered > kept:
        notes.append(f"{requests(answered - kept)} answered and not in the file, which keeps a sample: left out")
    return notes


def _answered(one: Row) -> int | None:
    """Return how many requests were answered, where the report says so."""
    for owner, key in (
        ("scheduler_metrics", "requests_made"),
        ("metrics", "request_totals"),
        ("run_stats", "requests_made"),
    ):
        if one.has(owner) and one.part(owner).has(key):
            return one.part(owner).part(key).whole("successful")
    return None


def result(path: str | Path, *, benchmark: str = "") -> Result:
    """Return what a benchmark says of itself: from its requests where all are kept, else from its metrics."""
    one = _benchmark(json_object(path), benchmark)
    metrics, rows = one.part("metrics"), one.part("requests").parts("successful")
    answered = _answered(one)
    whole = bool(rows) and (answered is None or answered == len(rows))
    latencies = {}
    for latency, (key, unit) in METRICS.items():
        held = statistics([row.number(key) * unit for row in rows if row.has(key)]) if whole else {}
        found = held or _summary(metrics, key, unit)
        if found:
            latencies[latency] = found
    notes = () if whole else ("its metrics weight tpot_s by tokens in some versions",)
    return Result(
        name=Path(path).name,
        tool="guidellm",
        completed=len(rows) if answered is None else answered,
        failed=_unanswered(one),
        requests_per_s=_mean(metrics, "requests_per_second"),
        output_tokens_per_s=_mean(metrics, "output_tokens_per_second"),
        latencies=latencies,
        notes=notes,
    )


def _summary(metrics: Row, key: str, unit: float) -> dict[str, float]:
    if not metrics.has(key) or not metrics.part(key).has("successful"):
        return {}
    held = metrics.part(key).part("successful")
    points = held.part("percentiles")
    return {"mean": held.number("mean") * unit, **{name: points.number(name) * unit for name in STATISTICS[1:]}}


def _mean(metrics: Row, key: str) -> float | None:
    return metrics.part(key).part("successful").number("mean") if metrics.has(key) else None
