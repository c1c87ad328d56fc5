"""What must hold on every trace, whatever the plan and the traffic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from costmodel.base import Array
from simulator.request import ENDS, State
from simulator.trace import Trace


def check(trace: Trace) -> None:
    """Raise if a trace breaks a law.

    Raises
    ------
    AssertionError
        With every law that is broken.
    """
    broken = list(broken_laws(trace))
    if broken:
        raise AssertionError("; ".join(broken))


def broken_laws(trace: Trace) -> Iterator[str]:
    """Yield the laws that a trace breaks."""
    yield from conservation(trace)
    yield from causality(trace)
    yield from monotone_clock(trace)
    yield from cache_conservation(trace)
    yield from never_idle(trace)
    yield from own_stages(trace)
    yield from tokens(trace)
    yield from loads(trace)


def conservation(trace: Trace) -> Iterator[str]:
    """Every request arrives, and ends once: finished, or rejected, cancelled or failed with a reason."""
    state = trace.columns["state"]
    lost = np.flatnonzero(~np.isin(state, ENDS))
    if len(lost):
        names = ", ".join(f"{int(i)} {State(int(state[i])).name.lower()}" for i in lost[:3])
        yield f"conservation: {len(lost)} requests have no end ({names})"
    if np.isnan(trace.columns["arrival_s"]).any():
        yield "conservation: a request never arrived"
    done = trace.finished
    if np.isnan(trace.columns["finish_s"][done]).any() or not np.isnan(trace.columns["finish_s"][~done]).all():
        yield "conservation: a request has an end time and is not finished, or the reverse"
    unsaid = [int(i) for i in np.flatnonzero(np.isin(state, ENDS) & ~done) if int(i) not in trace.reasons]
    if unsaid:
        yield f"conservation: {len(unsaid)} requests end without an answer and nobody says why ({unsaid[0]})"


def causality(trace: Trace) -> Iterator[str]:
    """Nothing happens to a request before what it depends on."""
    columns, done = trace.columns, trace.finished
    ways = (
        ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s"),
        ("arrival_s", "encoded_s", "first_token_s"),
        ("first_token_s", "joined_s", "finish_s"),
    )
    for before, after in (pair for way in ways for pair in itertools.pairwise(way)):
        early = columns[after][done] < columns[before][done]
        if before == "encoded_s":  # what is cached, or was computed before preemption, needs no embeddings
            early &= (columns["cached_tokens"][done] == 0) & (columns["preemptions"][done] == 0)
        if early.any():
            yield f"causality: {int(early.sum())} requests have {after} before {before}"
    several = done & (trace.output_tokens > 1)
    if (columns["finish_s"][several] <= columns["first_token_s"][several]).any() and _takes_time(trace):
        yield "causality: a second token comes with the first"
    follows = trace.requests.after
    late = np.flatnonzero(follows >= 0)
    ends = np.fmax(columns["finish_s"], columns["ended_s"])[follows[late]]
    if (columns["arrival_s"][late] < ends).any():
        yield "causality: a request arrives before the one that it follows has ended"


def _takes_time(trace: Trace) -> bool:
    return all((steps["end_s"] > steps["start_s"]).all() for steps in trace.steps)


def monotone_clock(trace: Trace) -> Iterator[str]:
    """No step of a worker starts before the last one ends."""
    for i, steps in enumerate(trace.steps):
        if (steps["end_s"] < steps["start_s"]).any():
            yield f"monotone clock: a step of worker {i} ends before it starts"
        if (steps["start_s"][1:] < steps["end_s"][:-1]).any():
            yield f"monotone clock: a step of worker {i} starts before the last one ends"


def cache_conservation(trace: Trace) -> Iterator[str]:
    """Blocks and embeddings add up, never below zero or beyond what there is, and none is held at the end."""
    yield from (f"cache conservation: {fault}" for fault in trace.faults)
    if trace.held_blocks:
        yield f"cache conservation: {trace.held_blocks} blocks are held by nobody"
    for pool in trace.pools:
        for i in pool.workers:
            used, blocks = trace.steps[i]["kv_used_blocks"], pool.limits.kv_blocks
            if len(used) and (used.min() < 0 or used.max() > blocks):
                yield f"cache conservation: worker {i} uses {used.max():.0f} of {blocks} blocks"
    cached = trace.columns["cached_tokens"]
    if (cached >= trace.prompt_tokens)[trace.finished].any() or (cached < 0).any():
        yield "cache conservation: a whole prompt comes out of the cache; its last token must be computed"


def never_idle(trace: Trace) -> Iterator[str]:
    """Between the steps of a worker nothing waits for it: without a running request, it admits whatever there is.

    Where a worker rests, what it holds waits for another worker or for its own restart.
    """
    columns = trace.columns
    for pool in trace.pools:
        for i, rests in zip(pool.workers, pool.rests, strict=True):
            steps = trace.steps[i]
            mine = trace.finished & (columns["worker"] == i)
            queued, scheduled = np.sort(columns["queued_s"][mine]), np.sort(columns["scheduled_s"][mine])
            for start_s, end_s in _gaps(steps):
                middle = np.searchsorted(queued, end_s, side="left") - np.searchsorted(scheduled, end_s, side="left")
                middle[np.isin(end_s, rests[1::2])] = 0
                if middle.any():
                    yield f"never idle: worker {i} is idle from {start_s[middle != 0][0]} s while a request waits"
            if len(steps["waiting"]):
                idle = steps["start_s"][1:] > steps["end_s"][:-1]
                idle &= ~np.isin(steps["end_s"][:-1], rests[::2])  # the rest may end before the gap: the client left
                if steps["waiting"][:-1][idle].any():
                    yield f"never idle: worker {i} stops while it holds requests"


def own_stages(trace: Trace) -> Iterator[str]:
    """Each pool runs its stages and no others."""
    signs = {"encode": "encode_s", "prefill": "chunk_tokens", "decode": "decoding"}
    for pool in trace.pools:
        for stage, sign in signs.items():
            if not pool.pool.runs(stage) and any(steps[sign].any() for steps in trace.steps_of(pool)):  # type: ignore[arg-type]
                yield f"own stages: pool {pool.pool.name!r} runs {stage}, which is not one of its stages"


def _gaps(steps: Mapping[str, Array]) -> Iterator[tuple[Array, Array]]:
    """Yield the starts and ends of the times without a step [s]."""
    if len(steps["start_s"]):
        starts, ends = steps["end_s"][:-1], steps["start_s"][1:]
        idle = ends > starts
        yield starts[idle], ends[idle]


def tokens(trace: Trace) -> Iterator[str]:
    """Every prompt token is computed or cached, and every token of an answer is generated."""
    done, columns = trace.finished, trace.columns
    again = columns["preemptions"].any() or columns["retries"].any()
    if again or np.isin(columns["state"], (State.CANCELLED, State.FAILED)).any():
        return  # what is computed again or in vain is not told apart in the steps
    computed = sum(float(steps["chunk_tokens"].sum()) for steps in trace.steps)
    expected = float((trace.prompt_tokens - columns["cached_tokens"])[done].sum())
    if computed != expected:
        yield f"conservation: {computed:.0f} prompt tokens were computed, and {expected:.0f} were to be"
    decoded = sum(float((steps["decoding"] * steps["steps"]).sum()) for steps in trace.steps)
    answers = float((trace.output_tokens - 1)[done].sum())
    if decoded != answers:
        yield f"conservation: {decoded:.0f} tokens were decoded, and {answers:.0f} were to be"
    first, weights = float(done.sum()), float(trace.itl[1].sum())
    if weights != answers:
        yield f"conservation: {weights:.0f} gaps between tokens for {answers:.0f} tokens after {first:.0f} first ones"


def loads(trace: Trace) -> Iterator[str]:
    """Nothing comes from a host or a store that was not put there, or that is computed or encoded too."""
    columns = trace.columns
    loaded = sum(one.host_loaded_tokens for one in trace.pools)
    again = columns["preemptions"].any() or columns["retries"].any()
    if not again and loaded > columns["cached_tokens"].sum():
        yield f"loads: {loaded} tokens were loaded from hosts, and {columns['cached_tokens'].sum()} were cached at all"
    for one in trace.pools:
        if one.host_loaded_blocks and not one.host_stored_blocks:
            yield f"loads: pool {one.pool.name!r} loads {one.host_loaded_blocks} blocks that nobody has stored"
    store, items = trace.store, int(trace.requests.n_items.sum())
    if store.hits and not store.written:
        yield f"loads: {store.hits} items were in a store into which nothing was written"
    if not again and store.hits + store.misses > items:
        yield f"loads: {store.hits + store.misses} items were looked for in the store, and there are {items}"
    if not again and trace.plan.store is not None and store.hits > items - trace.encoder_misses:
        yield f"loads: {store.hits} items came from the store and {trace.encoder_misses} were encoded, of {items}"
