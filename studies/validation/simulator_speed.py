"""How fast the simulator is: finished requests a CPU second, events, memory, on one core at 0.8 of saturation.

Run: python studies/validation/simulator_speed.py [--million] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
from collections.abc import Mapping
from pathlib import Path

from simulator import Pool, ServingPlan, check, simulate, traffic
from simulator.request import Requests
from simulator.service import Service
from simulator.step_service import StepService

PLAN = ServingPlan(model="qwen2.5-vl-7b", pools=(Pool(hardware="h100-sxm5-80gb"),))
LOAD = 0.8
TARGETS = {"text-500-200": 30_000, "image-1080p-1": 10_000}
"""Finished requests a CPU second that each workload must reach."""
N_REQUESTS = {"text-500-200": 100_000, "image-1080p-1": 20_000}
N_SATURATION = {"text-500-200": 10_000, "image-1080p-1": 2000}
N_LEAPS = 200
MILLION = 1_000_000
REPEATS = 3
N_SHOWN = 20
"""Functions of a profile."""


def saturation(plan: ServingPlan, workload: str, service: Service | Mapping[str, Service], n: int) -> float:
    """Return the requests a second that are finished when so many are there from the start."""
    trace = simulate(plan, traffic.preset(workload, None, n, 0, arrivals="burst"), service=service)
    return n / trace.span_s


def timed(requests: Requests, service: StepService, repeats: int = REPEATS) -> dict[str, float]:
    """Return the best of some runs: the machine disturbs, and never helps."""
    traces = [simulate(PLAN, requests, service=service) for _ in range(repeats)]
    check(traces[0])
    best = min(trace.cpu_s for trace in traces)
    n = len(requests)
    return {"requests": n, "requests_per_cpu_s": n / best, "events_per_request": traces[0].events / n}


def leaping(service: StepService) -> dict[str, float]:
    """Return the events of leaping and stepping at a tenth of the load, with answers of 1,000 tokens."""
    from dataclasses import replace

    import numpy as np

    base = traffic.preset("text-500-200", 1.0, N_LEAPS, 0)
    long = np.full(N_LEAPS, 1000)
    requests = replace(base, output_tokens=long, max_output_tokens=long)
    burst = replace(requests, arrival_s=np.zeros(N_LEAPS))
    rate = 0.1 * N_LEAPS / simulate(PLAN, burst, service=service).span_s
    spread = replace(requests, arrival_s=base.arrival_s / rate)
    leapt, stepped = (simulate(PLAN, spread, service=service, leaps=leaps) for leaps in (True, False))
    same = leapt.columns["finish_s"].tobytes() == stepped.columns["finish_s"].tobytes()
    return {"events_leaping": leapt.events, "events_stepping": stepped.events, "equal_bit_by_bit": float(same)}


def rows(*, million: bool = False) -> dict[str, dict[str, float]]:
    """Return every figure."""
    service = StepService.of(PLAN)
    found: dict[str, dict[str, float]] = {}
    for workload in TARGETS:
        peak = saturation(PLAN, workload, service, N_SATURATION[workload])
        requests = traffic.preset(workload, LOAD * peak, N_REQUESTS[workload], 0)
        found[workload] = {"saturation_requests_per_s": peak, **timed(requests, service)}
    found["leaps"] = leaping(service)
    if million:
        rate = LOAD * found["text-500-200"]["saturation_requests_per_s"]
        counts = (10_000, MILLION)  # each with a service that remembers nothing yet
        few, many = (timed(traffic.preset("text-500-200", rate, n, 0), StepService.of(PLAN), repeats=1) for n in counts)
        many["cost_against_10000"] = few["requests_per_cpu_s"] / many["requests_per_cpu_s"]
        many["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        found["million"] = many
    return found


def profile(workload: str, n: int = 5000) -> list[tuple[str, float, float]]:
    """Return where a run's time goes: functions, their own share of it, and their calls a request."""
    service = StepService.of(PLAN)
    peak = saturation(PLAN, workload, service, N_SATURATION[workload])
    requests = traffic.preset(workload, LOAD * peak, n, 0)
    simulate(PLAN, requests, service=service)  # so that tables are filled, as on long runs
    profiler = cProfile.Profile()
    profiler.runcall(simulate, PLAN, requests, service=service)
    held = pstats.Stats(profiler).get_stats_profile()
    total = sum(one.tottime for one in held.func_profiles.values())
    rows = [
        (f"{Path(one.file_name).name}: {name}", one.tottime / total, int(one.ncalls.split("/")[0]) / n)
        for name, one in held.func_profiles.items()
    ]
    return sorted(rows, key=lambda row: -row[1])[:N_SHOWN]


def main() -> None:
    """Print every figure, the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", action="store_true", help="run a million requests too")
    parser.add_argument("--profile", action="store_true", help="show where time goes instead")
    asked = parser.parse_args()
    if asked.profile:
        for workload in TARGETS:
            print(workload)
            for name, share, calls in profile(workload):
                print(f"  {share:6.1%}  {calls:6.2f} calls a request  {name}")
        return
    found = rows(million=asked.million)
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in figures.items()))
    for workload, target in TARGETS.items():
        reached = found[workload]["requests_per_cpu_s"]
        print(f"{workload}: {reached:,.0f} of {target:,} requests a CPU second ({reached / target:.2f})")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
