"""Answers of `lvlm solve --vary rate` and `--vary gpus`: how much load a deployment bears, and how it scales."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console

from costmodel.errors import Unsupported
from simulator import ServingPlan
from simulator.scaling import TIMES, Scaled, scalability
from simulator.sweep import KNEE, Sweep, Tried, sweep
from studies import serving
from studies.load import Asked
from studies.output import Answer, note
from studies.tables import MISSING, number, percent, seconds, sections, table

SHOWN: Final = ("ttft_s", "tpot_s", "e2e_s")
"""Latencies in the rows of a sweep."""


def solve_rate(what: Asked) -> tuple[Answer, bool]:
    """Return the sweep over the rate, and whether any rate meets the target."""
    found = sweep(what.runs(), attained=what.attained, tolerance=what.load.tolerance)
    values: dict[str, Any] = {
        "vary": "rate",
        "value": found.goodput_steady,
        "unit": "requests/s",
        "goodput_last_pass": found.goodput_last_pass,
        "goodput_first_violation": found.goodput_first_violation,
        "goodput_steady": found.goodput_steady,
        "saturation_requests_per_s": found.saturation_per_s,
        "knee_requests_per_s": found.knee_per_s,
        "alone_s": found.alone_s,
        "tried": [_tried(one) for one in found.tried],
    }
    answer = Answer("solve", what.inputs, values, lambda: values["tried"], lambda to: _show_rate(to, what, found))
    _remark(found)
    return answer, found.goodput_steady is not None


def _tried(one: Tried) -> dict[str, Any]:
    held = asdict(one.report)
    row: dict[str, Any] = {"rate_requests_per_s": one.rate_per_s, "attainment": one.share, "passes": one.passes}
    names = ("throughput_requests_per_s", "throughput_tokens_per_s", "goodput_requests_per_s")
    row |= {name: held[name] for name in names}
    row |= {f"{name}.{part}": held[name][part] for name in SHOWN for part in ("mean", "p50", "p99")}
    return {**row, "bottleneck": held["bottleneck"]}


def _remark(found: Sweep) -> None:
    if found.goodput_first_violation is None:
        note("every rate keeps its promises: the run is too short to be overloaded; raise --requests")
    elif (found.goodput_steady or 0.0) > found.saturation_per_s:
        note("rates above saturation keep their promises, so short is the run; raise --requests")
    last, first = found.goodput_last_pass, found.goodput_first_violation
    if last is not None and first is not None and last > first:
        note(f"{number(last)} requests/s pass although {number(first)} fail; more --requests make this steadier")


def _head(what: Asked, plan: ServingPlan) -> str:
    kept = {"TTFT": what.slo.ttft_s, "TPOT": what.slo.tpot_s, "end to end": what.slo.e2e_s}
    promised = ", ".join(f"{name} {seconds(value)}" for name, value in kept.items() if value is not None)
    asked = f"{what.traffic.requests:,} requests of {what.traffic.name}; {percent(what.attained)} must keep {promised}"
    return f"{plan.model} on {serving.devices_of(plan)}, {plan.policies.batch} batches; {asked}"


def _show_rate(to: Console, what: Asked, found: Sweep) -> None:
    rows = [_cells(one) for one in found.tried]
    columns = ("requests/s", "kept", "finished/s", "TTFT mean", "TTFT p99", "TPOT p99", "end to end")
    last, first, knee = found.goodput_steady, found.goodput_first_violation, found.knee_per_s
    kept = "no rate keeps the promises" if last is None else f"promises are kept up to {number(last)} requests/s"
    broken = "" if first is None else f", and first broken at {number(first)}"
    bend = (
        "knee: not reached in a run of so few requests"
        if knee is None
        else f"knee: up to {number(knee)} requests/s a request takes less than {KNEE:g} times as long as alone"
        f" ({seconds(found.alone_s)})"
    )
    lines = [f"goodput: {kept}{broken}", bend, f"saturation: {number(found.saturation_per_s)} requests/s are finished"]
    held = next((one.report.bottleneck for one in found.tried if not one.passes), None)
    lines += [f"Bottleneck at {number(first)} requests/s: {held}"] if held else []
    sections(to, _head(what, what.plan_at(1)), table(columns, rows, left=0), "\n".join(lines))


def _cells(one: Tried) -> tuple[str, ...]:
    held = one.report
    times = (held.ttft_s.mean, held.ttft_s.p99, held.tpot_s.p99, held.e2e_s.mean)
    return (
        number(one.rate_per_s),
        percent(one.share),
        number(held.throughput_requests_per_s),
        *(MISSING if value is None else seconds(value) for value in times),
    )


def solve_gpus(what: Asked) -> tuple[Answer, bool]:
    """Return how the deployment scales, and whether the target is met at all."""
    rate, searched = what.load.rate, what.load.rate is None
    if rate is None:
        rate = sweep(what.runs(), attained=what.attained, tolerance=what.load.tolerance).goodput_steady
    elif not 0 < rate < math.inf:
        raise ValueError(f"--rate {rate} must be a positive number of requests a second")
    base, devices = rate, _devices(what)
    found = () if base is None else scalability(lambda k: what.runs(k)(k * base), sorted(devices))
    rows = [_scaled(one, rate or 0.0, devices[one.times]) for one in found]
    values = {"vary": "gpus", "rate_requests_per_s": rate, "rate_searched": searched, "scaled": rows}
    return Answer("solve", what.inputs, values, lambda: rows, lambda to: _show_gpus(to, what, rows)), bool(rows)


def _devices(what: Asked) -> dict[int, int]:
    """Return the devices of each size that was asked for; of those taken by default, as far as links reach."""
    found: dict[int, int] = {}
    for times in what.load.times or TIMES:
        try:
            found[times] = what.plan_at(times).devices
        except Unsupported as error:
            if what.load.times or not found:
                raise
            note(str(error))
            break
    return found


def _scaled(one: Scaled, rate: float, devices: int) -> dict[str, Any]:
    held = one.report
    return {
        "times": one.times,
        "devices": devices,
        "rate_requests_per_s": one.times * rate,
        "attainment": one.share,
        "slo_efficiency": one.slo_efficiency,
        "goodput_requests_per_s": held.goodput_requests_per_s,
        "goodput_efficiency": one.goodput_efficiency,
        "throughput_requests_per_s": held.throughput_requests_per_s,
        "throughput_efficiency": one.throughput_efficiency,
        "bottleneck": held.bottleneck,
    }


def _show_gpus(to: Console, what: Asked, rows: list[dict[str, Any]]) -> None:
    columns = ("devices", "requests/s", "kept", "ratio", "good/s", "ratio", "finished/s", "ratio")
    lines = [
        (
            f"{row['devices']:,}",
            number(row["rate_requests_per_s"]),
            percent(row["attainment"]),
            number(row["slo_efficiency"]),
            number(row["goodput_requests_per_s"]),
            number(row["goodput_efficiency"]),
            number(row["throughput_requests_per_s"]),
            number(row["throughput_efficiency"]),
        )
        for row in rows
    ]
    says = (
        "Ratios are over the first row, rates over as many times its rate; that of kept is Eq. 8 of arXiv:2604.05546."
    )
    sections(to, _head(what, what.plan_at(1)), table(columns, lines, left=0), says)
