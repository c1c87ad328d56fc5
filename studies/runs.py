"""A measured run beside a simulated one, for `lvlm compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from simulator import Requests, ServingPlan, check, simulate, traffic
from simulator import results as held
from simulator.results import Difference, Result
from studies import serving
from studies.output import Answer, note
from studies.serving import Deployment
from studies.tables import MISSING, number, seconds, sections, table

SHOWN = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end to end"}
RATES = {"requests_per_s": "requests/s", "output_tokens_per_s": "output tokens/s"}
REMARK = "Errors are (simulated - measured) / measured."


def holds_result(text: str) -> bool:
    """Return whether a file, with or without options, is the result of a benchmark tool."""
    return held.holds_result(traffic.with_options(text)[0])


def compared(measured: str, simulated: str | None, *, model: str | None, hardware: str | None) -> Answer:
    """Return a measured result beside a simulated one.

    Parameters
    ----------
    measured : str
        The file of a result.
    simulated : str or None
        Another one, or a plan under which the measured requests are simulated.
    model, hardware : str or None
        The plan, where there is none.
    """
    path, options = traffic.with_options(measured)
    real = held.read_result(path, options=options)
    ours = _other(simulated, path, options, model=model, hardware=hardware)
    rows, missing = held.differences(real, ours)
    if not rows:
        raise ValueError(f"{real.name} and {ours.name} have no figure in common; save the runs in detail")
    inputs = {"measured": measured, "simulated": simulated, "model": model, "hardware": hardware}
    flat = [asdict(row) for row in rows]
    values = {"measured": asdict(real), "simulated": asdict(ours), "differences": flat, "missing": missing}
    return Answer("compare", inputs, values, lambda: flat, lambda to: _show(to, real, ours, rows, missing))


def _other(
    simulated: str | None, path: str, options: dict[str, str], *, model: str | None, hardware: str | None
) -> Result:
    if simulated is not None and not simulated.endswith(".toml"):
        where, others = traffic.with_options(simulated)
        return held.read_result(where, options=others)
    if simulated is None and not (model and hardware):
        raise ValueError("a result needs --simulated run.json or PLAN.toml, or --model and --hardware beside it")
    plan = serving.plan_of(simulated, Deployment(model=model, hardware=hardware) if simulated is None else Deployment())
    return _replayed(plan, traffic.read(path, options=options))


def _replayed(plan: ServingPlan, requests: Requests) -> Result:
    for said in requests.notes:
        note(f"{requests.name}: {said}")
    trace = simulate(plan, requests)
    check(trace)
    return held.result_of(trace)


def _show(to: Console, real: Result, ours: Result, rows: Sequence[Difference], missing: Sequence[str]) -> None:
    head = f"{Path(real.name).name}, {real.completed:,} requests, beside {ours.name}, {ours.completed:,} requests"
    counts = [f"{one.name}: {said}" for one in (real, ours) for said in one.notes]
    lines = table(("figure", "", "measured", "simulated", "error"), [_row(row) for row in rows], left=2)
    sections(to, head, lines, REMARK, *missing, *counts)


def _row(row: Difference) -> tuple[Any, ...]:
    error = MISSING if row.error is None else f"{row.error:+.1%}"
    form = seconds if row.metric in SHOWN else number
    name = SHOWN.get(row.metric) or RATES[row.metric]
    return name, row.statistic, form(row.measured), form(row.simulated), error
