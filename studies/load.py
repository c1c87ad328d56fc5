"""From the options of `lvlm solve --vary rate` and `--vary gpus` to what is simulated under which load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from cyclopts import Group, Parameter
from pydantic import ValidationError

from costmodel import Workload
from costmodel.errors import one_line, unknown
from simulator import Report, Requests, ServingPlan, Slo, check, report, simulate, traffic
from simulator.goodput import ATTAINED_SHARE
from simulator.serving_plan import Traffic
from simulator.step_service import StepService
from simulator.sweep import TOLERANCE
from studies import parse, serving
from studies.options import ONE_DEVICE, TEXT_PROMPT, Prompt, Serving, Texts, Whole
from studies.request import Request
from studies.serving import Deployment, Promises

LOAD: Final = Group("Load (--vary rate, gpus)", sort_key=2)
PROMISED: Final = {"ttft_s": "ttft_s", "tpot_s": "tpot_s", "total_s": "e2e_s"}
"""Targets that are promises to a request."""
ATTAINED: Final = "attainment"
"""The target that is the share of requests whose promises are kept."""


@Parameter(name="*", group=LOAD)
@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is simulated under which load.

    Parameters
    ----------
    system : str
        A serving system: vllm, sglang, sarathi, static.
    gpus : int
        Devices: of all pools together, where there are several.
    pools : tuple of str
        A pool, STAGES=DEVICES or STAGES=DEVICES@HARDWARE, such as encode=1 and prefill+decode=3. Repeat for each.
    set : tuple of str
        A setting of the plan, as in lvlm simulate. Repeat.
    workload : str
        A workload of lvlm workloads, or the file of a trace; by default all requests bring what --image, --video,
        --text and --output say.
    arrivals : str
        How requests come; see lvlm simulate.
    requests : int
        How many at each rate.
    seed : int
        The same requests come at every rate.
    rate : float
        With --vary gpus, requests a second of the deployment once; by default the highest that meets the target.
    times : tuple of int
        With --vary gpus, how many times the devices and the load; by default 1, 2, 4 and 8, as far as links reach.
        Repeat.
    tolerance : float
        Relative width to which rates are narrowed down.
    """

    system: str | None = None
    gpus: Whole | None = None
    pools: Texts = ()
    set: Texts = ()
    workload: str | None = None
    arrivals: str | None = None
    requests: Whole | None = None
    seed: int = 0
    rate: float | None = None
    times: tuple[Whole, ...] = ()
    tolerance: float = TOLERANCE


NO_LOAD: Final = Load()
REQUESTS: Final = 500
"""Requests at each rate, where nothing is said."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Everything that was asked, resolved.

    Parameters
    ----------
    plan_at : callable
        Returns the plan with every pool so many times.
    traffic : Traffic
        What comes, but for the rate.
    workload : Workload or None
        What every request brings, where no workload is named.
    slo : Slo
    attained : float
        Share of requests that must keep every promise.
    load : Load
    """

    plan_at: Callable[[int], ServingPlan]
    traffic: Traffic
    workload: Workload | None
    slo: Slo
    attained: float
    load: Load

    def requests(self, rate: float, n: int) -> Requests:
        """Return so many requests at a rate."""
        seed = self.load.seed
        if self.workload is not None:
            return traffic.repeated(self.workload, rate, n, seed, arrivals=self.traffic.arrivals)
        return serving.requests_of(self.traffic.model_copy(update={"rate": rate, "requests": n}), seed)

    def runs(self, times: int = 1) -> Callable[[float], Report]:
        """Return what simulates a rate on the plan so many times."""
        plan = self.plan_at(times)
        services = {pool.name: StepService.of_pool(plan, pool) for pool in plan.pools}

        def at(rate: float) -> Report:
            trace = simulate(
                plan, self.requests(rate, times * self.traffic.requests), service=services, seed=self.load.seed
            )
            check(trace)
            return report(trace, self.slo)

        return at

    @property
    def inputs(self) -> dict[str, Any]:
        """What was asked, for the JSON output."""
        one = self.workload
        return {
            "plan": self.plan_at(1).model_dump(mode="json", by_alias=True),
            "workload": {
                **self.traffic.model_dump(exclude={"rate", "concurrency"}),
                "images": [] if one is None else [f"{image.width}x{image.height}" for image in one.images],
                "videos": 0 if one is None else len(one.videos),
                "text": None if one is None else int(one.text_tokens),
                "output": None if one is None else int(one.output_tokens),
            },
            "slo": self.slo.model_dump(),
            "attainment": self.attained,
            "seed": self.load.seed,
            "tolerance": self.load.tolerance,
        }


def asked(
    names: tuple[str, str | None],
    load: Load,
    *,
    targets: Mapping[str, float],
    promises: Promises,
    prompt: Prompt = TEXT_PROMPT,
    options: Serving = ONE_DEVICE,
) -> Asked:
    """Return what was asked of the command, resolved.

    Parameters
    ----------
    names : tuple
        A model and a device, or a PLAN.toml and None.
    load : Load
    targets : mapping
        ttft_s, tpot_s, total_s, attainment.
    promises : Promises
    prompt : Prompt
        What each request brings, where no workload is named.
    options : Serving
        Parallelism, precision, engine and techniques.

    Raises
    ------
    ValueError
        If nothing is promised, or an option has no meaning here.
    """
    _refuse(load, options, prompt)
    plan_at = _plans(names, load, options)
    plan = plan_at(1)
    comes, workload = _traffic(plan, load, prompt, options)
    slo = _slo(plan, targets, promises)
    return Asked(plan_at, comes, workload, slo, targets.get(ATTAINED, ATTAINED_SHARE), load)


def _refuse(load: Load, options: Serving, prompt: Prompt) -> None:
    if options.batch != 1:
        raise ValueError("--batch is formed by the simulator; leave it out, or --set pool.max_batch=…")
    if prompt.pixels is not None:
        raise ValueError(
            "--pixels changes one request's model; requests that queue have that of the plan: leave it out"
        )
    if load.workload is not None and prompt != TEXT_PROMPT:
        raise ValueError("--workload and --image, --video, --text exclude each other; give one of them")
    if load.arrivals is not None and load.arrivals.startswith("burst"):
        raise ValueError("--arrivals burst has no rate that could vary; give another, such as poisson")


def _plans(names: tuple[str, str | None], load: Load, options: Serving) -> Callable[[int], ServingPlan]:
    model, hardware = names
    if model.endswith(".toml") and hardware is None:
        if options != replace(ONE_DEVICE, output=options.output):
            raise ValueError("PLAN.toml says how the model is served; leave the options of serving out, or --set them")
        given = Deployment(system=load.system, gpus=load.gpus, pools=load.pools, set=load.set)
        return lambda times: serving.plan_of(model, given, times=times)
    typed = ("pp", "dp", "ep", "encoder_tp", "encoder_dp", "engine")
    changed = [key for key in typed if getattr(options, key) != getattr(ONE_DEVICE, key)]
    settings = tuple(f"pool.{key}={getattr(options, key)}" for key in changed)
    given = Deployment(
        system=load.system,
        model=model,
        hardware=hardware,
        gpus=load.gpus,
        pools=load.pools,
        tp=options.tp,
        set=(*settings, *load.set),
    )
    bits = {key: getattr(options, key) for key in ("weight_bits", "activation_bits", "kv_bits")}
    methods = [dict(zip(("name", "parameters"), parse.split_method(text), strict=True)) for text in options.technique]

    def plan_at(times: int) -> ServingPlan:
        held = serving.plan_of(None, given, times=times).model_dump(by_alias=True)
        return ServingPlan.model_validate({**held, **bits, "techniques": methods})

    return plan_at


def _traffic(plan: ServingPlan, load: Load, prompt: Prompt, options: Serving) -> tuple[Traffic, Workload | None]:
    base = plan.workload.model_dump() if plan.workload and prompt == TEXT_PROMPT else {}
    base |= {"rate": None, "concurrency": 0}
    typed = {"name": load.workload, "arrivals": load.arrivals, "requests": load.requests}
    base |= {key: value for key, value in typed.items() if value is not None}
    workload = None
    if "name" not in base:
        base["name"] = "repeated"
        workload = Request.of(plan.model, prompt, options.output).workload
    try:
        return Traffic.model_validate({"requests": REQUESTS, **base}), workload
    except ValidationError as error:
        raise one_line(error, "load") from None


def _slo(plan: ServingPlan, targets: Mapping[str, float], promises: Promises) -> Slo:
    for name in targets:
        if name not in (*PROMISED, ATTAINED):
            raise unknown("target of a load", name, (*PROMISED, ATTAINED))
    base = serving.slo_of(promises, plan).model_dump()
    base |= {PROMISED[name]: value for name, value in targets.items() if name in PROMISED}
    try:
        slo = Slo.model_validate(base)
    except ValidationError as error:
        raise one_line(error, "--target") from None
    if all(value is None for value in base.values()):
        raise ValueError(
            "nothing is promised; give --target ttft_s=…, tpot_s=… or total_s=…, or --slo-ttft and the like"
        )
    return slo
