"""From the options of `lvlm simulate` to a plan and its traffic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Group, Parameter
from pydantic import ValidationError

from costmodel.errors import one_line, unknown
from simulator import Report, Requests, ServingPlan, Slo, Trace, traffic
from simulator.assembly import scaled
from simulator.results import vllm_result
from simulator.rows import write_rows
from simulator.service import Service
from simulator.serving_plan import Traffic
from simulator.traffic import mooncake
from studies.options import Flag, Texts, Whole
from studies.pools import asked_pools, assembled, set_fields

PLAN: Final = Group("Plan", sort_key=1)
TRAFFIC: Final = Group("Traffic", sort_key=2)
PROMISES: Final = Group("Promises", sort_key=3)

SYSTEMS: Final = {
    "vllm": {"engine": "vllm", "batch": "vllm"},
    "sglang": {"engine": "sglang", "batch": "sglang"},
    "sarathi": {"engine": "vllm", "batch": "sarathi"},
    "static": {"engine": "vllm", "batch": "static"},
}
"""Systems of one pool: the engine and the batch policy of each."""


@Parameter(name="*", group=PLAN)
@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How requests are served, without a plan's file.

    Parameters
    ----------
    system : str
        A serving system: vllm, sglang, sarathi, static.
    model : str
        A model, a config.json, a folder that holds one, or a hub id.
    hardware : str
        A device.
    gpus : int
        Devices: of all pools together, where there are several.
    pools : tuple of str
        A pool, STAGES=DEVICES or STAGES=DEVICES@HARDWARE, such as encode=1 and prefill+decode=3. Repeat for each.
    tp : int
        Devices of one worker; the others are more workers.
    set : tuple of str
        A setting of all pools, one by its name, the policies or the links between pools: pool.max_batch=64,
        prefill+decode.tp=2, policies.router=least-requests, links.mode=reserve. Repeat.
    dump_plan : bool
        Print the plan as TOML instead of simulating it.
    """

    system: str | None = None
    model: str | None = None
    hardware: str | None = None
    gpus: Whole | None = None
    pools: Texts = ()
    tp: Whole = 1
    set: Texts = ()
    dump_plan: Flag = False


@Parameter(name="*", group=TRAFFIC)
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What comes.

    Parameters
    ----------
    workload : str
        A workload of lvlm workloads, or the file of a trace; FILE:key=value sets an option of its format.
    rate : float
        Requests a second.
    arrivals : str
        poisson, gamma:cv=2, weibull:cv=2, uniform, on-off:on=10,off=30, diurnal:amplitude=0.5,period=86400, burst.
    concurrency : int
        A closed loop of so many users in place of a rate.
    requests : int
        How many.
    seed : int
        Equal seeds give equal runs.
    seeds : int
        Runs with seeds from --seed on, for confidence intervals.
    """

    workload: str | None = None
    rate: float | None = None
    arrivals: str | None = None
    concurrency: Whole | None = None
    requests: Whole | None = None
    seed: int = 0
    seeds: Whole = 1


@Parameter(name="*", group=PROMISES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """What is promised.

    Parameters
    ----------
    slo_ttft : float
        Longest time to first token [s].
    slo_tpot : float
        Longest time per output token [s].
    slo_e2e : float
        Longest time from arrival to the last token [s].
    """

    slo_ttft: Annotated[float | None, Parameter(name="--slo-ttft")] = None
    slo_tpot: Annotated[float | None, Parameter(name="--slo-tpot")] = None
    slo_e2e: Annotated[float | None, Parameter(name="--slo-e2e")] = None


NOTHING_PROMISED: Final = Promises()


def plan_of(path: str | None, deployment: Deployment, *, times: int = 1) -> ServingPlan:
    """Return the plan of a file, or of options, with every pool so many times.

    Raises
    ------
    ValueError
        If both are given, neither, or a setting is none.
    """
    typed = (deployment.system, deployment.model, deployment.hardware, deployment.pools, deployment.gpus)
    if path is not None:
        if any(typed) or deployment.tp != 1:
            raise ValueError(
                "PLAN.toml and --system, --model, --hardware, --gpus, --tp, --pools exclude each other; change the"
                " file, or --set"
            )
        return scaled(_of_file(path, deployment.set), times)
    elsewhere = all("@" in text for text in deployment.pools) and bool(deployment.pools)
    if deployment.model is None or (deployment.hardware is None and not elsewhere):
        raise ValueError("simulate needs PLAN.toml, or --model and --hardware; see lvlm simulate --help")
    return _of_system(deployment.system or "vllm", deployment, times)


def _of_system(name: str, deployment: Deployment, times: int) -> ServingPlan:
    if name not in SYSTEMS:
        raise unknown("system", name, SYSTEMS)
    system = SYSTEMS[name]
    common = {"hardware": deployment.hardware, "tp": deployment.tp, "engine": system["engine"]}
    policies = {"batch": system["batch"]}
    if deployment.pools:
        typed = asked_pools(deployment.pools, common)
        held = {"model": deployment.model, "pools": typed, "policies": policies}
        return assembled(held, deployment.set, deployment.gpus, times)
    alone = {**common, "devices": deployment.gpus or deployment.tp}
    return assembled({"model": deployment.model, "pools": [alone], "policies": policies}, deployment.set, None, times)


def devices_of(plan: ServingPlan) -> str:
    """Return the devices of a plan in words."""
    counts: dict[str, int] = {}
    for pool in plan.pools:
        counts[pool.hardware] = counts.get(pool.hardware, 0) + pool.devices
    return " + ".join(f"{count} x {hardware}" for hardware, count in counts.items())


def compared(name: str, plan: ServingPlan) -> ServingPlan:
    """Return the plan with another system in its place."""
    if name not in SYSTEMS:
        raise unknown("system", name, SYSTEMS)
    system = SYSTEMS[name]
    pools = tuple(pool.model_copy(update={"engine": system["engine"]}) for pool in plan.pools)
    policies = plan.policies.model_copy(update={"batch": system["batch"]})
    return plan.model_copy(update={"pools": pools, "policies": policies})


def _of_file(path: str, settings: tuple[str, ...]) -> ServingPlan:
    plan = ServingPlan.read(path)
    if not settings:
        return plan
    held = plan.model_dump(by_alias=True)
    links = set_fields(held, settings)
    held["links"] = [{**link, **links} for link in held["links"]]
    try:
        plan = ServingPlan.model_validate(held)
        _ = plan.topology
    except ValidationError as error:
        raise one_line(error, "plan") from None
    return plan


def asked_of(asked: Asked, plan: ServingPlan) -> Traffic:
    """Return the traffic: options stand above the plan's file.

    Raises
    ------
    ValueError
        If no workload is named, or neither a rate nor users.
    """
    base = plan.workload.model_dump() if plan.workload else {}
    if asked.workload is not None:
        base["name"] = asked.workload
    for key in ("rate", "arrivals", "concurrency", "requests"):
        value = getattr(asked, key)
        if value is not None:
            base[key] = value
            if key in ("rate", "concurrency"):
                base.pop("concurrency" if key == "rate" else "rate", None)
    if "name" not in base:
        raise ValueError("simulate needs --workload: a name of lvlm workloads, or the file of a trace")
    if asked.rate is not None and asked.concurrency is not None:
        raise ValueError("--rate and --concurrency exclude each other; give one of them")
    try:
        return Traffic.model_validate(base)
    except ValidationError as error:
        raise one_line(error, "traffic") from None


def requests_of(wanted: Traffic, seed: int) -> Requests:
    """Return the requests of a traffic."""
    if wanted.name in traffic.preset_names():
        rate, users = wanted.rate, wanted.concurrency
        return traffic.preset(wanted.name, rate, wanted.requests, seed, arrivals=wanted.arrivals, concurrency=users)
    path, options = traffic.with_options(wanted.name)
    if not Path(path).exists():
        raise unknown("workload", wanted.name, traffic.preset_names())
    if wanted.concurrency:
        raise ValueError("--concurrency replays no trace; leave it out, or give a workload by name")
    return traffic.read(path, rate=wanted.rate, n=wanted.requests, seed=seed, options=options)


def write_run(trace: Trace, one: Report, path: str) -> None:
    """Write a run: vLLM's result keys as .json, Mooncake's lines as .jsonl, else a row a request."""
    if path.endswith(".json"):
        Path(path).write_text(json.dumps(vllm_result(trace, one)) + "\n", encoding="utf-8")
    elif path.endswith(".jsonl"):
        requests, times = trace.requests, trace.columns["arrival_s"]
        service = _service(trace.plan) if requests.shared_items.any() else None
        mooncake.write(requests, path, service, arrival_s=times, prompt_tokens=trace.prompt_tokens)
    else:
        write_rows(trace, path)


def _service(plan: ServingPlan) -> Service:
    from simulator.step_service import StepService

    return StepService.of(plan)


def slo_of(promises: Promises, plan: ServingPlan) -> Slo:
    """Return what is promised: options stand above the plan's file."""
    base = plan.slo.model_dump() if plan.slo else {}
    typed = {"ttft_s": promises.slo_ttft, "tpot_s": promises.slo_tpot, "e2e_s": promises.slo_e2e}
    try:
        return Slo.model_validate({**base, **{key: value for key, value in typed.items() if value is not None}})
    except ValidationError as error:
        raise one_line(error, "promises") from None
