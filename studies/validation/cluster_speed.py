"""How fast the simulator is with many workers and with several pools: CPU time a finished request, on one core.

Run: python studies/validation/cluster_speed.py | tee studies/validation/cluster_speed.txt
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median
from typing import Final

from costmodel import load_hardware
from simulator import Pool, ServingPlan, check, simulate, traffic
from simulator.service import Service
from simulator.serving_plan import Policies
from simulator.step_service import StepService
from simulator.topology import Link
from studies.validation.simulator_speed import LOAD, saturation

MODEL: Final = "qwen2.5-vl-7b"
HARDWARE: Final = "h100-sxm5-80gb"
TEXT, PICTURES = "text-500-200", "image-1080p-1"
ROUTERS: Final = ("round-robin", "least-tokens", "prefix-aware", "power-of-two")
WORKERS: Final = 256
PER_WORKER: Final = 400
"""Requests a worker; a run begins and ends with few at work, so as many on one worker are compared with them."""
RUNS, RUNS_ALONE = 3, 15
MOST_RATIO: Final = 1.5
"""How much more a request may cost at so many workers than at one."""
LANGUAGE: Final = 3
"""Workers of prefill and decode beside one that encodes."""
CPU_WORKERS: Final[Mapping[str, int | None]] = {"one CPU worker": None, "64 CPU workers": 64}
"""Of the encoding pool: the engine's default, which a picture a request keeps busy, and enough for the devices."""
N_PICTURES, N_BURST = 6000, 2000
LEAST_RATE: Final = 10_000
"""Finished requests a CPU second that encode + prefill/decode pools must reach."""
Figures = dict[str, dict[str, float]]


def pool_of(workers: int, router: str) -> ServingPlan:
    """Return workers that do everything."""
    pool = Pool(hardware=HARDWARE, workers=workers)
    return ServingPlan(model=MODEL, pools=(pool,), policies=Policies(router=router))


def encoder_apart(cpu_workers: int | None) -> ServingPlan:
    """Return one worker that encodes for three, over the device's own link."""
    own = load_hardware(HARDWARE).link(1 + LANGUAGE)
    held = {"bandwidth_bytes_per_s": own.bandwidth_bytes_per_s, "latency_s": own.latency_s}
    encode = Pool(name="e", stages=("preprocess", "encode"), hardware=HARDWARE, preprocess_workers=cpu_workers)
    language = Pool(name="pd", stages=("prefill", "decode"), hardware=HARDWARE, workers=LANGUAGE)
    link = Link.model_validate({"from": "e", "to": "pd", "kind": own.kind, **held})
    return ServingPlan(model=MODEL, pools=(encode, language), links=(link,))


def cost_us(plan: ServingPlan, rate: float, n: int, service: Service, runs: int) -> dict[str, float]:
    """Return the CPU time of a finished request and its events, medians of runs with different seeds."""
    found = []
    for seed in range(runs):
        trace = simulate(plan, traffic.preset(TEXT, rate, n, seed), service=service)
        found.append((1e6 * trace.cpu_s / n, trace.events / n))
    check(trace)
    costs, events = zip(*found, strict=True)
    return {"us_per_request": median(costs), "events_per_request": median(events)}


def many_workers() -> Figures:
    """Return what a request costs at one worker, and at many with every router."""
    service = StepService.of(pool_of(1, ROUTERS[0]))
    rate = LOAD * saturation(pool_of(1, ROUTERS[0]), TEXT, service, N_BURST)
    alone = cost_us(pool_of(1, ROUTERS[0]), rate, PER_WORKER, service, RUNS_ALONE)
    rows: Figures = {"1 worker": alone}
    for router in ROUTERS:
        row = cost_us(pool_of(WORKERS, router), WORKERS * rate, WORKERS * PER_WORKER, service, RUNS)
        row["ratio"] = row["us_per_request"] / alone["us_per_request"]
        rows[f"{WORKERS} workers, {router}"] = row
    return rows


def pools() -> Figures:
    """Return how fast requests with a picture go through an encoder apart from the language model."""
    rows: Figures = {}
    for name, cpu_workers in CPU_WORKERS.items():
        plan = encoder_apart(cpu_workers)
        service = {pool.name: StepService.of_pool(plan, pool) for pool in plan.pools}
        rate = LOAD * saturation(plan, PICTURES, service, N_BURST)
        traces = [
            simulate(plan, traffic.preset(PICTURES, rate, N_PICTURES, seed), service=service) for seed in range(RUNS)
        ]
        check(traces[0])
        speed = median(N_PICTURES / trace.cpu_s for trace in traces)
        events = traces[0].events / N_PICTURES
        row = {"requests_per_s": rate, "requests_per_cpu_s": speed, "events_per_request": events}
        rows[f"1 encode : {LANGUAGE} prefill+decode, {name}"] = row
    return rows


def main() -> None:
    """Print every figure, the last line as JSON."""
    found = {**many_workers(), **pools()}
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in figures.items()))
    for name, figures in found.items():
        if "ratio" in figures:
            print(f"{name}: {figures['ratio']:.2f} times the cost at one worker, at most {MOST_RATIO}")
        if "requests_per_cpu_s" in figures:
            speed = figures["requests_per_cpu_s"]
            print(f"{name}: {speed:,.0f} of {LEAST_RATE:,} requests a CPU second ({speed / LEAST_RATE:.2f})")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
