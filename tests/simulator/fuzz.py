"""Random workers and traffic for the fuzz tests."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from costmodel import Image
from simulator import Pool, ServingPlan
from simulator.request import Items, requests_of
from simulator.service import Capacity, LinearService, ReadRule
from simulator.serving_plan import Policies

SIZES = (Image(280, 280), Image(560, 560), Image(1120, 560))


KV_TOKEN_BYTES = 50.0


@st.composite
def hosts(draw):
    """Return what a pool says of KV in its hosts' memory: nothing, or room for a few or for many blocks."""
    held = draw(st.sampled_from([0.0, 0.0, 5e3, 3e4, 1e6]))
    return {"host_cache_bytes": held, "host_bandwidth_bytes_per_s": draw(st.sampled_from([1e4, 1e6, 1e12]))}


@st.composite
def services(draw):
    rules = draw(
        st.sampled_from(
            [(ReadRule(),), (ReadRule(), ReadRule(0.5, 40)), (ReadRule(cap=24), ReadRule(fixed=3.0, share=0.0))]
        )
    )
    block = draw(st.sampled_from([1, 4, 16]))
    sequences = draw(st.integers(1, 12))
    return LinearService(
        step_base_s=draw(st.sampled_from([1e-3, 0.01])),
        token_s=draw(st.sampled_from([1e-5, 1e-4])),
        sequence_s=1e-5,
        key_s=1e-7,
        kv_token_bytes=KV_TOKEN_BYTES,
        patch_s=draw(st.sampled_from([0.0, 1e-5])),
        pixel_s=draw(st.sampled_from([0.0, 1e-8])),
        request_s=draw(st.sampled_from([0.0, 0.003])),
        rules=rules,
        preprocess_workers=draw(st.integers(1, 3)),
        capacity=Capacity(
            kv_blocks=draw(st.integers(20, 200) | st.integers(20, 3000)) * 16 // block,
            block_tokens=block,
            chunk_tokens=draw(st.integers(sequences, 600)),
            max_sequences=sequences,
            encoder_tokens=draw(st.sampled_from([100, 800, 4000])),
        ),
    )


@st.composite
def traffic(draw):
    n = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gaps = rng.exponential(draw(st.sampled_from([0.0, 0.01, 0.3])), n)
    counts = rng.integers(0, 1 + draw(st.integers(0, 3)), n)
    total = int(counts.sum())
    text = rng.integers(1, draw(st.sampled_from([30, 800])), n)
    owner = np.repeat(np.arange(n), counts)
    before = np.sort(rng.integers(0, 1000, total) % text[owner]) if total else np.zeros(0, dtype=int)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for r in range(n):
        part = slice(offsets[r], offsets[r + 1])
        before[part] = np.sort(before[part] % text[r])
    kind = rng.integers(0, len(SIZES), total)
    content = rng.integers(0, draw(st.sampled_from([4, 10**6])), total) * len(SIZES) + kind
    items = Items(offsets, kind, content, before, SIZES)
    links = {}
    kind = draw(st.sampled_from(["open", "open", "shared", "chat", "closed"]))
    output = rng.integers(1, draw(st.sampled_from([2, 20, 300])), n)
    if kind in ("shared", "chat"):
        parent = np.array([rng.integers(-1, i) if i else -1 for i in range(n)])
        links = {
            "parent": parent,
            "shared_text_tokens": np.minimum(rng.integers(0, 400, n), np.minimum(text, text[np.maximum(parent, 0)])),
            "shared_items": np.zeros(n, dtype=int),
        }
    if kind == "chat":
        links["after"] = links["parent"]
    concurrency = int(rng.integers(1, n + 1)) if kind == "closed" else 0
    arrival = np.cumsum(gaps)
    if kind == "chat":
        arrival = np.where(links["after"] >= 0, gaps, arrival)
    return requests_of(arrival, text, output, items=items, concurrency=concurrency, links=links)


@st.composite
def plans(draw):
    shares = draw(st.booleans())
    pool = Pool(
        hardware="any",
        workers=draw(st.sampled_from([1, 1, 2])),
        long_prefill_tokens=draw(st.sampled_from([0, 64])),
        preprocess_by=draw(st.sampled_from(["request", "item"])),
        **(draw(hosts()) if shares else {}),
    )
    policies = Policies(
        batch=draw(st.sampled_from(["vllm", "sglang", "sarathi", "static"])),
        router=draw(st.sampled_from(["round-robin", "least-requests", "least-tokens"])),
        prefix_caching=shares,
    )
    return ServingPlan(model="any", pools=(pool,), policies=policies)


@st.composite
def crowded(draw):
    """Return a plan with a host cache, prompts that start alike, and a service with few blocks for them."""
    base = draw(services())
    block, n = base.capacity.block_tokens, draw(st.integers(4, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    text, output = rng.integers(60, 400, n), rng.integers(1, draw(st.sampled_from([2, 40])), n)
    parent = np.array([rng.integers(-1, i) if i else -1 for i in range(n)])
    shared = np.minimum(rng.integers(30, 400, n), np.minimum(text, text[np.maximum(parent, 0)]))
    links = {"parent": parent, "shared_text_tokens": shared, "shared_items": np.zeros(n, dtype=int)}
    gaps = rng.exponential(draw(st.sampled_from([0.01, 0.3])), n)
    if draw(st.booleans()):
        links["after"] = parent
    arrival = np.where(parent >= 0, gaps, np.cumsum(gaps)) if "after" in links else np.cumsum(gaps)
    blocks = draw(st.integers(450, 1000)) // block + 1
    plan, held = draw(plans()), {"host_cache_bytes": draw(st.sampled_from([2e4, 5e4, 1e6]))}
    pool = plan.pools[0].model_copy(update={"host_bandwidth_bytes_per_s": 1e6, **held})
    policies = plan.policies.model_copy(update={"prefix_caching": True})
    return (
        plan.model_copy(update={"pools": (pool,), "policies": policies}),
        requests_of(arrival, text, output, links=links),
        replace(base, capacity=replace(base.capacity, kv_blocks=blocks)),
    )
