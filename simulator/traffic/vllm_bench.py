"""Results of `vllm bench serve --save-result`, with `--save-detailed` a list entry a request.

The keys are those that the tool writes [1]_: aggregates such as `request_throughput` and `p99_ttft_ms`, and in detail
`input_lens`, `output_lens`, `ttfts` [s], `itls` [s], `start_times` [s] and `errors`. `lvlm simulate -o run.json` writes
the same.

References
----------
.. [1] https://github.com/vllm-project/vllm, vllm/benchmarks/serve.py (`benchmark`, `calculate_metrics`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from costmodel.base import Array
from simulator.request import Requests, requests_of
from simulator.results import MILLI, SHORT, STATISTICS, Result, statistics
from simulator.traffic.arrivals import arrival_times
from simulator.traffic.fields import Row, at_least_one, json_object, requests

ABOUT = "results of vllm bench serve (JSON of --save-result --save-detailed)"
DETAILED: Final = ("input_lens", "output_lens")
IN_FULL: Final = "save the run with --save-detailed"


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    return head.lstrip().startswith("{") and '"total_input_tokens"' in head and '"completed"' in head


def load(path: str | Path, n: int | None = None, *, seed: int = 0) -> Requests:
    """Return the requests of a result; those that failed are left out, as a note says.

    Parameters
    ----------
    path : str or Path
    n : int, optional
        Requests that are kept, from the first.
    seed : int
        For arrivals that are drawn.

    Notes
    -----
    Requests come at their `start_times`. Older files have none; then they come as the tool sends them: gaps of a Gamma
    distribution of shape `burstiness` at `request_rate`, or all at once with `max_concurrency` users. The tool counts
    the prompt as a whole, so pictures are text here.
    """
    held = json_object(path)
    kept, failed = _kept(held)
    notes = [f"{requests(failed)} that failed: left out"] if failed else []
    prompt = np.array(held.wholes("input_lens"), dtype=np.int64)[kept]
    output = np.array(held.wholes("output_lens"), dtype=np.int64)[kept]
    users = 0
    if held.has("start_times"):
        times = np.array(held.numbers("start_times", -np.inf))[kept]
        order = np.argsort(times, kind="stable")[:n]
        at = times[order] - times[order].min()
    else:
        order = np.arange(len(kept))[:n]
        at, users = _as_sent(held, len(order), seed)
        notes.append("the file has no start_times; arrivals are drawn as the tool does")
    text, output = at_least_one(prompt[order].tolist(), "input", notes), output[order]
    return requests_of(at, text, output, concurrency=users, name="vllm-bench", notes=notes)


def _kept(held: Row) -> tuple[list[int], int]:
    """Return which requests have an answer, and how many do not."""
    for key in DETAILED:
        if not held.has(key):
            raise ValueError(f"{held.where}: {key} is missing, the file has aggregates alone; {IN_FULL}")
    lengths = held.numbers("output_lens")
    for key in ("input_lens", "ttfts", "itls", "start_times", "errors"):
        if held.has(key) and len(held.sequence(key)) != len(lengths):
            count = len(held.sequence(key))
            raise ValueError(f"{held.where}: {key} has {count} entries and output_lens {len(lengths)}; correct it")
    errors = held.sequence("errors") if held.has("errors") else [""] * len(lengths)
    kept = [index for index, (tokens, error) in enumerate(zip(lengths, errors, strict=True)) if tokens and not error]
    if not kept:
        raise ValueError(f"{held.where}: output_lens has no request that was answered; give another run")
    return kept, len(lengths) - len(kept)


def _as_sent(held: Row, n: int, seed: int) -> tuple[Array, int]:
    """Return arrivals [s] and users as the tool has them by its settings."""
    if held.values.get("request_rate") in ("inf", float("inf")):
        return np.zeros(n), held.whole("max_concurrency", 1) if held.has("max_concurrency") else 0
    rate = held.number("request_rate")
    burstiness = held.number("burstiness") if held.has("burstiness") else 1.0
    if not rate or not burstiness:
        raise held.wrong("request_rate" if not rate else "burstiness", "must be more than 0")
    return arrival_times(f"gamma:cv={burstiness**-0.5!r}", rate, n, np.random.default_rng(seed)), 0


def result(path: str | Path) -> Result:
    """Return what the run says of itself: the tool's own aggregates, and from its lists those that it left out."""
    held = json_object(path)
    detail = _detail(held)
    latencies = {}
    for latency, short in SHORT.items():
        found = {**statistics(detail.get(latency, ())), **_aggregates(held, short)}
        if found:
            latencies[latency] = {name: found[name] for name in STATISTICS if name in found}
    completed = held.whole("completed")
    total = held.whole("num_prompts") if held.has("num_prompts") else completed
    return Result(
        name=Path(path).name,
        tool=str(held.values.get("backend") or "vllm"),
        completed=completed,
        failed=held.whole("failed") if held.has("failed") else total - completed,
        requests_per_s=held.number("request_throughput"),
        output_tokens_per_s=held.number("output_throughput") if held.has("output_throughput") else None,
        latencies=latencies,
    )


def _aggregates(held: Row, short: str) -> dict[str, float]:
    names = {"mean": f"mean_{short}_ms", **{name: f"{name}_{short}_ms" for name in STATISTICS[1:]}}
    if not held.has(names["p50"]):
        names["p50"] = f"median_{short}_ms"
    return {name: held.number(key) * MILLI for name, key in names.items() if held.has(key)}


def _detail(held: Row) -> dict[str, list[float]]:
    """Return the latencies of the answered requests, as the tool works them out [s]."""
    if not (held.has("ttfts") and held.has("output_lens")):
        return {}
    kept, _ = _kept(held)
    ttfts, lengths = held.numbers("ttfts"), held.numbers("output_lens")
    found = {"ttft_s": [ttfts[index] for index in kept]}
    if not held.has("itls"):
        return found
    gaps = _gaps(held)
    found["itl_s"] = [gap for index in kept for gap in gaps[index]]
    found["e2e_s"] = [ttfts[index] + sum(gaps[index]) for index in kept]
    found["tpot_s"] = [sum(gaps[index]) / (lengths[index] - 1) for index in kept if lengths[index] > 1]
    return found


def _gaps(held: Row) -> list[list[float]]:
    lists: dict[str, Any] = {f"itls[{index}]": value for index, value in enumerate(held.sequence("itls"))}
    inside = Row(held.where, lists)
    return [inside.numbers(name) if lists[name] else [] for name in lists]
