"""What workers did with their time: stages, queues, energy, and what holds the rest up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from costmodel import load_engine, load_hardware
from costmodel.base import Array
from costmodel.economics import cost_usd
from costmodel.energy import stage_power_w
from costmodel.hardware import HardwareProfile
from simulator.trace import PoolTrace, Trace

BUSY = 0.7
"""From this share of its time on, a stage is called a bottleneck; below it, queues are short in all of the theory."""
WAITING = 0.5
"""Share of a worker's time from which on requests that wait in front of it mean that it is saturated."""
FULL = 0.98
"""Share of blocks or sequences from which on they count as used up."""

STORE_WIRE = "store > pools"
"""What reports call the wire of a store of embeddings."""


@dataclass(frozen=True, slots=True)
class Use:
    """Use of the hardware.

    Parameters
    ----------
    utilisation : mapping
        By pool and stage, the share of time in use; idle is of the workers.
    energy_j : float or None
        Of all devices; None where one is not known [J].
    cost_usd : float or None
        List price of all devices for the whole run; None where one has none.
    hardware : HardwareProfile or None
        Of the pool that decodes; None where it is not known.
    links : mapping
        By link, the share of the time with transfers under way, in the mean over its wires.
    """

    utilisation: Mapping[str, Mapping[str, float]]
    energy_j: float | None
    cost_usd: float | None
    hardware: HardwareProfile | None
    links: Mapping[str, float]


def stage_seconds(steps: Mapping[str, Array]) -> dict[str, float]:
    """Return the time of one worker in encode, prefill and decode [s].

    Notes
    -----
    A step that runs chunks beside decoding sequences is decode for as long as steps of decoding alone take with as many
    sequences, between those seen in the same log, and prefill for the rest. Where none was seen, tokens share the time.
    """
    span = steps["end_s"] - steps["start_s"]
    encode = float(steps["encode_s"].sum())
    model_s = span - steps["encode_s"]
    chunks, decoding = steps["chunk_tokens"], steps["decoding"]
    alone, mixed = (chunks == 0) & (decoding > 0), (chunks > 0) & (decoding > 0)
    decode = float(model_s[alone].sum())
    share = decoding[mixed] / np.maximum(decoding[mixed] + chunks[mixed], 1)
    if alone.any():
        order = np.argsort(decoding[alone], kind="stable")
        known = np.interp(decoding[mixed], decoding[alone][order], (span / steps["steps"])[alone][order])
        share = np.minimum(1.0, known / np.maximum(model_s[mixed], 1e-12))
    decode += float((share * model_s[mixed]).sum())
    return {"encode": encode, "prefill": float(model_s.sum()) - decode, "decode": decode}


def use_of(trace: Trace) -> Use:
    """Return the use of the hardware in a run."""
    energies, costs = [], []
    utilisation = {}
    for one in trace.pools:
        shares, seconds_s = _use_of_pool(trace, one)
        utilisation[one.pool.name] = shares
        hardware = _hardware(one.pool.hardware)
        energies.append(None if hardware is None else _energy_j(one, hardware, shares, seconds_s))
        costs.append(None if hardware is None else _cost_usd(one, hardware, trace.paid_s(one)))
    decoding = next(one.pool for one in trace.pools if one.pool.runs("decode"))
    wires: dict[str, list[float]] = {}
    for link in trace.links:
        wires.setdefault(f"{link.source} > {link.target}", []).append(_share(link.busy_s, trace.span_s))
    if trace.plan.store is not None:
        wires[STORE_WIRE] = [min(1.0, _share(trace.store.busy_s, trace.span_s))]  # writes may outlast the requests
    return Use(
        utilisation=utilisation,
        energy_j=None if None in energies else sum(energies),  # type: ignore[arg-type]
        cost_usd=None if None in costs else sum(costs),  # type: ignore[arg-type]
        hardware=_hardware(decoding.hardware),
        links={name: sum(shares) / len(shares) for name, shares in wires.items()},
    )


def _use_of_pool(trace: Trace, one: PoolTrace) -> tuple[dict[str, float], dict[str, float]]:
    """Return the shares of a pool's time, and the seconds of all its workers, by stage."""
    busy = [stage_seconds(steps) for steps in trace.steps_of(one)]
    total = {stage: sum(each[stage] for each in busy) for stage in ("encode", "prefill", "decode")}
    time_s = trace.paid_s(one)
    shares = {}
    if one.preprocess_workers:
        shares["preprocess"] = _share(one.preprocess_busy_s, trace.span_s * one.preprocess_workers)
    shares |= {stage: _share(s, time_s) for stage, s in total.items() if one.pool.runs(stage)}  # type: ignore[arg-type]
    shares["idle"] = max(0.0, 1.0 - sum(total.values()) / time_s) if time_s else 0.0
    return shares, {**total, "idle": shares["idle"] * time_s}


def _energy_j(
    one: PoolTrace, hardware: HardwareProfile, shares: Mapping[str, float], seconds_s: Mapping[str, float]
) -> float:
    """Return the energy of a pool's devices, those of pools beside it counted with their own work [J]."""
    del shares
    engine = load_engine(one.pool.engine)
    watts = {"encode": 1.0, "prefill": 1.0, "decode": 0.0}  # share of the time in which compute is the limit
    busy_j = sum(seconds_s[stage] * stage_power_w(hardware, engine, share) for stage, share in watts.items())
    idle_j = 0.0 if one.pool.shares_devices_of else seconds_s["idle"] * hardware.idle_w
    return (busy_j + idle_j) * one.pool.devices_per_worker / one.pool.loops


def _cost_usd(one: PoolTrace, hardware: HardwareProfile, paid_s: float) -> float | None:
    """Return the price of a pool's devices, once where pools share them [dollars]."""
    each = 0 if one.pool.shares_devices_of else one.pool.devices_per_worker / one.pool.loops
    return cost_usd(hardware, device_seconds=each * paid_s)


def _share(seconds: float, of_s: float) -> float:
    return seconds / of_s if of_s else 0.0


def _hardware(name: str) -> HardwareProfile | None:
    """Return a device, or None for one of a plan whose times are injected."""
    try:
        return load_hardware(name)
    except LookupError:
        return None


def queues(trace: Trace) -> dict[str, float]:
    """Return how many requests wait in the mean, by Little's law.

    In front of the CPU workers (and, where encoders are apart, at those and on the way), in front of the workers, and
    between workers that prefill and those that decode.
    """
    columns, done, span = trace.columns, trace.finished, trace.span_s
    before = columns["queued_s"] - columns["arrival_s"] - np.nan_to_num(columns["preprocess_s"])
    wait = columns["scheduled_s"] - columns["queued_s"]
    found = {
        "preprocess": _share(max(0.0, float(before[done].sum())), span),
        "worker": _share(float(wait[done].sum()), span),
        "system": _share(float(trace.e2e_s[done].sum()), span),
    }
    if not np.isnan(columns["joined_s"]).all():
        moved = columns["joined_s"] - columns["first_token_s"]
        found["between prefill and decode"] = _share(float(np.nansum(moved[done])), span)
    return found


def bottleneck(trace: Trace, use: Use) -> str:
    """Return what holds the rest up, in words.

    A worker may be busy all the time with a few sequences and still have room; it is saturated when requests wait in
    front of it for most of the time that it works. Encoders of other pools are when they are busy, workers that only
    decode when they have no room for more sequences.
    """
    cpus = {name: shares.get("preprocess", 0.0) for name, shares in use.utilisation.items()}
    slowest = max(cpus, key=cpus.__getitem__)
    waits = {one.pool.name: _waiting(trace, one) for one in trace.pools}
    name = max(waits, key=lambda key: waits[key][0])
    held, why = waits[name]
    if cpus[slowest] >= BUSY and cpus[slowest] >= held:
        return (
            f"CPU preprocessing is busy {cpus[slowest]:.0%} of the time; more devices do not help, more CPU workers do"
        )
    wire = max(use.links, key=use.links.__getitem__, default=None)
    if wire is not None and use.links[wire] >= BUSY and use.links[wire] >= held:
        return f"the link {wire} is busy {use.links[wire]:.0%} of the time; a faster one helps, more devices do not"
    if held < WAITING:
        return f"nothing is saturated: {_at_work(use)}"
    shares = use.utilisation[name]
    largest = max(("encode", "prefill", "decode"), key=lambda stage: shares.get(stage, 0.0))
    busy = 1.0 - shares["idle"]
    text = f"pool {name!r} is busy {busy:.0%} of the time, most of it with {largest} ({shares.get(largest, 0.0):.0%})"
    return f"{text}; {why}"


def _at_work(use: Use) -> str:
    """Return in words how much of their time pools work."""
    parts = []
    for name, shares in use.utilisation.items():
        cpu = f", its CPU workers {shares['preprocess']:.0%}" if "preprocess" in shares else ""
        parts.append(f"pool {name!r} works {1.0 - shares['idle']:.0%} of the time{cpu}")
    return "; ".join(parts)


def _waiting(trace: Trace, one: PoolTrace) -> tuple[float, str]:
    """Return the share of the workers' time in which requests wait, and for what."""
    steps = {key: np.concatenate([each[key] for each in trace.steps_of(one)]) for key in trace.steps[0]}
    span = steps["end_s"] - steps["start_s"]
    if one.pool.runs("encode") and not one.pool.runs("prefill"):
        busy = _share(float(span.sum()), trace.paid_s(one))
        return busy if busy >= BUSY else 0.0, "work waits for it to be free"
    limits = one.limits
    full = steps["running"] >= FULL * limits.max_sequences
    blocks = steps["kv_used_blocks"] >= FULL * limits.kv_blocks
    waiting = steps["waiting"] > 0 if one.pool.runs("prefill") else full | blocks  # who decodes alone lets in what fits
    full, blocks = full & waiting, blocks & waiting
    held = float(span[waiting].sum())
    share = _share(held, float(span.sum()))
    if span[full].sum() > held / 2:
        return share, f"requests wait because {limits.max_sequences} sequences run, the most that may"
    if span[blocks].sum() > held / 2:
        return share, f"requests wait because the KV cache of {limits.kv_blocks:,} blocks is full"
    return share, "requests wait for their turn in the budget of a step"
