"""Clusters for the tests: pools that are called what they run, the links between them, times that add up by hand."""

import numpy as np

from costmodel import Image
from simulator import Pool, ServingPlan
from simulator.engine import Simulation
from simulator.laws import check
from simulator.request import Items, requests_of
from simulator.service import Capacity, LinearService
from simulator.serving_plan import Policies
from simulator.topology import Link, Topology
from tests.simulator.cluster_fuzz import left_over

ROOM = Capacity(kv_blocks=100_000, block_tokens=1, chunk_tokens=10_000, max_sequences=64, encoder_tokens=10_000)
UNITS = {"embedding_token_bytes": 1.0, "kv_token_bytes": 1.0, "visual_tokens_per_pixel": 1.0}
"""A pixel is a visual token, and a token is a byte wherever it goes."""
FAST = 1e300
"""What a wire carries in a second that takes no time at all."""


def pool(stages, **more):
    """Return a pool that is called like its stages, with a plus between them."""
    return Pool(**{"name": stages, "stages": tuple(stages.split("+")), "hardware": "any", **more})


def cluster(*pools, wires=None, policies=None, **wire):
    """Return a plan with all links that it needs: infinitely fast, or as `wire` says, or by ends as `wires` says."""
    found = []
    for source, target, what in Topology.model_construct(pools=pools, links=()).hops():
        own = {"bandwidth_bytes_per_s": FAST, **wire, **(wires or {}).get((source.name, target.name), {})}
        if what == "pixels" and not (wires or {}).get((source.name, target.name)):
            own = {"bandwidth_bytes_per_s": FAST}
        found.append(Link(**{"from": source.name, "to": target.name}, **own))
    return ServingPlan(model="any", pools=pools, links=tuple(found), policies=Policies(**(policies or {})))


def troubled(plan, *failures, control=None, **policies):
    """Return a plan with failures and control, checked."""
    rules = {"failures": failures, "control": control, "policies": {**plan.policies.model_dump(), **policies}}
    return ServingPlan.model_validate(plan.model_dump(by_alias=True) | rules)


def crash(pool, worker, at_s, for_s=None):
    """Return the crash of a worker."""
    return {"kind": "crash", "pool": pool, "worker": worker, "at_s": at_s, "for_s": for_s}


def service(**more):
    """Return times that add up by hand; of capacity, what is given stands above the rest."""
    held = {name: more.pop(name) for name in list(more) if name in Capacity.__slots__}
    room = {name: getattr(ROOM, name) for name in Capacity.__slots__}
    return LinearService(**{"capacity": Capacity(**{**room, **held}), **UNITS, **more})


def pictures(counts, tokens, content=None, before=None):
    """Return pictures of so many visual tokens, in front of the text if nothing else is said."""
    total, sizes = sum(counts), sorted(set(tokens))
    return Items(
        np.concatenate([[0], np.cumsum(counts)]).astype(int),
        np.array([sizes.index(size) for size in tokens], dtype=int),
        np.arange(total) if content is None else np.array(content),
        np.zeros(total, dtype=int) if before is None else np.array(before),
        tuple(Image(size, 1) for size in sizes),
    )


def asked(text, output, arrival=None, *, items=None, concurrency=0, **links):
    """Return requests."""
    return requests_of(
        np.zeros(len(text)) if arrival is None else np.array(arrival, dtype=float),
        np.array(text),
        np.array(output),
        items=items,
        concurrency=concurrency,
        links={name: np.array(column) for name, column in links.items()},
    )


def run(plan, requests, times, **more):
    """Return a simulation that has run, its laws checked."""
    done = Simulation(plan, requests, times, **more)
    done.run()
    check(done.trace(0, 0.0, 0.0))
    assert not list(left_over(done))
    return done


def serve(plan, requests, times, **more):
    """Return the trace of a run that keeps the laws and leaves nothing behind."""
    return run(plan, requests, times, **more).trace(0, 0.0, 0.0)
