"""What the workers of a pool have room for: what weights and activations leave of their devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from costmodel import DoesNotFit, Parallelism, Precision, load_engine, load_hardware, load_model, technique
from costmodel.hardware import HardwareProfile
from costmodel.media import MediaTotals
from costmodel.memory import Memory, Part, memory
from costmodel.query import Query
from simulator.item_times import OUTPUT_TOKENS, totals
from simulator.prompting import Asking, Example
from simulator.service import Capacity
from simulator.serving_plan import ServingPlan
from simulator.topology import Pool

LARGE_DEVICE_BYTES: Final = 70 * 2**30
"""vLLM raises its defaults from here on, except for the A100 (`EngineArgs`, get_batch_defaults)."""
LARGE_SEQUENCES, SMALL_SEQUENCES = 1024, 256
SMALL_CHUNK_TOKENS = 2048
LARGE_CHUNK_TOKENS = 8192
"""Defaults of an API server of vLLM: sequences and tokens of a step."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A pool on a device, and the memory that it takes there.

    Parameters
    ----------
    pool : Pool
    memory : Memory
        With the largest prompt of a step, on one device.
    budget : int
        Tokens of that step.
    """

    pool: Pool
    memory: Memory
    budget: int

    @property
    def caches(self) -> bool:
        """Whether it needs room for keys and values."""
        return "language" in parts_of(self.pool)

    @property
    def taken_bytes(self) -> float:
        """What it takes without its cache: weights, activations, and what its engine reserves [bytes]."""
        return self.memory.peak_bytes - self.memory.kv_bytes


def asking_of(plan: ServingPlan, pool: Pool) -> Asking:
    """Return how requests become queries in a pool of a plan."""
    return Asking(
        load_model(plan.model),
        load_engine(pool.engine),
        Precision(plan.weight_bits, plan.activation_bits, plan.kv_bits),
        Parallelism(pool.tp, pool.pp, pool.lockstep, pool.ep, pool.encoder_tp, pool.encoder_dp),
        tuple(technique(method.name, **method.parameters) for method in plan.techniques),
    )


def parts_of(pool: Pool) -> tuple[Part, ...]:
    """Return the parts of a model that the devices of a pool hold."""
    language = {"prefill", "decode"} & set(pool.stages)
    held: dict[Part, bool] = {"vision": "encode" in pool.stages, "language": bool(language)}
    return tuple(part for part, is_held in held.items() if is_held)


def capacity_of(plan: ServingPlan, pool: Pool) -> Capacity:
    """Return what a worker of a pool has room for, with the engine's defaults for the device.

    Raises
    ------
    DoesNotFit
        If the pools of the device do not fit, or leave no room for a cache where one needs it.
    """
    asking, device = asking_of(plan, pool), load_hardware(pool.hardware)
    own = _tenant(asking, pool, device)
    host = pool.shares_devices_of or pool.name
    others = [x for x in plan.pools if x.name != pool.name and host in (x.name, x.shares_devices_of)]
    if others:
        tenants = [own, *(_tenant(asking_of(plan, other), other, device) for other in others)]
        kv_blocks = _shared_blocks(own, tenants, device)
    else:
        kv_blocks = _blocks(own, device, plan.model)
    engine, large = asking.engine, _is_large(device)
    chunk = _chunk_tokens(asking, device)
    return Capacity(
        kv_blocks=kv_blocks,
        block_tokens=int(engine.kv_block_tokens) if engine.kv_block_tokens > 1 else 16,
        chunk_tokens=chunk,
        max_sequences=LARGE_SEQUENCES if large else SMALL_SEQUENCES,
        encoder_tokens=chunk,
    )


def _is_large(device: HardwareProfile) -> bool:
    return device.memory_bytes >= LARGE_DEVICE_BYTES and not device.name.startswith("a100")


def _chunk_tokens(asking: Asking, device: HardwareProfile) -> int:
    """Return the tokens of a step."""
    default = LARGE_CHUNK_TOKENS if _is_large(device) else SMALL_CHUNK_TOKENS
    return int(min(asking.engine.prefill_chunk_tokens, default))


def _tenant(asking: Asking, pool: Pool, device: HardwareProfile) -> Tenant:
    budget = pool.token_budget or _chunk_tokens(asking, device)
    return Tenant(pool, memory(_largest_prompt(asking, budget), device, parts=parts_of(pool)), budget)


def _largest_prompt(asking: Asking, budget: int) -> Query:
    """Return a prompt that fills a step: of text, but for a picture that techniques may want to see."""
    seen = Example.of(asking.model).costs[:1] if asking.techniques else ()
    media = totals(seen) if seen else MediaTotals()
    text = budget - float(media.visual_tokens + media.marker_tokens)
    return asking.query(media, max(text, 1.0), OUTPUT_TOKENS)


def _blocks(own: Tenant, device: HardwareProfile, model: str) -> int:
    """Return the blocks of a pool that has its devices for itself."""
    held = own.memory
    if not held.kv_blocks and (own.caches or not held.fits):
        what = f"{load_model(model).name} with a prompt of {own.budget} tokens on {device.name}"
        raise DoesNotFit(what, required_bytes=held.peak_bytes, available_bytes=held.usable_bytes)
    return held.kv_blocks


def _shared_blocks(own: Tenant, tenants: Sequence[Tenant], device: HardwareProfile) -> int:
    """Return the blocks of a pool on devices of several: each that caches has an equal part of what all leave."""
    usable = min(tenant.memory.usable_bytes for tenant in tenants)
    taken = sum(tenant.taken_bytes for tenant in tenants)
    caching = [tenant for tenant in tenants if tenant.caches]
    each = (usable - taken) / max(len(caching), 1)
    if each < max((tenant.memory.block_bytes for tenant in caching), default=0.0):
        names = " and ".join(repr(tenant.pool.name) for tenant in sorted(tenants, key=lambda one: one.pool.name))
        least = taken + sum(tenant.memory.kv_bytes for tenant in caching)
        raise DoesNotFit(
            f"all that pools {names} hold on one {device.name}", required_bytes=least, available_bytes=usable
        )
    return int(each / own.memory.block_bytes) if own.caches and own.memory.block_bytes else 0
