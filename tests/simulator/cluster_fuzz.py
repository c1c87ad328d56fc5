"""Random clusters for the fuzz tests: pools by role, links, routers, orders, patience and priorities.

`python -m tests.simulator.cluster_fuzz 5000 1` runs 5000 of them from seed 1 and prints a line for each that fails, and
`python -m tests.simulator.cluster_fuzz 17/42` prints example 42 of seed 17 in full.
"""

import signal
import sys
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from simulator import Pool, ServingPlan, simulate
from simulator.engine import Simulation
from simulator.laws import broken_laws
from simulator.rules import Store
from simulator.serving_plan import Policies
from simulator.topology import Link, Topology, encoders_for_others
from simulator.trace import same
from tests.simulator.fuzz import hosts, services, traffic

BATCH = 50
"""Examples of one seed: few, so that one of them is quickly found again."""
LONGEST_S = 60
"""An example that takes longer is taken to hang [s]."""

SHAPES = (
    (("preprocess", "encode", "prefill", "decode"),),
    (("preprocess", "encode"), ("prefill", "decode")),
    (("encode",), ("preprocess", "prefill", "decode")),
    (("preprocess",), ("encode",), ("prefill", "decode")),
    (("preprocess", "encode", "prefill"), ("decode",)),
    (("preprocess", "encode"), ("prefill",), ("decode",)),
    (("preprocess", "encode", "decode"), ("prefill",)),
    (("preprocess", "encode"), ("prefill",), ("prefill", "decode")),
    (("preprocess",), ("encode", "prefill", "decode")),
)
ROUTERS = (
    "round-robin",
    "least-requests",
    "least-tokens",
    "least-image-tokens",
    "random",
    "power-of-two",
    "prefix-aware",
    "affinity",
)


@st.composite
def clusters(draw):
    """Return a plan; every link that it needs is there."""
    shape, shares = draw(st.sampled_from(SHAPES)), draw(st.booleans())
    pools = tuple(
        Pool(
            name="+".join(stages),
            hardware="any",
            stages=stages,
            workers=draw(st.integers(1, 3)),
            max_batch=draw(st.sampled_from([None, 1, 4])),
            encode_items=draw(st.sampled_from([None, 1, 3])),
            encoder_budget_tokens=draw(st.sampled_from([None, 500])),
            encoder_cache_tokens=draw(st.sampled_from([None, None, 1])),
            preprocess_by=draw(st.sampled_from(["request", "item"])),
            long_prefill_tokens=draw(st.sampled_from([0, 64])),
            **(draw(hosts()) if shares and "prefill" in stages else {}),
        )
        for stages in shape
    )
    links = tuple(draw(links_between(pools)))
    policies = Policies(
        batch=draw(st.sampled_from(["vllm", "sglang", "sarathi"])),
        router=draw(st.sampled_from(ROUTERS)),
        encode_router=draw(st.sampled_from(ROUTERS)),
        decode_router=draw(st.sampled_from(ROUTERS)),
        order=draw(st.sampled_from(["fcfs", "priority", "shortest", "size-class"])),
        encode_order=draw(st.sampled_from(["fcfs", "shortest"])),
        prefix_caching=shares,
        signal_age_s=draw(st.sampled_from([0.0, 0.5])),
        admission=draw(st.sampled_from(["all", "all", "queue", "ttft"])),
        admission_limit=30.0,
    )
    apart = encoders_for_others(Topology.model_construct(pools=pools, links=links))
    return ServingPlan(
        model="any", pools=pools, links=links, policies=policies, store=draw(stores()) if apart else None
    )


@st.composite
def stores(draw):
    """Return no store, or one with room for nothing, for a few pictures or for all."""
    room = draw(st.sampled_from([None, 0.0, 1e5, 5e5, 1e12]))
    rate, latency_s = draw(st.sampled_from([1e5, 1e6, 1e12])), draw(st.sampled_from([0.0, 1e-3]))
    return room if room is None else Store(capacity_bytes=room, bandwidth_bytes_per_s=rate, latency_s=latency_s)


@st.composite
def links_between(draw, pools):
    """Return a link for each hop of some pools."""
    whole = Topology.model_construct(pools=pools, links=())
    found = []
    for source, target, what in whole.hops():
        mode = draw(st.sampled_from(["push", "pull", "reserve"]))
        found.append(
            Link(
                **{"from": source.name, "to": target.name},
                bandwidth_bytes_per_s=draw(st.sampled_from([1e4, 1e6, 1e12])),
                latency_s=draw(st.sampled_from([0.0, 1e-3])),
                per=draw(st.sampled_from(["worker", "pool"])),
                mode=mode,
                release=draw(st.sampled_from(["request", "item"])) if what == "embeddings" else "request",
                layerwise=what == "KV" and mode == "reserve" and draw(st.booleans()),
            )
        )
    return found


@st.composite
def moody(draw, requests):
    """Return the requests with clients that give up, and priorities."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = len(requests)
    patience = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.0, 0.5])), rng.exponential(2.0, n) + 1e-3, np.inf)
    longer = requests.output_tokens + rng.integers(0, 5, n)
    return replace(requests, patience_s=patience, priority=rng.integers(0, 3, n), max_output_tokens=longer)


@st.composite
def cases(draw):
    """Return a plan, requests and a service whose transfers take time."""
    service = replace(draw(services()), embedding_token_bytes=100.0, kv_token_bytes=50.0, kv_layers=4)
    return draw(clusters()), draw(moody(draw(traffic()))), service


def left_over(run):
    """Yield what a simulation has not cleared away at its end: loads, room, outputs, requests on their way."""
    for pool in run.runs:
        loads = pool.loads
        for name in ("requests", "tokens", "image_tokens"):
            if any(getattr(loads, name)):
                yield f"left over: {name} of pool {pool.pool.name!r} are {list(getattr(loads, name))}"
        yield from (
            f"left over: {len(room)} requests ask pool {pool.pool.name!r} for room" for room in pool.rooms if room
        )
    if run.flow.pictures.encoding or run.network.journeys or run.network.parked:
        yield f"left over: {run.flow.pictures.encoding} are encoded, {list(run.network.journeys)} are on their way"


def faults_of(plan, requests, service):
    """Return what breaks: laws, with and without leaps, and runs that should be the same and are not."""
    run = Simulation(plan, requests, service)
    run.run()
    trace = run.trace(0, 0.0, 0.0)
    stepped = simulate(plan, requests, service=service, leaps=False)
    faults = [*broken_laws(trace), *left_over(run), *(f"stepped: {line}" for line in broken_laws(stepped))]
    if not same(trace, stepped) or trace.store != stepped.store:
        faults.append("leaps differ from steps")
    if not same(trace, simulate(plan, requests, service=service)):
        faults.append("two runs differ")
    return faults


def each(start, n, see, drawn):
    """Call a function with each of some examples of a seed, and its number."""
    numbers = iter(range(n))

    @seed(start)
    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def run(case):
        see(next(numbers), case)

    run()


def _stop(signal_number, frame):
    del signal_number, frame
    raise TimeoutError(f"takes over {LONGEST_S} s")


def attempt(case, faults):
    """Return what is wrong with an example, a crash or a hang included."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LONGEST_S)
    try:
        return faults(*case)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
        return [f"{type(error).__name__}: {error}"]
    finally:
        signal.alarm(0)


def _report(start, number, case, faults):
    for fault in attempt(case, faults)[:1]:
        pools = " | ".join(f"{pool.workers} x {pool.name}" for pool in case[0].pools)
        sys.stdout.write(f"{start}/{number}: {fault} [{pools}; {len(case[1])} requests]\n")
        sys.stdout.flush()


def main(arguments, drawn, faults):
    """Run examples, or show one."""
    if "/" in arguments[0]:
        start, wanted = map(int, arguments[0].split("/"))
        found = []
        each(start, BATCH, lambda number, case: found.append(case) if number == wanted else None, drawn)
        sys.stdout.write(f"{found[0]}\n{attempt(found[0], faults)}\n")
        return
    n, start = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    for batch in range(-(-n // BATCH)):
        first = start * 10**6 + batch
        each(first, BATCH, lambda number, case, first=first: _report(first, number, case, faults), drawn)
    sys.stdout.write(f"{n} examples\n")


if __name__ == "__main__":
    main(sys.argv[1:], cases(), faults_of)
