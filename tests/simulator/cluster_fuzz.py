"""Random clusters for the fuzz tests: pools by role, links, routers, orders, patience and priorities."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from simulator import Pool, ServingPlan
from simulator.serving_plan import Policies
from simulator.topology import Link, Topology

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
    "power-of-two",
    "prefix-aware",
    "affinity",
)


@st.composite
def clusters(draw):
    """Return a plan; every link that it needs is there."""
    shape = draw(st.sampled_from(SHAPES))
    pools = tuple(
        Pool(
            name="+".join(stages),
            hardware="any",
            stages=stages,
            workers=draw(st.integers(1, 3)),
            max_batch=draw(st.sampled_from([None, 1, 4])),
            encode_items=draw(st.sampled_from([None, 1, 3])),
            encoder_budget_tokens=draw(st.sampled_from([None, 500])),
            preprocess_by=draw(st.sampled_from(["request", "item"])),
            long_prefill_tokens=draw(st.sampled_from([0, 64])),
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
        prefix_caching=draw(st.booleans()),
        signal_age_s=draw(st.sampled_from([0.0, 0.5])),
        admission=draw(st.sampled_from(["all", "all", "queue"])),
        admission_limit=30.0,
    )
    return ServingPlan(model="any", pools=pools, links=links, policies=policies)


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
