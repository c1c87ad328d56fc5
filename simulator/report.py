"""What a run means for users and owners: latencies, promises kept, use of the hardware, money, energy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from costmodel.base import Array
from costmodel.energy import energy_per_token_j
from simulator.request import State
from simulator.serving_plan import Slo
from simulator.trace import Trace
from simulator.usage import Use, bottleneck, queues, stage_seconds, use_of

LATENCIES: Final = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
PERCENTILES: Final = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """How a latency is spread over requests (or gaps) [s]; None where there are none."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None

    @staticmethod
    def of(values: Array, weights: Array | None = None) -> Spread:
        """Return the spread of values that occurred so often each; not-a-numbers are left out."""
        known = ~np.isnan(values)
        values = values[known]
        counts = np.ones(len(values)) if weights is None else weights[known]
        if not len(values) or not counts.sum():
            return Spread(None, None, None, None, None)
        order = np.argsort(values, kind="stable")
        values, reached = values[order], np.cumsum(counts[order])
        places = np.searchsorted(reached, np.array(PERCENTILES) / 100 * reached[-1])
        picked = values[np.minimum(places, len(values) - 1)]
        return Spread(float(np.average(values, weights=counts[order])), *map(float, picked))


@dataclass(frozen=True, slots=True)
class Report:
    """The serving report.

    Parameters
    ----------
    requests : mapping
        Counts: arrived, finished, rejected, cancelled, failed, running, queued.
    ttft_s, tpot_s, itl_s, e2e_s : Spread
        Time to first token, time per output token (over N - 1 gaps), gaps between tokens, arrival to last token [s].
    throughput_requests_per_s, throughput_tokens_per_s : float
        Finished requests and their output tokens over the time from first arrival to last end.
    slo_attainment : mapping
        Shares of arrived requests that keep ttft, tpot, both (joint), and e2e; None where nothing is promised.
    goodput_requests_per_s : float or None
        Rate of requests that keep every promise (Table 5 of arXiv:2604.05546); for the two goodputs that are maximum
        rates, see `simulator.goodput`.
    cost_per_request_usd, cost_per_good_request_usd : float or None
        List price over finished requests, and over those that keep every promise (Eq. 7); None without a price.
    energy_per_token_j, energy_per_token_tdp_j : float or None
        From the power of each stage and of idle devices; and Eq. 9, the device's limit times TPOT, which is what one
        stream alone would cost.
    reasons : mapping
        Why requests ended without an answer, and how many.
    failures : mapping
        How often something went wrong, by its kind.
    retries : int
        How often requests began anew.
    paid_worker_s : mapping
        By pool, for how long its workers were paid, all together [s].
    classes : mapping
        By priority, where requests have several: how many arrived and finished, time to first token and end to end, and
        attainment.
    utilisation, links, queues : mapping
        By pool and stage, and by link, the share of time in use; mean requests that wait.
    bottleneck : str
        In words.
    preemptions, cached_prompt_share, encoder_hit_share : float
        Preemptions, share of prompt tokens and of encodings that came from caches.
    shared_caches : mapping
        host_loaded_tokens and host_loaded_bytes: prompt tokens whose KV was loaded from hosts instead of computed (they
        count as cached), and its bytes. store_hit_share, store_fetched_bytes and store_written_bytes: share of items
        that the store of embeddings had, and what it sent and took.
    span_s, wall_s, cpu_s, events
        Simulated time, what the run took [s], events on the clock.
    """

    requests: Mapping[str, int]
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    e2e_s: Spread
    throughput_requests_per_s: float
    throughput_tokens_per_s: float
    slo_attainment: Mapping[str, float | None]
    goodput_requests_per_s: float | None
    cost_per_request_usd: float | None
    cost_per_good_request_usd: float | None
    energy_per_token_j: float | None
    energy_per_token_tdp_j: float | None
    reasons: Mapping[str, int]
    failures: Mapping[str, int]
    retries: int
    paid_worker_s: Mapping[str, float]
    classes: Mapping[str, Mapping[str, Any]]
    utilisation: Mapping[str, Mapping[str, float]]
    links: Mapping[str, float]
    queues: Mapping[str, float]
    bottleneck: str
    preemptions: int
    cached_prompt_share: float
    encoder_hit_share: float
    shared_caches: Mapping[str, float]
    span_s: float
    wall_s: float
    cpu_s: float
    events: int

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, by the keys of the JSON interface."""
        return asdict(self)


def report(trace: Trace, slo: Slo | None = None) -> Report:
    """Return the report of a run.

    Parameters
    ----------
    trace : Trace
    slo : Slo, optional
        What is promised.
    """
    slo = slo or Slo()
    done, span = trace.finished, trace.span_s
    n_done, tokens = int(done.sum()), int(trace.output_tokens[done].sum())
    use = use_of(trace)
    passing, promised = _passing(trace, slo), slo != Slo()
    n_good = int(passing["all"].sum())
    tpot = Spread.of(trace.tpot_s[done])
    prompt = int(trace.prompt_tokens[done].sum())
    return Report(
        requests=_counts(trace),
        ttft_s=Spread.of(trace.ttft_s[done]),
        tpot_s=tpot,
        itl_s=Spread.of(*trace.itl),
        e2e_s=Spread.of(trace.e2e_s[done]),
        throughput_requests_per_s=_over(n_done, span),
        throughput_tokens_per_s=_over(tokens, span),
        slo_attainment=_attainment(len(trace), slo, passing),
        goodput_requests_per_s=_over(n_good, span) if promised else None,
        cost_per_request_usd=_cost(use, n_done),
        cost_per_good_request_usd=_cost(use, n_good) if promised else None,
        energy_per_token_j=_over(use.energy_j, tokens) if use.energy_j is not None else None,
        energy_per_token_tdp_j=_limit_j(use, tpot),
        **_troubles(trace),
        classes=_classes(trace, slo, passing),
        utilisation=use.utilisation,
        links=use.links,
        queues=queues(trace),
        bottleneck=bottleneck(trace, use),
        preemptions=int(trace.columns["preemptions"].sum()),
        cached_prompt_share=_over(float(trace.columns["cached_tokens"][done].sum()), prompt),
        encoder_hit_share=_over(trace.encoder_hits, trace.encoder_hits + trace.encoder_misses),
        shared_caches=_shared_caches(trace),
        span_s=span,
        wall_s=trace.wall_s,
        cpu_s=trace.cpu_s,
        events=trace.events,
    )


def _shared_caches(trace: Trace) -> dict[str, float]:
    store = trace.store
    return {
        "host_loaded_tokens": sum(one.host_loaded_tokens for one in trace.pools),
        "host_loaded_bytes": sum(one.host_loaded_bytes for one in trace.pools),
        "store_hit_share": _over(store.hits, store.hits + store.misses),
        "store_fetched_bytes": store.fetched_bytes,
        "store_written_bytes": store.written_bytes,
    }


def _limit_j(use: Use, tpot: Spread) -> float | None:
    """Return the energy of a token at the device's limit (Eq. 9)."""
    return energy_per_token_j(use.hardware.tdp_w, tpot.mean) if use.hardware and tpot.mean else None


def _troubles(trace: Trace) -> dict[str, Any]:
    """Return what went wrong, and for how long workers were paid."""
    return {
        "reasons": dict(Counter(trace.reasons.values())),
        "failures": dict(Counter(failure.kind for failure in trace.failures)),
        "retries": int(trace.columns["retries"].sum()),
        "paid_worker_s": {one.pool.name: trace.paid_s(one) for one in trace.pools},
    }


def _over(value: float, by: float) -> float:
    return value / by if by else 0.0


def _counts(trace: Trace) -> dict[str, int]:
    state = trace.columns["state"]
    ends = ("finished", "rejected", "cancelled", "failed", "running")
    found = {name: int((state == State[name.upper()]).sum()) for name in ends}
    waiting = int(np.isin(state, (State.WAITING, State.PREPROCESSING, State.ENCODING, State.MOVING)).sum())
    arrived = int((~np.isnan(trace.columns["arrival_s"])).sum())
    order = ("arrived", "finished", "rejected", "cancelled", "failed", "running", "queued")
    return {name: {"arrived": arrived, "queued": waiting, **found}.get(name, 0) for name in order}


def _passing(trace: Trace, slo: Slo) -> dict[str, Any]:
    """Return which requests keep each promise; an answer of one token keeps any TPOT."""
    done = trace.finished
    kept = {
        "ttft": done & (trace.ttft_s <= (np.inf if slo.ttft_s is None else slo.ttft_s)),
        "tpot": done & (np.nan_to_num(trace.tpot_s) <= (np.inf if slo.tpot_s is None else slo.tpot_s)),
        "e2e": done & (trace.e2e_s <= (np.inf if slo.e2e_s is None else slo.e2e_s)),
    }
    joint = kept["ttft"] & kept["tpot"]
    return {**kept, "joint": joint, "all": joint & kept["e2e"]}


def _classes(trace: Trace, slo: Slo, passing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each priority got, the most urgent first; nothing where all are alike."""
    priority, done = trace.requests.priority, trace.finished
    found = {}
    for level in np.unique(priority) if len(priority) else ():
        mine = priority == level
        kept = {name: some & mine for name, some in passing.items()}
        found[str(level)] = {
            "arrived": int((mine & ~np.isnan(trace.columns["arrival_s"])).sum()),
            "finished": int((mine & done).sum()),
            "ttft_s": Spread.of(trace.ttft_s[mine & done]),
            "e2e_s": Spread.of(trace.e2e_s[mine & done]),
            "slo_attainment": _attainment(int(mine.sum()), slo, kept),
        }
    return found if len(found) > 1 else {}


def _attainment(n: int, slo: Slo, passing: Mapping[str, Any]) -> dict[str, float | None]:
    promised = {
        "ttft": slo.ttft_s is not None,
        "tpot": slo.tpot_s is not None,
        "joint": slo.ttft_s is not None or slo.tpot_s is not None,
        "e2e": slo.e2e_s is not None,
    }
    return {name: _over(int(passing[name].sum()), n) if said else None for name, said in promised.items()}


def _cost(use: Use, n_requests: int) -> float | None:
    """Return the price of all devices for the whole run over some requests [USD]."""
    return None if use.cost_usd is None or not n_requests else use.cost_usd / n_requests


def confidence(reports: Sequence[Report], level: float = 0.95) -> dict[str, dict[str, float]]:
    """Return mean and confidence interval (Student's t) of the main figures over runs with different seeds.

    Parameters
    ----------
    reports : sequence of Report
        At least two.
    level : float
        Probability that the interval holds the mean.
    """
    from scipy.stats import t

    rows = [_main_figures(one) for one in reports]
    factor = float(t.ppf((1 + level) / 2, len(rows) - 1)) / len(rows) ** 0.5 if len(rows) > 1 else float("nan")
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows if row.get(name) is not None], dtype=float)
        if len(values) == len(rows) and len(rows) > 1:
            mean, half = float(values.mean()), factor * float(values.std(ddof=1))
            found[name] = {"mean": mean, "low": mean - half, "high": mean + half}
    return found


def _main_figures(one: Report) -> dict[str, float | None]:
    held = one.as_dict()
    figures = {f"{name}.{part}": held[name][part] for name in LATENCIES for part in ("mean", "p50", "p90", "p99")}
    names = ("throughput_requests_per_s", "throughput_tokens_per_s", "goodput_requests_per_s", "energy_per_token_j")
    attained = {f"slo_attainment.{name}": value for name, value in one.slo_attainment.items()}
    return {**figures, **{name: held[name] for name in names}, **attained}


__all__ = ["Report", "Spread", "confidence", "report", "stage_seconds"]
