"""Where stages run: pools of equal workers, and the links between pools."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, model_validator

from costmodel.base import Frozen
from costmodel.errors import Unsupported

Stage: TypeAlias = Literal["preprocess", "encode", "prefill", "decode"]
STAGES: Final[tuple[Stage, ...]] = ("preprocess", "encode", "prefill", "decode")
Count: TypeAlias = Annotated[int, Field(ge=1)]


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
        Embeddings that one step may encode, and that the encoder cache holds; None is the engine's default. Raised to
        the largest item.
    preprocess_workers : int or None
        CPU workers of the whole pool; None is the engine's default.
    preprocess_by : {"request", "item"}
        Whether one CPU worker does a whole request, or several share its items.
    processor_cache_bytes : float
        Preprocessed pictures that the host keeps [bytes].
    """

    name: str = "all"
    stages: tuple[Stage, ...] = STAGES
    workers: Count = 1
    hardware: str
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
    preprocess_workers: Count | None = None
    preprocess_by: Literal["request", "item"] = "request"
    processor_cache_bytes: Annotated[float, Field(ge=0)] = float(4 << 30)

    @property
    def devices(self) -> int:
        """Devices of all workers."""
        return self.workers * self.tp * self.pp * self.dp

    @property
    def lockstep(self) -> int:
        """Data-parallel replicas that step together, because routed experts are dealt out over all of them."""
        return self.dp if self.ep > self.tp else 1

    @property
    def replicas(self) -> int:
        """Loops with a queue and a cache of their own: replicas that share no experts, and batches of a pipeline."""
        return self.workers * self.pp * (self.dp // self.lockstep)


class Link(Frozen):
    """A link between two pools.

    Parameters
    ----------
    source, target : str
        The pools.
    kind : str
        What it is called.
    bandwidth_bytes_per_s : float
        Rate [bytes/s].
    latency_s : float
        Delay of a transfer [s].
    """

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    kind: str = "link"
    bandwidth_bytes_per_s: Annotated[float, Field(gt=0)]
    latency_s: Annotated[float, Field(ge=0)] = 0.0


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
        if len(self.pools) > 1 or set(self.pools[0].stages) != set(STAGES):
            raise Unsupported("several pools are not simulated yet; use one pool that runs all stages")
        return self
