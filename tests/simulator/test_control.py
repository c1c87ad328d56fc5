"""Control by hand: when workers are ordered, come, go and change their role; what is paid; nothing sees the future."""

import numpy as np
import pytest

from simulator import report
from simulator.control import Controller
from simulator.engine import NOT_BACK
from simulator.trace import same
from tests.simulator.clusters import asked, cluster, crash, pictures, pool, run, serve, service, troubled

ALL = "preprocess+encode+prefill+decode"
STEPS = {"step_base_s": 1.0}
UP = {"pool": ALL, "most": 3, "signal": "waiting", "above": 1.5, "below": 0.5, "holds": 2, "cold_start_s": 3.0}
NEVER = 0.0
"""A threshold that nothing is below."""
FREE = {"router": "least-requests"}


def scaled(*scale, workers=1, every_s=1.0, move=(), failures=(), **more):
    """Return a plan of one pool whose workers run one request at a time."""
    plan = cluster(pool(ALL, workers=workers, max_batch=1), policies=FREE)
    return troubled(plan, *failures, control={"every_s": every_s, "scale": scale, "move": move}, **more)


def both_ways(plan, requests, times=None):
    """Return the trace of a run, after a look that steps one by one say the same."""
    times = times or service(**STEPS)
    trace = serve(plan, requests, times)
    stepped = serve(plan, requests, times, leaps=False)
    assert same(trace, stepped)
    assert [one.hours for one in trace.pools] == [one.hours for one in stepped.pools]
    return trace


def hours(trace, name=ALL):
    return next(list(map(list, one.hours)) for one in trace.pools if one.pool.name == name)


# More workers


def test_a_queue_that_holds_orders_a_worker_which_takes_work_after_its_cold_start():
    """Five wait at 1 and at 2 s; the worker is paid from then on. Who comes at 5 s is taken at once, at 4.9 s not."""
    trace = both_ways(scaled(UP | {"most": 2, "below": NEVER}), asked([10] * 8, [4] * 8, [0.0] * 6 + [4.9, 5.0]))
    assert hours(trace) == [[0.0], [2.0]]
    assert trace.columns["worker"].tolist() == [0] * 7 + [1]
    assert trace.columns["scheduled_s"].tolist() == [0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 5.0]


@pytest.mark.parametrize(("holds", "ordered"), [(1, 1.0), (2, 2.0), (5, 5.0)])
def test_a_signal_must_hold_for_so_many_looks(holds, ordered):
    trace = both_ways(scaled(UP | {"most": 2, "holds": holds}), asked([10] * 6, [4] * 6))
    assert hours(trace)[1][0] == ordered


def test_a_signal_that_is_broken_begins_to_count_anew():
    """Two wait at 1 s, one at 2 s, and three from 3 s on."""
    requests = asked([10] * 5, [1, 4, 2, 2, 2], [0.5, 0.5, 0.5, 2.5, 2.5])
    trace = both_ways(scaled(UP | {"most": 2, "below": NEVER}), requests)
    assert hours(trace)[1] == [4.0]


@pytest.mark.parametrize(
    ("signal", "above", "ordered"),
    [
        ("waiting", 4.5, 1.0),
        ("waiting", 5.0, None),
        ("requests", 5.5, 1.0),
        ("tokens", 59.0, 1.0),
        ("tokens", 60.0, None),
    ],
)
def test_what_is_looked_at(signal, above, ordered):
    """Six requests of 10 tokens, of which one runs."""
    rule = UP | {"signal": signal, "above": above, "below": NEVER, "holds": 1, "most": 2}
    trace = both_ways(scaled(rule), asked([10] * 6, [4] * 6))
    assert hours(trace)[1][:1] == ([] if ordered is None else [ordered])


def test_what_waits_for_a_pool_without_a_worker_orders_one():
    """The only worker is lost at 0.5 s for ever: at 1 s three wait for one that takes work."""
    plan = scaled(UP | {"most": 2, "holds": 1, "above": 9.0}, failures=[crash(ALL, 0, 0.5)])
    trace = both_ways(plan, asked([10] * 3, [2] * 3))
    assert hours(trace) == [[0.0], [1.0]]
    assert trace.columns["finish_s"].tolist() == [6.0, 8.0, 10.0]


def test_more_workers_end_a_queue_that_one_does_not():
    requests = asked([10] * 60, [4] * 60, np.arange(60) * 1.5)
    one, more = both_ways(scaled(), requests), both_ways(scaled(UP), requests)
    assert more.ttft_s[-10:].mean() < 0.3 * one.ttft_s[-10:].mean()


# Fewer workers


def test_a_worker_without_need_takes_no_more_work_ends_what_it_has_and_goes():
    """Nothing waits at 1 and 2 s: of equals the last goes. Its request ends at 10 s, which the look at 11 s finds."""
    down = UP | {"most": 2}
    requests = asked([10] * 4, [20, 10, 2, 2], [0.0, 0.0, 3.0, 23.0])
    trace = both_ways(scaled(down, workers=2), requests)
    assert hours(trace) == [[0.0], [0.0, 11.0]]
    assert trace.columns["worker"].tolist() == [0, 1, 0, 0]
    assert trace.columns["finish_s"].tolist() == [20.0, 10.0, 22.0, 25.0]
    assert not trace.columns["retries"].any()


def test_a_worker_with_nothing_to_do_goes_at_once():
    trace = both_ways(scaled(UP | {"most": 2}, workers=2), asked([10], [5]))
    assert hours(trace) == [[0.0], [0.0, 2.0]]


def test_a_worker_that_is_to_go_is_called_back_where_it_is_needed_again():
    """It is sent away at 2 s, and needed at 5 s, when it still has its request: no cold start."""
    requests = asked([10] * 7, [20, 20, 3, 3, 3, 3, 3], [0.0, 0.0, 4.5, 4.5, 4.5, 5.5, 5.5])
    trace = both_ways(scaled(UP | {"most": 2, "holds": 1}, workers=2, every_s=2.5), requests)
    assert hours(trace)[1][:1] == [0.0]
    assert trace.columns["worker"][2:5].tolist() == [0, 0, 0]
    assert trace.columns["worker"][5:].tolist() == [1, 1]


def test_a_worker_that_comes_back_has_empty_caches():
    """The last prompt starts like the second, which was computed by a worker that has gone since."""
    links = {"parent": [-1, -1, -1, 1], "shared_text_tokens": [0, 0, 0, 40]}
    requests = asked([60] * 4, [9, 1, 30, 1], [0.0, 0.0, 29.0, 30.0], **links)
    gone = UP | {"most": 2, "holds": 1, "cold_start_s": 0.0, "above": 0.5, "below": 0.1}
    trace = both_ways(scaled(gone, workers=2), requests)
    assert hours(trace)[1][1] == 2.0
    assert trace.columns["cached_tokens"].tolist() == [0] * 4


# Steadiness and bounds


def load(gap_s, n=200):
    """Return requests of 4 s of work that come at equal times."""
    return asked([10] * n, [4] * n, np.arange(n) * gap_s)


def test_a_gap_between_thresholds_keeps_numbers_steady_under_steady_load():
    """3.2 workers' worth of work: four have 0.8 requests each in the mean."""
    rule = UP | {"most": 8, "signal": "requests", "above": 1.2, "below": 0.4}
    steady, swinging = (both_ways(scaled(one), load(1.25)) for one in (rule, rule | {"above": 0.9, "below": 0.89}))
    changes = [sum(200.0 < time_s < 249.0 for each in hours(trace) for time_s in each) for trace in (steady, swinging)]
    assert changes[0] == 0
    assert changes[1] > 10


@pytest.mark.parametrize("seed", range(8))
def test_bounds_are_kept_at_every_look(seed, monkeypatch):
    seen = {}

    def look(self, before=Controller._look):
        before(self)
        for one in self.network.pools:
            seen.setdefault(one.pool.name, set()).update((one.staffed, self._expected(one)))

    monkeypatch.setattr(Controller, "_look", look)
    rng = np.random.default_rng(seed)
    n = 120
    arrival_s = np.cumsum(rng.exponential(1.0, n) * np.where(np.arange(n) // 30 % 2, 4.0, 0.3))
    plan = cluster(pool("preprocess+encode+prefill", workers=3, max_batch=2), pool("decode", workers=3, max_batch=2))
    rules = {"above": 1.0, "below": 0.6, "holds": 1, "signal": "requests"}
    scale = [
        {"pool": "preprocess+encode+prefill", "least": 2, "most": 4, "cold_start_s": 2.0, **rules},
        {"pool": "decode", "least": 2, "most": 5, "cold_start_s": 0.0, **rules},
    ]
    ends = [plan.pools[0].name, plan.pools[1].name]
    move = [{"from": a, "to": b, "switch_s": 1.5, **rules} for a, b in (ends, ends[::-1])]
    failures = [{"kind": "crash", "pool": name, "mean_time_between_s": 40.0, "for_s": 3.0} for name in ends]
    plan = troubled(plan, *failures, control={"every_s": 0.5, "scale": scale, "move": move}, most_retries=99)
    requests = asked(rng.integers(1, 50, n), rng.integers(2, 12, n), arrival_s)
    trace = both_ways(plan, requests)
    assert trace.finished.all()
    for rule in scale:
        numbers = seen[rule["pool"]]
        assert min(numbers) >= rule["least"]
        assert max(numbers) <= rule["most"]
        assert len(numbers) > 1


# Roles

ROLES = ("preprocess+encode", "prefill", "decode")


def switching(arrival_s, switch_s=0.5, **more):
    """Return the trace of text before which encoders have nothing to do and prefill is slow."""
    plan = cluster(pool(ROLES[0], workers=2), pool(ROLES[1], max_batch=1), pool(ROLES[2]), policies=FREE)
    rule = {"from": ROLES[0], "to": ROLES[1], "above": 1.5, "below": 0.5, "holds": 1, "switch_s": switch_s, **more}
    n = len(arrival_s)
    return both_ways(troubled(plan, control={"every_s": 1.0, "move": [rule]}), asked([10] * n, [2] * n, arrival_s))


def test_an_idle_encoder_becomes_a_worker_that_prefills():
    """Three wait at 1 s. One of both encoders goes at once and takes prompts from 1.5 s on; the other stays."""
    trace = switching([0.0] * 5 + [1.4, 1.5])
    assert hours(trace, ROLES[0]) == [[0.0], [0.0, 1.0], []]
    assert hours(trace, ROLES[1]) == [[0.0], [1.0], []]
    assert trace.columns["scheduled_s"][5:].tolist() == [5.0, 1.5]
    assert sum(trace.paid_s(one) for one in trace.pools) == 4 * trace.end_s


def test_the_way_back_is_a_rule_of_its_own():
    plan = cluster(
        pool(ROLES[0], workers=2, encode_items=1), pool(ROLES[1], max_batch=1), pool(ROLES[2]), policies=FREE
    )
    there = {"from": ROLES[0], "to": ROLES[1], "above": 1.5, "below": 0.5, "holds": 1, "switch_s": 0.0}
    back = there | {"from": ROLES[1], "to": ROLES[0]}
    counts = [0] * 6 + [1] * 6
    requests = asked(
        [10] * 12, [1] * 12, [0.0] * 6 + [20.0, 20.0, 20.0, 22.0, 22.0, 22.0], items=pictures(counts, [40] * 6)
    )
    times = service(step_base_s=1.0, patch_s=0.1)
    one_way, both = (
        both_ways(troubled(plan, control={"every_s": 1.0, "move": rules}), requests, times)
        for rules in ([there], [there, back])
    )
    assert hours(one_way, ROLES[0])[1] == [0.0, 1.0]
    assert hours(both, ROLES[0])[1][:2] == [0.0, 1.0]
    assert hours(both, ROLES[0])[1][2] == 21.0  # two pictures wait at one encoder
    assert both.columns["finish_s"].max() < one_way.columns["finish_s"].max()


def test_a_pool_keeps_its_last_workers():
    assert hours(switching([0.0] * 9, least=2), ROLES[0]) == [[0.0], [0.0], []]


# Money


def test_what_is_paid_is_from_the_order_to_the_end():
    """The second worker from 2 s on: cold start and draining are paid too."""
    trace = both_ways(scaled(UP | {"most": 2, "below": NEVER}), asked([10] * 6, [4] * 6))
    (one,) = trace.pools
    assert trace.end_s == 24.0
    assert trace.paid_s(one) == 24.0 + 22.0
    told = report(trace)
    assert told.paid_worker_s == {ALL: 46.0}
    assert told.utilisation[ALL]["idle"] == pytest.approx(1.0 - 24.0 / 46.0)


def test_hours_before_the_first_request_are_not_of_the_run():
    trace = both_ways(scaled(workers=2), asked([10], [5], [100.0]))
    assert trace.paid_s(trace.pools[0]) == 2 * 5.0


def test_a_worker_that_has_crashed_is_paid():
    trace = both_ways(scaled(workers=2, failures=[crash(ALL, 1, 1.0)]), asked([10], [5]))
    assert trace.paid_s(trace.pools[0]) == 10.0


# The future


@pytest.mark.parametrize("signal", ["waiting", "requests", "tokens"])
def test_answers_of_later_requests_change_nothing_before_they_come(signal):
    n, later_s = 80, 60.0
    rng = np.random.default_rng(5)
    arrival_s = np.cumsum(rng.exponential(1.5, n))
    output = rng.integers(1, 9, n)
    other = np.where(arrival_s > later_s, 10 - output, output)
    gaps = {"tokens": (30.0, 8.0)}.get(signal, (1.5, 0.7))
    rule = UP | {"signal": signal, "above": gaps[0], "below": gaps[1], "most": 6}
    failing = [{"kind": "straggler", "pool": ALL, "mean_time_between_s": 20.0, "for_s": 5.0}]
    plan = scaled(rule, failures=failing)
    runs = [both_ways(plan, asked([10] * n, out, arrival_s, max_output_tokens=[9] * n)) for out in (output, other)]
    before = [{name: np.where(t < later_s, t, np.inf) for name, t in columns_of(trace).items()} for trace in runs]
    assert all(np.array_equal(before[0][name], before[1][name]) for name in before[0])
    paid = [[[t for t in each if t < later_s] for each in hours(trace)] for trace in runs]
    assert paid[0] == paid[1]
    assert sum(map(len, paid[0])) > 3
    assert not same(*runs)


def columns_of(trace):
    return {name: column for name, column in trace.columns.items() if name.endswith("_s")}


# The end


def test_a_run_ends_with_its_last_request():
    endless = {"kind": "straggler", "pool": ALL, "mean_time_between_s": 0.1, "for_s": 0.1}
    trace = both_ways(scaled(UP, failures=[endless], every_s=0.01), asked([10], [3]))
    assert trace.end_s < 9.0
    assert trace.events < 3000


def test_long_silence_ends_no_control():
    """Looks go on for as long as a request is to come."""
    plan = scaled(UP | {"most": 2, "below": NEVER}, every_s=0.01)
    trace = both_ways(plan, asked([10] * 7, [4] * 7, [0.0] + [1000.0] * 6))
    assert hours(trace)[1] == pytest.approx([1000.02], abs=0.011)


def test_a_run_that_is_stuck_ends_with_reasons():
    """The link is lost for ever; looks, stragglers and slow CPUs do not keep the run going."""
    plan = cluster(pool("preprocess+encode+prefill", max_batch=1), pool("decode", workers=2))
    names = [one.name for one in plan.pools]
    kinds = ("straggler", "preprocessing")
    endless = [{"kind": kind, "pool": names[0], "mean_time_between_s": 0.2, "for_s": 5.0} for kind in kinds]
    lost = {"kind": "link", "pool": names[0], "to": names[1], "at_s": 3.5}
    scale = [UP | {"pool": name, "most": 4} for name in names]
    plan = troubled(plan, *endless, lost, control={"every_s": 0.5, "scale": scale})
    trace = both_ways(plan, asked([10] * 6, [1, 1, 1, 5, 5, 5]))
    assert trace.reasons == {3: NOT_BACK, 4: NOT_BACK, 5: NOT_BACK}
    assert trace.events < 10_000


def test_troubles_go_on_after_a_time_in_which_nothing_could_happen():
    """The only worker is away for so long that hundreds of stragglers are in vain; they are back when it is."""
    slow = {"kind": "straggler", "pool": ALL, "worker": 0, "mean_time_between_s": 1.0, "for_s": 1.0, "slowdown": 3.0}
    plan = scaled(failures=[slow, crash(ALL, 0, 2.5, 5000.0)])
    trace = serve(plan, asked([10], [300]), service(**STEPS), seed=1)
    late = [one for one in trace.failures if one.at_s > 5002.5]
    assert len(late) > 50
    assert len(trace.failures) < 1000
    assert 1.5 < (trace.end_s - 5002.5) / 300 < 2.5  # half of its time three times as slow


def test_control_that_never_acts_changes_nothing():
    requests = load(3.0, 40)
    plain = cluster(pool(ALL, max_batch=1), policies=FREE)
    done = run(scaled(UP | {"most": 1}), requests, service(**STEPS))
    assert same(done.trace(0, 0.0, 0.0), serve(plain, requests, service(**STEPS)))
