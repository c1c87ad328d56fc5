"""Where stages run: pools of equal workers, and the links between pools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from costmodel.base import Frozen

Stage: TypeAlias = Literal["preprocess", "encode", "prefill", "decode"]
STAGES: Final[tuple[Stage, ...]] = ("preprocess", "encode", "prefill", "decode")
Count: TypeAlias = Annotated[int, Field(ge=1)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]


class Pool(Frozen):
    """Equal workers that run the same stages.

    Parameters
    ----------
    name : str
        What reports call it.
    stages : tuple of str
        What its workers do, of preprocess, encode, prefill and decode.
    workers : int
        Workers; each has `tp` x `ep`... devices of its own.
    hardware : str
        The device.
    serves : {"all", "text", "media"}
        Which requests its prefill takes: all, those without pictures, or those with.
    shares_devices_of : str or None
        A pool on whose devices these workers run too: worker k beside worker k modulo that pool's. Steps that run at
        the same time share the device equally.
    tp, pp, dp, ep, encoder_tp, encoder_dp : int
        How the devices of one worker share the model; see `costmodel.Parallelism`, and `lockstep` and `replicas`.
    engine : str
        What the software adds.
    max_batch : int or None
        Most sequences that run at once on a data-parallel replica; None is the engine's default for the device.
    token_budget : int or None
        Tokens of a step of a replica; None is that of the batch policy, or the engine's default for the device.
    long_prefill_tokens : int
        Most tokens of one prompt in a step; 0 is no limit.
    encoder_budget_tokens : int or None
        Embeddings that one step may encode; None is the engine's default. Raised to the largest item.
    encoder_cache_tokens : int or None
        Embeddings that a worker holds: encoded here, or received; None is the budget. Raised to the largest item, and
        where they are received or sent, to the largest request.
    encode_items : int or None
        Most items of one forward pass of an encoder that works for other pools; None is no limit but the budget.
    preprocess_workers : int or None
        CPU workers of the whole pool; None is the engine's default.
    preprocess_by : {"request", "item"}
        Whether one CPU worker does a whole request, or several share its items.
    processor_cache_bytes : float
        Preprocessed pictures that the host keeps [bytes].
    host_cache_bytes : float
        Copies of KV blocks that the host of each worker keeps, lost when the worker crashes or goes; 0 is none [bytes].
    host_bandwidth_bytes_per_s : float or None
        Rate at which a worker loads them; None is that of its devices' links to the host [bytes/s].
    """

    name: str = "all"
    stages: tuple[Stage, ...] = STAGES
    workers: Count = 1
    hardware: str
    serves: Literal["all", "text", "media"] = "all"
    shares_devices_of: str | None = None
    tp: Count = 1
    pp: Count = 1
    dp: Count = 1
    ep: Count = 1
    encoder_tp: Count | None = None
    encoder_dp: Count = 1
    engine: str = "vllm"
    max_batch: Count | None = None
    token_budget: Count | None = None
    long_prefill_tokens: Annotated[int, Field(ge=0)] = 0
    encoder_budget_tokens: Count | None = None
    encoder_cache_tokens: Count | None = None
    encode_items: Count | None = None
    preprocess_workers: Count | None = None
    preprocess_by: Literal["request", "item"] = "request"
    processor_cache_bytes: Annotated[float, Field(ge=0)] = float(4 << 30)
    host_cache_bytes: Annotated[float, Field(ge=0)] = 0.0
    host_bandwidth_bytes_per_s: Positive | None = None

    @field_validator("stages")
    @classmethod
    def _ordered(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if not stages:
            raise ValueError(f"stages={list(stages)} must name one of {', '.join(STAGES)}")
        return tuple(stage for stage in STAGES if stage in stages)

    @property
    def devices(self) -> int:
        """Devices of all workers; none of its own where it shares those of another pool."""
        return 0 if self.shares_devices_of else self.workers * self.devices_per_worker

    @property
    def devices_per_worker(self) -> int:
        """Devices of one worker."""
        return self.tp * self.pp * self.dp

    def runs(self, stage: Stage) -> bool:
        """Return whether its workers run a stage."""
        return stage in self.stages

    def takes(self, *, media: bool) -> bool:
        """Return whether its prefill takes requests with pictures, or without."""
        return self.serves == "all" or (self.serves == "media") == media

    @property
    def lockstep(self) -> int:
        """Data-parallel replicas that step together, because routed experts are dealt out over all of them."""
        return self.dp if self.ep > self.tp else 1

    @property
    def replicas(self) -> int:
        """Loops with a queue and a cache of their own: replicas that share no experts, and batches of a pipeline."""
        return self.workers * self.loops

    @property
    def loops(self) -> int:
        """Of those, how many a worker's devices run."""
        return self.pp * (self.dp // self.lockstep)


class Link(Frozen):
    """A link from one pool to another.

    Parameters
    ----------
    source, target : str
        The pools.
    kind : str
        What it is called.
    bandwidth_bytes_per_s : float
        Rate; transfers at the same time share it equally [bytes/s].
    latency_s : float
        From the end of sending to the landing [s].
    per : {"worker", "pool"}
        Whether every sending worker has a link of its own, or all of the pool share one.
    mode : {"push", "pull", "reserve"}
        When a transfer begins. `push`: when what is sent is there and the receiver has room. `pull`: when the receiver
        also has nothing better to do (`pull_below`). `reserve`: the receiver is chosen and its room taken beforehand.
    pull_below : float
        With `pull`, a receiver asks for more while the prompts that wait there need less than this share of its blocks
        (EPDServe's `waiting_block_prop_threshold`).
    release : {"request", "item"}
        Whether prefill waits for all embeddings of a request, or goes as far as they have landed (RServe).
    layerwise : bool
        Whether KV leaves layer by layer while prefill runs; needs `reserve`.
    """

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    kind: str = "link"
    bandwidth_bytes_per_s: Positive
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    per: Literal["worker", "pool"] = "worker"
    mode: Literal["push", "pull", "reserve"] = "push"
    pull_below: Annotated[float, Field(gt=0, le=1)] = 0.05
    release: Literal["request", "item"] = "request"
    layerwise: bool = False

    @model_validator(mode="after")
    def _check(self) -> Link:
        if self.layerwise and self.mode != "reserve":
            raise ValueError(f"mode={self.mode!r} of a layerwise link must be 'reserve': the receiver is known before")
        return self


class Topology(Frozen):
    """Pools and links.

    Parameters
    ----------
    pools : tuple of Pool
    links : tuple of Link
    """

    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]
    links: tuple[Link, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Topology:
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pools={names} must have names of their own; rename one")
        for link in self.links:
            for end in (link.source, link.target):
                if end not in names:
                    raise ValueError(f"link {link.kind!r} ends at {end!r}, which is no pool; known: {', '.join(names)}")
        ends = [(link.source, link.target) for link in self.links]
        for pair in ends:
            if ends.count(pair) > 1:
                raise ValueError(f"links={len(ends)} must have ends of their own; two lead from {pair[0]} to {pair[1]}")
        self._check_devices()
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    def _check_devices(self) -> None:
        for pool in self.pools:
            host = pool.shares_devices_of
            if host is None:
                continue
            found = [other for other in self.pools if other.name == host]
            if not found or host == pool.name or found[0].shares_devices_of:
                raise ValueError(
                    f"pool {pool.name!r}: shares_devices_of={host!r} must name another pool with devices of its own"
                )
            if (found[0].replicas, found[0].devices_per_worker) != (pool.replicas, pool.devices_per_worker):
                raise ValueError(
                    f"pool {pool.name!r}: workers={pool.workers}, tp, pp and dp must be those of {host!r}, "
                    f"{found[0].workers}: a worker of each shares its devices"
                )
            if found[0].hardware != pool.hardware:
                raise ValueError(
                    f"pool {pool.name!r}: hardware={pool.hardware!r} must be that of {host!r}, {found[0].hardware!r}"
                )

    def pool(self, name: str) -> Pool:
        """Return a pool by name."""
        return next(pool for pool in self.pools if pool.name == name)

    def running(self, *stages: Stage) -> list[Pool]:
        """Return the pools that run all of these stages."""
        return [pool for pool in self.pools if all(pool.runs(stage) for stage in stages)]

    def link(self, source: str, target: str) -> Link | None:
        """Return the link between two pools, if there is one."""
        return next((link for link in self.links if (link.source, link.target) == (source, target)), None)

    def hops(self) -> Iterator[tuple[Pool, Pool, str]]:
        """Yield which pools send what to which: pixels, embeddings, KV."""
        fronts = self.running("prefill")
        remote = [pool for pool in fronts if not pool.runs("encode") and pool.serves != "text"]
        encoders = encoders_for_others(self)
        for front in remote:
            for encoder in encoders:
                yield encoder, front, "embeddings"
        for source in [pool for pool in fronts if not pool.runs("decode")]:
            for target in self.running("decode"):
                yield source, target, "KV"
        for target in [*encoders, *(pool for pool in fronts if pool.runs("encode"))]:
            for source in preprocessors_of(self, target):
                if source.name != target.name:
                    yield source, target, "pixels"


def encoders_for_others(topology: Topology) -> list[Pool]:
    """Return the pools that encode for pools which prefill and do not encode themselves."""
    remote = any(not pool.runs("encode") and pool.serves != "text" for pool in topology.running("prefill"))
    able = topology.running("encode")
    apart = [pool for pool in able if not pool.runs("prefill")]
    return (apart or able) if remote else []


def preprocessors_of(topology: Topology, target: Pool) -> list[Pool]:
    """Return the pools that preprocess for one that encodes: itself, else pools for that, else those that prefill."""
    if target.runs("preprocess"):
        return [target]
    able = topology.running("preprocess")
    apart = [pool for pool in able if not pool.runs("encode")]
    return [pool for pool in apart if not pool.runs("prefill")] or apart or able


def _problems(topology: Topology) -> Iterator[str]:
    """Yield what makes a plan impossible."""
    stages: tuple[Stage, ...] = ("prefill", "decode")
    for stage in stages:
        if not topology.running(stage):
            yield f"stage {stage!r} is run by no pool; add it to the stages of one"
    encoders = encoders_for_others(topology)
    for pool in topology.pools:
        if not pool.runs("prefill") and not _is_fed(topology, pool, encoders):
            what = "+".join(pool.stages)
            yield f"pool {pool.name!r} ({what}) is fed by nobody: others do all of its stages themselves"
    for source, target, what in topology.hops():
        if topology.link(source.name, target.name) is None:
            yield (
                f"a link from {source.name!r} to {target.name!r} is missing, over which {what} go; add [[links]] with "
                f'from = "{source.name}", to = "{target.name}", bandwidth_bytes_per_s'
            )


def _is_fed(topology: Topology, pool: Pool, encoders: list[Pool]) -> bool:
    if pool.runs("encode") and pool in encoders:
        return True
    if pool.runs("decode") and any(not front.runs("decode") for front in topology.running("prefill")):
        return True
    users = [*encoders, *topology.running("encode", "prefill")]
    return pool.runs("preprocess") and any(pool in preprocessors_of(topology, user) for user in users)
