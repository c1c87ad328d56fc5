"""Everything that says how requests are served: topology, policies, techniques, and what to ask of it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from costmodel.base import Frozen
from costmodel.errors import one_line
from simulator.batching import batch_policy
from simulator.ordering import order_key
from simulator.routing import router
from simulator.rules import Control, Failure, Store
from simulator.topology import Link, Pool, Topology, encoders_for_others

Positive = Annotated[float, Field(gt=0)]


class Policies(Frozen):
    """Decisions by name.

    Parameters
    ----------
    batch : str
        How a worker forms its batches; a module of `simulator.batching`.
    router, encode_router, decode_router : str
        Which worker a request goes to for its prompt, a picture to be encoded, and a request to decode where that is
        elsewhere; see `simulator.routing`.
    order, encode_order : str
        In which order requests wait for their prompt, and pictures for an encoder of another pool; see
        `simulator.ordering`.
    prefix_caching : bool
        Whether prompts that start alike share blocks.
    signal_age_s : float
        How old may be what routers see of the workers [s].
    admission : {"all", "queue", "ttft"}
        Whether every request is taken; or none while each worker of its pool has `admission_limit` requests; or none
        that would wait longer than `admission_limit` seconds for prompts before its own (early rejection, Mooncake).
    admission_limit : float or None
        Requests a worker, or seconds; None is the promised TTFT of the plan.
    after_crash : {"retry", "fail"}
        What becomes of requests whose worker crashes: they begin anew, or fail.
    most_retries : int
        After so many, a request fails too.
    """

    batch: str = "vllm"
    router: str = "round-robin"
    encode_router: str = "round-robin"
    decode_router: str = "least-tokens"
    order: str = "fcfs"
    encode_order: str = "fcfs"
    prefix_caching: bool = True
    signal_age_s: Annotated[float, Field(ge=0)] = 0.0
    admission: Literal["all", "queue", "ttft"] = "all"
    admission_limit: Positive | None = None
    after_crash: Literal["retry", "fail"] = "retry"
    most_retries: Annotated[int, Field(ge=0)] = 3

    @field_validator("batch")
    @classmethod
    def _known_batch(cls, name: str) -> str:
        batch_policy(name)
        return name

    @field_validator("router", "encode_router", "decode_router")
    @classmethod
    def _known_router(cls, name: str) -> str:
        router(name)
        return name

    @field_validator("order", "encode_order")
    @classmethod
    def _known_order(cls, name: str) -> str:
        order_key(name)
        return name


class Slo(Frozen):
    """Promises a request is held to; None promises nothing.

    Parameters
    ----------
    ttft_s, tpot_s, e2e_s : float or None
        Longest time to first token, time per output token, and time from arrival to the last token [s].
    """

    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    e2e_s: Positive | None = None


class Traffic(Frozen):
    """What is asked of a plan.

    Parameters
    ----------
    name : str
        A preset, or the path of a trace.
    rate : float or None
        Requests a second.
    arrivals : str
        How they come: poisson, gamma:cv=2, …
    concurrency : int
        Closed loop with so many users; 0 is open.
    requests : int
        How many.
    """

    name: str
    rate: Positive | None = None
    arrivals: str = "poisson"
    concurrency: Annotated[int, Field(ge=0)] = 0
    requests: Annotated[int, Field(ge=1)] = 1000


class Method(Frozen):
    """A technique by name.

    Parameters
    ----------
    name : str
    parameters : mapping
        Its parameters.
    """

    name: str
    parameters: dict[str, float | str] = Field(default_factory=dict)


class ServingPlan(Frozen):
    """How a model is served.

    Parameters
    ----------
    model : str
        The model.
    pools, links
        The topology.
    policies : Policies
    failures : tuple of Failure
        What goes wrong.
    control : Control or None
        How workers come, go and change their role.
    store : Store or None
        Embeddings that all pools reach.
    techniques : tuple of Method
    workload : Traffic or None
    slo : Slo or None
        What a PLAN.toml asks for; options of the command stand above it.
    weight_bits, activation_bits, kv_bits : int
        Widths of numbers.
    """

    model: str
    pools: tuple[Pool, ...]
    links: tuple[Link, ...] = ()
    policies: Policies = Policies()
    failures: tuple[Failure, ...] = ()
    control: Control | None = None
    store: Store | None = None
    techniques: tuple[Method, ...] = ()
    workload: Traffic | None = None
    slo: Slo | None = None
    weight_bits: int = 16
    activation_bits: int = 16
    kv_bits: int = 16

    @model_validator(mode="after")
    def _check(self) -> ServingPlan:
        for problem in [*_problems(self), *_cache_problems(self)]:
            raise ValueError(problem)
        return self

    @property
    def topology(self) -> Topology:
        """Pools and links, checked."""
        return Topology(pools=self.pools, links=self.links)

    @property
    def devices(self) -> int:
        """Devices of all pools."""
        return sum(pool.devices for pool in self.pools)

    @staticmethod
    def read(path: str | Path) -> ServingPlan:
        """Return the plan of a TOML file.

        Raises
        ------
        ValueError
            If it is no plan; the message names the key.
        """
        try:
            held: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no plan {str(path)!r}; give the path of a TOML file, or --model, …") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is no TOML file: {error}") from None
        try:
            plan = ServingPlan.model_validate(held)
            _ = plan.topology
        except ValidationError as error:
            raise one_line(error, str(path)) from None
        return plan

    def as_toml(self) -> str:
        """Return the plan as a TOML file."""
        import tomlkit

        held = self.model_dump(mode="json", exclude_none=True, exclude_defaults=True, by_alias=True)
        return tomlkit.dumps({"model": held.pop("model"), **held})


def _problems(plan: ServingPlan) -> Iterator[str]:
    """Yield what failures and control ask of pools and links that are not there."""
    pools = {pool.name: pool for pool in plan.pools}
    rules = plan.control or Control()
    controlled = [rule.pool for rule in rules.scale] + [e for rule in rules.move for e in (rule.source, rule.target)]
    named = [(f"failure {failure.kind!r}", end) for failure in plan.failures for end in (failure.pool, failure.to)]
    for what, name in [*named, *(("control", name) for name in controlled)]:
        if name is not None and name not in pools:
            yield f"{what} names pool {name!r}, which there is not; known: {', '.join(pools)}"
            return
    for failure in plan.failures:
        yield from _failure_problems(failure, pools[failure.pool], plan)
    yield from _control_problems(rules, pools, controlled)


def _control_problems(rules: Control, pools: Mapping[str, Pool], controlled: Sequence[str]) -> Iterator[str]:
    for name in controlled:
        if pools[name].loops > 1 or pools[name].shares_devices_of:
            yield f"control of pool {name!r} needs workers that come and go alone: pp=1, dp=1, devices of their own"
    scaled = [rule.pool for rule in rules.scale]
    if len(set(scaled)) < len(scaled):
        yield f"control scales pools {scaled}, one of them by several rules that work against each other; keep one"
    for rule in rules.scale:
        if not rule.least <= pools[rule.pool].workers <= rule.most:
            limits = f"least={rule.least} and most={rule.most}"
            yield f"workers={pools[rule.pool].workers} of pool {rule.pool!r} must be between {limits} of its scaling"
    for change in rules.move:
        a, b = pools[change.source], pools[change.target]
        if (a.hardware, a.devices_per_worker) != (b.hardware, b.devices_per_worker):
            yield f"workers of {a.name!r} cannot move to {b.name!r}: hardware and devices of a worker must be the same"


def _cache_problems(plan: ServingPlan) -> Iterator[str]:
    """Yield what caches ask of pools and policies that is not so."""
    for pool in plan.pools:
        what = f"host_cache_bytes={pool.host_cache_bytes:g} of pool {pool.name!r}"
        if pool.host_cache_bytes and not pool.runs("prefill"):
            yield f"{what} is for pools that run 'prefill'; leave it out"
        elif pool.host_cache_bytes and not plan.policies.prefix_caching:
            yield f"{what} needs prefix_caching of the policies: blocks are found by what they hold; leave one out"
    if plan.store is not None and not encoders_for_others(Topology.model_construct(pools=plan.pools, links=plan.links)):
        yield "store=… needs a pool that encodes for others which prefill; give encoders a pool of their own"


def _failure_problems(failure: Failure, pool: Pool, plan: ServingPlan) -> Iterator[str]:
    if failure.worker is not None and failure.worker >= pool.replicas:
        yield f"worker={failure.worker} of a failure must be one of pool {pool.name!r}: 0 to {pool.replicas - 1}"
    if failure.kind == "preprocessing" and not pool.runs("preprocess"):
        yield f"failure 'preprocessing' of pool {pool.name!r} needs a pool that runs 'preprocess'; change it"
    if failure.kind == "link" and not any((x.source, x.target) == (failure.pool, failure.to) for x in plan.links):
        yield f"failure 'link' from {failure.pool!r} to {failure.to!r} is of no link of the plan; change its ends"
