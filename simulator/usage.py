"""What workers did with their time: stages, queues, energy, and what holds the rest up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from costmodel import load_engine, load_hardware
from costmodel.base import Array
from costmodel.energy import stage_power_w
from costmodel.hardware import HardwareProfile
from simulator.trace import Trace

BUSY = 0.7
"""From this share of its time on, a stage is called a bottleneck; below it, queues are short in all of the theory."""
WAITING = 0.5
"""Share of a worker's time from which on requests that wait in front of it mean that it is saturated."""
FULL = 0.98
"""Share of blocks or sequences from which on they count as used up."""


@dataclass(frozen=True, slots=True)
class Use:
    """Use of the hardware.

    Parameters
    ----------
    utilisation : mapping
        By pool and stage, the share of time in use.
    energy_j : float or None
        Of all devices; None where the device is not known [J].
    hardware : HardwareProfile or None
    """

    utilisation: Mapping[str, Mapping[str, float]]
    energy_j: float | None
    hardware: HardwareProfile | None


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
    pool, span = trace.plan.pools[0], trace.span_s
    busy = [stage_seconds(steps) for steps in trace.steps]
    total = {stage: sum(one[stage] for one in busy) for stage in ("encode", "prefill", "decode")}
    time_s = span * len(trace.steps)
    shares = {"preprocess": _share(trace.preprocess_busy_s, span * trace.preprocess_workers)}
    shares |= {stage: _share(seconds, time_s) for stage, seconds in total.items()}
    shares["idle"] = max(0.0, 1.0 - sum(total.values()) / time_s) if time_s else 0.0
    hardware = _hardware(pool.hardware)
    energy_j = None
    if hardware is not None:
        engine = load_engine(pool.engine)
        watts = {"encode": 1.0, "prefill": 1.0, "decode": 0.0}  # share of the time in which compute is the limit
        energy_j = sum(total[stage] * stage_power_w(hardware, engine, share) for stage, share in watts.items())
        energy_j = (energy_j + shares["idle"] * time_s * hardware.idle_w) * pool.devices / pool.replicas
    return Use({pool.name: shares}, energy_j, hardware)


def _share(seconds: float, of_s: float) -> float:
    return seconds / of_s if of_s else 0.0


def _hardware(name: str) -> HardwareProfile | None:
    """Return a device, or None for one of a plan whose times are injected."""
    try:
        return load_hardware(name)
    except LookupError:
        return None


def queues(trace: Trace) -> dict[str, float]:
    """Return how many requests wait in the mean, by Little's law: in front of the CPU and of the workers."""
    columns, done, span = trace.columns, trace.finished, trace.span_s
    before = columns["queued_s"] - columns["arrival_s"] - np.nan_to_num(columns["preprocess_s"])
    wait = columns["scheduled_s"] - columns["queued_s"]
    return {
        "preprocess": _share(max(0.0, float(before[done].sum())), span),
        "worker": _share(float(wait[done].sum()), span),
        "system": _share(float(trace.e2e_s[done].sum()), span),
    }


def bottleneck(trace: Trace, use: Use) -> str:
    """Return what holds the rest up, in words.

    A worker may be busy all the time with a few sequences and still have room; it is saturated when requests wait in
    front of it for most of the time that it works.
    """
    name, shares = next(iter(use.utilisation.items()))
    worker, cpu = 1.0 - shares["idle"], shares["preprocess"]
    waits, why = _waiting(trace)
    if cpu >= BUSY and cpu >= waits:
        return f"CPU preprocessing is busy {cpu:.0%} of the time; more devices do not help, more CPU workers do"
    if waits < WAITING:
        return f"nothing is saturated: pool {name!r} works {worker:.0%} of the time, its CPU workers {cpu:.0%}"
    largest = max(("encode", "prefill", "decode"), key=lambda stage: shares[stage])
    text = f"pool {name!r} is busy {worker:.0%} of the time, most of it with {largest} ({shares[largest]:.0%})"
    return f"{text}; requests wait {why}"


def _waiting(trace: Trace) -> tuple[float, str]:
    """Return the share of the workers' time in which requests wait, and for what."""
    steps = {key: np.concatenate([one[key] for one in trace.steps]) for key in trace.steps[0]}
    span = steps["end_s"] - steps["start_s"]
    waiting = steps["waiting"] > 0
    held = float(span[waiting].sum())
    limits = trace.limits
    full = (steps["running"] >= FULL * limits.max_sequences) & waiting
    blocks = (steps["kv_used_blocks"] >= FULL * limits.kv_blocks) & waiting
    share = _share(held, float(span.sum()))
    if span[full].sum() > held / 2:
        return share, f"because {limits.max_sequences} sequences run, the most that may"
    if span[blocks].sum() > held / 2:
        return share, f"because the KV cache of {limits.kv_blocks:,} blocks is full"
    return share, "for their turn in the budget of a step"
