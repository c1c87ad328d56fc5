"""Results of runs, measured or simulated: one shape for the files of all tools, and vLLM's keys for our own runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from costmodel.base import Array
from simulator.report import LATENCIES, PERCENTILES, Report, Spread
from simulator.trace import Trace
from simulator.traffic.read import format_of

STATISTICS: Final = ("mean", *(f"p{percent}" for percent in PERCENTILES))
MILLI: Final = 1e-3
SHORT: Final = {"ttft_s": "ttft", "tpot_s": "tpot", "itl_s": "itl", "e2e_s": "e2el"}
"""What vLLM calls the latencies in its keys."""
BACKEND: Final = "lvlm-sim"


@dataclass(frozen=True, slots=True)
class Result:
    """What one run says of itself.

    Parameters
    ----------
    name, tool : str
        The file, and what wrote it.
    completed, failed : int
        Requests.
    requests_per_s, output_tokens_per_s : float or None
        Of those that completed, over the whole run.
    latencies : mapping of str to mapping of str to float
        By latency (ttft_s, tpot_s, itl_s, e2e_s) and statistic (mean, p50, p90, p95, p99) [s]; what the run does not
        say is not there.
    notes : tuple of str
        What to know of its figures.
    """

    name: str
    tool: str
    completed: int
    failed: int
    requests_per_s: float | None
    output_tokens_per_s: float | None
    latencies: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()


def statistics(values: Sequence[float] | Array) -> dict[str, float]:
    """Return mean and percentiles of values, straight between neighbours; nothing where there are none."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return {}
    points = np.percentile(known, PERCENTILES).tolist()
    return dict(zip(STATISTICS, [float(known.mean()), *points], strict=True))


def holds_result(path: str | Path) -> bool:
    """Return whether a file is the result of a benchmark tool."""
    try:
        return hasattr(format_of(path), "result")
    except (OSError, ValueError):
        return False


def read_result(path: str | Path, *, options: Mapping[str, str] | None = None) -> Result:
    """Return what a benchmark tool says of a run.

    Parameters
    ----------
    path : str or Path
        Its file: of vLLM, guidellm or aiperf, or of `lvlm simulate -o run.json`.
    options : mapping of str to str, optional
        Of the format: the keywords of its `result`.

    Raises
    ------
    ValueError
        If it is no result, or a value in it is missing or wrong.
    """
    module = format_of(path)
    if not hasattr(module, "result"):
        raise ValueError(f"{Path(path).name} holds requests, of {module.ABOUT}, and no latencies; give a result")
    found: Result = module.result(path, **(options or {}))
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two runs.

    Parameters
    ----------
    metric, statistic : str
        A latency [s] and mean or percentile; or a rate [1/s], in total.
    measured, simulated : float
    error : float or None
        (simulated - measured) / measured; None where 0 was measured.
    """

    metric: str
    statistic: str
    measured: float
    simulated: float
    error: float | None


def differences(measured: Result, simulated: Result) -> tuple[list[Difference], list[str]]:
    """Return the figures that both runs have, and in words those that one of them lacks."""
    sides = (_figures(measured), _figures(simulated))
    both = [key for key in sides[0] if key in sides[1]]
    rows = []
    for metric, statistic in both:
        real, ours = (side[metric, statistic] for side in sides)
        rows.append(Difference(metric, statistic, real, ours, (ours - real) / real if real else None))
    lacking: dict[tuple[str, str], list[str]] = {}
    for one, mine, other in ((measured, sides[0], sides[1]), (simulated, sides[1], sides[0])):
        for metric, statistic in other:
            if (metric, statistic) not in mine:
                lacking.setdefault((one.name, metric), []).append(statistic)
    return rows, [f"{name} has no {metric}: {', '.join(names)}" for (name, metric), names in lacking.items()]


def _figures(one: Result) -> dict[tuple[str, str], float]:
    latencies = {
        (latency, name): held[name]
        for latency, held in ((key, one.latencies.get(key, {})) for key in LATENCIES)
        for name in STATISTICS
        if name in held
    }
    rates = {"requests_per_s": one.requests_per_s, "output_tokens_per_s": one.output_tokens_per_s}
    return {**latencies, **{(name, "total"): value for name, value in rates.items() if value is not None}}


def result_of(trace: Trace) -> Result:
    """Return what a simulated run says of itself."""
    done, span = trace.finished, trace.span_s
    return Result(
        name="the simulation",
        tool=BACKEND,
        completed=int(done.sum()),
        failed=len(trace) - int(done.sum()),
        requests_per_s=float(done.sum()) / span if span else None,
        output_tokens_per_s=float(trace.output_tokens[done].sum()) / span if span else None,
        latencies={name: _latency(trace, name) for name in LATENCIES},
        notes=trace.requests.notes,
    )


def _latency(trace: Trace, name: str) -> dict[str, float]:
    """Return the statistics of a latency as tools work them out; of gaps, which are weighted, as the report does."""
    if name != "itl_s":
        return statistics(getattr(trace, name)[trace.finished])
    return {key: value for key, value in asdict(Spread.of(*trace.itl)).items() if value is not None}


def vllm_result(trace: Trace, report: Report) -> dict[str, Any]:
    """Return a run by the keys of `vllm bench serve --save-result --save-detailed`.

    Parameters
    ----------
    trace : Trace
    report : Report
        Of the trace.

    Notes
    -----
    The trace keeps the gaps between tokens of all requests together, so `itls` spreads the gaps of a request evenly
    over its decode time, while the keys that end in `_itl_ms` are those of the true gaps. There is no date: equal seeds
    give equal bytes. `request_rate` is the rate at which requests came.
    """
    arrival, done = trace.columns["arrival_s"], trace.finished
    came = np.flatnonzero(~np.isnan(arrival))
    came = came[np.argsort(arrival[came], kind="stable")]
    first, span = float(arrival[came].min()) if len(came) else 0.0, float(np.ptp(arrival[came])) if len(came) else 0.0
    tokens = np.where(done, trace.output_tokens, 0)
    total_in, total_out = int(trace.prompt_tokens[done].sum()), int(tokens.sum())
    busy = report.span_s or 1.0
    found: dict[str, Any] = {
        "backend": BACKEND,
        "label": None,
        "model_id": trace.plan.model,
        "tokenizer_id": trace.plan.model,
        "num_prompts": len(trace),
        "request_rate": (len(came) - 1) / span if span else "inf",
        "burstiness": None,
        "max_concurrency": trace.requests.concurrency or None,
        "duration": report.span_s,
        "completed": int(done.sum()),
        "failed": len(came) - int(done.sum()),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": report.throughput_requests_per_s,
        "request_goodput": report.goodput_requests_per_s,
        "output_throughput": report.throughput_tokens_per_s,
        "total_token_throughput": (total_in + total_out) / busy,
        "input_lens": trace.prompt_tokens[came].tolist(),
        "output_lens": tokens[came].tolist(),
        "ttfts": np.where(done, trace.ttft_s, 0.0)[came].tolist(),
        "itls": [_even(trace, index) for index in came.tolist()],
        "start_times": (arrival[came] - first).tolist(),
        "generated_texts": [""] * len(came),
        "errors": ["" if done[index] else "not finished" for index in came.tolist()],
        "max_output_tokens_per_s": _most_tokens(trace),
        "max_concurrent_requests": _most_at_once(trace),
    }
    for latency in LATENCIES:
        found |= _keys(SHORT[latency], _latency(trace, latency), _deviation(trace, latency))
    return found


def _even(trace: Trace, index: int) -> list[float]:
    """Return the gaps between the tokens of a request, as if they were equal [s]."""
    gaps = int(trace.output_tokens[index]) - 1
    return [float(trace.tpot_s[index])] * gaps if trace.finished[index] and gaps else []


def _keys(short: str, held: Mapping[str, float], deviation: float | None) -> dict[str, float | None]:
    names = {"mean": "mean", "median": "p50", **{name: name for name in STATISTICS[1:]}}
    found = {f"{name}_{short}_ms": held[key] / MILLI if key in held else None for name, key in names.items()}
    return found | {f"std_{short}_ms": None if deviation is None else deviation / MILLI}


def _deviation(trace: Trace, latency: str) -> float | None:
    if latency == "itl_s":
        values, weights = trace.itl
        if not weights.sum():
            return None
        mean = float(np.average(values, weights=weights))
        return math.sqrt(np.average((values - mean) ** 2, weights=weights))
    held: Array = getattr(trace, latency)[trace.finished]
    held = held[~np.isnan(held)]
    return float(np.std(held)) if len(held) else None


def _most_at_once(trace: Trace) -> int:
    """Return the most requests between arrival and end; one that ends makes room for one that comes then."""
    done = trace.finished
    times = np.concatenate([trace.columns["finish_s"][done], trace.columns["arrival_s"][done]])
    change = np.repeat([-1, 1], int(done.sum()))
    order = np.argsort(times, kind="stable")
    return int(np.cumsum(change[order]).max(initial=0))


def _most_tokens(trace: Trace) -> float:
    """Return the most output tokens in a second of the run, those of a request evenly over its decode time."""
    done = np.flatnonzero(trace.finished)
    if not len(done):
        return 0.0
    counts = trace.output_tokens[done]
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    gap = np.repeat(np.nan_to_num(trace.tpot_s[done]), counts)
    begin = np.repeat(trace.columns["first_token_s"][done], counts) - float(np.nanmin(trace.columns["arrival_s"]))
    return float(np.bincount((begin + place * gap).astype(np.int64)).max())
