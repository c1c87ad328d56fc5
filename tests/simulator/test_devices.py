"""Pools on the same devices: who works at the same time takes turns, and all their weights are in one memory."""

import pytest

from costmodel import DoesNotFit, load_hardware
from costmodel.media import MediaTotals
from costmodel.memory import memory
from simulator import Pool, ServingPlan, report
from simulator.capacity import asking_of, parts_of
from simulator.item_times import OUTPUT_TOKENS
from simulator.step_service import StepService
from simulator.trace import same
from tests.simulator.clusters import asked, cluster, crash, pictures, pool, serve, service, troubled

FRONT, DECODE = "preprocess+encode+prefill", "decode"
STEPS = {"step_base_s": 1.0}
DEVICE = "h100-sxm5-80gb"


def both_ways(plan, requests, times):
    """Return the trace of a run, after a look that steps one by one say the same."""
    trace = serve(plan, requests, times)
    assert same(trace, serve(plan, requests, times, leaps=False))
    return trace


def apart(workers=1, **decode):
    """Return a plan whose prompts are computed in one pool and go on in another, on the same devices or not."""
    return cluster(pool(FRONT, workers=workers), pool(DECODE, workers=workers, **decode))


def ends(trace):
    return trace.columns["finish_s"].tolist()


# Turns


def test_alone_a_worker_is_as_fast_as_ever():
    requests = asked([10, 10], [4, 3], [0.0, 20.0])
    one, other = (both_ways(apart(**more), requests, service(**STEPS)) for more in ({"shares_devices_of": FRONT}, {}))
    assert same(one, other)
    assert ends(one) == [4.0, 23.0]


def test_two_that_work_at_the_same_time_take_twice_as_long_each():
    """At 1.5 s a prompt begins when half of a step of the other is left, which takes until 2.5 s.

    Half of the next step is done when the prompt ends at 3.5 s; the rest is as fast as alone.
    """
    requests = asked([10, 10], [4, 2], [0.0, 1.5])
    trace = both_ways(apart(shares_devices_of=FRONT), requests, service(**STEPS))
    prompts, answers = trace.steps
    assert prompts["end_s"].tolist() == [1.0, 3.5]
    assert answers["end_s"].tolist() == [2.5, 4.0, 5.0]
    assert ends(trace) == [5.0, 5.0]
    free = both_ways(apart(), requests, service(**STEPS))
    assert free.ttft_s.tolist() == [1.0, 1.0]
    assert ends(free) == [4.0, 4.0]


def test_of_three_each_has_a_third():
    """Encoder, prefill and decode: 6 s of encoding beside a prompt of 1 s, and then beside two tokens of 1 s."""
    more = {"shares_devices_of": "preprocess+encode"}
    plan = cluster(pool("preprocess+encode"), pool("prefill", **more), pool("decode", **more))
    requests = asked([10, 10, 10], [3, 1, 1], [0.0, 0.0, 2.0], items=pictures([0, 1, 0], [60]))
    trace = both_ways(plan, requests, service(**STEPS, patch_s=0.1))
    encode, prompts, answers = (steps["end_s"].tolist() for steps in trace.steps)
    # prompt until 2 s; then the three of them: encoding has 5 s left, the next prompt 1 s, the token 1 s: until 5 s;
    # then the encoder has 4 s left beside a token of 1 s until 7 s, and 3 s alone
    assert prompts[:2] == pytest.approx([2.0, 5.0])
    assert answers == pytest.approx([5.0, 7.0])
    assert encode == pytest.approx([10.0])


def test_workers_share_with_the_one_on_their_device_only():
    """Prompts go to both devices in turn; the answer is on the first."""
    requests = asked([10, 10, 10], [6, 1, 1], [0.0, 2.0, 2.5])
    plan = cluster(pool(FRONT, workers=2), pool(DECODE, workers=2, shares_devices_of=FRONT))
    trace = both_ways(plan, requests, service(**STEPS))
    assert trace.columns["worker"].tolist() == [0, 1, 0]
    assert trace.ttft_s.tolist() == [1.0, 1.0, 2.0]
    assert ends(trace) == [7.0, 3.0, 4.5]


def test_who_crashes_leaves_the_device_to_the_other():
    """Both at half their pace from 1.5 to 2 s, when the worker that decodes is lost."""
    plan = troubled(apart(shares_devices_of=FRONT), crash(DECODE, 0, 2.0), after_crash="fail")
    trace = both_ways(plan, asked([10, 10], [4, 1], [0.0, 1.5]), service(**STEPS))
    assert ends(trace)[1] == 2.75


def test_a_straggler_takes_turns_too():
    """Three times as slow from the start: its prompt alone 3 s; beside a token that takes 2 s, six times."""
    slow = {"kind": "straggler", "pool": FRONT, "worker": 0, "at_s": 0.0, "slowdown": 3.0}
    plan = troubled(apart(shares_devices_of=FRONT), slow)
    trace = both_ways(plan, asked([10, 10], [2, 1], [0.0, 3.0]), service(**STEPS))
    assert trace.ttft_s[0] == 3.0
    assert ends(trace) == pytest.approx([5.0, 3.0 + 2.0 + 2.0])  # a third of it is done beside the token


def test_a_client_that_leaves_gives_back_its_turn():
    requests = asked([10, 10], [9, 3], [0.0, 1.5], patience_s=[2.0, float("inf")])
    trace = both_ways(apart(shares_devices_of=FRONT), requests, service(**STEPS))
    # the step under way at 2 s ends at 2.5 s, when half of the prompt is done
    assert trace.ttft_s[1] == 1.5
    assert ends(trace)[1] == 5.0


def test_shared_devices_are_paid_once():
    hosts = Pool(name="a", hardware=DEVICE, stages=("preprocess", "encode", "prefill"), workers=2)
    guest = Pool(name="b", hardware=DEVICE, stages=("decode",), workers=2)
    costs = []
    for more in ({"shares_devices_of": "a"}, {}):
        plan = cluster(hosts, guest.model_copy(update=more))
        costs.append(report(serve(plan, asked([10], [5]), service(**STEPS))).cost_per_request_usd)
    assert costs[1] == pytest.approx(2 * costs[0])


# Memory


def model_plan(*pools, model="qwen2.5-vl-7b"):
    return ServingPlan(model=model, pools=pools, links=cluster(*pools, bandwidth_bytes_per_s=1e10).links)


def together(*stages, hardware=DEVICE, **more):
    """Return the plan of pools on the devices of the first."""
    first, *others = (pool(name, hardware=hardware, **more) for name in stages)
    guests = [other.model_copy(update={"shares_devices_of": first.name}) for other in others]
    return model_plan(first, *guests)


def held(plan, index):
    """Return the memory of a pool with a prompt that fills its step."""
    one = plan.pools[index]
    prompt = asking_of(plan, one).query(MediaTotals(), 8192.0, OUTPUT_TOKENS)
    return memory(prompt, load_hardware(one.hardware), parts=parts_of(one))


def blocks(plan):
    return [StepService.of_pool(plan, one).capacity.kv_blocks for one in plan.pools]


@pytest.mark.parametrize(
    "stages",
    [
        ("preprocess+encode", "prefill+decode"),
        ("preprocess+encode+prefill", "decode"),
        ("preprocess+encode", "prefill", "decode"),
        ("preprocess+encode+prefill+decode", "prefill", "decode"),
    ],
    ids=" | ".join,
)
def test_the_memory_of_a_device_is_given_out_once(stages):
    plan = together(*stages)
    found, each = blocks(plan), [held(plan, i) for i in range(len(stages))]
    taken = sum(m.weights_bytes + m.activation_bytes + m.reserve_bytes for m in each)
    caching = [i for i, one in enumerate(plan.pools) if "language" in parts_of(one)]
    room = (each[0].usable_bytes - taken) / len(caching)
    assert found == [int(room / each[i].block_bytes) if i in caching else 0 for i in range(len(stages))]
    total = taken + sum(n * m.block_bytes for n, m in zip(found, each, strict=True))
    assert total <= each[0].usable_bytes < total + sum(each[i].block_bytes for i in caching)


def test_weights_of_two_leave_much_less_than_those_of_one():
    """15.2 GB of weights of the language model twice, and once the encoder's 1.4 GB, of 92 % of 85.5 GB."""
    alone = blocks(model_plan(pool("preprocess+encode+prefill+decode", hardware=DEVICE)))[0]
    both = blocks(together("preprocess+encode+prefill", "decode"))
    assert both[0] == both[1]
    assert 2 * both[0] < 0.8 * alone


def test_pools_of_which_each_fits_alone_may_not_fit_together():
    plan = together("preprocess+encode+prefill", "decode", hardware="l4-24gb")
    on_its_own = model_plan(*(one.model_copy(update={"shares_devices_of": None}) for one in plan.pools))
    assert min(blocks(on_its_own)) > 0
    with pytest.raises(DoesNotFit, match=r"'decode' and 'preprocess\+encode\+prefill' hold on one l4-24gb") as error:
        blocks(plan)
    assert "\n" not in str(error.value)
    assert error.value.required_bytes > error.value.available_bytes


def test_encoders_alone_need_no_cache_but_must_fit():
    plan = together("preprocess+encode", "prefill+decode", hardware="l4-24gb")
    own = model_plan(*(one.model_copy(update={"shares_devices_of": None}) for one in plan.pools))
    assert blocks(plan)[0] == blocks(own)[0] == 0
    assert 0 < blocks(plan)[1] < blocks(own)[1]


def test_devices_of_a_worker_hold_their_share():
    """With twice the devices, each holds half of the weights and has half of each token's cache."""
    one, two = (blocks(together("preprocess+encode+prefill", "decode", tp=tp)) for tp in (1, 2))
    assert 2.5 * one[0] < two[0] < 8 * one[0]
