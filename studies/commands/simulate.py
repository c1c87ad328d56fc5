"""`lvlm simulate`: requests through a deployment, and the serving report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Console, RenderableType
from rich.table import Table

from costmodel.units import SECONDS_PER_HOUR
from simulator import Report, Requests, ServingPlan, Slo, Trace, check, report
from simulator import simulate as run
from simulator.assembly import assumptions
from simulator.report import confidence
from simulator.timeline import write_timeline
from simulator.topology import STAGES
from studies import serving
from studies.options import FOR_PEOPLE, Format, Texts
from studies.output import Answer, emit, note
from studies.serving import Asked, Deployment, Promises
from studies.tables import GB, MISSING, number, percent, seconds, sections, table

LATENCIES: Final = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end to end"}
FAILURES: Final = {
    "crash": "{:,} x a worker crashed",
    "straggler": "{:,} x a worker was slow",
    "link": "{:,} x a link was lost or slow",
    "preprocessing": "{:,} x CPUs were slow",
}
ROUNDING: Final = 1e-9
"""Share of a time that sums may be off by."""
LONG_RUN: Final = 20_000
"""Requests from which on progress is shown."""


def simulate(
    plan: str | None = None,
    /,
    *,
    deployment: Deployment = Deployment(),  # noqa: B008 - frozen
    asked: Asked = Asked(),  # noqa: B008
    promises: Promises = Promises(),  # noqa: B008
    compare: Texts = (),
    output: Annotated[str | None, Parameter(name=("-o", "--output-file"))] = None,
    timeline: str | None = None,
    plot: str | None = None,
    form: Format = FOR_PEOPLE,
) -> None:
    """Simulate serving: latencies, promises kept, goodput, use of the hardware, money and energy.

    Parameters
    ----------
    plan : str
        A PLAN.toml; or give --model and --hardware.
    compare : tuple of str
        Another system under the same traffic. Repeat for several.
    output : str
        A file for a row a request, .csv or .parquet; for the keys of vllm bench serve, .json; or for Mooncake's lines,
        .jsonl.
    timeline : str
        A file for https://ui.perfetto.dev: .json or .json.gz.
    plot : str
        A file for distributions and queues over time: .svg or .png.
    """
    wanted = serving.plan_of(plan, deployment)
    for said in assumptions(wanted) if plan is None else ():
        note(said)
    if deployment.dump_plan:
        sys.stdout.write(wanted.as_toml())
        return
    slo, comes = serving.slo_of(promises, wanted), serving.asked_of(asked, wanted)
    runs = [_run(wanted, serving.requests_of(comes, asked.seed + i), asked.seed + i) for i in range(asked.seeds)]
    reports = [report(trace, slo) for trace in runs]
    others = {name: _other(name, wanted, runs[0], slo) for name in compare}
    _write(runs[0], reports[0], output=output, timeline=timeline, plot=plot)
    values = reports[0].as_dict()
    if len(reports) > 1:
        values["confidence"] = confidence(reports)
    if others:
        values["compare"] = {name: other.as_dict() for name, other in others.items()}
    inputs: dict[str, Any] = {"plan": wanted.model_dump(mode="json", by_alias=True), "workload": comes.model_dump()}
    inputs |= {"slo": slo.model_dump(), "seed": asked.seed, "seeds": asked.seeds}
    every = {serving_name(wanted): reports[0], **others}
    emit(
        Answer(
            "simulate",
            inputs,
            values,
            lambda: [_row(name, one) for name, one in every.items()],
            lambda to: _show(to, wanted, every, values.get("confidence")),
        ),
        form,
    )


def serving_name(plan: ServingPlan) -> str:
    """Return what a plan is called in a table."""
    return plan.policies.batch


def _run(plan: ServingPlan, requests: Requests, seed: int) -> Trace:
    with _progress(len(requests)) as tick:
        trace = run(plan, requests, seed=seed, progress=tick)
    check(trace)
    return trace


def _other(name: str, plan: ServingPlan, first: Trace, slo: Slo) -> Report:
    return report(_run(serving.compared(name, plan), first.requests, first.seed), slo)


class _progress:  # noqa: N801 - used as a context
    """Progress on stderr of runs that are long, where a person looks."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._bar: Any = None

    def __enter__(self) -> Callable[[int], None] | None:
        if self.total < LONG_RUN or not sys.stderr.isatty():
            return None
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task("requests", total=self.total)
        return lambda done: self._bar.update(task, completed=done)

    def __exit__(self, *problem: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _write(trace: Trace, one: Report, *, output: str | None, timeline: str | None, plot: str | None) -> None:
    for said in trace.requests.notes:
        note(f"{trace.requests.name}: {said}")
    if output is not None:
        serving.write_run(trace, one, output)
        note(f"{len(trace):,} requests in {output}")
    if timeline is not None:
        write_timeline(trace, timeline)
        note(f"timeline in {timeline}; open it at https://ui.perfetto.dev")
    if plot is not None:
        from studies.serving_plot import draw

        draw(trace, plot)
        note(f"plot in {plot}")


def _row(name: str, one: Report) -> dict[str, Any]:
    held = one.as_dict()
    row: dict[str, Any] = {"system": name, **held["requests"]}
    for latency in LATENCIES:
        row |= {f"{latency}.{part}": value for part, value in held[latency].items()}
    row |= {f"slo_attainment.{part}": value for part, value in one.slo_attainment.items()}
    for pool, shares in one.utilisation.items():
        row |= {f"utilisation.{pool}.{stage}": share for stage, share in shares.items()}
    row |= {f"links.{link}": share for link, share in one.links.items()}
    row |= {f"failures.{kind}": count for kind, count in one.failures.items()}
    row |= {f"paid_worker_s.{pool}": paid_s for pool, paid_s in one.paid_worker_s.items()}
    plain = (int, float, str, type(None))
    return {**row, **{key: value for key, value in held.items() if isinstance(value, plain)}}


def _show(to: Console, plan: ServingPlan, every: Mapping[str, Report], sure: Mapping[str, Any] | None) -> None:
    for name, one in every.items():
        counts = ", ".join(f"{value:,} {key}" for key, value in one.requests.items() if value)
        head = f"{plan.model} on {serving.devices_of(plan)}, {name} batches: {counts}"
        ends = [f"{count:,} without an answer: {reason}" for reason, count in one.reasons.items()]
        more = [_classes(one)] if one.classes else []
        more += [_links(plan, one)] if one.links else []
        parts: list[RenderableType] = [head, _latencies(one), _figures(one), _pools(plan, one), *more]
        sections(to, *parts, *_troubles(plan, one), *ends, f"Bottleneck: {one.bottleneck}")
        to.print()
    if sure:
        rows = [(key, number(v["mean"]), f"{number(v['low'])} to {number(v['high'])}") for key, v in sure.items()]
        to.print(table(("95 % confidence", "mean", "interval"), rows))


def _pools(plan: ServingPlan, one: Report) -> Table:
    """Return what each pool did with its time."""
    rows = []
    for pool in plan.pools:
        shares = one.utilisation[pool.name]
        where = f"{pool.devices} x {pool.hardware}" if pool.devices else f"those of {pool.shares_devices_of}"
        used = (percent(shares[stage]) if stage in shares else MISSING for stage in (*STAGES, "idle"))
        rows.append((pool.name, where, f"{pool.replicas:,}", *used))
    return table(("time of pool", "devices", "workers", *STAGES, "idle"), rows, left=2)


def _classes(one: Report) -> Table:
    """Return what requests of each priority got."""
    rows = []
    for level, held in one.classes.items():
        times = (held["ttft_s"].p50, held["ttft_s"].p99, held["e2e_s"].mean)
        shown = (MISSING if value is None else seconds(value) for value in times)
        share = held["slo_attainment"]["joint"]
        counts = (f"{held['arrived']:,}", f"{held['finished']:,}")
        rows.append((level, *counts, *shown, MISSING if share is None else percent(share)))
    return table(("priority", "arrived", "finished", "TTFT p50", "TTFT p99", "end to end", "kept"), rows)


def _troubles(plan: ServingPlan, one: Report) -> list[str]:
    """Return in words what went wrong, and for how long workers were paid where that is not all the time."""
    lines = []
    if one.failures:
        happened = ", ".join(FAILURES[kind].format(count) for kind, count in one.failures.items())
        lines.append(f"went wrong: {happened}; requests began anew {one.retries:,} times")
    for pool in plan.pools:
        paid_s, all_s = one.paid_worker_s[pool.name], pool.replicas * one.span_s
        if abs(paid_s - all_s) > ROUNDING * all_s:
            paid, whole = (number(time_s / SECONDS_PER_HOUR) for time_s in (paid_s, all_s))
            many = f"{pool.replicas:,} all the time would be {whole}"
            lines.append(f"pool {pool.name!r}: {paid} worker-hours were paid; {many}")
    return lines


def _links(plan: ServingPlan, one: Report) -> Table:
    """Return how busy each link was."""
    rows = []
    for link in plan.links:
        name = f"{link.source} > {link.target}"
        if name in one.links:
            rate = f"{number(link.bandwidth_bytes_per_s * GB)} GB/s a {link.per}"
            rows.append((name, link.kind, rate, percent(one.links[name])))
    return table(("link", "medium", "rate", "busy"), rows, left=2)


def _latencies(one: Report) -> Table:
    rows = []
    for key, name in LATENCIES.items():
        spread = getattr(one, key)
        values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99)
        rows.append((name, *(MISSING if value is None else seconds(value) for value in values)))
    return table(("latency", "mean", "p50", "p90", "p95", "p99"), rows)


def _figures(one: Report) -> Table:
    grid = Table.grid(padding=(0, 3))
    grid.add_row(
        "throughput",
        f"{number(one.throughput_requests_per_s)} requests/s, {number(one.throughput_tokens_per_s)} tokens/s",
    )
    kept = [f"{name} {percent(share)}" for name, share in one.slo_attainment.items() if share is not None]
    if kept:
        grid.add_row("promises kept", f"{', '.join(kept)}; goodput {number(one.goodput_requests_per_s)} requests/s")
    caches = f"{percent(one.cached_prompt_share)} of prompt tokens, {percent(one.encoder_hit_share)} of pictures"
    grid.add_row("from caches", f"{caches}; {one.preemptions:,} preemptions")
    cost, energy = one.cost_per_request_usd, one.energy_per_token_j
    money = "unknown (no public price)" if cost is None else f"{number(cost)} USD a request"
    grid.add_row("cost, energy", f"{money}, {number(energy)} J a token")
    grid.add_row("simulated", f"{number(one.span_s)} s in {seconds(one.cpu_s)} of one core, {one.events:,} events")
    return grid
